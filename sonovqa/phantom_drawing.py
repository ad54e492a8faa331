"""Draws a phantom: anatomy in a curvilinear fan with log-compressed Rayleigh speckle, attenuation and acoustic shadows.

The image is formed in a scanner's order: an echo map is sampled along scan lines, speckle, attenuation, shadows and gain
are added there in decibels, and the lines are scan-converted. Lengths are in heights of the image unless told otherwise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from sonovqa.phantom_anatomy import ANATOMIES, BONE, FLUID, TISSUE, Shapes, oval, stroke

#: The fan: its apex above the middle of the upper edge, radii of the probe's face and of the deepest echo.
APEX, NEAR, DEEP, HALF_ANGLE = -0.10, 0.15, 1.08, math.radians(47)
DEPTH_CM = 15.0  #: depth shown at zoom 1
CM = (DEEP - NEAR) / DEPTH_CM  #: a centimetre at zoom 1
POCKET_CM = 3.8  #: size of the fluid pocket, the same at every gestational age
DYNAMIC_RANGE_DB = 52.0
SPECKLE = 0.5  #: share of full log-Rayleigh speckle (5.6 dB) left after the frame averaging of a scanner
DEPTH_LOSS, SHADOW_LOSS, PATCHINESS = 0.10, 0.22, 0.05  #: in display levels
GREY_STEP = 4  #: a 6-bit display, as many scan converters have; it also takes a third off a PNG


@dataclass(frozen=True)
class Spec:
    """Everything a phantom is drawn from. The answers follow from the first six, and those decide or bound the rest.

    Attributes:
        category: one of `sonovqa.questions.CATEGORIES`.
        abnormal: whether the category's finding is drawn.
        side: ``left`` or ``right``: where the landmark (occiput, spine or head) lies.
        presentation: ``cephalic`` or ``breech``: a skull or a pair of feet in the pocket of fluid at the lower pole.
        weeks: gestational-age interval, a key of `sonovqa.phantom_anatomy.RADIUS_CM`; seen in ``radius_cm``.
        quality: ``good``, ``medium`` or ``low``; seen in ``gain_db`` and ``blur``.
        radius_cm: radius of the anatomy in cm.
        zoom: magnification relative to `DEPTH_CM`; the depth ticks follow it.
        centre: (x, y) of the anatomy from the middle of the upper edge.
        tilt: rotation in degrees.
        pocket: direction of the pocket in degrees; 0 above the anatomy, 180 below.
        gain_db: overall gain in dB.
        blur: standard deviation of the point spread.
        seed: of speckle and background.
    """

    category: str
    abnormal: bool
    side: str
    presentation: str
    weeks: str
    quality: str
    radius_cm: float
    zoom: float
    centre: tuple[float, float]
    tilt: float
    pocket: float
    gain_db: float
    blur: float
    seed: int


@dataclass(frozen=True)
class _Fan:
    """A display size's index maps, computed once.

    Attributes:
        pick: int64 [lines, samples], which pixel of the flat echo map a sample hears.
        convert: sparse [height * width, lines * samples], bilinear scan conversion.
    """

    pick: np.ndarray
    convert: object


@functools.lru_cache(maxsize=4)
def _fan(width: int, height: int) -> _Fan:
    from scipy.sparse import csr_array

    lines, samples = max(48, int(0.42 * height)), max(48, int(0.5 * height))
    angle, reach = np.linspace(-HALF_ANGLE, HALF_ANGLE, lines)[:, None], np.linspace(NEAR, DEEP, samples)[None, :]
    column = np.rint(width / 2 + height * reach * np.sin(angle)).astype(np.int64).clip(0, width - 1)
    row = np.rint(height * (APEX + reach * np.cos(angle))).astype(np.int64).clip(0, height - 1)
    y, x = np.mgrid[0:height, 0:width]
    across, down = (x.ravel() + 0.5 - width / 2) / height, (y.ravel() + 0.5) / height - APEX
    line = (np.arctan2(across, down) / HALF_ANGLE + 1) / 2 * (lines - 1)
    sample = (np.hypot(across, down) - NEAR) / (DEEP - NEAR) * (samples - 1)
    inside = np.flatnonzero((line >= 0) & (line < lines - 1) & (sample >= 0) & (sample < samples - 1))
    line, sample = line[inside].astype(np.float32), sample[inside].astype(np.float32)
    first = line.astype(np.int32) * samples + sample.astype(np.int32)
    u, v = line % 1, sample % 1
    weights = np.stack([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v], 1)
    corners = first[:, None] + np.array([0, 1, samples, samples + 1], np.int32)
    counts = np.zeros(width * height + 1, np.int32)
    counts[inside + 1] = 4
    shape = (width * height, lines * samples)
    return _Fan(
        row * width + column, csr_array((weights.ravel(), corners.ravel(), np.cumsum(counts, dtype=np.int32)), shape=shape)
    )


def structures_of(spec: Spec) -> dict[str, Shapes]:
    """The structures that are drawn, by canonical name and in drawing order."""
    anatomy = ANATOMIES[spec.category]
    return {**anatomy.structures, **(anatomy.altered if spec.abnormal else {})}


def _anatomy(spec: Spec) -> Shapes:
    anatomy = ANATOMIES[spec.category]
    structures = (shape for shapes in structures_of(spec).values() for shape in shapes)
    return (*anatomy.body, *structures, *(anatomy.lesion if spec.abnormal else ()))


def _pocket(spec: Spec) -> tuple[Shapes, tuple[float, float], float]:
    """The pocket of fluid with the presenting part, as shapes around its own centre, that centre, and its unit's length.

    Skull and feet have the same area, so that overall brightness tells nothing. The pocket is kept inside the fan.
    """
    unit = POCKET_CM * CM * spec.zoom
    away = (0.85 * spec.radius_cm * CM * spec.zoom) + 0.30 * unit
    angle = math.radians(spec.pocket)
    x, y = spec.centre[0] + away * math.sin(angle), spec.centre[1] - away * math.cos(angle)
    reach = min(max(math.hypot(x, y - APEX), NEAR + 0.5 * unit), DEEP - 0.45 * unit)
    widest = HALF_ANGLE - 0.65 * unit / reach
    turn = min(max(math.atan2(x, y - APEX), -widest), widest)
    if spec.presentation == "cephalic":
        part = (oval(0, 0, 0.27, 0.27, BONE),)
    else:
        part = tuple(stroke(0.22, BONE, (d, -0.26), (d, 0.26)) for d in (-0.28, 0.28))
    return (oval(0, 0, 0.62, 0.40, FLUID), *part), (reach * math.sin(turn), APEX + reach * math.cos(turn)), unit


def _echo_map(spec: Spec, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Echo level and share of sound kept, both float32 [height, width], 0 … 1."""
    from PIL import Image, ImageDraw, ImageFilter

    echo, kept = Image.new("L", (width, height), round(255 * TISSUE)), Image.new("L", (width, height), 0)
    pen, shade = ImageDraw.Draw(echo), ImageDraw.Draw(kept)

    def put(shapes: Shapes, centre: tuple[float, float], unit: float, tilt: float = 0.0, mirrored: bool = False) -> None:
        unit, turn, flip = unit * height, math.radians(tilt), -1 if mirrored else 1
        c, s, x0, y0 = math.cos(turn), math.sin(turn), width / 2 + centre[0] * height, centre[1] * height
        for shape in shapes:
            points = [(x0 + unit * (flip * x * c - y * s), y0 + unit * (flip * x * s + y * c)) for x, y in shape.points]
            for canvas, level in ((pen, shape.level), (shade, shape.shadow))[: 2 if shape.shadow else 1]:
                if shape.width:
                    canvas.line(points, round(255 * level), max(1, round(unit * shape.width)), joint="curve")
                else:
                    canvas.polygon(points, round(255 * level))

    put(_anatomy(spec), spec.centre, spec.radius_cm * CM * spec.zoom, spec.tilt, spec.side == "right")
    put(*_pocket(spec))
    echo = echo.filter(ImageFilter.GaussianBlur(height * (0.004 + spec.blur)))
    return np.asarray(echo, np.float32) / 255, np.asarray(kept, np.float32) / 255


def _background(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Slow unevenness of tissue, the same kind in every category: float32 of ``shape``, mean about 0."""
    from PIL import Image

    coarse = Image.fromarray(rng.standard_normal((7, 9), dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))


def _speckle_db(spec: Spec, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Log-compressed fully developed speckle: power of a correlated complex Gaussian field; blur widens its cells.

    Source: Wagner et al., "Statistics of speckle in ultrasound B-scans", IEEE Trans. Sonics Ultrason. 30 (1983).
    """
    from scipy.ndimage import gaussian_filter

    grain = (0.9 + 150 * spec.blur * shape[0] / 252, 0.6 + 100 * spec.blur * shape[1] / 300)
    parts = rng.standard_normal((2, *shape), dtype=np.float32)
    power = sum(gaussian_filter(part, grain, mode="nearest", truncate=2.5) ** 2 for part in parts)
    return 10 * np.log10(power / power.mean() + 1e-3)


def draw(spec: Spec, size: tuple[int, int] = (800, 600)) -> np.ndarray:
    """Draw a phantom.

    Args:
        spec: what to draw.
        size: width and height in pixels, 64 x 48 or more; the scene is laid out for 4:3.

    Returns:
        Grey image, uint8 [height, width], 64 levels; the same for the same arguments.
    """
    width, height = size
    rng, fan = np.random.default_rng(spec.seed), _fan(width, height)
    echo, kept = (plane.ravel()[fan.pick] for plane in _echo_map(spec, width, height))
    samples = echo.shape[1]
    heard = np.cumsum(kept, axis=1) * (60 * (DEEP - NEAR) / samples * 0.12)
    level = echo + PATCHINESS * _background(echo.shape, rng) * (echo > 0.15)
    level -= DEPTH_LOSS * np.linspace(0, 1, samples, dtype=np.float32)
    level -= SHADOW_LOSS * (1 - np.exp(-heard)) * (kept < 0.05)
    level += (SPECKLE * _speckle_db(spec, echo.shape, rng) + spec.gain_db) / DYNAMIC_RANGE_DB
    grey = (255 * np.clip(level, 0, 1)).astype(np.float32)
    image = (fan.convert @ grey.ravel()).reshape(height, width)
    _draw_ticks(image, spec)
    return (image / GREY_STEP).astype(np.uint8) * GREY_STEP


def _draw_ticks(image: np.ndarray, spec: Spec) -> None:
    """Depth ticks at the right edge, 1 cm apart, every fifth longer."""
    height, width = image.shape
    for index in range(int(DEPTH_CM / spec.zoom) + 1):
        y = round(height * (APEX + NEAR + index * CM * spec.zoom))
        if 0 <= y < height:
            length = width // 80 * (2 if index % 5 == 0 else 1)
            image[y : y + max(1, height // 300), width - 1 - length : width - 1] = 200
