"""The blocks of experiments.md: found by their markers, and unrolled by bash into the commands they would run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sonovqa.cli import UserError

DATA = "data"  # the name of the block that draws the data sets
_BLOCK = re.compile(r"^<!-- experiment: (\S+) -->\s*^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: `python` tells its words instead of running: loops, defaults and quotes stay bash's own business.
_TELL = """python() { printf '%s\\0' "$@"; printf '\\1\\0'; }\n"""


@dataclass(frozen=True)
class Command:
    """One command of a block: the words after ``python``."""

    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The command as it is typed."""
        return shlex.join(("python", *self.words))

    @property
    def script(self) -> str:
        """``train.py``, ``sonovqa.robustness``, …"""
        return self.words[1] if self.words[0] == "-m" else self.words[0]

    def value(self, *flags: str) -> str | None:
        """What stands after the first of ``flags`` that is given, or ``None``."""
        for at, word in enumerate(self.words):
            name, sign, value = word.partition("=")
            if name in flags:
                return value if sign else next(iter(self.words[at + 1 : at + 2]), None)
        return None

    @property
    def run(self) -> Path | None:
        """The folder of the run that a training writes."""
        name = self.value("--run", "--run-name")
        return Path(self.value("--outputs") or "outputs") / name if self.script == "train.py" and name else None

    @property
    def evaluated(self) -> Path | None:
        """The run, or bare model, whose answers an evaluation scores."""
        plain = self.script == "evaluate.py" and self.words[1] not in ("compare", "prompts", "score")
        return Path(self.words[1]) if plain and not self.words[1].startswith("-") else None

    def makes(self) -> set[str]:
        """What later commands can need: a run's or data set's folder, a file, or ``<run>/eval`` for an evaluation."""
        if self.script == "train.py":
            return {str(self.run)}
        made = {self.value("--out"), self.value("--record")} - {None}
        return made | ({f"{self.evaluated}/eval"} if self.evaluated else set())

    def needs(self) -> set[str]:
        """All that it names; a comparison also the evaluations of what it names."""
        compared = self.words[:2] == ("evaluate.py", "compare")
        return set(self.words) | {f"{word}/eval" for word in self.words[2:] if compared}


def names(page: Path) -> list[str]:
    """The names of the blocks of experiments.md, in order."""
    return list(_blocks(page))


def commands(page: Path, name: str) -> list[Command]:
    """The commands of a block with the knobs of the environment, behind those of the data block whose sets it names.

    Raises:
        UserError: if there is no such block, or bash cannot run it.
    """
    blocks = _blocks(page)
    if name not in blocks:
        raise UserError(f"no such experiment; {name}; {', '.join(blocks)} are in {page.name}; choose one")
    found = unrolled(blocks[name])
    if name == DATA or DATA not in blocks:
        return found
    named = set().union(*(command.needs() for command in found))
    return [command for command in unrolled(blocks[DATA]) if command.makes() & named] + found


def unrolled(block: str) -> list[Command]:
    """The `python` commands of a bash text with its variables, loops and quotes resolved, in the order they would run.

    Raises:
        UserError: if bash finds a fault, or anything but `python` is called.
    """
    shell = shutil.which("bash")
    if shell is None:
        raise UserError("bash is not installed; the blocks of experiments.md are written for it; install it")
    done = subprocess.run(
        [shell, "--noprofile", "--norc", "-euc", _TELL + block], env=os.environ | {"PATH": ""}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"a block of experiments.md fails in bash; {done.stderr.strip().splitlines()[-1]}; mend it or the variable"
        )
    return [Command(tuple(part.split("\0")[:-1])) for part in done.stdout.split("\1\0")[:-1]]


def _blocks(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8")
    found = _BLOCK.findall(text)
    if len(dict(found)) != len(found) or len(found) != text.count("<!-- experiment: "):
        raise UserError(f"{page.name}; a marker <!-- experiment: NAME --> is there twice or has no bash block below; mend it")
    return dict(found)
