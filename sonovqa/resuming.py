"""Going on with an interrupted run: how far it got, which checkpoints are whole, whether the command is still the same one."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from sonovqa import dataset, devices, files
from sonovqa.cli import UserError

WHOLE = "checkpoint_is_whole.json"  # written last into a checkpoint: its files and their sizes
STARTED = "started.json"  # in checkpoints/: what the run was started with
HELD = "process"  # in checkpoints/: the number of the process that trains the run, which has the file locked

#: Arguments that change neither weights nor losses; every other one must stay as it was.
FREE = frozenset({"data", "run", "outputs", "workers", "log_every", "report_to", "resume", "merge", "dry_run", "checkpointing",
                  "push_to_hub", "public"})  # fmt: skip


def stage(folder: Path) -> str:
    """How far a run got, by the files in its folder: ``new``, ``started`` (a whole checkpoint), ``trained`` or ``finished``."""
    if (folder / "run.json").exists():
        return "finished"
    if (folder / "plan.json").exists():  # written after the trained weights
        return "trained"
    return "started" if any(is_whole(path) for path in (folder / "checkpoints").glob("checkpoint-*")) else "new"


def settings(args: argparse.Namespace) -> dict:
    """What must stay as it was for a run to go on: arguments, the data set's fingerprint, the number of processes.

    Take them from the command line as it was typed, before unset arguments are filled in from the data.
    """
    kept = {name: value for name, value in vars(args).items() if name not in FREE}
    fingerprint = dataset.about(args.data)["fingerprint"]
    return json.loads(json.dumps(kept, default=str)) | {"data": fingerprint, "WORLD_SIZE": str(devices.processes())}


def start(folder: Path, now: dict) -> None:
    """Write down the `settings` a run is started with; before its first step. Raises `UserError` as `hold` does."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / HELD).touch()
    hold(folder)
    files.write_json(folder / "checkpoints" / STARTED, now)


def hold(folder: Path) -> None:
    """Let no other process train a run that was started, for as long as this one lives. Of torchrun's the first one holds it.

    A POSIX record lock, unlike others of the project, for it is the process's own: data workers do not inherit it, and who has it
    gets it again. Closing the file in any place would give it back, so that it is never closed.

    Raises:
        UserError: if another process holds it.

    Source: fcntl(2), "Advisory record locking".
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    try:
        opened = os.open(folder / "checkpoints" / HELD, os.O_RDWR)
    except OSError:  # nothing was started here, or nothing can be written
        return
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = os.read(opened, 20).decode(errors="replace").strip()
        os.close(opened)
        told = f"{folder} is being trained by process {other}; one at a time is allowed"
        raise UserError(f"--run; {told}; wait until it has ended, or end it: kill -INT {other}") from None
    except OSError:  # a file system without locks
        return
    os.pwrite(opened, f"{os.getpid():<20}".encode(), 0)


def started(folder: Path) -> dict | None:
    """The `settings` a run was started with, or ``None`` if it is not known: checkpoints/ was removed, or is not there yet."""
    path = folder / "checkpoints" / STARTED
    return files.read_json(path) if path.exists() else None


def check_same(folder: Path, now: dict) -> None:
    """Raise `UserError` if a run that has something to go on from was started with other `settings`, naming each flag."""
    before = started(folder)
    if stage(folder) not in ("started", "trained") or before is None:
        return
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        told = ", ".join(f"{flag(name)} was {shown(before[name])} and now is {shown(now[name])}" for name in changed)
        raise UserError(f"--resume; {told}; a run goes on only as it was started; give it the same, or choose another --run")


def flag(name: str) -> str:
    """An argument's name as it is typed."""
    return name if name.isupper() else f"--{name.replace('_', '-')}"


def shown(value) -> str:
    """An argument's value in words; fingerprints are shortened."""
    return "unset" if value is None else value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def mark_whole(checkpoint: Path) -> None:
    """Say that everything of a checkpoint is on disk; nothing may be written into it afterwards."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != WHOLE}
    files.write_json(checkpoint / WHOLE, sizes)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and has lost nothing since: a kill can also fall into its removal."""
    marker = checkpoint / WHOLE
    if not marker.is_file():
        return False
    paths = {checkpoint / name: size for name, size in files.read_json(marker).items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def number(checkpoint: Path) -> int:
    """The step of ``checkpoint-<step>``."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``; those cut off while being written or removed are cleared away."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # of several processes another may be at it
    return max(whole, key=number, default=None)


def prune(folder: Path, best: int | None) -> None:
    """Remove all checkpoints but the newest and the one of step ``best``; call it once the newest is marked as whole."""
    paths = sorted(folder.glob("checkpoint-*"), key=number)
    for path in paths[:-1]:
        if number(path) != best:
            shutil.rmtree(path)


def clear_parts(folder: Path) -> None:
    """Remove what a kill left half written in a run's folder: temporary names of `files`, and unchecked merged weights."""
    for path in (*folder.glob(".*.part*"), folder / "merged.unchecked"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def way_on(words: Sequence[str]) -> str:
    """How to go on with a stopped training from its last whole checkpoint: its command, with as many processes as it had.

    Args:
        words: ``sys.argv``.
    """
    processes = devices.processes()
    launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
    return f"go on with: {launcher} {shlex.join([*(word for word in words if word != '--resume'), '--resume'])}"
