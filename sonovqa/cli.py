"""What every script does at its edges: parsers, one-line errors, the console, clean interruption."""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable

from rich.console import Console

#: Usage statistics that libraries send home unless told not to; data of patients are no place for them (docs/privacy.md).
for _name in ("HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "UNSLOTH_DISABLE_STATISTICS", "VLLM_NO_USAGE_STATS",
              "DO_NOT_TRACK"):  # fmt: skip
    os.environ.setdefault(_name, "true" if _name.startswith("MLFLOW") else "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

RESEARCH_NOTICE = "Research use only. Not a medical device: no answer here may guide the care of a patient."

#: Tables and progress go to standard output, everything that is not a result to standard error.
console = Console(highlight=False, soft_wrap=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


#: Faults of a disk and of a path, which are nobody's programming error.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
MISPLACED = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP}
FIRST_SPEAKS = 5.0  # seconds that torchrun's other processes wait before they say their mistake themselves


class UserError(Exception):
    """A mistake of the user: printed as one line, exit status 2, never a traceback.

    Write it as ``what; the value; what is allowed; the command or flag that fixes it``.
    """


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the commands in a script's docstring as written and shows every flag's default."""

    def _get_help_string(self, action):  # "(default: None)" tells a reader nothing
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` without abbreviations whose mistakes read like all others of the project."""

    def __init__(self, **options):
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str):
        """Exit with status 2 and one line. Source: ``argparse.ArgumentParser.error``, less its usage block."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def check(problems: list[str]) -> None:
    """Raise one `UserError` that lists every problem found, so that nobody mends them one run at a time.

    Raises:
        UserError: if ``problems`` is not empty.
    """
    if problems:
        raise UserError("\n       ".join(problems))


def out_of_range(args, counts=(), not_negative=(), positive=()) -> list[str]:
    """What is wrong with numbers of a command line, a line each, for `check`; unset ones are left alone.

    Args:
        args: the parsed arguments.
        counts, not_negative, positive: names of those that must be 1 or more, 0 or more, above 0. None may be infinite or NaN;
            of a list each is checked.
    """
    rules = (
        (counts, lambda value: value >= 1, "1 or more"),
        (not_negative, lambda value: value >= 0, "0 or more"),
        (positive, lambda value: value > 0, "above 0"),
    )
    problems = []
    for names, fits, allowed in rules:
        for name in names:
            given = getattr(args, name)
            values = given if isinstance(given, list) else [] if given is None else [given]
            wrong = [value for value in values if not (fits(value) and math.isfinite(value))]
            problems += [f"--{name.replace('_', '-')} {value}; must be {allowed}" for value in wrong]
    return problems


def run(main: Callable[[], int | None], resume: str = "the same command goes on where it stopped") -> None:
    """Call ``main`` as a program: exit 0, 2 after a `UserError`, 130 after Ctrl-C, 1 on anything unforeseen.

    Args:
        main: the script's ``main``, taking its arguments from ``sys.argv``.
        resume: how to go on after an interruption, printed after Ctrl-C.
    """
    try:
        status = main() or 0
    except UserError as mistake:
        _let_the_first_speak()
        sys.stderr.write(f"error: {mistake}\n")
        status = 2
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped: what was finished is kept; {resume}\n")
        status = 130
    except BrokenPipeError:  # `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as fault:
        if fault.errno not in FULL | MISPLACED:
            raise
        where = f"; {str(fault.filename)[:200]}" if fault.filename else ""
        told, way_out = (
            ("cannot write", "make room") if fault.errno in FULL else ("cannot use a file or folder", "mend its name or place")
        )
        sys.stderr.write(f"error: {told}: {fault.strerror}{where}; what was finished is kept; {way_out}, then {resume}\n")
        status = 2
    sys.stdout.flush()
    sys.exit(status)


def _let_the_first_speak() -> None:
    """Of torchrun's processes, which mostly meet the same mistake, only the first is to say it: torchrun ends the others as soon
    as it is gone. If it is not, the mistake is this process's own."""
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_SPEAKS)


def _interrupted(kind, value, trace) -> None:
    """Ctrl-C while a script is still importing, before `run`, needs no traceback either."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("\nstopped before anything was done\n")
    else:
        sys.__excepthook__(kind, value, trace)


sys.excepthook = _interrupted
