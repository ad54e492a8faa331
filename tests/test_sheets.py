"""Workbooks as they come from the field are read row by row, and what cannot be read is named."""

from __future__ import annotations

import csv
import datetime
import re
import zipfile

import openpyxl
import pytest
from openpyxl.chart import BarChart, Reference

from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS
from sonovqa.sheets import Unreadable, cell_text, read_sheet

FORM_A = ["Folder Name", "Image Name", "Status", *(f"{q.id}: {q.title}" for q in QUESTIONS.values())]
ANSWERS = [f"answer {number}" for number in range(1, 9)]


def workbook(path, *rows, title="Sheet1"):
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def read(path, **options):
    drops = {}
    return list(read_sheet(path, drops, **options)), drops


def test_form_a(tmp_path):
    path = workbook(
        tmp_path / "annotations.xlsx",
        FORM_A,
        ["Abdomen", "a 1.png", "complete", *ANSWERS],
        ["Abdomen", "a_2.png", " Complete ", "  stomach,\nspine ", 24, 20.0, 12.5, None, "nan", True, "-"],
        ["Abdomen", "a_3.png", "incomplete", *ANSWERS],
        ["Abdomen", "a_4.png", "complet", *ANSWERS],
        [None] * 11,
        ["Abdomen", None, "complete", *ANSWERS],
        [None, "a_6.png", "complete", *ANSWERS],
        ["Abdomen", "a_7.png", "complete"],
        ["Abdomen", "a_8.png", None, *ANSWERS],
    )
    rows, drops = read(path)
    assert [(row.folder, row.image, row.place) for row in rows] == [
        ("Abdomen", "a 1.png", "annotations.xlsx row 2"),
        ("Abdomen", "a_2.png", "annotations.xlsx row 3"),
    ]
    assert rows[0].answers == dict(zip(QUESTIONS, ANSWERS, strict=True))
    assert rows[1].answers == {"Q1": "stomach,\nspine", "Q2": "24", "Q3": "20", "Q4": "12.5", "Q7": "TRUE"}
    assert {reason: len(items) for reason, items in drops.items()} == {
        "status is not complete": 2,
        'status is misspelt: "complet" instead of "complete"': 1,
        "no image name in the row": 1,
        "no folder name in the row": 1,
        "no answers yet": 1,
    }
    assert drops["no answers yet"] == ["annotations.xlsx row 9: Abdomen/a_7.png"]


def test_form_b(tmp_path):
    headers = [f"{q.id}:\n{q.title} Identification: Identify and describe …" for q in QUESTIONS.values()]
    path = workbook(
        tmp_path / "Non_standard_NT_image_list.xlsx",
        ["image_name", *reversed(headers)],
        ["NT 001.PNG", *reversed(ANSWERS)],
        ["NT 002.PNG"],
        ["NT 003.PNG", *[None] * 7, "only Q1"],
    )
    rows, drops = read(path)
    assert [(row.folder, row.image) for row in rows] == [("Non_standard_NT", "NT 001.PNG"), ("Non_standard_NT", "NT 003.PNG")]
    assert rows[0].answers == dict(zip(QUESTIONS, ANSWERS, strict=True))
    assert rows[1].answers == {"Q1": "only Q1"}
    assert drops == {"no answers yet": ["Non_standard_NT_image_list.xlsx row 3: Non_standard_NT/NT 002.PNG"]}


@pytest.mark.parametrize("title", ["q1", " Q 1 - structures", "Q1. Anatomy", "Q01_anatomy", "q1(Anatomy)\n"])
def test_headers_are_matched_by_their_number(tmp_path, title):
    rows, _ = read(
        workbook(tmp_path / "s.xlsx", ["a note on top"], [], ["FOLDER_NAME", "image  name", title], ["A", "1.png", "spine"])
    )
    assert rows[0].answers == {"Q1": "spine"} and rows[0].place == "s.xlsx row 4"


@pytest.mark.parametrize(("encoding", "delimiter"), [("utf-8", ","), ("utf-8-sig", ";"), ("utf-16", "\t"), ("cp1252", ";")])
def test_csv_as_spreadsheets_write_it(tmp_path, encoding, delimiter):
    path = tmp_path / "s.csv"
    lines = [["Folder Name", "Image Name", "Q1", "Q7"], ["A", "é 1.png", '"two\nlines, ""quoted"""', "=B2"]]
    path.write_text("\r\n".join(delimiter.join(cells) for cells in lines), encoding=encoding, newline="")
    rows, drops = read(path)
    assert rows[0].image == "é 1.png" and rows[0].answers == {"Q1": 'two\nlines, "quoted"'}
    assert drops == {"answer cell: a formula without a stored value": ["s.csv row 2: A/é 1.png, Q7"]}


@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
def test_the_header_alone_tells_the_delimiter_of_a_csv_file(tmp_path, delimiter):
    path = tmp_path / "s.csv"
    answer = "spine, stomach; liver,\tkidneys, " * 200
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([["annotated by A, B; C, D, E\tF"], ["Folder", "Image", "Q1: structures, visible; or\tnot"]])
        writer.writerows([["A", f"{number}.png", answer] for number in range(3)])
    assert [row.answers for row in read(path)[0]] == [{"Q1": answer.strip()}] * 3


def test_patient_column_and_unknown_question(tmp_path):
    path = workbook(tmp_path / "s.xlsx", ["Folder", "Image", "Patient ID", "Q1", "Q9: Mood"], ["A", "1.png", 12, "spine", "good"])
    rows, drops = read(path, group_column="patient_id")
    assert rows[0].group == "12" and rows[0].answers == {"Q1": "spine"}
    assert drops == {"unknown question: Q1 … Q8 are known": ["s.xlsx, `Q9: Mood`, 1 answers"]}
    with pytest.raises(UserError, match=r"no patient column.*Patients.*`Patient ID`"):
        read(path, group_column="Patients")


def test_only_the_first_worksheet_with_a_header_is_read(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["read me first"])
    for name in ("one", "two"):
        sheet = book.create_sheet(name)
        sheet.append(["Folder", "Image", "Q1"])
        sheet.append(["A", f"{name}.png", "spine"])
    book.save(tmp_path / "s.xlsx")
    rows, drops = read(tmp_path / "s.xlsx")
    assert [row.image for row in rows] == ["one.png"]
    assert list(drops.values()) == [["s.xlsx, two"]]


@pytest.mark.parametrize("status", [[], ["incomplete"]])
def test_a_worksheet_without_images_gives_way_to_one_that_has_them(tmp_path, status):
    header = ["Folder", "Image", "Q1", "Status"]
    book = openpyxl.Workbook()
    for rows in ([header, [None, None, None, *status]], [header, ["A", "1.png", "spine", "complete"]]):
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(tmp_path / "s.xlsx")
    rows, drops = read(tmp_path / "s.xlsx")
    assert [row.image for row in rows] == ["1.png"] and drops == {}
    assert read(workbook(tmp_path / "alone.xlsx", header)) == ([], {})


@pytest.mark.parametrize("drawn", [False, True])
def test_chart_sheets_are_passed_over(tmp_path, drawn):
    book = openpyxl.Workbook()
    for row in (["Folder", "Image", "Q1"], ["A", "1.png", "spine"], ["A", "2.png", "=A1"]):
        book.active.append(row)
    sheet = book.create_chartsheet("figure", 0)
    if drawn:
        chart = BarChart()
        chart.add_data(Reference(book.active, min_col=1, min_row=1, max_row=2))
        sheet.add_chart(chart)
    book["Sheet"].print_title_rows = "1:1"  # a name that belongs to the second sheet, by its number
    book.save(tmp_path / "s.xlsx")
    if not drawn:  # a spreadsheet program leaves out the links of a chart sheet that has no chart
        with zipfile.ZipFile(tmp_path / "s.xlsx") as archive:
            parts = {name: archive.read(name) for name in archive.namelist() if not name.startswith("xl/chartsheets/_rels")}
        with zipfile.ZipFile(tmp_path / "s.xlsx", "w") as archive:
            for part, data in parts.items():
                archive.writestr(part, data)
    rows, drops = read(tmp_path / "s.xlsx")
    assert [row.image for row in rows] == ["1.png"] and len(drops) == 2


def test_a_patient_cell_that_cannot_be_read_is_listed(tmp_path):
    path = workbook(
        tmp_path / "s.xlsx",
        ["Folder", "Image", "Patient", "Q1"],
        ["A", "1.png", datetime.date(2024, 1, 2), "x"],
        ["A", "2.png", 7, "x"],
    )
    rows, drops = read(path, group_column="Patient")
    assert [row.group for row in rows] == ["", "7"]
    assert drops == {"patient cell: a date where text belongs": ["s.xlsx row 2: A/1.png"]}
    assert read(path)[1] == {}


def test_formulas_dates_and_errors_are_listed(tmp_path):
    path = workbook(
        tmp_path / "s.xlsx",
        ["Folder", "Image", "Q1", "Q2", "Q3", "Q4"],
        ["A", "1.png", "=1+1", datetime.datetime(2024, 12, 14), "#REF!", "spine"],
    )
    rows, drops = read(path)
    assert rows[0].answers == {"Q4": "spine"}
    assert sorted(drops) == [
        "answer cell: a date where text belongs",
        "answer cell: a formula without a stored value",
        "answer cell: the spreadsheet error #REF!",
    ]


def test_a_formula_with_a_stored_value_is_read(tmp_path):
    path = workbook(tmp_path / "s.xlsx", ["Folder", "Image", "Q1"], ["A", "1.png", '="sp"&"ine"'])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = "xl/worksheets/sheet1.xml"
    cell = re.sub(r'<c r="C2"[^>]*>(<f>.*?</f>)<v ?(?:></v>|/>)', r'<c r="C2" t="str">\1<v>spine</v>', parts[name].decode())
    assert ">spine<" in cell
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in {**parts, name: cell.encode()}.items():
            archive.writestr(part, data)
    assert read(path)[0][0].answers == {"Q1": "spine"}


def protected(path):
    import msoffcrypto.format.ooxml

    plain = workbook(path.with_name("plain.xlsx"), FORM_A)
    with open(plain, "rb") as source, open(path, "wb") as target:
        msoffcrypto.format.ooxml.OOXMLFile(source).encrypt("secret", target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: workbook(path), "sheet is empty"),
        (lambda path: path.touch(), "sheet is empty.*0 bytes"),
        (lambda path: workbook(path, FORM_A[:3], ["A", "1.png", "complete"]), "lacks question columns.*`Status`"),
        (lambda path: workbook(path, ["Folder Name", *FORM_A[3:]], ["A", "x"]), "lacks an `Image Name` column"),
        (lambda path: workbook(path, FORM_A[1:], ["1.png", "complete", "x"]), "no folder column"),
        (lambda path: workbook(path, [*FORM_A, "Q1 again"], ["A"]), "two columns for Q1"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and then nothing"), "corrupt"),
        (lambda path: path.write_bytes(workbook(path, FORM_A).read_bytes()[:-200]), "corrupt"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("hello.txt", "not a workbook"), "corrupt"),
        (protected, "protected by a password"),
        (lambda path: path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)), "old .xls format"),
        (lambda path: None, "no such sheet"),
        (lambda path: path.mkdir(), "no such sheet"),
    ],
)
def test_a_sheet_that_cannot_be_used_is_one_line(tmp_path, make, message):
    path = tmp_path / "s.xlsx"
    make(path)
    with pytest.raises(UserError, match=message) as mistake:
        read(path)
    assert "\n" not in str(mistake.value) and "s.xlsx" in str(mistake.value)


def test_unknown_kind_of_sheet(tmp_path):
    (tmp_path / "s.ods").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind of sheet"):
        read(tmp_path / "s.ods")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (3, "3"), (3.0, "3"), (0.5, "0.5"), (False, "FALSE"), ("a_x000D_b", "a\nb"), (" x ", " x ")],
)
def test_cell_text(value, text):
    assert cell_text(value) == text


@pytest.mark.parametrize("value", [datetime.time(1), datetime.timedelta(1), datetime.date(2024, 1, 1), "#N/A", b"bytes"])
def test_cell_text_refuses_what_is_no_answer(value):
    assert isinstance(cell_text(value), Unreadable)
