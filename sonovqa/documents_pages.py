"""Clinical pages drawn with Pillow: blocks of text on paper, then scanned: turned, blurred, noisy, unevenly lit."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT = 1000, 1294  # pixels: a letter page at 118 dpi
MARGIN, GAP = 64, 10
#: Regular and bold faces that matplotlib brings along (DejaVu and STIX, free licences).
FACES = {
    "sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    "times": ("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
}
SIZES = range(24, 14, -1)  # pixels; smaller type cannot be read after blur and noise
INK = (20, 20, 28)


@dataclass(frozen=True)
class Heading:
    """A line in bold, underlined or on a grey band."""

    text: str


@dataclass(frozen=True)
class Prose:
    """Paragraphs, wrapped; one a line of ``text``."""

    text: str


@dataclass(frozen=True)
class Fields:
    """``label: value`` pairs in two columns."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A header and rows of cells."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block = Heading | Prose | Fields | Table


@dataclass(frozen=True)
class Style:
    """How a page looks.

    Attributes:
        face: of `FACES`.
        band: whether headings stand on a grey band instead of a rule.
        rules: lines of a table: ``grid``, ``rows``, ``zebra`` or ``none``.
        degrees: rotation of the scan, anticlockwise.
        blur: radius in pixels.
        noise: standard deviation in grey levels.
        shade: how much darker one edge is, 0 to 1.
        paper: grey level of the paper.
        quality: of the JPEG file.
        seed: of the noise.
    """

    face: str
    band: bool
    rules: str
    degrees: float
    blur: float
    noise: float
    shade: float
    paper: int
    quality: int
    seed: int


def draw_style(rng: np.random.Generator) -> Style:
    """A style drawn at random, never so bad that a person could not read the page."""
    return Style(
        face=str(rng.choice(list(FACES))),
        band=bool(rng.random() < 0.5),
        rules=str(rng.choice(["grid", "rows", "zebra", "none"])),
        degrees=float(rng.uniform(-2.5, 2.5)),
        blur=float(rng.choice([0, 0.4, 0.7])),
        noise=float(rng.uniform(0, 12)),
        shade=float(rng.uniform(0, 0.15)),
        paper=int(rng.integers(238, 256)),
        quality=int(rng.integers(60, 93)),
        seed=int(rng.integers(2**31)),
    )


@functools.cache
def font(face: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """One of `FACES` at ``size`` pixels; Times, which is small for its size, a little larger."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / FACES[face][bold]), size + 3 * (face == "times"))


class Sheet:
    """A page being filled from the top, in one face and size; ``y`` beyond `bottom` means that it does not fit."""

    bottom = HEIGHT - MARGIN - 30

    def __init__(self, style: Style, size: int):
        self.style, self.size, self.y, self.wide = style, size, MARGIN, False
        self.image = Image.new("RGB", (WIDTH, HEIGHT), (style.paper,) * 3)
        self.ink = ImageDraw.Draw(self.image)
        self.line = round(size * 1.4)

    def text(self, x: float, y: float, words: str, bold: bool = False) -> None:
        """Write one line; ``(x, y)`` is its upper left corner in pixels."""
        self.ink.text((x, y), words, INK, font(self.style.face, bold, self.size))

    def length(self, words: str, bold: bool = False) -> float:
        """Width of a line in pixels."""
        return font(self.style.face, bold, self.size).getlength(words)

    def add(self, block: Block) -> None:
        """Draw a block and move on below it."""
        {Heading: self._heading, Prose: self._prose, Fields: self._fields, Table: self._table}[type(block)](block)
        self.y += GAP

    def _heading(self, block: Heading) -> None:
        self.y += GAP
        if self.style.band:
            self.ink.rectangle((MARGIN - 6, self.y - 3, WIDTH - MARGIN, self.y + self.line), (self.style.paper - 32,) * 3)
        else:
            self.ink.line((MARGIN, self.y + self.line, WIDTH - MARGIN, self.y + self.line), INK, 2)
        self.text(MARGIN, self.y, block.text, bold=True)
        self.y += self.line + 4

    def _prose(self, block: Prose) -> None:
        for line in wrapped(block.text, self.style.face, self.size):
            self.text(MARGIN, self.y, line)
            self.y += self.line

    def _fields(self, block: Fields) -> None:
        column = (WIDTH - 2 * MARGIN) // 2
        for index, (label, value) in enumerate(block.pairs):
            x = MARGIN + column * (index % 2)
            self.text(x, self.y, f"{label}: ", bold=True)
            self.text(x + self.length(f"{label}: ", bold=True), self.y, value)
            self.wide |= self.length(f"{label}: ", bold=True) + self.length(value) > column - 8
            self.y += self.line * (index % 2)
        self.y += self.line * (len(block.pairs) % 2)

    def _table(self, block: Table) -> None:
        rows = [block.header, *block.rows]
        widths = [max(self.length(row[c], bold=r == 0) for r, row in enumerate(rows)) + 14 for c in range(len(block.header))]
        spare = WIDTH - 2 * MARGIN - sum(widths)
        self.wide |= spare < 0
        widths = [width + max(spare, 0) / len(widths) for width in widths]
        top, height, right = self.y, self.line + 6, MARGIN + sum(widths)
        for number, row in enumerate(rows):
            if self.style.rules == "zebra" and number % 2 == 0:
                self.ink.rectangle((MARGIN, self.y, right, self.y + height), (self.style.paper - 20,) * 3)
            for column, cell in enumerate(row):
                self.text(MARGIN + sum(widths[:column]) + 6, self.y + 3, cell, bold=number == 0)
            self.y += height
            if self.style.rules in ("grid", "rows") or number == 0:
                self.ink.line((MARGIN, self.y, right, self.y), (90, 90, 96), 1)
        if self.style.rules == "grid":
            for column in range(len(widths) + 1):
                x = MARGIN + sum(widths[:column])
                self.ink.line((x, top, x, self.y), (90, 90, 96), 1)
            self.ink.line((MARGIN, top, right, top), (90, 90, 96), 1)


def wrapped(text: str, face: str, size: int) -> list[str]:
    """Lines of paragraphs as wide as the page allows, by their measured width: capitals are half as wide again as small letters.

    Broken at white space only, so that "end-diastolic" stays one word; a word wider than the page is cut rather than lost.
    """
    width, lines = WIDTH - 2 * MARGIN, []
    measured = font(face, False, size).getlength
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+", paragraph):
            if line and measured(line + word) > width:
                lines.append(line)
                line, word = "", word.lstrip()
            while measured(line + word) > width:
                fits = max(1, bisect.bisect_right(range(1, len(word)), width, key=lambda letters: measured(word[:letters])))
                lines.append(word[:fits])
                word = word[fits:]
            line += word
        lines.append(line)
    return lines


def _title_font(title: str, face: str, size: int) -> ImageFont.FreeTypeFont:
    """A little larger than the text, or as large as the title fits on the page."""
    sizes = (font(face, True, each) for each in range(size + 8, 8, -1))
    return next(big for big in sizes if big.getlength(title) <= WIDTH - 2 * MARGIN or big.size <= 12)


def draw(title: str, blocks: Sequence[Block], footer: str, style: Style, sizes: Sequence[int] = SIZES) -> Image.Image:
    """A page in the largest type of ``sizes`` that holds all its blocks, scanned in ``style``.

    Returns:
        RGB image of ``WIDTH x HEIGHT`` pixels.

    Raises:
        ValueError: the blocks do not fit on one page.
    """
    for size in sizes:
        sheet = Sheet(style, size)
        big = _title_font(title, style.face, size)
        sheet.ink.text(((WIDTH - big.getlength(title)) / 2, sheet.y), title, INK, big)
        sheet.y += sheet.line + 18
        for block in blocks:
            sheet.add(block)
        if sheet.y <= Sheet.bottom and not sheet.wide:
            sheet.ink.text((MARGIN, HEIGHT - MARGIN), footer, (70, 70, 76), font(style.face, False, 16))
            return scanned(sheet.image, style)
    raise ValueError(f"the page is too full: {title}")


def scanned(page: Image.Image, style: Style) -> Image.Image:
    """The page as a scanner gives it: turned, blurred, shaded, with noise. Same size."""
    edge = (style.paper - 14,) * 3
    page = page.rotate(style.degrees, Image.Resampling.BICUBIC, fillcolor=edge)
    if style.blur:
        page = page.filter(ImageFilter.GaussianBlur(style.blur))
    rng = np.random.default_rng(style.seed)
    noise = rng.standard_normal((HEIGHT, WIDTH, 1), np.float32) * np.float32(style.noise)
    light = np.linspace(1, 1 - style.shade, WIDTH, dtype=np.float32)[None, :, None]
    return Image.fromarray(np.clip(np.asarray(page, np.float32) * light + noise, 0, 255).astype(np.uint8))
