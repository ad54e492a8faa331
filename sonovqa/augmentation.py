"""Augmentation of training images that never makes an answer false (experiment 6).

``basic``: rotation, brightness, contrast, gain, gamma, crop and left-right flip; ``advanced``: besides, speckle, depth-dependent
attenuation, acoustic shadow and elastic deformation. What is done to a picture depends on what is asked of it (`allowed`):

- *Flip*: only if every answer of the row has a mirrored wording that is certain (`augmentation_sides`); answers change with it.
- *Rotation*, up to 15 degrees: planes, presentation and lie are said of the fetus and the mother, which turning the display
  leaves alone. A side is the nearest of left, right, top and bottom, so it holds up to 45 degrees from its axis. Answers that
  tell an hour or an angle stop it. All but 1 % of the field stays in the frame, or the picture is turned less.
- *Crop*: only the surround goes, never the field itself. Where weeks or millimetres are asked and no pixel size is told, what
  is not black (field, depth ticks, text) is moved within the frame instead, pixel for pixel: a smaller frame would be enlarged
  on its way to the model. With a pixel size the frame shrinks, and `chat.context_for` tells its new width in millimetres.
- *Levels*: where image quality is asked, the field's mean stays within 1 dB of a 60 dB display, whatever else is done, nothing
  is blurred, and the one resampling is bicubic. (Phantoms call a gain of up to 2 dB good, 6 to 7 medium, 11.5 and more low.)
- *Shadow*: never so deep that it hides what is named: 4 or 6 dB, where the dark parts of a phantom lie 8 dB above black.
- *Elastic*: not where weeks or millimetres are asked: it moves neighbouring parts by up to 6 % of their distance.

Pillow resamples and SciPy smooths: torchvision's transforms draw from torch's global generator, resample once each, and
know no decibels; Albumentations is no longer maintained, and MONAI's are made for volumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sonovqa import answers as meanings
from sonovqa import augmentation_effects as effects
from sonovqa import augmentation_field, augmentation_sides, chat
from sonovqa.augmentation_field import Field
from sonovqa.files import sha256
from sonovqa.questions import QUESTIONS, REPORT_ID
from sonovqa.report_sections import sections_of

LEVELS = ("none", "basic", "advanced")
MOST_DEGREES = 15.0
MARGIN = 0.02  # of the field's shorter side, kept around it by a crop
OFTEN = 0.5  # how often each of flip, speckle, attenuation, shadow and elastic deformation is done


@dataclass(frozen=True)
class Strength:
    """The most that is done to grey levels: decibels, and for contrast and gamma the logarithm of the factor."""

    level_db: float
    brightness: float
    contrast: float
    gamma: float
    speckle_db: float
    attenuation_db: float
    shadow_db: float


#: Where image quality is asked (Q6, a report, or a question that nobody knows), and where it is not.
MILD = Strength(1.0, 0.03, 0.05, 0.05, 0.8, 3.0, 4.0)
FULL = Strength(4.0, 0.15, 0.20, 0.20, 2.0, 8.0, 6.0)


@dataclass(frozen=True)
class Allowed:
    """What may be done to one row's picture.

    Attributes:
        mirrored: the answers' texts after a flip, or ``None`` if there must be none.
        turn, cut, stretch: rotation, a smaller frame, elastic deformation.
        acoustic: speckle, attenuation and shadow: of ultrasound only.
        strength: of what is done to grey levels.
    """

    mirrored: tuple[str, ...] | None
    turn: bool
    cut: bool
    stretch: bool
    acoustic: bool
    strength: Strength


def allowed(answers: Sequence[Mapping], context: str | None) -> Allowed:
    """What may be done to a picture of which ``answers`` (``{question_id, question, answer}``) and ``context`` must stay true."""
    known = all(one["question_id"] in QUESTIONS or one["question_id"] == REPORT_ID for one in answers)
    asked = {name for one in answers for name in _asked_in(one)}
    turning = [context or "", *(one["answer"] for one in answers if "Q2" in _asked_in(one))]
    sided = any(augmentation_sides.has_side(text) for text in [context or "", *(one["question"] for one in answers)])
    swapped = [None if sided else augmentation_sides.mirrored(one["question_id"], one["answer"]) for one in answers]
    pixels = context is not None and chat.context_for(context, (1, 1)) != context
    valued = any(_holds_length(one) for one in answers)
    return Allowed(
        mirrored=None if None in swapped else tuple(swapped),
        turn=known and not any(map(augmentation_sides.names_a_turn, turning)),
        cut=known and (pixels or not (context or valued or "Q5" in asked)),
        stretch=known and not (context or valued or "Q5" in asked),
        acoustic=known,
        strength=MILD if "Q6" in asked or not known else FULL,
    )


def _asked_in(one: Mapping) -> list[str]:
    """The questions that an answer answers: one, or a report's sections."""
    return list(sections_of(one["answer"])) if one["question_id"] == REPORT_ID else [one["question_id"]]


def _holds_length(one: Mapping) -> bool:
    """Whether an answer gives measured values: Q4's, or those of its section in a report."""
    text = sections_of(one["answer"]).get("Q4", "") if one["question_id"] == REPORT_ID else one["answer"]
    meaning = meanings.read("Q4", text) if one["question_id"] in ("Q4", REPORT_ID) else None
    return meaning is not None and bool(meaning.values)


def augment(
    image, answers: Sequence[Mapping], context: str | None, level: str, rng: np.random.Generator
) -> tuple[object, list[dict], str | None]:
    """One random variant of a picture, with the answers that are true of it.

    Args:
        image: a PIL image, RGB.
        answers: all that is asked of it, ``{question_id, question, answer}`` with perhaps a ``label``.
        context: the picture's context line, or ``None``.
        level: one of `LEVELS`; ``none`` gives back what came.
        rng: source of all randomness: the same state, the same result.

    Returns:
        The picture (RGB; smaller where it was cropped, else of the same size), the answers, and the context, which stays
        true: a pixel size is that of the file's own pixels, and none is enlarged.

    Raises:
        ValueError: if the level is unknown.
    """
    if level not in LEVELS:
        raise ValueError(f"no such augmentation: {level!r}; choose {', '.join(LEVELS)}")
    if level == "none":
        return image, [dict(one) for one in answers], context
    may = allowed(answers, context)
    flip = bool(rng.random() < OFTEN) and may.mirrored is not None
    picture = _one_channel(image)
    field = augmentation_field.find(picture)
    picture, field = (_cropped if may.cut else _shifted)(picture, field, rng)
    mean = effects.Levels(picture, field).mean
    if level == "advanced" and may.acoustic:
        picture = _with_acoustics(picture, field, may.strength, rng)
    picture = _toned(picture, field, may.strength, mean, rng)
    turned = rng.uniform(-MOST_DEGREES, MOST_DEGREES) * may.turn
    moved = None
    if level == "advanced" and may.stretch and rng.random() < OFTEN:
        moved = effects.displacement(picture.size, rng)
    picture = effects.geometry(field, turned, flip, moved).apply(picture)
    told = [dict(one) for one in answers]
    if flip:
        told = [_reworded(one, text) for one, text in zip(answers, may.mirrored, strict=True)]
    return picture.convert("RGB"), told, context


def _one_channel(image):
    """A grey picture in one channel, which is three times as fast; a picture with colours as it is."""
    from PIL import ImageChops

    red, green, blue = image.split()
    grey = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    return red if grey else image


def _cropped(image, field: Field, rng: np.random.Generator):
    """A smaller frame, cut anywhere between the old one and the field with its margin."""
    (width, height), box = image.size, field.box
    margin = math.ceil(MARGIN * min(box[2] - box[0], box[3] - box[1]))
    free = [edge - margin for edge in (box[0], box[1], width - box[2], height - box[3])]
    left, upper, right, lower = (int(rng.integers(max(room, 0) + 1)) for room in free)
    image = image.crop((left, upper, width - right, height - lower))
    return image, field.moved(-left, -upper, image.size)


def _shifted(image, field: Field, rng: np.random.Generator):
    """All that is not black, moved within the same frame by whole pixels."""
    from PIL import Image

    left, upper, right, lower = field.content
    x = int(rng.integers(-left, image.size[0] - right + 1))
    y = int(rng.integers(-upper, image.size[1] - lower + 1))
    frame = Image.new(image.mode, image.size)
    frame.paste(image.crop(field.content), (left + x, upper + y))
    return frame, field.moved(x, y, image.size)


def _with_acoustics(image, field: Field, most: Strength, rng: np.random.Generator):
    """Attenuation, shadow and speckle, each half of the time; what they take from the field's mean the gain gives back."""
    width, height = image.size
    grain = max(1.5, 0.006 * height)  # pixels
    shape = round(height / grain), round(width / grain)
    some = rng.random(3) < OFTEN
    change = np.zeros(shape, np.float32)
    if some[0] or some[1]:
        line, depth = field.lines(shape)
        if some[0]:
            change += effects.attenuation(depth, rng.uniform(0, most.attenuation_db))
        if some[1]:
            change += effects.shadow(line, depth, rng.uniform(0.3, 1) * most.shadow_db, rng)
    if some[2]:
        change += effects.speckle(shape, rng.uniform(0.2, 1) * most.speckle_db, rng)
    return effects.add_db(image, change - change[field.cells(shape)].mean()) if some.any() else image


def _toned(image, field: Field, most: Strength, mean: float, rng: np.random.Generator):
    brightness, contrast, gamma = (math.exp(rng.uniform(-one, one)) for one in (most.brightness, most.contrast, most.gamma))
    tone = effects.Tone(rng.uniform(-most.level_db, most.level_db), brightness, contrast, gamma)
    table = tone.table(effects.Levels(image, field), mean, most.level_db)
    return image.point(table.tolist() * len(image.getbands()))


def _reworded(one: Mapping, text: str) -> dict:
    if text == one["answer"]:
        return dict(one)
    label = {"label": meanings.label(one["question_id"], text, one["question"])} if "label" in one else {}
    return {**one, "answer": text, **label}


@dataclass(frozen=True)
class Augmentation:
    """Augments rows of the data set: the same row and draw give the same picture in any worker and after any resumption.

    Attributes:
        level: one of `LEVELS`.
        seed: 0 or more.
    """

    level: str
    seed: int = 0

    def __call__(self, image, row: Mapping, draw: int) -> tuple[object, dict]:
        """The picture and the row that is true of it.

        Args:
            image: the row's picture, a PIL image, RGB.
            row: of the data set; ``image_id``, ``questions`` and ``context`` are read. All its questions stay true, asked or not.
            draw: a number of its own for every drawing of the row (its epoch, say, and repeat), 0 or more.

        Returns:
            The picture as from `augment`, and the row with ``questions`` and ``context`` replaced, in the same order and number.
        """
        rng = np.random.default_rng([self.seed, int(sha256(row["image_id"])[:16], 16), draw])
        answered = [q for q in row["questions"] if q["answer"]]
        image, told, context = augment(image, answered, row.get("context") or None, self.level, rng)
        following = iter(told)
        questions = [next(following) if q["answer"] else q for q in row["questions"]]
        return image, {**row, "questions": questions, "context": context}
