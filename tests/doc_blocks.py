"""Code blocks of a Markdown page, with the comment that stands before them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```\n", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: the comment right before it ("" without one), its language and its text."""

    mark: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page in order."""
    return [Block(found["mark"] or "", found["language"], found["code"]) for found in _BLOCK.finditer(page.read_text())]


def inline(page: Path) -> list[str]:
    """What stands between backticks within the sentences of a page, line ends as spaces."""
    sentences = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", sentences)]


def commands(code: str) -> list[str]:
    """The commands of a shell block, comments cut off, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+# .*$", "", line).strip())]
