"""Extractions as models write them: where their JSON stands, how it is shaped, and what its words and units mean."""

from __future__ import annotations

import json

import pytest

from sonovqa import extraction, measures, scoretable, scoring
from sonovqa.extraction_quantities import quantities, quantity
from sonovqa.questions import QUESTIONS, TEXT_LABEL

ONE = '{"values": [{"name": "X", "value": 5, "unit": "mmol/L"}]}'
OTHER = ONE.replace("5", "6")


@pytest.mark.parametrize(
    "text",
    [
        f"Page [1]: {ONE}", f"{ONE}\nSee reference [1].", f"[See below] {ONE}", f"Values (mmol/L) [as of {ONE}",
        f'<think>Perhaps {{"values": [...]}} or {OTHER}</think>{ONE}', f"it may be {OTHER}</think>\n{ONE}",
        f'{{"values": []}}\nSorry: {ONE}', f"{OTHER}\nSorry: {ONE}", f'{ONE}\n{{"values": []}}', f'{{"values": [5,]}} {ONE}',
        f'{{"values": [{{"name": "", "value": 0, "unit": ""}}]}} becomes {ONE}', f"{ONE}<|im_end|>\n{{",
        "```json\n" + json.dumps(json.loads(ONE), indent=2) + "\n```",
    ],
)  # fmt: skip
def test_of_several_brackets_the_answer_is_read(text):
    assert extraction.score(ONE, text)["combined"] == 1


def test_json_as_deep_as_an_extraction_may_be_is_read():
    assert extraction.score(ONE, "[" * 45 + ONE + "]" * 45)["combined"] == 1
    assert not extraction.score(ONE, "[" * 50 + ONE + "]" * 50)["read"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 L of fluid, 3 liters of it", ["3 L", "3 liters"]), ("10 U or 10 units", ["10 U", "10 units"]),
        ("2 g of Ancef, 1.5 gm", ["2 g", "1.5 gm"]), ("a 22 G needle, a 22-gauge cannula, a 6 F sheath, a 0.035 J wire", []),
        ("3 x 2 x 1.5 cm, 4 × 3-mm and 2 by 3 cm", ["3 x 2 x 1.5 cm", "4 × 3 mm", "2 by 3 cm"]),
        ("100 mm of Hg, 12 cm of water", ["100 mm of Hg", "12 cm of water"]),
        ("10,500/mm3, 9,000 per mm³, 300 cells per cubic mm", ["10,500 /mm3", "9,000 per mm³", "300 cells per cubic mm"]),
        ("4.2 x 10^9/L, 4.2 x10³/µL", ["4.2 x 10^9/L", "4.2 x10³/µL"]), ("5 feet 4 inches", ["5 feet", "4 inches"]),
        ("a 3-inch scar, 5 in the room", ["3 inch"]), ("200 joules, 360 J", ["200 joules", "360 J"]), ("4500 cGy", ["4500 cGy"]),
        ("100 mg/m2, 75 mg per m²", ["100 mg/m2", "75 mg per m²"]), ("2 L per minute, 3 L/min", ["2 L per minute", "3 L/min"]),
        ("4 liters per minute, 50 mL per hour", ["4 liters per minute", "50 mL per hour"]), ("120/80 L arm, 3 l, 4 u", []),
    ],
)  # fmt: skip
def test_units_of_prose(text, found):
    """As they are printed, and each can be read."""
    assert [" ".join(one) for one in quantities(text)] == found
    assert all(map(quantity, found))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("22 G", "22 g", False), ("22 G", "22 gauge", True), ("3 x 2 x 1.5 cm", "3×2×1.50 cm", True),
        ("3 x 2 cm", "3 X 2 CM", True), ("3 x 2 cm", "2 x 3 cm", False), ("3 x 2 x 1.5 cm", "1.5 cm", False),
        ("3 x 2 cm", "3/2 cm", False), ("3 x 2 cm", "3 x 2 mm", False),
        ("4.2 x 10^3/uL", "4.2 K/uL", True), ("4.2 x 10^3/uL", "4.2 K/mm3", True), ("100 mm of Hg", "100 mmHg", True),
        ("100 mm of Hg", "100 mm", False), ("10,500/mm3", "10500 /uL", True), ("10,500 cells/mm³", "10500 K/uL", False),
        ("2 L per minute", "2 L/min", True), ("2 liters per minute", "2 L", False), ("100 mg/m2", "100 mg per m²", True),
        ("100 mg/m2", "100 mg", False), ("200 J", "200 joules", True), ("4500 cGy", "45 Gy", False), ("3 in", "3 inches", True),
    ],
)  # fmt: skip
def test_which_quantities_are_the_same(one, other, same):
    assert quantity(one) and quantity(other) and (quantity(one) == quantity(other)) is same


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [
        ("BID", "twice daily", True), ("TID", "three times a day", True), ("q12h", "every 12 hours", True),
        ("q8h", "q 8 hrs", True), ("BID", "q12h", False), ("TID", "q8h", False), ("QID", "q6h", False),
        ("daily", "q24h", False), ("q8h", "q6h", False),
    ],
)  # fmt: skip
def test_times_a_day_are_not_hours_apart(printed, said, same):
    drug = '{"medications": [{"name": "A", "dose": "5 mg", "route": "oral", "frequency": "%s"}]}'
    assert (extraction.score(drug % printed, drug % said)["combined"] == 1) is same


FOUND = json.dumps({"findings": ["Sepsis", "Acute cholecystitis"]})
SEPSIS = '{"findings": ["Sepsis"]}'
PROSE = json.dumps({"values": [{"value": 5, "unit": "mg"}, {"value": "120/80", "unit": "mmHg"}]})
FLAGGED = '{"values": [{"name": "X", "value": 5, "unit": "mmol/L"%s}]}'
ORDERED = json.dumps({"medications": [{"name": "Digoxin", "dose": "125 mcg", "route": "oral", "frequency": "BID"}]})


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (FOUND, '["Sepsis", "acute cholecystitis"]'), (FOUND, '{"diagnoses": ["Sepsis"], "findings": ["Acute cholecystitis"]}'),
        (FOUND, '{"findings": [{"name": "Sepsis"}, {"finding": "Acute cholecystitis"}]}'), (ONE, '{"X": "5 mmol/L"}'),
        (FOUND, '{"diagnosis": "Acute cholecystitis", "findings": "Sepsis"}'), ('{"findings": ["A"]}', '{"findings": "A"}'),
        (FOUND, '[{"name": "Sepsis", "present": true}, "Acute cholecystitis", "N/A"]'), (PROSE, '["120/80 mmHg", "5 mg"]'),
        (PROSE, '{"values": ["5 mg", "120/80 mmHg"]}'), (PROSE, '{"measurements": ["5 mg", {"value": "120/80 mm Hg"}]}'),
        (ONE, '{"values": {"X": {"value": 5, "unit": "mmol/L"}}}'), (ONE, '{"X": {"result": "5 mmol/L"}}'),
        (ONE, '{"values": {"X": "5 mmol/L"}}'), (ONE, '[{"X": 5, "unit": "mmol/L"}]'),
        (ONE, ONE.replace("}]", ', "time": "-"}]')),
        (ORDERED, '{"Digoxin": {"dose": "125 mcg", "route": "oral", "frequency": "BID"}}'),
        (ORDERED, '[{"medication": "Digoxin", "dose": "125 mcg", "route": "oral", "frequency": "BID", "action": "N/A"}]'),
    ],
)  # fmt: skip
def test_shape_is_not_scored(reference, text):
    assert extraction.score(reference, text)["combined"] == 1


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (ONE, '{"values": {"X": {"value": 5, "unit": "mg/dL"}}}'), (ONE, '{"values": {"X": {"value": 5}}}'),
        (ONE, '{"values": ["5 mmol/L"]}'), (ONE, '{"values": {"Y": {"value": 5, "unit": "mmol/L"}}}'),
        (ONE, '[{"X": 5, "unit": "mg/dL"}]'), (ONE, '[{"X": "5 mmol/L", "unit": "mg/dL"}]'), (PROSE, '["5 mmHg", "120/80 mg"]'),
        (ONE.replace("mmol/L", ""), '[{"X": 5, "unit": "mg/dL"}]'), (PROSE, '{"values": [5, "120/80"]}'), (ONE, '{"X": 5}'),
        (SEPSIS, '{"ruled out": ["Sepsis"]}'), (SEPSIS, '{"ruled_out": [{"name": "Sepsis"}]}'),
        (SEPSIS, '{"family history": [{"name": "Sepsis"}]}'), (SEPSIS, '{"absent": "Sepsis"}'),
        (SEPSIS, '[{"name": "Sepsis", "present": false}]'), (SEPSIS, '{"Sepsis": false}'),
        (SEPSIS, '[{"name": "Sepsis", "status": "ruled out"}]'), (SEPSIS, '{"Sepsis": "absent"}'),
        (SEPSIS, '{"ruled out": {"findings": ["Sepsis"]}}'),
    ],
)  # fmt: skip
def test_no_shape_makes_a_wrong_extraction_right(reference, text):
    """Not a value, or not a term, is right: a unit, a name or a denial is never lost with the shape."""
    made = extraction.score(reference, text)
    assert made["value_f1"] == 0 if "values" in reference else made["term_f1"] == 0


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [
        ("H", "High", True), ("L", "low", True), ("H", "↑", True), ("", "N", True), ("", "-", True), ("", "N/A", True),
        ("", "normal", True), ("", "Within normal limits", True), ("H", "L", False), ("H", "N", False), ("H", "normal", False),
        ("H", "", False), ("", "H", False), ("", "*", False), ("", "abnormal", False), ("H", "HH", False),
        ("H", "critical", False),
    ],
)  # fmt: skip
def test_flags(printed, said, same):
    reference, text = (FLAGGED % (f', "flag": "{flag}"' if flag else "") for flag in (printed, said))
    made = extraction.score(reference, text)
    assert (made["combined"] == 1) is same and made["value_f1"] == 1


def rows_of(kind: str, answer_type: str, references) -> list[dict]:
    """A row a reference, answered rightly."""
    return [
        {"image_id": str(n), "group": str(n), "category": "", "question_id": kind, "question": "?", "answer_type": answer_type,
         "reference": text, "prediction": text, "error": None, "finish_reason": "stop"}
        for n, text in enumerate(references)
    ]  # fmt: skip


ASKED = {
    "Q1": ("skull", "stomach"), "Q2": ("cephalic, axial", "breech, axial"), "Q3": ("axial abdomen", "longitudinal femur"),
    "Q4": ("HC 175 mm", "AC 150 mm"), "Q5": ("20-25 weeks", "8-13 weeks"), "Q6": ("good", "low"), "Q7": ("normal", "abnormal"),
    "Q8": ("routine monitoring", "specialist referral"),
}  # fmt: skip


def test_the_headline_of_every_kind_of_question_is_in_the_printed_table():
    kinds = [rows_of(kind, "", ASKED[kind]) for kind in QUESTIONS] + [rows_of("Q4", "", ("HC", "AC"))]
    kinds += [rows_of("a", "closed", ("yes", "no")), rows_of("b", "open", ("liver", "5 mm")), rows_of("c", TEXT_LABEL, "xxy")]
    kinds += [rows_of(kind, extraction.ANSWER_TYPE, (ONE, FOUND)) for kind in extraction.QUESTIONS]
    for rows in kinds:
        kind = measures.kind_of(rows[0])
        found = measures.headline(kind, measures.measure(kind, rows, [row["prediction"] for row in rows]))
        assert found in scoretable.SHOWN, kind


def test_the_table_of_documents_shows_their_own_scores_and_the_headline_first():
    rows = rows_of("values", extraction.ANSWER_TYPE, (ONE, ONE, ONE))
    rows[0]["prediction"] = ONE.replace("mmol/L", "mg/dL")
    baselines = scoring.Baselines(scoring.majority_answers(rows), "the references themselves", None)
    table = scoretable.table(scoring.score(rows, baselines, resamples=0))
    shown = dict(zip(table.columns[1].cells, table.columns[2].cells, strict=True))
    assert next(iter(shown)) == "combined ↑"
    assert {name: shown[name][:4] for name in ("combined ↑", "term F1 ↑", "value F1 ↑", "accuracy ↑")} == {
        "combined ↑": "0.83", "term F1 ↑": "1.00", "value F1 ↑": "0.67", "accuracy ↑": "0.67",
    }  # fmt: skip
