"""Run an experiment of experiments.md: its block's commands one after another, then a table of what they gave.

    python -m sonovqa.experiments --list
    python -m sonovqa.experiments 3 --dry-run
    MODEL=tiny DATA=data/phantoms python -m sonovqa.experiments 3
    python -m sonovqa.experiments 3 --records                      # keep what was measured in outputs/records/

Stopped by whatever means, the same command goes on: what is finished is not done again, an unfinished run is resumed. A
command that fails is shown as failed and stops nothing but those that need what it should have made. Runs of an
experiment stand below one MLflow run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from sonovqa import cli, dataset, experiments_blocks, experiments_records, files, records, resuming
from sonovqa.cli import UserError, console
from sonovqa.experiments_blocks import Command

OUTPUTS = Path("outputs")
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
STYLES = {DONE: "green", FAILED: "red", SKIPPED: "yellow"}


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

    def __post_init__(self):
        self.state = files.read_json(self.path) if self.path.exists() else {"parent": None, "commands": {}}

    def note(self, command: Command, **what) -> None:
        """Write down what became of a command."""
        self.state["commands"][command.text] = what
        files.write_json(self.path, self.state)

    def is_done(self, command: Command) -> bool:
        """Whether a command need not run again.

        A training or data set is done where its record is; everything else where an earlier call of this experiment finished
        it after all that it reads.

        Raises:
            UserError: if what stands in its place was made by other arguments.
        """
        made = made_by(command)
        if made is not None:
            return made.exists() and check_same(command, made)
        kept = self.state["commands"].get(command.text, {})
        if kept.get("status") != DONE or not all(Path(p).exists() for p in command.makes() if not p.endswith("/eval")):
            return False
        read = (Path(word) / name for word in command.words for name in ("run.json", "dataset.json"))
        return all(path.stat().st_mtime <= kept["finished"] for path in read if path.is_file())


def made_by(command: Command) -> Path | None:
    """The record that a training or a preparation writes last."""
    if command.script == "train.py" and command.run:
        return command.run / "run.json"
    out = command.value("--out")
    return Path(out) / "dataset.json" if command.script == "prepare_dataset.py" and out else None


def check_same(command: Command, path: Path) -> bool:
    """True if the record at ``path`` was made with the command's arguments.

    Raises:
        UserError: naming those that differ.
    """
    given, wrong = files.read_json(path)["arguments"], []
    for flag in (word for word in command.words if word.startswith("--")):
        name, _, joined = flag.partition("=")
        key, value = name[2:].replace("-", "_"), joined or command.value(name)
        off = key.removeprefix("no_")
        if key not in given and off in given:
            wrong += [f"{name} was not given"] if given[off] is True else []
        elif key != "data" and isinstance(given.get(key), str | int | float) and not isinstance(given[key], bool):
            before = str(Path(given[key]).name) if key == "model" else str(given[key])
            now = Path(value).name if key == "model" else value
            same = before == now or (_number(before) is not None and _number(before) == _number(now))
            wrong += [] if same else [f"{name} was {given[key]}, not {value}"]
    if command.script == "train.py":
        data, kept = Path(command.value("--data") or ""), files.read_json(path).get("data")
        if (data / "dataset.json").exists() and kept != dataset.about(data)["fingerprint"]:
            wrong.append(f"--data held other images or answers than {data} does now")
    if wrong:
        raise UserError(f"{path.parent} was made by another command; {'; '.join(wrong)}; delete it, or set RUNS or DATA")
    return True


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def run_all(sweep: Sweep, commands: Sequence[Command]) -> list[Outcome]:
    """Run a block's commands in order; finished ones are not repeated, those that need what failed are skipped.

    Raises:
        KeyboardInterrupt: after the command at hand has ended.
    """
    outcomes, lost = [], {}
    for number, command in enumerate(commands, 1):
        missing = sorted(lost[need] for need in command.needs() if need in lost)
        if missing:
            outcome = Outcome(command, SKIPPED, f"needs what command {missing[0]} did not make")
        else:
            outcome = run_one(sweep, command, f"{number}/{len(commands)}")
        if outcome.status != DONE:
            lost |= {made: lost.get(made, number) for made in command.makes()}
        if outcome.why:
            console.print(f"[{STYLES[outcome.status]}]{outcome.status}[/]: ", end="")
            console.print(outcome.why, markup=False, soft_wrap=True)
        outcomes.append(outcome)
    return outcomes


def run_one(sweep: Sweep, command: Command, where: str) -> Outcome:
    """Run one command unless it is done; afterwards its scores are in MLflow too. Raises `KeyboardInterrupt` as `run_all`."""
    console.rule(f"experiment {sweep.name}, {where}", align="left")
    console.print(command.text, markup=False, soft_wrap=True)
    try:
        if sweep.is_done(command):
            return Outcome(command, DONE, "finished before")
    except UserError as other:
        return Outcome(command, FAILED, str(other))
    begun = command.run and resuming.stage(command.run) != "new"
    parent = {"MLFLOW_PARENT_RUN_ID": sweep.state["parent"]} if sweep.state["parent"] else {}
    started = time.perf_counter()
    status = sweep.call(Command((*command.words, "--resume")) if begun else command, parent)
    took = round(time.perf_counter() - started, 1)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        sweep.note(command, status=FAILED, exit=status, seconds=took, finished=time.time())
        return Outcome(command, FAILED, f"exit status {status}, see above", took)
    sweep.note(command, status=DONE, seconds=took, finished=time.time())
    if command.evaluated:
        experiments_records.track(command.evaluated)
    return Outcome(command, DONE, seconds=took)


def in_process_of_its_own(command: Command, environment: Mapping[str, str]) -> int:
    """Run a command with this Python; Ctrl-C reaches it once, so that it can end in order, and the sweep after it.

    Returns:
        Its exit status, 130 if it was interrupted.
    """
    words = [sys.executable, *command.words]
    child = subprocess.Popen(words, env=os.environ | environment, start_new_session=True)
    interrupted = False
    try:
        while True:
            try:
                status = child.wait()
                return 130 if interrupted or status == -signal.SIGINT else status
            except KeyboardInterrupt:
                interrupted = True
                child.send_signal(signal.SIGINT)
    finally:
        if child.poll() is None:
            child.terminate()


def show(outcomes: Sequence[Outcome]) -> None:
    """Print what became of every command."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "command", "status", "time"):
        table.add_column(name, justify="right" if name in ("", "time") else "left", overflow="fold")
    for number, one in enumerate(outcomes, 1):
        time_taken = "" if one.seconds is None else records.duration(one.seconds)
        why = f": {one.why}" if one.status != DONE else ""
        table.add_row(str(number), cli_text(one.command), f"[{STYLES[one.status]}]{one.status}[/]{why}", time_taken)
    console.print(table)


def cli_text(command: Command) -> str:
    """A command for a table's cell, square brackets kept."""
    return escape(command.text.removeprefix("python "))


def perform(name: str, commands: Sequence[Command], call=in_process_of_its_own) -> list[Outcome]:
    """Run an experiment's commands under one MLflow run, print what became of them and what they gave.

    Raises:
        KeyboardInterrupt: if it was stopped; the same call goes on.
    """
    sweep, ended = Sweep(name, OUTPUTS / "experiments" / f"{name}.json", call), "KILLED"
    trains = any(command.run and command.value("--report-to") != "none" for command in commands)
    if trains and name != experiments_blocks.DATA:
        sweep.state["parent"] = records.open_parent(OUTPUTS, f"experiment {name}", sweep.state["parent"])
        files.write_json(sweep.path, sweep.state)
    try:
        outcomes = run_all(sweep, commands)
        ended = "FINISHED" if all(one.status == DONE for one in outcomes) else "FAILED"
    finally:
        if sweep.state["parent"]:
            records.close_parent(OUTPUTS, sweep.state["parent"], ended)
    show(outcomes)
    return outcomes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.experiments")
    parser.add_argument("name", nargs="?", metavar="N", help="an experiment of experiments.md, such as 3")
    parser.add_argument("--list", action="store_true", help="name the experiments")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--records", action="store_true", help="run none; put its finished runs' records and tables in the page")
    args = parser.parse_args(argv)
    if not args.list and args.name is None:
        raise UserError("no experiment named; give its name; `--list` shows them; such as python -m sonovqa.experiments 3")
    return args


def main(argv: list[str] | None = None) -> int:
    from sonovqa import tables

    args, page = parse(argv), records.ROOT / "experiments.md"
    if args.list:
        for name in experiments_blocks.names(page):
            console.print(f"{name}: {len(experiments_blocks.commands(page, name))} commands", markup=False)
        return 0
    commands = experiments_blocks.commands(page, args.name)
    if args.dry_run:
        for command in commands:
            console.print(command.text, markup=False, soft_wrap=True)
        return 0
    if args.records:
        return tables.keep(args.name, commands)
    outcomes = perform(args.name, commands)
    tables.show(args.name, commands)
    return int(any(one.status != DONE for one in outcomes))


if __name__ == "__main__":
    cli.run(main, resume=f"go on with: python -m sonovqa.experiments {shlex.join(sys.argv[1:])}")
