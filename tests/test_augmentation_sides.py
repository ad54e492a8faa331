"""Left and right in answers: what a mirrored picture's answers say, over many phrasings, and where nobody can tell."""

from __future__ import annotations

import itertools

import pytest

from sonovqa import answers
from sonovqa.augmentation_sides import mirrored
from sonovqa.phantom_answers import SYNONYMS

ANCHORS = ("occiput", "spine", "head", "back", "fetal spine", "crown")
DIRECTIONS = (
    "{a} {s}", "{a} to the {s}", "{a} on the {s} side", "{s}-sided {a}", "{a} towards the {s} of the image", "{a} {s}ward",
    "{a} is lying to the {s}", "{a} at image {s}", "{a} {s}most", "{a} to {l}", "{a} at {h} o'clock",
)  # fmt: skip
AROUND = (
    "{}", "cephalic, axial, {}", "Breech presentation; sagittal view; {}.", "{}, transverse section", "{}, longitudinal lie",
)  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mirrored_orientation_swaps_the_side_and_nothing_else(direction, around):
    sides = {"left": {"s": "left", "l": "L", "h": 9}, "right": {"s": "right", "l": "R", "h": 3}}
    for anchor, (side, words) in itertools.product(ANCHORS, sides.items()):
        text = around.format(direction.format(a=anchor, **words))
        for written in (text, text.capitalize(), text.upper()):
            before, other = answers.read("Q2", written), mirrored("Q2", written)
            assert other is not None, written
            parts, after = dict(before.parts), dict(answers.read("Q2", other).parts)
            opposite = {"left": "right", "right": "left"}[side]
            assert parts["side"].endswith(side) and after["side"] == parts["side"].replace(side, opposite), (written, other)
            assert {k: v for k, v in parts.items() if k != "side"} == {k: v for k, v in after.items() if k != "side"}
            assert mirrored("Q2", other) == written


@pytest.mark.parametrize(
    "text",
    ["cephalic", "breech, axial", "head down, longitudinal lie", "spine anterior", "cephalic, spine at 12 o'clock",
     "occiput at top", "cannot be determined", "head toward maternal pelvis"],
)  # fmt: skip
def test_orientation_without_left_or_right_stays(text):
    assert mirrored("Q2", text) == text


@pytest.mark.parametrize(
    ("question_id", "text"),
    [("Q2", "LOA"), ("Q2", "left occiput anterior"), ("Q2", "cephalic, head in maternal left"), ("Q2", "spine in left flank"),
     ("Q2", "fetus facing right, spine left"), ("Q2", "spine rigth"), ("Q2", "spine left, stomach right"), ("Q2", "Kopf links"),
     ("Q2", "spine left, turned clockwise"), ("Q2", "spine left at right angles"), ("Q2", "spine left (lt)"), ("Q2", ""),
     ("Q1", "stomach on the left"), ("Q1", "left kidney"), ("Q4", "AP diameter of right renal pelvis 4 mm"),
     ("Q7", "abnormal: dextrocardia"), ("Q7", "abnormal: left hydronephrosis"), ("Q7", "situs solitus, normal"),
     ("1559", "left lung"), ("1559", "no")],
)  # fmt: skip
def test_no_mirrored_answer_where_a_side_is_not_surely_the_pictures(question_id, text):
    assert mirrored(question_id, text) is None


def test_names_with_sides_stay_and_every_phantom_wording_has_a_mirror_image():
    for question_id, text in (("Q1", "heart, left ventricle, right atrium"), ("Q3", "left ventricular outflow tract view")):
        assert mirrored(question_id, text) == text
    for question_id, table in SYNONYMS.items():
        for text in (wording for term, others in table.items() for wording in (term, *others)):
            assert mirrored(question_id, text) is not None, text
