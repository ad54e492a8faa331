"""Clinical pages and the scores of what is extracted from them."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import prepare_dataset
import train
from sonovqa import dataset, documents, documents_pages, documents_vocabulary, extraction, measures
from sonovqa.cli import UserError
from sonovqa.documents_forms import TEMPLATES, Draw
from sonovqa.extraction_quantities import quantities, quantity, unit

VALUES = [
    {"name": "Potassium", "value": 5.9, "unit": "mmol/L", "flag": "H"},
    {"name": "Glucose", "value": 1200, "unit": "mg/dL"},
    {"name": "pH", "value": 7.3, "unit": ""},
    {"name": "Blood pressure", "value": "120/80", "unit": "mmHg"},
]
LABS = json.dumps({"values": VALUES})
DRUGS = [
    {"name": "Metformin", "dose": "500 mg", "route": "oral", "frequency": "BID"},
    {"name": "Digoxin", "dose": "125 mcg", "route": "oral", "frequency": "once daily"},
]


def changed(index: int, **new) -> str:
    return json.dumps({"values": [{**value, **(new if number == index else {})} for number, value in enumerate(VALUES)]})


def test_a_perfect_extraction_scores_one_however_it_is_written():
    other = (
        'Here it is:\n```json\n[{"test": "potassium", "result": "5.90 mmol / l", "flag": "h"}, {"name": "GLUCOSE", '
        '"value": "1,200", "units": "MG/DL"}, {"name": "PH", "value": "7.30"},'
        ' {"name": "Blood pressure", "value": "120 / 80 mm Hg"}]\n```'
    )
    for text in (LABS, other):
        assert {k: v for k, v in extraction.score(LABS, text).items() if k != "read"} == dict.fromkeys(
            [f"{kind}_{what}" for kind in ("term", "value") for what in ("precision", "recall", "f1")] + ["combined"], 1.0
        )
    assert extraction.key_of(LABS) == extraction.key_of(other)


def test_a_partly_wrong_extraction_loses_what_is_wrong():
    one_value = extraction.score(LABS, changed(0, value=5.8))
    assert (one_value["term_f1"], one_value["value_f1"], one_value["combined"]) == (1, 0.75, 0.875)
    assert extraction.score(LABS, changed(0, flag="L"))["term_f1"] == 0.8 and one_value["read"]
    missing = extraction.score(LABS, json.dumps({"values": VALUES[:2]}))
    assert (missing["value_precision"], missing["value_recall"]) == (1, 0.5)
    invented = extraction.score(LABS, json.dumps({"values": [*VALUES, {"name": "Sodium", "value": 140, "unit": "mmol/L"}]}))
    assert invented["value_precision"] == 0.8 and invented["value_recall"] == 1


def test_a_value_counts_only_with_its_unit():
    made = extraction.score(LABS, TABLED["units of two results swapped"])
    assert (made["term_f1"], made["value_f1"], made["combined"]) == (1, 0.5, 0.75)
    for other in ("", "mEq/L", "furlongs"):
        assert extraction.score(LABS, changed(0, unit=other))["value_recall"] == 0.75
    assert extraction.score(LABS, changed(2, unit="mmHg"))["value_recall"] == 0.75  # a unit where the page has none


SWAPPED = [{**VALUES[0], "unit": "mg/dL"}, {**VALUES[1], "unit": "mmol/L"}, *VALUES[2:]]
#: What experiments.md tables: an answer about `LABS`.
TABLED = {
    "all right": LABS,
    "one number wrong": changed(0, value=5.8),
    "one flag wrong": changed(0, flag="L"),
    "two of four results left out": json.dumps({"values": VALUES[:2]}),
    "one result invented": json.dumps({"values": [*VALUES, {"name": "Sodium", "value": 140, "unit": "mmol/L"}]}),
    "units of two results swapped": json.dumps({"values": SWAPPED}),
    "cut short": LABS[:-30],
}


def table_of_scores() -> str:
    """The rows of experiments.md's table."""
    made = {what: extraction.score(LABS, text) for what, text in TABLED.items()}
    return "\n".join(f"| {what} | {m['term_f1']:.2f} | {m['value_f1']:.2f} | {m['combined']:.2f} |" for what, m in made.items())


def test_the_page_tables_these_scores_and_its_commands_are_taken():
    text = (ROOT / "experiments.md").read_text().split("## Documents\n")[1].split("\n## ")[0]
    assert f"| --- | --- | --- | --- |\n{table_of_scores()}\n<!-- end of scores of extractions -->" in text
    commands = [line.split("#")[0].split()[1:] for line in re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()]
    for script, *words in commands:
        {"prepare_dataset.py": prepare_dataset, "train.py": train, "evaluate.py": evaluate}[script].parse(words)
    assert [words[0] for words in commands] == ["prepare_dataset.py"] * 2 + ["train.py", "evaluate.py"]
    pixels = int(commands[2][commands[2].index("--max-pixels") + 1])
    assert pixels >= documents_pages.WIDTH * documents_pages.HEIGHT, "a page is not made smaller"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("500 mcg", "500 ug", True), ("500 mcg", "500 µg", True), ("500 mcg", "500 mg", False), ("0.5 g", "500 mg", False),
        ("4.2 10^9/L", "4.2 K/uL", True), ("37.0 °C", "37 C", True), ("37 °C", "37 °F", False), ("5 mL/hr", "5 cc/h", True),
        ("<0.01 ng/mL", "0.01 ng/mL", False), ("1,000 units", "1000 units", True), ("10 units", "10 mL", False),
        ("120/80 mmHg", "80/120 mmHg", False), ("55%", "55 percent", True), ("3 mmol/L", "3 mEq/L", False),
        (".5 mg", "0.5 mg", True), ("4.2 x10³/µL", "4.2 10^3/uL", True), ("4.2 × 10³/µL", "4.2 K/uL", True),
        ("2 mIU/L", "2 uIU/mL", True), ("16 breaths per minute", "16 /min", True), ("90 mg per dL", "90 mg/dL", True),
        ("5 mM", "5 mmol/L", True), ("5 mM", "5 mm", False), ("5 MM", "5 mm", True), ("5 µM", "5 umol/L", True),
        ("10-15 mg", "10 to 15 mg", True), ("10-15 mg", "10/15 mg", False), ("10-15 mg", "15 mg", False),
    ],
)  # fmt: skip
def test_units_and_numbers(one, other, same):
    assert (quantity(one) == quantity(other)) is same and quantity(one)


def test_a_unit_said_twice_counts_once_and_another_one_is_wrong():
    drug, pressure = '{"medications": [{"name": "Metformin", "dose": "500 mg"%s}]}', '{"values": [{"name": "BP", "value": %s}]}'
    assert extraction.score(drug % "", drug % ', "unit": "mg"')["combined"] == 1
    assert extraction.score(drug % "", drug % ', "unit": "mcg"')["value_f1"] == 0
    assert extraction.score(pressure % '"120/80", "unit": "mmHg"', pressure % '"120/80 mmHg", "unit": "mm Hg"')["combined"] == 1


@pytest.mark.parametrize(
    ("said", "same"),
    [("8:00", True), ("0800", True), ("8:00 AM", True), ("08:00:00", True), ("8:00 pm", False), ("18:00", False)],
)
def test_a_time_counts_however_it_is_written(said, same):
    row = '{"values": [{"name": "Pulse", "time": "%s", "value": 80, "unit": "bpm"}]}'
    assert (extraction.score(row % "08:00", row % said)["value_f1"] == 1) is same


def test_values_in_prose_are_whole_and_no_ages_or_durations():
    text = (
        "A 54-year-old, 98.6 F or 37.0 C, after 3 weeks, 120/80 mm Hg, 5 mg/kg/day, 10-15 mg, .5 mg of it, 2 to 3 cm and a 5-mm "
        "node, 50 µg, 80 beats per minute; a 6 F sheath, C4-5 level, 2 tablets, 99 degrees F, sodium 140 mEq/L."
    )
    assert quantities(text) == [
        ("98.6", "F"), ("37.0", "C"), ("120/80", "mm Hg"), ("5", "mg/kg/day"), ("10-15", "mg"), (".5", "mg"), ("2 to 3", "cm"),
        ("5", "mm"), ("50", "µg"), ("80", "beats per minute"), ("99", "degrees F"), ("140", "mEq/L"),
    ]  # fmt: skip
    assert all(quantity(" ".join(found)) for found in quantities(text)), "what is asked can be read"
    assert "no ages, no durations" in documents.VALUES_IN_PROSE


def test_medications_are_whole_or_wrong():
    reference = json.dumps({"medications": DRUGS})
    same = json.dumps([{**DRUGS[1], "frequency": "daily"}, {**DRUGS[0], "frequency": "twice a day", "dose": "500.0 MG"}])
    assert extraction.score(reference, same)["combined"] == 1
    exchanged = json.dumps([{**DRUGS[0], "dose": DRUGS[1]["dose"]}, {**DRUGS[1], "dose": DRUGS[0]["dose"]}])
    assert extraction.score(reference, exchanged)["value_f1"] == 0 and extraction.score(reference, exchanged)["term_f1"] == 1
    frequency = json.dumps([{**DRUGS[0], "frequency": "once daily"}, {**DRUGS[1], "frequency": "BID"}])
    assert extraction.score(reference, frequency)["term_f1"] == pytest.approx(4 / 6)


INDENTED = json.dumps({"values": VALUES}, indent=2)


@pytest.mark.parametrize(
    "text",
    [
        "", "no values were found", LABS[:-30], '{"values": [{"name"', "[" * 100_000, f"```json\n{INDENTED[:-2]}",
        INDENTED[: INDENTED.index("}") + 1], INDENTED[: INDENTED.index("}") + 1] + "\n```", f"{{\n  {LABS[1:-30]}",
        f"Draft: {LABS}\nBetter: {LABS[:-30]}", f"<think>It is {LABS}", '{"a":' * 501 + "1" + "}" * 501,
        '{"values":' + "[" * 60 + json.dumps(VALUES[0]) + "]" * 60 + "}", f'{{"values": [{json.dumps(VALUES[0])},]}}',
    ],
)  # fmt: skip
def test_what_is_no_whole_json_is_unread(text):
    made = extraction.score(LABS, text)
    assert not made["read"] and made["combined"] == made["value_f1"] == 0 and extraction.key_of(text) is None


def test_nothing_to_find():
    assert extraction.score('{"findings": []}', '{"findings": []}')["combined"] == 1
    assert extraction.score('{"findings": []}', '{"findings": ["sepsis"]}')["combined"] == 0
    with pytest.raises(ValueError, match="no JSON"):
        extraction.score("plain words", "{}")


def test_extractions_are_measured_beside_the_other_questions():
    rows = [{"question_id": "values", "answer_type": extraction.ANSWER_TYPE, "reference": LABS, "question": "?"}] * 2
    texts = [LABS, changed(0, unit="mg/dL")]
    kind = measures.kind_of(rows[0])
    scores = measures.measure(kind, rows, texts)
    assert kind == "values" and measures.headline(kind, scores) == "combined"
    assert scores["combined"].value == pytest.approx((1 + 0.875) / 2) and scores["accuracy"].value == 0.5
    assert measures.meaning(rows[0], "nothing") is None and measures.key_of(rows[0], "nothing") == "unread"


def test_every_unit_of_the_forms_is_known():
    v = documents_vocabulary
    units = [row[1] for rows in (v.OBSERVATIONS, v.GASES, v.DRIPS, v.ECHO, v.VITALS) for row in rows]
    units += [row[2] for row in v.DRUGS] + [system[0] for row in v.TESTS for system in row[2:]]
    assert [each for each in units if unit(each) is None] == []


def printed(form) -> str:
    """All that stands on a form, as text."""
    return " ".join(str(vars(block)) for block in form.blocks)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_asked_of_a_form_stands_on_it(kind):
    for number in range(30):
        form = TEMPLATES[kind](Draw(np.random.default_rng([7, number])))
        text = printed(form)
        asked = [*form.findings, *(str(x) for m in form.medications for x in m.values())]
        asked += [v[key] for v in form.values for key in ("name", "unit")]
        assert [entry for entry in asked if entry not in text] == []
        for value in form.values:
            plain = str(value["value"])
            assert plain in text or any(f"{plain}{zeros}" in text for zeros in ("0", "00"))
        if kind == "lab_panel":
            flags = {value.get("flag", "") for value in form.values}
            assert flags <= {"", "H", "L"} and len({value["name"] for value in form.values}) == len(form.values)
        for name in extraction.QUESTIONS:
            answer = documents.compact(name, getattr(form, name))
            assert extraction.score(answer, answer)["combined"] == 1


def test_pages_are_readable_and_differ_in_looks():
    styles = [documents_pages.draw_style(np.random.default_rng(seed)) for seed in range(60)]
    assert {style.face for style in styles} == set(documents_pages.FACES) and len({style.rules for style in styles}) == 4
    form = TEMPLATES["lab_panel"](Draw(np.random.default_rng(0)))
    for style in styles[:4]:
        page = np.asarray(documents_pages.draw(form.title, form.blocks, "footer", style).convert("L"), float)
        assert page.shape == (documents_pages.HEIGHT, documents_pages.WIDTH)
        assert np.median(page) - np.percentile(page, 0.5) > 100  # ink against paper
    with pytest.raises(ValueError, match="too full"):
        documents_pages.draw("title", form.blocks * 4, "", styles[0])


@pytest.mark.parametrize("face", documents_pages.FACES)
def test_no_line_and_no_title_runs_off_the_page(face):
    text = f"{'LEFT COMMON FEMORAL ARTERY WOMB ' * 20}\n      Sig: oral\n\nLV end-diastolic {'diameter ' * 30}{'W' * 200}"
    room = documents_pages.WIDTH - 2 * documents_pages.MARGIN
    for size in (15, 21, 24):
        lines = documents_pages.wrapped(text, face, size)
        assert max(documents_pages.font(face, False, size).getlength(line) for line in lines) <= room
        assert "".join("".join(lines).split()) == "".join(text.split()) and "      Sig: oral" in lines and "" in lines
        assert not any(line.endswith("end-") for line in lines)
        assert documents_pages.wrapped("\n".join(lines), face, size) == lines, "a page's lines stay as they were cut"
        title = "W" * 48
        assert documents_pages._title_font(title, face, size).getlength(title) <= room


def prepare(out, *arguments):
    prepare_dataset.main(["documents", *map(str, arguments), "--out", str(out), "--workers", "1"])
    return dataset.load(out), json.loads((out / "dataset.json").read_text())


def test_forms_split_80_10_10_and_come_out_the_same_again(tmp_path):
    data, about = prepare(tmp_path / "a", "--forms", 40)
    assert {name: split.num_rows for name, split in data.items()} == {"train": 32, "validation": 4, "test": 4}
    rows = [row for split in data.values() for row in split.remove_columns("image")]
    assert {row["category"] for row in rows} == set(TEMPLATES) and len({row["group"] for row in rows}) == 40
    types = {(q["question_id"], q["answer_type"]) for row in rows for q in row["questions"]}
    assert types == {(name, "extraction") for name in ("medications", "findings", "values")}
    assert "synthetic" in about["source"]["synthetic"] and any("synthetic" in note for note in about["notes"])
    again = prepare(tmp_path / "b", "--forms", 40)[1]
    assert again["fingerprint"] == about["fingerprint"]
    assert prepare(tmp_path / "c", "--forms", 40, "--seed", 1)[1]["fingerprint"] != about["fingerprint"]


def test_pages_are_never_drawn_into_somebody_elses_folder(tmp_path):
    (tmp_path / "out-source").mkdir()
    (tmp_path / "out-source" / "thesis.docx").touch()
    with pytest.raises(UserError, match=r"out-source holds thesis.docx but no documents.json"):
        prepare(tmp_path / "out", "--forms", 8)
    assert len(list((tmp_path / "out-source").iterdir())) == 1
    (tmp_path / "out-source" / "thesis.docx").unlink()
    first = prepare(tmp_path / "out", "--forms", 8)[1]
    assert prepare(tmp_path / "out", "--forms", 8)[1] == first


def samples(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", *documents.COLUMNS])
        writer.writerows([[number, "d", *row] for number, row in enumerate(rows)])


@pytest.fixture
def transcriptions(tmp_path):
    echo = "2-D M-MODE: , ,1.  Left atrium of 4.7 cm.,2.  Ejection fraction of 51%.,DOPPLER: , Trace mitral regurgitation."
    rows = [[" Radiology", f" Study {n} ", f"{echo} Case {n}.", "radiology, doppler, ejection fraction"] for n in range(6)]
    long = "HISTORY: , " + "The patient is well and walks two miles. " * 150
    rows += [[" Surgery", "Study 0", rows[0][2], ""], [" Surgery", "Empty", "  ", "x"], [" Surgery", "Long", long, "nothing"]]
    folder = tmp_path / "mtsamples"
    folder.mkdir()
    samples(folder / "mtsamples.csv", rows)
    return folder


def test_transcriptions_become_pages_with_all_their_words(tmp_path, transcriptions):
    data, about = prepare(tmp_path / "out", "--forms", 0, "--root", transcriptions)
    rows = [row for split in data.values() for row in split.remove_columns("image")]
    asked = {row["image_id"]: {q["question_id"]: q["answer"] for q in row["questions"]} for row in rows}
    echo = next(answers for answers in asked.values() if "Case 3" in answers["transcription"])
    assert json.loads(echo["findings"]) == {"findings": ["doppler", "ejection fraction"]}
    assert json.loads(echo["values"]) == {"values": [{"value": 4.7, "unit": "cm"}, {"value": 51, "unit": "%"}]}
    long = sorted((name, answers) for name, answers in asked.items() if "two miles" in answers["transcription"])
    assert len(long) > 1 and " ".join(a["transcription"] for _, a in long).count("two miles") == 150
    assert len({row["group"] for row in rows if row["image_id"] in dict(long)}) == 1
    dropped = {reason: len(items) for reason, items in about["dropped"].items()}
    assert dropped["the same transcription under another specialty"] == dropped["a row without a transcription"] == 1
    assert any("not synthetic" in note for note in about["notes"]) and any("worse" in note for note in about["notes"])
    path = next((tmp_path / "out-source" / "transcription").glob("*.jpg"))
    assert Image.open(path).size == (documents_pages.WIDTH, documents_pages.HEIGHT)


def test_what_is_not_rendered_is_listed(tmp_path, transcriptions):
    about = prepare(tmp_path / "out", "--forms", 8, "--root", transcriptions, "--transcriptions", 3)[1]
    assert [len(items) for reason, items in about["dropped"].items() if reason.startswith("not rendered")] == [4]
    about = prepare(tmp_path / "forms", "--forms", 8, "--root", transcriptions, "--transcriptions", 0)[1]
    assert [len(items) for reason, items in about["dropped"].items() if reason.startswith("not rendered")] == [7]


def test_forms_alone_can_be_asked_for(tmp_path):
    splits, _ = prepare(tmp_path / "out", "--forms", 16, "--transcriptions", 0)
    assert sum(len(split) for split in splits.values()) == 16


def test_mistakes_are_named(tmp_path, transcriptions):
    for asked in (("--forms", 0), ("--forms", -1), ("--forms", 8, "--transcriptions", -1)):
        with pytest.raises(UserError, match="no page to draw"):
            prepare(tmp_path / "out", *asked)
    with pytest.raises(UserError, match="no single CSV"):
        prepare(tmp_path / "out", "--root", tmp_path / "nowhere")
    (transcriptions / "mtsamples.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks description"):
        prepare(tmp_path / "out", "--root", transcriptions)
    samples(transcriptions / "mtsamples.csv", [["Surgery", "Empty", "", ""]])
    with pytest.raises(UserError, match="no usable row"):
        prepare(tmp_path / "out", "--root", transcriptions)
