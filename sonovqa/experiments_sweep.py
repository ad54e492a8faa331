"""A sweep over the commands of one or more experiments: what is finished is not repeated, what can run side by side does.

A command waits for those before it whose results it names; so order and `jobs` change nothing but the time it takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from sonovqa import experiments_records, files, records, resuming, tracking
from sonovqa.cli import UserError, console
from sonovqa.experiments_blocks import Command
from sonovqa.experiments_done import check_same, has_scores, made_by, read_by

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
_TRACKING = threading.Lock()  # MLflow is told by one thread at a time
STYLES = {DONE: "green", FAILED: "red", SKIPPED: "yellow"}


#: Becomes the command that stands behind the sweep's process number, and gets Ctrl-C's signal should the sweep die without a word
#: (SIGKILL, want of memory). That is asked for by a process of its own, after its start and before the command's: `preexec_fn`
#: may not be used beside threads. A shell's `&` has Ctrl-C ignored, which the command would inherit: it is to end by it.
_BECOME = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGINT), 0, 0, 0)  # PR_SET_PDEATHSIG, which outlives execv
if os.getppid() != int(sys.argv[1]):  # it died before
    sys.exit(130)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Outcome:
    """What became of a command: ``done``, ``failed`` or ``skipped``, why, and the seconds it took now (``None``: not run)."""

    command: Command
    status: str
    why: str = ""
    seconds: float | None = None


@dataclass
class Sweep:
    """One experiment under way.

    Attributes:
        name: of the block.
        path: the state file, written after every command: ``{"parent": MLflow run id, "commands": {text: {...}}}``.
        call: runs a command with the environment's changes and gives its exit status.
    """

    name: str
    path: Path
    call: Callable[[Command, Mapping[str, str]], int]
    state: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.state = files.read_json(self.path) if self.path.exists() else {"parent": None, "commands": {}}

    def note(self, command: Command, **what) -> None:
        """Write down what became of a command."""
        with self.lock:
            self.state["commands"][command.text] = what
            files.write_json(self.path, self.state)

    def is_done(self, command: Command) -> bool:
        """Whether a command need not run again.

        A training or data set is done where its record is; everything else where an earlier call of this experiment finished
        it after all that it reads was written, and what it wrote is there, of its own arguments, and nobody else's since.

        Raises:
            UserError: if what stands in its place was made by other arguments.
        """
        made = made_by(command)
        if made is not None:
            return made.exists() and check_same(command, made)
        kept = self.state["commands"].get(command.text, {})
        written = [Path(name) for name in command.makes() if not name.endswith("/eval")]  # has_scores knows that folder
        if kept.get("status") != DONE or not all(path.exists() for path in written) or not has_scores(command):
            return False
        out = Path(command.value("--out") or "")  # a --record is written by several commands
        try:
            files_of = [*read_by(command), out]
        except UserError:  # an evaluation is gone; the command itself says which
            return False
        return all(path.stat().st_mtime <= kept["finished"] for path in files_of if path.is_file())


class Processes:
    """Runs commands with this Python, each in a session of its own, so that Ctrl-C reaches it once and it can end in order. It
    also gets it where this process dies.

    Args:
        logs: folder for what commands print, a file each; ``None``: the terminal.
        threads: that each may compute with; ``None``: as many as it likes.
    """

    def __init__(self, logs: Path | None = None, threads: int | None = None):
        self.logs, self.threads, self.interrupted = logs, threads, False
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def __call__(self, command: Command, environment: Mapping[str, str]) -> int:
        """Run one command; its exit status, 130 if it was interrupted."""
        given = {**({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}), **os.environ, **environment}
        log = self.log_of(command)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        with open(log or os.devnull, "w") as stream:
            printed = {"stdout": stream, "stderr": subprocess.STDOUT} if log else {}
            with self._lock:
                if self.interrupted:
                    return 130
                words = (sys.executable, "-ISc", _BECOME, str(os.getpid()), sys.executable, *command.words)
                child = subprocess.Popen(words, env=given, start_new_session=True, **printed)
                self._children.add(child)
            status = child.wait()
        self._children.discard(child)
        return 130 if self.interrupted or status == -signal.SIGINT else status

    def log_of(self, command: Command) -> Path | None:
        """Where a command's output goes; a run's log is named after the run."""
        if self.logs is None:
            return None
        digest = files.sha256(command.text.removesuffix(" --resume"))[:8]
        return self.logs / f"{(command.run or command.evaluated or Path(command.script)).name}-{digest}.log"

    def end(self, number: int = signal.SIGINT) -> None:
        """Send a signal to every command under way and start none any more."""
        with self._lock:
            self.interrupted = True
        for child in list(self._children):
            child.send_signal(number)


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM (`kill`, a service or batch system) and SIGHUP (a terminal or connection that closed) do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # no signal is handled here
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}  # `nohup` goes on
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Place:
    """A command's place in the work: its sweep, its number among all, and the numbers of those it waits for."""

    sweep: Sweep
    command: Command
    number: int
    after: tuple[int, ...]


def places(work: Sequence[tuple[Sweep, Command]]) -> list[Place]:
    """The work in order, each command after those before it that make what it names or makes itself."""
    made = [command.makes() for _, command in work]
    found = []
    for number, (sweep, command) in enumerate(work):
        touched = command.needs() | made[number]
        found.append(Place(sweep, command, number, tuple(k for k in range(number) if made[k] & touched)))
    return found


def run_all(work: Sequence[tuple[Sweep, Command]], jobs: int = 1) -> list[Outcome]:
    """Run commands, at most ``jobs`` at once; finished ones are not repeated, those that need what failed are skipped.

    Args:
        work: each command with the sweep that it belongs to, in the order in which they would run one after another.
        jobs: commands at once.

    Raises:
        KeyboardInterrupt: after the commands at hand have ended.
    """
    waiting, outcomes, running = places(work), {}, {}
    total, stopped = len(waiting), False
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                ready = next((one for one in waiting if all(k in outcomes for k in one.after)), None)
                if ready and len(running) < jobs and not stopped:
                    waiting.remove(ready)
                    _begin(ready, total, outcomes, running, pool)
                    continue
                if not running:
                    raise KeyboardInterrupt
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(future)
                    outcome = future.result()
                    stopped |= outcome is None
                    if outcome is not None:
                        outcomes[place.number] = _told(outcome, place, jobs)
        except BaseException:
            for call in {id(sweep.call): sweep.call for sweep, _ in work}.values():  # a command may have begun this very moment
                if isinstance(call, Processes):
                    call.end()
            raise
    if stopped:
        raise KeyboardInterrupt
    return [outcomes[number] for number in range(total)]


def _begin(place: Place, total: int, outcomes: dict[int, Outcome], running: dict[Future, Place], pool) -> None:
    """Start a command, or note at once that it is finished, cannot be or need not be tried."""
    console.rule(f"experiment {place.sweep.name}, {place.number + 1}/{total}", align="left")
    console.print(place.command.text, markup=False, soft_wrap=True)
    lacking = [k for k in place.after if outcomes[k].status != DONE and outcomes[k].command.makes() & place.command.needs()]
    try:
        if lacking:
            outcome = Outcome(place.command, SKIPPED, f"needs what command {lacking[0] + 1} did not make")
        elif place.sweep.is_done(place.command):
            outcome = Outcome(place.command, DONE, "finished before")
        else:
            running[pool.submit(run_one, place.sweep, place.command)] = place
            return
    except UserError as other:
        outcome = Outcome(place.command, FAILED, str(other))
    outcomes[place.number] = _told(outcome, place, 1)


def _told(outcome: Outcome, place: Place, jobs: int) -> Outcome:
    """The outcome, said on the terminal where the command itself said nothing there."""
    if jobs > 1 and outcome.seconds is not None:
        console.print(f"{place.number + 1}: {outcome.status} after {records.duration(outcome.seconds)}", markup=False)
    if outcome.why:
        console.print(f"[{STYLES[outcome.status]}]{outcome.status}[/]: ", end="")
        console.print(outcome.why, markup=False, soft_wrap=True)
    return outcome


def run_one(sweep: Sweep, command: Command) -> Outcome | None:
    """Run one command; afterwards its scores are in MLflow too. ``None`` if it was interrupted."""
    begun = command.run and resuming.stage(command.run) != "new"
    parent = {"WANDB_RUN_GROUP": f"experiment {sweep.name}"}
    parent |= {"MLFLOW_PARENT_RUN_ID": sweep.state["parent"]} if sweep.state["parent"] else {}
    started = time.perf_counter()
    status = sweep.call(Command((*command.words, "--resume")) if begun else command, parent)
    took = round(time.perf_counter() - started, 1)
    if status == 130:
        return None
    if status:
        sweep.note(command, status=FAILED, exit=status, seconds=took, finished=time.time())
        log = sweep.call.log_of(command) if isinstance(sweep.call, Processes) else None
        return Outcome(command, FAILED, f"exit status {status}, see {log or 'above'}", took)
    sweep.note(command, status=DONE, seconds=took, finished=time.time())
    if command.evaluated:
        with _TRACKING:
            tracking.attempt(f"the scores of {command.evaluated}", experiments_records.track, command.evaluated)
    return Outcome(command, DONE, seconds=took)
