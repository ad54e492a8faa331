"""Where the echoes of an ultrasound image lie: the field without its black surround, and the scan lines through it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GRID = 96  # the shorter side of the picture the field is found on, in cells, at most
BLACK, DARK = 8, 2  # grey levels of a pixel and of a cell's mean below which it is background: compression leaves some noise
PART = 0.05  # of the largest part; a part that is smaller is no field
SMALLEST = 0.15  # of the frame; what is smaller is no field, and nothing is cut
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Field:
    """The field of one picture.

    Attributes:
        size: width and height of the picture in pixels.
        step: side of a cell in pixels.
        points: ``[n, 2]``, x and y in pixels of the middles of the cells that belong to it.
        box: left, upper, right, lower of the field in pixels, right and lower outside it.
        content: the same of everything that is not black: field, depth ticks, burnt-in text.
        apex: (x, y) in pixels where its side edges meet, or ``None`` for parallel scan lines.
    """

    size: tuple[int, int]
    step: int
    points: np.ndarray
    box: Box
    content: Box
    apex: tuple[float, float] | None

    def lost(self, points: np.ndarray) -> float:
        """The share of `points` (``[n, 2]``, in pixels) outside the frame."""
        width, height = self.size
        x, y = points.T
        return float(np.mean((x < 0) | (x > width) | (y < 0) | (y > height)))

    def lines(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Across and along the scan lines for a grid over the picture.

        Args:
            shape: rows and columns of the grid.

        Returns:
            float32 ``[rows, columns]`` twice: the scan line, 0 (left) to 1 (right), and the depth, 0 (probe) to 1 (deepest)
            within the field; they run on outside it.
        """
        width, height = self.size
        x = ((np.arange(shape[1], dtype=np.float32) + 0.5) * (width / shape[1]))[None, :]
        y = ((np.arange(shape[0], dtype=np.float32) + 0.5) * (height / shape[0]))[:, None]
        inside = self._polar(*self.points.T)
        line, depth = (_scaled(all_over, own) for all_over, own in zip(self._polar(x, y), inside, strict=True))
        return line, depth

    def cells(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the field's points in a grid of ``shape`` over the picture."""
        width, height = self.size
        x, y = self.points.T
        return (y * shape[0] / height).astype(int), (x * shape[1] / width).astype(int)

    @property
    def share(self) -> float:
        """Of the picture, 0 … 1."""
        return len(self.points) * self.step**2 / (self.size[0] * self.size[1])

    def moved(self, x: int, y: int, size: tuple[int, int]) -> Field:
        """The field in a picture of another size to which its own is moved by (x, y) pixels."""
        by = (x, y, x, y)
        box, content = (tuple(edge + b for edge, b in zip(one, by, strict=True)) for one in (self.box, self.content))
        apex = None if self.apex is None else (self.apex[0] + x, self.apex[1] + y)
        return Field(size, self.step, self.points + np.array((x, y)), box, content, apex)

    def _polar(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.apex is None:
            return x + 0 * y, y + 0 * x
        x, y = x - self.apex[0], y - self.apex[1]
        return np.arctan2(x, y), np.hypot(x, y)


def _scaled(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    return ((values - own.min()) / max(np.ptp(own), 1e-6)).astype(np.float32)


def find(image) -> Field:
    """Find the field of a PIL picture: the hull of its large parts that are not black.

    The hull takes in dark fluid, shadows and the weak echoes of a picture with low gain; thin text and ticks beside the field
    are too small a part. A picture without black surround is its own field.
    """
    from scipy import ndimage

    grey = image.convert("L")
    step = max(1, min(image.size) // GRID)
    cells = np.pad(np.asarray(grey.reduce(step)) >= DARK, 4, mode="edge")
    joined = ndimage.binary_closing(cells, iterations=2)  # the scattered speckle of a weak field
    opened = ndimage.binary_opening(joined)[4:-4, 4:-4]
    named, count = ndimage.label(opened)
    sizes = np.bincount(named.ravel(), minlength=2) * (np.arange(max(count, 1) + 1) > 0)
    inside = _hull((sizes >= PART * sizes.max())[named] & opened) if count else opened
    if inside.mean() < SMALLEST:
        inside = np.ones_like(opened)
    rows, columns = np.nonzero(inside)
    box = _within((columns.min() - 1, rows.min() - 1, columns.max() + 2, rows.max() + 2), step, image.size)
    shown = grey.point(lambda level: 255 * (level >= BLACK)).getbbox() or (0, 0, *image.size)
    content = (*map(min, box[:2], shown[:2]), *map(max, box[2:], shown[2:]))
    points = (np.stack([columns, rows], axis=1) + 0.5) * step
    points = np.minimum(points, np.array(image.size) - 0.5)  # the last column and row of cells may be partial
    return Field(image.size, step, points, box, content, _apex(inside, step))


def _hull(cells: np.ndarray) -> np.ndarray:
    """The cells inside the convex hull of those that are set."""
    from PIL import Image, ImageDraw
    from scipy.spatial import ConvexHull, QhullError

    rows = np.flatnonzero(cells.any(axis=1))
    ends = cells[rows].argmax(axis=1), cells.shape[1] - 1 - cells[rows, ::-1].argmax(axis=1)
    points = np.concatenate([np.stack([column, rows], axis=1) for column in ends])  # no other cell can be a corner
    try:
        corners = points[ConvexHull(points).vertices]
    except QhullError:  # all on one line
        return cells
    filled = Image.new("1", cells.shape[::-1])
    ImageDraw.Draw(filled).polygon([tuple(map(int, corner)) for corner in corners], fill=1, outline=1)
    return np.asarray(filled)


def _within(cells: tuple[int, int, int, int], step: int, size: tuple[int, int]) -> Box:
    """A box of cells in pixels, inside the frame."""
    left, upper, right, lower = (int(edge) * step for edge in cells)
    return max(left, 0), max(upper, 0), min(right, size[0]), min(lower, size[1])


def _apex(inside: np.ndarray, step: int) -> tuple[float, float] | None:
    """Where straight lines through the left and right edges of a field meet above it; rows cut by the frame tell nothing."""
    rows = np.flatnonzero(inside.any(axis=1))
    left, right = inside.argmax(axis=1)[rows], inside.shape[1] - inside[:, ::-1].argmax(axis=1)[rows]
    free = (left > 0) & (right < inside.shape[1])
    free[-max(1, len(rows) // 4) :] = False  # the lower arc
    free[: len(rows) // 20] = False  # and the probe's
    if free.sum() < 6:
        return None
    (a, b), (c, d) = (np.polyfit(rows[free] + 0.5, edge[free], 1) for edge in (left, right))
    if c - a < 0.1:  # nearly parallel: a linear probe
        return None
    y = (b - d) / (c - a)
    if not math.isfinite(y) or y > rows[0] + 0.25 * len(rows):  # no fan
        return None
    return step * (a * y + b), step * y
