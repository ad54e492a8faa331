"""What every script does at its edges: parsers, one-line errors, the console, clean interruption."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable

from rich.console import Console

RESEARCH_NOTICE = "Research use only. Not a medical device: no answer here may guide the care of a patient."

#: Tables and progress go to standard output, everything that is not a result to standard error.
console = Console(highlight=False, soft_wrap=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


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


def run(main: Callable[[], int | None], resume: str = "the same command goes on where it stopped") -> None:
    """Call ``main`` as a program: exit 0, 2 after a `UserError`, 130 after Ctrl-C, 1 on anything unforeseen.

    Args:
        main: the script's ``main``, taking its arguments from ``sys.argv``.
        resume: how to go on after an interruption, printed after Ctrl-C.
    """
    try:
        status = main() or 0
    except UserError as mistake:
        sys.stderr.write(f"error: {mistake}\n")
        status = 2
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped: what was finished is kept; {resume}\n")
        status = 130
    except BrokenPipeError:  # `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f"; {fault.filename}" if fault.filename else ""
        sys.stderr.write(f"error: cannot write: {fault.strerror}{where}; what was finished is kept; make room, then {resume}\n")
        status = 2
    sys.stdout.flush()
    sys.exit(status)
