"""prepare_dataset.py end to end: hand-made sheets and images go in, a data set comes out, and nothing is lost in silence."""

from __future__ import annotations

import datetime
import json
import os
import unicodedata

import pytest
from clinic import NORMAL, clinic, picture, prepare, rows_of, write_sheet

import prepare_dataset
from sonovqa import dataset
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS
from sonovqa.splits import SPLITS


def test_form_a_round_trip(tmp_path, capsys):
    clinic(tmp_path)
    data, about = prepare(tmp_path, "--group-column", "Patient")
    assert list(data) == list(SPLITS)
    rows = rows_of(data)
    assert len(rows) == 20 and about["dropped"] == {}
    for image_id, row in rows.items():
        assert row["image"]["bytes"] == (tmp_path / "images" / image_id).read_bytes()
        assert row["category"] == image_id.split("/")[0]
        assert row["group"] == f"P{int(image_id[-7:-4]) // 2}"
        assert [q["question_id"] for q in row["questions"]] == list(QUESTIONS)
        assert all(set(q) == {"question_id", "question", "answer", "label", "answer_type"} for q in row["questions"])
        abnormal = int(image_id[-7:-4]) % 7 == 0
        assert row["questions"][6]["label"] == ("abnormal" if abnormal else "normal")
    homes = {(row["group"], name) for name, split in data.items() for row in split}
    assert len(homes) == 10 == sum(split["groups"] for split in about["splits"].values())
    assert data["train"][0]["image"].size == (64, 48)
    shown = capsys.readouterr().out
    assert "train" in shown and "before" in shown


def test_form_b_and_names_typed_differently(tmp_path):
    headers = ["image name", *(f"{q.id}:\n{q.title}: Identify and describe …" for q in QUESTIONS.values())]
    root = tmp_path / "images"
    on_disk = [
        "NT 1.PNG",
        "nt_2.png",
        unicodedata.normalize("NFD", "café 3.png"),
        "four.JPEG",
        *(f"{n}.png" for n in range(5, 9)),
    ]
    for seed, name in enumerate(on_disk):
        picture(root / "Non_standard_NT" / name, seed)
    in_sheet = ["nt_1.png", "NT 2.PNG", "café_3.png", "four.jpeg", "5", 6, "7.PNG", "./8.png"]
    rows = [[name, *NORMAL] for name in in_sheet] + [["9.png", *NORMAL], ["10.png"]]
    sheet = write_sheet(tmp_path / "Non standard NT_image_list.xlsx", rows, headers)
    prepare_dataset.main(["sheet", str(sheet), "--images", str(root), "--out", str(tmp_path / "data")])
    data = rows_of(dataset.load(tmp_path / "data"))
    assert set(data) == {unicodedata.normalize("NFC", f"Non_standard_NT/{name}") for name in on_disk}
    assert {row["category"] for row in data.values()} == {"Non_standard_NT"}
    about = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert {reason: len(items) for reason, items in about["dropped"].items()} == {"no such image file": 1, "no answers yet": 1}
    assert any("nobody's patient is named" in note for note in about["notes"])


def test_duplicate_rows(tmp_path):
    clinic(tmp_path)
    same = ["Abdomen", "img_000.png", "complete", "P0", *NORMAL[:6], " ABNORMAL ", None]
    other = ["Femur", "img_001.png", "complete", "P0", *NORMAL[:6], "Abnormal", NORMAL[7]]
    clinic(tmp_path, extra=[same, other])
    data, about = prepare(tmp_path, "--group-column", "Patient")
    rows = rows_of(data)
    assert "Abdomen/img_000.png" in rows and "Femur/img_001.png" not in rows
    assert about["dropped"] == {
        "rows of one image agree: merged into one": ["annotations.xlsx row 22: Abdomen/img_000.png"],
        "rows of one image contradict each other: none is used": [
            f"annotations.xlsx row {number}: Femur/img_001.png, Q7" for number in (3, 23)
        ],
    }


def test_near_duplicates_share_a_group_without_a_patient(tmp_path):
    clinic(tmp_path)
    folder = tmp_path / "images" / "Abdomen"
    base = picture(folder / "copy.png", 0)
    base.save(folder / "copy.jpg", quality=85)
    base.resize((96, 72)).point(lambda value: value * 0.9).save(folder / "larger.png")
    names = ("copy.png", "copy.jpg", "larger.png")
    clinic(tmp_path, extra=[["Abdomen", name, "complete", None, *NORMAL] for name in names])
    data, about = prepare(tmp_path)
    rows = rows_of(data)
    assert {rows[f"Abdomen/{name}"]["group"] for name in (*names, "img_000.png")} == {"Abdomen/copy.jpg"}
    assert len({row["group"] for row in rows.values()}) == 20
    assert about["leakage"]["near_duplicates"] == about["leakage"]["identical_images"] == []
    _, about = prepare(tmp_path, "--group-column", "Patient")
    assert "3 images have no patient" in about["notes"][0]  # they take the patient of their near-duplicate
    assert about["leakage"]["groups"] == about["leakage"]["near_duplicates"] == []


def test_a_leak_between_patients_is_reported(tmp_path):
    clinic(tmp_path)
    rows = []
    for number in range(20):  # every patient's image once more under another patient's name
        folder, name = ("Abdomen", "Femur")[number % 2], f"again_{number:03}.png"
        os.link(tmp_path / "images" / folder / f"img_{number:03}.png", tmp_path / "images" / folder / name)
        rows.append([folder, name, "complete", f"R{number}", *NORMAL])
    clinic(tmp_path, extra=rows)
    _, about = prepare(tmp_path, "--group-column", "Patient")
    leak = about["leakage"]
    assert leak["groups"] == [] and leak["identical_images"] and leak["near_duplicates"]
    assert 0 < leak["test_questions_on_images_outside_test"] <= leak["test_questions"]
    assert any(note.startswith("LEAK") for note in about["notes"])


def test_group_regex(tmp_path):
    clinic(tmp_path)
    data, _ = prepare(tmp_path, "--group-regex", r"img_\d*(\d)\.")
    assert {name[-5]: row["group"] for name, row in rows_of(data).items()} == {digit: digit for digit in "0123456789"}
    splits = {digit: {split for split, rows in data.items() if digit in rows["group"]} for digit in "0123456789"}
    assert all(len(homes) == 1 for homes in splits.values())


def test_the_same_input_gives_the_same_data_set(tmp_path):
    clinic(tmp_path)
    _, first = prepare(tmp_path)
    _, second = prepare(tmp_path)
    assert first == second
    _, third = prepare(tmp_path, "--seed", 7)
    assert third["fingerprint"] != first["fingerprint"]


def test_a_data_set_of_another_source_is_not_replaced(tmp_path):
    """Two clinics, or a clinic and the page's marks, have the same --out where none is given."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        clinic(tmp_path / name)

    def words(name: str, sheet: str = "annotations.xlsx") -> list[str]:
        return [str(tmp_path / name / sheet), "--images", str(tmp_path / name / "images")]

    out = ["--out", str(tmp_path / "data")]
    prepare_dataset.main(["sheet", *words("one"), *out])
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    for other in (["sheet", *words("two")], ["phantoms", "--images", "20", "--size", "64x48"]):
        with pytest.raises(UserError, match=r"another source; .*: sheet, .*one/annotations.xlsx.*; choose another --out") as told:
            prepare_dataset.main([*other, *out])
        assert "\n" not in str(told.value) and (tmp_path / "data" / "dataset.json").read_bytes() == before
    (tmp_path / "one" / "annotations.xlsx").rename(tmp_path / "one" / "of today.xlsx")
    prepare_dataset.main(["sheet", *words("one", "of today.xlsx"), *out])  # its images are the same source
    assert (tmp_path / "data" / "dataset.json").read_bytes() != before


def test_max_images_is_drawn_across_categories(tmp_path):
    clinic(tmp_path)
    (tmp_path / "images" / "Abdomen" / "img_000.png").write_bytes(b"broken")
    data, _ = prepare(tmp_path, "--max-images", 9)
    rows = rows_of(data)
    assert len(rows) == 9 and 4 <= sum(row["category"] == "Femur" for row in rows.values()) <= 5
    assert max(rows) > "Femur/img_01"


def test_raw_answers(tmp_path):
    clinic(tmp_path, extra=[["Abdomen", "odd.png", "complete", "P99", "  Spine,  VERTEBRAL colum ", *NORMAL[1:]]])
    picture(tmp_path / "images" / "Abdomen" / "odd.png", 77)
    raw = rows_of(prepare(tmp_path, "--raw-answers")[0])["Abdomen/odd.png"]["questions"][0]
    tidy = rows_of(prepare(tmp_path)[0])["Abdomen/odd.png"]["questions"][0]
    assert raw["answer"] == "Spine,  VERTEBRAL colum" != tidy["answer"]
    assert raw["label"] == tidy["label"] == "spine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "no such image folder"),
        (["--group-column", "Doctor"], "no patient column"),
        (["--group-regex", "("], "no regular expression"),
        (["--group-regex", "(P[0-9]+)_"], "matches no file name"),
        (["--max-images", "2"], "--max-images is too small"),
        (["--near-duplicates", "300"], "out of range"),
        (["--out", "images"], "holds something else"),
        (["--out", "annotations.xlsx"], "--out is no folder"),
        (["--out", "annotations.xlsx/data"], "--out is no folder"),
        (["--export-chat", "chat.json"], "no .jsonl file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, message):
    clinic(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as mistake:
        prepare_dataset.main(["sheet", "annotations.xlsx", "--images", "images", "--out", "data", *arguments])
    assert "\n" not in str(mistake.value) and len(list((tmp_path / "images").iterdir())) == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [["--ratios", "70/30"], ["--ratios", "80/20/0"], ["--ratios", "a/b/c"], ["--rat", "1"]])
def test_the_parser_refuses_in_one_line(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        prepare_dataset.main(["sheet", "s.xlsx", "--images", str(tmp_path), *arguments])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_nothing_left_says_why(tmp_path):
    write_sheet(tmp_path / "annotations.xlsx", [["Abdomen", f"{n}.png", "complete", "P1", *NORMAL] for n in range(3)])
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"no usable row is left.*3 x no such image folder"):
        prepare(tmp_path)


def test_every_row_of_one_patient(tmp_path):
    clinic(tmp_path, patients=1)
    with pytest.raises(UserError, match="fewer groups than splits; 1 for 3") as mistake:
        prepare(tmp_path, "--group-column", "Patient")
    assert "left out" not in str(mistake.value)


def test_too_few_groups_say_what_was_left_out_before(tmp_path):
    """Merged folder cells hold their text in the first row only: the images dropped are why the groups are few."""
    clinic(tmp_path, patients=1, extra=[[None, f"img_{number:03}.png", "complete", "P7", *NORMAL] for number in range(11)])
    with pytest.raises(UserError, match=r"fewer groups than splits; 1 for 3.*11 x no folder name in the row \(such as .* row 4"):
        prepare(tmp_path, "--group-column", "Patient")


def with_patients(tmp_path, name):
    """The clinic's sheet with ``name(number of the row)`` in the column of patients."""
    import openpyxl

    book = openpyxl.load_workbook(clinic(tmp_path))
    for number in range(20):
        book.active.cell(number + 2, 4).value = name(number)
    book.save(tmp_path / "annotations.xlsx")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "Patient: every cell is empty"),
        ("  ", "every cell is empty"),
        (datetime.date(2024, 1, 2), "20 x patient cell: a date"),
    ],
)
def test_a_patient_column_that_names_nobody_is_refused(tmp_path, value, said):
    with_patients(tmp_path, lambda number: value)
    with pytest.raises(UserError, match=f"--group-column names no patient; .*{said}"):
        prepare(tmp_path, "--group-column", "Patient")
    assert not (tmp_path / "data").exists()


def test_some_patient_cells_that_cannot_be_read_are_listed(tmp_path):
    with_patients(tmp_path, lambda number: datetime.date(2024, 1, 2) if number < 3 else f"P{number // 2}")
    _, about = prepare(tmp_path, "--group-column", "Patient")
    assert len(about["dropped"]["patient cell: a date where text belongs"]) == 3
    assert any("3 images have no patient" in note for note in about["notes"])


def test_a_patient_is_one_however_the_case_is_typed(tmp_path):
    with_patients(tmp_path, lambda number: f"{'pP'[number % 2]}{number // 2} ")
    data, about = prepare(tmp_path, "--group-column", "Patient")
    assert {row["group"] for row in rows_of(data).values()} == {f"P{number}" for number in range(10)}
    assert sum(split["groups"] for split in about["splits"].values()) == 10
    assert any("P0 = p0, P1 = p1" in note for note in about["notes"])
    assert not any("nobody's patient" in note for note in about["notes"])


def test_phantoms_are_never_drawn_into_somebody_elses_folder(tmp_path):
    source = tmp_path / "data-source"
    source.mkdir()
    (source / "annotations.xlsx").write_bytes(b"a year of work")
    with pytest.raises(UserError, match=r"data-source holds annotations.xlsx but no phantoms.json.*--out"):
        prepare(tmp_path, "--images", 3, "--size", "64x48", source="phantoms")
    assert [path.name for path in source.iterdir()] == ["annotations.xlsx"]
    assert (source / "annotations.xlsx").read_bytes() == b"a year of work"
    (source / "annotations.xlsx").rename(source / ".phantoms.json.x1.part")  # a run killed before its first file was whole
    for _ in range(2):  # and one's own folder is gone on with
        assert prepare(tmp_path, "--images", 20, "--size", "64x48", source="phantoms")[1]["splits"]["train"]["images"]
