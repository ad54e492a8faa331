"""What an augmentation does to pixels: one resampling for all geometry, and changes of grey level in decibels.

A B-mode picture is log-compressed: equal steps of grey are equal steps in decibels, and what multiplies an echo adds to its
grey level. So gain, attenuation, shadows and speckle are sums here. Sources: Szabo, Diagnostic Ultrasound Imaging (2nd ed.,
2014), chapters 4 (attenuation) and 10 (log compression); for speckle see `speckle`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sonovqa.augmentation_field import Field

DISPLAY_DB = 60.0  # dynamic range of the display; scanners are set to 50 … 70 dB
LEVELS_A_DB = 255 / DISPLAY_DB
FLOOR = 8  # grey levels over which a change fades out towards black, so that the surround stays black
MESH = (8, 6)  # cells of the elastic mesh, across and down
STRAIN = 0.06  # most by which neighbouring nodes of the mesh move apart or together, share of a cell
LOST = 0.01  # most of the field that a rotation may turn out of the frame


@dataclass(frozen=True)
class Geometry:
    """A rotation about a centre, a shift, a mirror image and an elastic displacement, in pixels; y runs downwards.

    Attributes:
        size: width and height.
        angle: degrees, clockwise as seen.
        centre, shift: the centre of rotation, and where it goes.
        mirrored: left and right change places, after all else.
        moved: ``[MESH[1] + 1, MESH[0] + 1, 2]``, displacement at the mesh's nodes, or ``None``.
    """

    size: tuple[int, int]
    angle: float = 0.0
    centre: tuple[float, float] = (0.0, 0.0)
    shift: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False
    moved: np.ndarray | None = None

    def target(self, points: np.ndarray) -> np.ndarray:
        """Where points ``[..., 2]`` of the picture go, the elastic displacement left out."""
        turned = (points - self.centre) @ _rotation(self.angle).T + self.centre + self.shift
        return turned * (-1, 1) + (self.size[0], 0) if self.mirrored else turned

    def source(self, points: np.ndarray) -> np.ndarray:
        """Where points ``[..., 2]`` of the changed picture come from, the elastic displacement left out."""
        points = (self.size[0], 0) + points * (-1, 1) if self.mirrored else points
        return (points - self.centre - np.array(self.shift)) @ _rotation(self.angle) + self.centre

    def apply(self, image):
        """The changed PIL picture, resampled once (bicubic), or not at all for a mere mirror image; black comes in."""
        from PIL import Image

        if self.angle == 0 and self.moved is None and self.shift == (0.0, 0.0):
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image
        if self.moved is None:
            (c, f), (a, d), (b, e) = self.source(np.array([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]))
            how = Image.Transform.AFFINE, (a - c, b - c, c, d - f, e - f, f)
        else:
            how = Image.Transform.MESH, self._mesh()
        return image.transform(image.size, *how, Image.Resampling.BICUBIC)

    def _mesh(self) -> list:
        """Pillow's mesh: target boxes, each with the corners it comes from (from the upper left against the clock)."""
        width, height = self.size
        x, y = (np.rint(np.linspace(0, end, n + 1)).astype(int) for end, n in ((width, MESH[0]), (height, MESH[1])))
        nodes = self.source(np.stack(np.meshgrid(x, y), axis=-1).astype(float)) + self.moved
        return [
            ((int(x[i]), int(y[j]), int(x[i + 1]), int(y[j + 1])),
             [float(v) for k, m in ((j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)) for v in nodes[k, m]])
            for j in range(MESH[1]) for i in range(MESH[0])
        ]  # fmt: skip


def _rotation(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s], [s, c]])


def geometry(field: Field, angle: float, mirrored: bool = False, moved: np.ndarray | None = None) -> Geometry:
    """A rotation of the field about its middle, by ``angle`` degrees or by as much less as keeps all but `LOST` of it in the
    frame, in which it is centred; then, where told, an elastic displacement and a mirror image."""
    middle = tuple(field.points.mean(axis=0).tolist())
    for halvings in range(5 if angle else 0):
        turned = Geometry(field.size, angle / 2**halvings, middle)
        points = turned.target(field.points)
        shift = np.array(field.size) / 2 - (points.min(axis=0) + points.max(axis=0)) / 2
        if field.lost(points + shift) <= LOST:
            return Geometry(field.size, turned.angle, middle, tuple(shift.tolist()), mirrored, moved)
    return Geometry(field.size, mirrored=mirrored, moved=moved)


def displacement(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement of the mesh's nodes, zero at the frame, so that nothing leaves it and its mean strain is zero.

    Source: free-form deformation by a control mesh, Rueckert et al., IEEE Trans. Med. Imaging 18 (1999); random fields as in
    Simard et al., ICDAR 2003.
    """
    from scipy.ndimage import gaussian_filter

    drawn = rng.standard_normal((MESH[1] + 1, MESH[0] + 1, 2))
    drawn = gaussian_filter(drawn, (1.0, 1.0, 0))
    drawn[[0, -1]] = drawn[:, [0, -1]] = 0
    cell = min(size[0] / MESH[0], size[1] / MESH[1])
    steepest = max(np.abs(np.diff(drawn, axis=0)).max(), np.abs(np.diff(drawn, axis=1)).max())
    return drawn * (rng.uniform(0.3, 1) * STRAIN * cell / steepest)


class Levels:
    """The grey levels of a picture's field: ``weights`` ``[256]``, their shares; black surround counts in none of them."""

    def __init__(self, image, field: Field):
        counts = np.array(image.convert("L").histogram(), float)
        self.weights = counts / max(counts.sum() * field.share, 1.0)

    @property
    def mean(self) -> float:
        return float(np.arange(256) @ self.weights)


@dataclass(frozen=True)
class Tone:
    """Changes that are the same for every pixel.

    Attributes:
        gain_db: added to every echo.
        brightness, contrast, gamma: factors on grey, on its distance from the field's mean, and exponent.
    """

    gain_db: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0

    def table(self, levels_of: Levels, mean: float, most_db: float) -> np.ndarray:
        """The new level of each of 256 grey levels, uint8 ``[256]``; black stays black.

        Args:
            levels_of: the picture's levels.
            mean: of the field before anything was done to it.
            most_db: most by which the field's mean may be off that; what goes beyond is taken back.
        """
        levels, weights = np.arange(256.0), levels_of.weights
        changed = 255 * (levels / 255) ** self.gamma
        changed = (mean + (changed - mean) * self.contrast) * self.brightness + self.gain_db * LEVELS_A_DB
        fade = np.minimum(levels / FLOOR, 1)
        changed = levels + (changed - levels) * fade
        most = most_db * LEVELS_A_DB
        for _ in range(3):  # clipping takes part of each correction
            shift = float(np.clip(changed, 0, 255) @ weights) - mean
            changed -= (shift - float(np.clip(shift, -most, most))) * fade
        return np.rint(np.clip(changed, 0, 255)).astype(np.uint8)


def attenuation(depth: np.ndarray, decibels: float) -> np.ndarray:
    """Loss that grows in proportion to depth, ``decibels`` over the field, about its mean (the scanner's gain makes up for it).

    Source: exponential attenuation in tissue, about 0.5 dB/cm/MHz one way (Szabo, chapter 4).
    """
    return decibels * (0.5 - np.clip(depth, 0, 1))


def shadow(line: np.ndarray, depth: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """An acoustic shadow: a few scan lines, with soft edges, lose up to ``decibels`` behind some depth."""
    middle, width, start = rng.uniform(0.1, 0.9), rng.uniform(0.03, 0.08), rng.uniform(0.15, 0.5)
    across = np.exp(-0.5 * ((line - middle) / (width / 2)) ** 2)
    return -decibels * across * np.clip((depth - start) / 0.1, 0, 1)


def speckle(shape: tuple[int, int], decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Multiplicative speckle, in decibels: intensity is gamma-distributed, the mean of N independent speckle patterns.

    Args:
        shape: rows and columns of grains.
        decibels: standard deviation; fully developed speckle (N = 1) has 5.6 dB.
        rng: source of randomness.

    Source: Goodman, in Laser Speckle and Related Phenomena (1975), section 2.2 (sums of speckle intensities are gamma-
    distributed); Burckhardt, IEEE Trans. Sonics Ultrason. 25 (1978), for B-mode.
    """
    looks = (10 / math.log(10) / decibels) ** 2 + 0.5  # of the variance of log-gamma, the trigamma function: about 1/(N - 1/2)
    power = rng.standard_gamma(looks, shape, dtype=np.float32) / np.float32(looks)
    return 10 * np.log10(np.maximum(power, 1e-6))


def add_db(image, decibels: np.ndarray):
    """A PIL picture with a map of decibels added, the map resized to it (bilinear); black stays black."""
    from PIL import Image

    level = np.asarray(image, np.float32)
    change = Image.fromarray(decibels.astype(np.float32) * np.float32(LEVELS_A_DB)).resize(image.size, Image.Resampling.BILINEAR)
    change = np.asarray(change)
    change = change if level.ndim == 2 else change[..., None]
    level = level + change * np.minimum(level * np.float32(1 / FLOOR), 1)
    return Image.fromarray(np.clip(level + 0.5, 0, 255).astype(np.uint8), image.mode)
