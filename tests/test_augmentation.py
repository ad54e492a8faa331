"""An augmentation never makes an answer false: pictures, and the texts that go with them."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

from sonovqa import answers, augmentation, augmentation_effects, augmentation_field, chat, phantom_drawing, phantoms
from sonovqa.augmentation import Augmentation, allowed, augment
from sonovqa.augmentation_sides import mirrored
from sonovqa.questions import CATEGORIES, QUESTIONS, report_text

SIZE = (400, 300)


def question(question_id: str, answer: str, text: str | None = None) -> dict:
    asked = QUESTIONS[question_id].prompts["default"] if text is None else text
    return {"question_id": question_id, "question": asked, "answer": answer}


def phantom(seed: int, **given) -> tuple[phantoms.Spec, Image.Image, dict]:
    spec = phantoms.sample_spec(np.random.default_rng(seed), CATEGORIES[seed % 14], **given)
    told = [question(q, text) | {"label": answers.label(q, text)} for q, text in phantoms.answers_of(spec).items()]
    row = {"image_id": f"{spec.category}/{seed}.png", "group": "P", "category": spec.category, "questions": told}
    return spec, Image.fromarray(phantoms.draw(spec, SIZE)).convert("RGB"), row


def text_of(row: dict, question_id: str) -> str:
    return next(q["answer"] for q in row["questions"] if q["question_id"] == question_id)


def still(monkeypatch) -> None:
    """Nothing but flip and crop: no rotation, no change of levels."""
    monkeypatch.setattr(augmentation, "MOST_DEGREES", 0.0)
    for name in ("MILD", "FULL"):
        monkeypatch.setattr(augmentation, name, augmentation.Strength(0, 0, 0, 0, 0.01, 0, 0))


def test_none_changes_nothing():
    _, image, row = phantom(1)
    made, told = Augmentation("none", 3)(image, row, 7)
    assert made.tobytes() == image.tobytes() and made.size == image.size and told["questions"] == row["questions"]
    with pytest.raises(ValueError, match="strong"):
        augment(image, row["questions"], None, "strong", np.random.default_rng(0))


@pytest.mark.parametrize("level", ["basic", "advanced"])
def test_same_row_and_draw_same_picture_whatever_came_before(level):
    _, image, row = phantom(2)
    first = [Augmentation(level, 5)(image, row, draw) for draw in range(4)]
    np.random.seed(0)
    again = [pickle.loads(pickle.dumps(Augmentation(level, 5)))(image, row, draw) for draw in (3, 2, 1, 0)][::-1]
    assert [i.tobytes() for i, _ in first] == [i.tobytes() for i, _ in again] and [r for _, r in first] == [r for _, r in again]
    assert len({i.tobytes() for i, _ in first}) == 4
    others = [Augmentation(level, 6)(image, row, 0), Augmentation(level, 5)(image, row | {"image_id": "other"}, 0)]
    assert all(other.tobytes() != first[0][0].tobytes() for other, _ in others)
    rngs = (np.random.default_rng(9), np.random.default_rng(9))
    assert len({augment(image, row["questions"], None, level, rng)[0].tobytes() for rng in rngs}) == 1


def test_levels_differ_and_return_rgb_of_the_same_size():
    _, image, row = phantom(3)
    made = {level: Augmentation(level, 0)(image, row, 1)[0] for level in augmentation.LEVELS}
    assert len({i.tobytes() for i in made.values()}) == 3
    assert {(i.mode, i.size) for i in made.values()} == {("RGB", SIZE)}


# ---------------------------------------------------------------------------------------------------------------- sides


@pytest.mark.parametrize("level", ["basic", "advanced"])
def test_a_picture_is_mirrored_exactly_when_its_text_is(level):
    flips = 0
    for seed, draw in itertools.product(range(14), range(3)):
        spec, image, row = phantom(seed)
        made, told = Augmentation(level, 1)(image, row, draw)
        swapped = text_of(told, "Q2") != text_of(row, "Q2")
        odd = [np.asarray(i.convert("L").resize((40, 30)), float) for i in (image, made)]
        odd = [a - a[:, ::-1] for a in odd]  # what a mirror image turns into its negative
        assert (float((odd[0] * odd[1]).sum()) < 0) == swapped, (spec.category, draw)
        side = dict(answers.read("Q2", text_of(told, "Q2")).parts)["side"]
        assert side.endswith(spec.side) != swapped
        assert all(text_of(told, q) == text_of(row, q) for q in QUESTIONS if q != "Q2")
        labels = {q["question_id"]: q["label"] for q in told["questions"]}
        assert labels["Q2"] == answers.label("Q2", text_of(told, "Q2"))
        flips += swapped
    assert 10 < flips < 32


def test_a_report_is_mirrored_section_by_section():
    _, image, row = phantom(4, side="left")
    text = report_text({q["question_id"]: q["answer"] for q in row["questions"]})
    other = mirrored("report", text)
    assert other == text.replace(" left", " right") and mirrored("report", other) == text
    assert mirrored("report", text + "\n\nThe left side.") is None
    asked = [question("Q2", text) | {"question_id": "report"}]
    told = {augment(image, asked, None, "basic", np.random.default_rng(seed))[1][0]["answer"] for seed in range(8)}
    assert told == {text, other}


def test_other_questions_allow_neither_flip_nor_turn_nor_crop():
    row = [question("1559", "no", "Is there a mass in the left lung?"), question("1560", "yes", "Is this a chest x-ray?")]
    for asked in (row, row[1:]):
        may = allowed(asked, None)
        assert may.mirrored is None and not (may.turn or may.cut or may.stretch or may.acoustic)
        assert may.strength == augmentation.MILD
    side_in_question = [question("Q1", "stomach", "What is seen on the left of the image?")]
    assert allowed(side_in_question, None).mirrored is None and allowed([question("Q1", "stomach")], None).mirrored == (
        "stomach",
    )
    assert allowed([question("Q1", "stomach")], "Probe marker on the right").mirrored is None


# ------------------------------------------------------------------------------------------------------- crop and scale


def framed(image: Image.Image, left: int, upper: int, right: int, lower: int) -> Image.Image:
    """A picture within a black surround, with a line of text and ticks beside the field."""
    frame = Image.new("RGB", (image.width + left + right, image.height + upper + lower))
    frame.paste(image, (left, upper))
    for y in range(5, frame.height, 40):
        frame.paste((200, 200, 200), (frame.width - 8, y, frame.width - 2, y + 1))
    return frame


@pytest.mark.parametrize("gain_db", [0.0, -12.5])
def test_a_crop_never_cuts_the_field(monkeypatch, gain_db):
    still(monkeypatch)
    sizes = set()
    for seed in range(10):
        _, image, _ = phantom(seed, gain_db=gain_db)
        frame = framed(image.crop((0, 0, 390, 300)), 60, 30, 50, 45)
        asked = [question("Q1", "spine"), question("Q2", "cephalic, spine at 12 o'clock")]  # no scale asked; both flip
        made, _, _ = augment(frame, asked, None, "basic", np.random.default_rng(seed))
        sizes.add(made.size)
        kept = np.asarray(image.crop((0, 0, 390, 300)).convert("L"), int)
        shown = np.asarray(made.convert("L"), int)
        assert shown.sum() >= (0.995 if gain_db else 1) * kept.sum()  # of a very weak field single specks may go
        columns, rows = (np.flatnonzero((kept > 40).sum(axis=axis) > 4) for axis in (0, 1))
        inner = kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert any(_holds(shown, part) for part in (inner, inner[:, ::-1])), seed
    assert len(sizes) > 5  # and it does crop


def _holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture holds another, pixel for pixel."""
    height, width = part.shape
    windows = (
        np.lib.stride_tricks.sliding_window_view(picture, (height, width)) if picture.shape >= part.shape else np.empty((0, 0))
    )
    probe = np.unravel_index(part.argmax(), part.shape)
    places = np.argwhere(windows[:, :, probe[0], probe[1]] == part[probe]) if windows.size else []
    return any(np.array_equal(picture[y : y + height, x : x + width], part) for y, x in places)


def test_where_weeks_or_lengths_are_asked_the_frame_stays_and_nothing_in_it_is_lost(monkeypatch):
    still(monkeypatch)
    _, image, row = phantom(5)
    frame = framed(image, 60, 30, 50, 45)
    for asked in ([question("Q5", "20-25 weeks")], [question("Q4", "HC 68.8 mm")], row["questions"]):
        assert not allowed(asked, None).cut
        made = [augment(frame, asked, None, "basic", np.random.default_rng(seed))[0] for seed in range(6)]
        assert {i.size for i in made} == {frame.size} and len({i.tobytes() for i in made}) > 3
        assert {int(np.asarray(i).astype(int).sum()) for i in made} == {int(np.asarray(frame).astype(int).sum())}
    assert not allowed([question("Q5", "20-25 weeks")], None).stretch, "weeks are read off sizes"
    assert not allowed([question("Q4", "HC 68.8 mm")], None).stretch and allowed([question("Q4", "HC, BPD")], None).stretch


def test_a_pixel_size_stays_true_of_a_cropped_picture(monkeypatch):
    still(monkeypatch)
    frame, context = framed(phantom(6)[1], 70, 60, 80, 90), "Pixel size: 0.1000 mm"
    asked = [question("Q4", "HC 68.8 mm"), question("Q5", "20-25 weeks")]
    assert not allowed(asked, context).stretch and allowed(asked, "Image size: 40.0 x 30.0 mm").cut is False
    for seed in range(5):
        made, told, line = augment(frame, asked, context, "basic", np.random.default_rng(seed))
        assert made.size < frame.size and line == context and told == asked
        assert chat.context_for(line, made.size) == f"Image size: {made.width / 10:.1f} x {made.height / 10:.1f} mm"
        part = np.asarray(made.convert("L"), int)
        whole = np.asarray(frame.convert("L"), int)
        assert any(_holds(picture, part) for picture in (whole, whole[:, ::-1]))  # its pixels are the file's own


def outlines(spec: phantoms.Spec) -> np.ndarray:
    """Corners of all that a phantom's answers name, pocket included, in pixels."""
    width, height = SIZE
    points = []
    pocket, centre, unit = phantom_drawing._pocket(spec)
    anatomy = phantom_drawing._anatomy(spec)
    parts = [(anatomy, spec.centre, spec.radius_cm * phantom_drawing.CM * spec.zoom, spec.tilt, spec.side == "right")]
    for shapes, (x, y), scale, tilt, flipped in [*parts, (pocket, centre, unit, 0.0, False)]:
        c, s, flip = math.cos(math.radians(tilt)), math.sin(math.radians(tilt)), -1 if flipped else 1
        for u, v in (point for shape in shapes for point in shape.points):
            u *= flip
            points.append((width / 2 + height * (x + scale * (u * c - v * s)), height * (y + scale * (u * s + v * c))))
    return np.array(points)


@pytest.mark.parametrize("degrees", [-15.0, 15.0])
def test_a_turn_keeps_all_that_is_named_in_the_frame_and_every_side(degrees):
    for seed in range(28):
        spec, image, row = phantom(seed, quality=("good", "low")[seed % 2])
        field = augmentation_field.find(image)
        turned = augmentation_effects.geometry(field, degrees, mirrored=bool(seed % 3))
        assert turned.angle == degrees
        points = turned.target(outlines(spec))
        assert field.lost(points) == 0, spec.category
        back = turned.source(points)
        assert np.allclose(back, outlines(spec))
        middle = np.array((SIZE[0] / 2 + spec.centre[0] * SIZE[1], spec.centre[1] * SIZE[1]))
        landmark = middle + np.array(((-1, 1)[spec.side == "right"] * 30, 0))
        ends = turned.target(np.stack([landmark, middle]))
        across, down = ends[0] - ends[1]  # from the middle of the anatomy to its landmark's side
        assert abs(across) > 3 * abs(down) and (across > 0) == ((spec.side == "right") != turned.mirrored)


def test_a_field_that_fills_the_frame_is_hardly_turned():
    field = augmentation_field.find(noise_image(200, 150, 0))
    assert abs(augmentation_effects.geometry(field, 15.0).angle) < 4 and field.box == (0, 0, 200, 150) and field.apex is None


def test_answers_that_tell_an_angle_are_not_turned():
    assert allowed([question("Q2", "cephalic, spine left")], None).turn
    for text in ("spine at 10 o'clock", "spine left, tilted by 20 degrees", "spine left, rotated"):
        assert not allowed([question("Q2", text)], None).turn


# --------------------------------------------------------------------------------------------------------------- levels


def test_the_field_and_its_apex_are_found_at_any_gain():
    width, height = SIZE
    for gain_db in (-12.5, 0.0, 12.5):
        _, image, _ = phantom(8, gain_db=gain_db)
        field = augmentation_field.find(image)
        x, y = field.apex
        assert abs(x - width / 2) < 12 and abs(y - height * phantom_drawing.APEX) < 35, gain_db
        line, depth = field.lines((30, 40))
        assert line[15, 0] < line[15, 20] < line[15, 39] and depth[3, 20] < depth[25, 20]


def test_levels_stay_within_bounds_where_quality_is_asked():
    most = augmentation.MILD.level_db * augmentation_effects.LEVELS_A_DB
    assert allowed([question("Q6", "good")], None).strength == augmentation.MILD
    assert allowed([question("Q1", "spine")], None).strength == augmentation.FULL
    for seed in range(6):
        _, image, row = phantom(seed)
        field, means = augmentation_field.find(image), []
        for strength in (augmentation.MILD, augmentation.FULL):
            rng = np.random.default_rng(seed)
            grey, before = image.convert("L"), augmentation_effects.Levels(image, field).mean
            made = augmentation._toned(augmentation._with_acoustics(grey, field, strength, rng), field, strength, before, rng)
            means.append(abs(augmentation_effects.Levels(made, field).mean - before))
            assert (np.asarray(made)[np.asarray(grey) == 0] == 0).all()  # the surround stays black
        assert means[0] <= most + 0.5


def test_quality_read_by_a_meter_of_clean_phantoms_stays_true():
    """Gain and blur are estimated from levels and the energy of details; the limits lie between the phantoms' severities."""
    from scipy.ndimage import gaussian_filter
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    def measured(image: Image.Image) -> list[float]:
        grey = np.asarray(image.convert("L"), np.float32)
        grey = grey + np.random.default_rng(0).uniform(-2, 2, grey.shape).astype(np.float32) * (
            grey > 0
        )  # steps of 4 grey levels
        x, y = augmentation_field.find(image).points.astype(int).T
        cells = np.zeros_like(grey)
        cells[y, x] = 1
        dense = gaussian_filter(cells, 12)
        smooth = gaussian_filter(grey, 1)
        inside = dense > 0.75 * dense.max()
        bands, last = [], grey
        for width in (0.8, 1.6, 3.2, 6.4):
            blurred = gaussian_filter(grey, width)
            bands.append(np.log(np.square((last - blurred)[inside & (smooth > 30) & (smooth < 200)]).mean() + 0.1))
            last = blurred
        return [smooth[inside].mean(), smooth[inside].std(), *np.percentile(smooth[inside], (10, 30, 50, 70, 90)), *bands]

    made = [phantom(seed) for seed in range(300)]
    clean = np.array([measured(image) for _, image, _ in made])
    wanted = np.array([(spec.gain_db, spec.blur) for spec, _, _ in made])
    meter = make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    meter.fit(clean[:220], wanted[:220] / (1, 0.001))

    def right(table: np.ndarray) -> float:
        gain, blur = (meter.predict(table) * (1, 0.001)).T
        faults = np.maximum(np.digitize(np.abs(gain), (4, 9.25)), np.digitize(blur, (0.0055, 0.015)))
        return float(np.mean([("good", "medium", "low")[f] == m[0].quality for f, m in zip(faults, made[220:], strict=True)]))

    def variants(level: str) -> np.ndarray:
        return np.array([measured(Augmentation(level, 2)(image, row, 0)[0]) for _, image, row in made[220:]])

    assert right(clean[220:]) > 0.98
    assert right(variants("basic")) > 0.94 and right(variants("advanced")) > 0.93


def test_colours_and_odd_pictures_pass():
    asked = [question("Q1", "spine"), question("Q6", "good")]
    for image in (
        noise_image(17, 16, 0),
        Image.new("RGB", (64, 48)),
        Image.new("RGB", (64, 48), (255, 255, 255)),
        noise_image(96, 64, 1),
    ):
        for level, seed in itertools.product(("basic", "advanced"), range(4)):
            made, told, context = augment(image, asked, None, level, np.random.default_rng(seed))
            assert made.mode == "RGB" and told == asked and context is None
    colours = np.asarray(made).reshape(-1, 3)
    assert (colours[:, 0] != colours[:, 1]).any()


def test_unanswered_questions_of_a_row_stay_and_order_does():
    _, image, row = phantom(9)
    row["questions"][3] = row["questions"][3] | {"answer": "", "label": ""}
    for draw in range(4):
        _, told = Augmentation("basic", 0)(image, row, draw)
        assert [q["question_id"] for q in told["questions"]] == list(QUESTIONS) and told["questions"][3] == row["questions"][3]
        assert len(chat.tasks_of(told)) == 7 and told["group"] == "P"
