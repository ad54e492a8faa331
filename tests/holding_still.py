"""Commands that stand still at a file they are about to touch, so that a signal lands there and not a moment too late."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "holding"


@dataclass(frozen=True)
class Hold:
    """Where a command, or a process it starts, stands still until it is killed or let go; good for one run of it.

    Attributes:
        at: a regular expression found in ``open <path> <mode>``, ``os.mkdir <path> …`` or ``os.rename <path> …``: what
            Python does to files, not what libraries in other languages do.
        note: a file that is not there yet, which says that the command stands still.
    """

    at: str
    note: Path

    @property
    def environment(self) -> dict[str, str]:
        """To be added to the command's environment."""
        paths = filter(None, (str(FOLDER), os.environ.get("PYTHONPATH")))
        return {"HOLD_AT": self.at, "HOLD_NOTE": str(self.note), "PYTHONPATH": os.pathsep.join(paths)}

    def wait(self, process: subprocess.Popen) -> None:
        """Until the command stands still; a failure if it ends without."""
        while not self.note.exists():
            assert process.poll() is None, f"ended before {self.at}: {process.stdout.read() if process.stdout else ''}"
            time.sleep(0.005)
        assert process.poll() is None

    def let_go(self) -> None:
        self.note.with_name(self.note.name + ".go").touch()
