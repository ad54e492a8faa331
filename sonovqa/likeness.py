"""A small likeness of an image in the terminal, so that nobody asks about the wrong one."""

from __future__ import annotations

from rich.text import Text


def likeness(image, columns: int = 32) -> Text:
    """An image in half blocks: two rows of pixels a line, the upper as foreground.

    Args:
        image: a PIL image, RGB.
        columns: of the terminal.
    """
    rows = max(2, min(32, round(columns * image.height / image.width))) // 2 * 2
    small = image.resize((columns, rows))
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*small.getpixel((x, at))) for at in (y, y + 1))
            text.append("▀", f"{upper} on {lower}")
        text.append("\n")
    return text
