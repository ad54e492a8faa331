"""Run an experiment of experiments.md: its block's commands one after another, then a table of what they gave.

    python -m sonovqa.experiments --list
    python -m sonovqa.experiments 3 --dry-run
    MODEL=tiny DATA=data/phantoms python -m sonovqa.experiments 3
    python -m sonovqa.experiments 3 6 7 --jobs 8                   # side by side, on a box with many cores
    python -m sonovqa.experiments 3 --records                      # keep what was measured in outputs/records/

Stopped by whatever means, the same command goes on: what is finished is not done again, an unfinished run is resumed. A
command that fails is shown as failed and stops nothing but those that need what it should have made. Runs of an
experiment stand below one MLflow run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from sonovqa import cli, experiments_blocks, files, records, tracking, tracking_mlflow
from sonovqa.cli import UserError, console
from sonovqa.experiments_blocks import Command
from sonovqa.experiments_sweep import DONE, STYLES, Outcome, Processes, Sweep, ended_as_by_ctrl_c, run_all

OUTPUTS = Path("outputs")


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


def perform(name: str, commands: Sequence[Command], call=None) -> list[Outcome]:
    """Run one experiment's commands, see `perform_all`."""
    return perform_all({name: commands}, call)[name]


def perform_all(blocks: Mapping[str, Sequence[Command]], call=None, jobs: int = 1) -> dict[str, list[Outcome]]:
    """Run experiments' commands, each experiment's under one MLflow run, print what became of them and what they gave.

    Args:
        blocks: commands by experiment; one that several need (a data set, a shared run) runs once.
        call: runs a command with the environment's changes and gives its exit status; ``None``: `Processes`.
        jobs: commands at once; with more than one each prints into a file of its own and gets its share of the cores.

    Raises:
        KeyboardInterrupt: if it was stopped, by Ctrl-C, SIGTERM or SIGHUP; the same call goes on.
    """
    logs, threads = (OUTPUTS / "experiments" / "logs", max(1, len(os.sched_getaffinity(0)) // jobs)) if jobs > 1 else (None, None)
    call = call or Processes(logs, threads)
    sweeps = {name: Sweep(name, OUTPUTS / "experiments" / f"{name}.json", call) for name in blocks}
    for name, sweep in sweeps.items():
        trains = any(command.run and command.value("--report-to") in (None, tracking.MLFLOW) for command in blocks[name])
        if trains and name != experiments_blocks.DATA:
            known = (OUTPUTS, f"experiment {name}", sweep.state["parent"])
            sweep.state["parent"] = tracking.attempt(known[1], tracking_mlflow.open_parent, *known)
            files.write_json(sweep.path, sweep.state)
    ended: dict[str, list[Outcome]] = {}
    try:
        with ended_as_by_ctrl_c():
            outcomes = iter(run_all([(sweeps[name], command) for name in blocks for command in blocks[name]], jobs))
        ended = {name: [next(outcomes) for _ in commands] for name, commands in blocks.items()}
    finally:
        for name, sweep in sweeps.items():
            if sweep.state["parent"]:
                known = (OUTPUTS, sweep.state["parent"], _status(ended.get(name)))
                tracking.attempt(f"the end of experiment {name}", tracking_mlflow.close_parent, *known)
    for found in ended.values():
        show(found)
    return ended


def _status(outcomes: Sequence[Outcome] | None) -> str:
    """MLflow's word for how an experiment ended."""
    if outcomes is None:
        return "KILLED"
    return "FINISHED" if all(one.status == DONE for one in outcomes) else "FAILED"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.experiments")
    parser.add_argument("names", nargs="*", metavar="N", help="experiments of experiments.md, such as 3")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once; what waits for nothing runs side by side")
    parser.add_argument("--list", action="store_true", help="name the experiments")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--records", action="store_true", help="run none; put its finished runs' records and tables in the page")
    args = parser.parse_args(argv)
    if not args.list and not args.names:
        raise UserError("no experiment named; give its name; `--list` shows them; such as python -m sonovqa.experiments 3")
    cli.check(cli.out_of_range(args, ("jobs",), ()))
    return args


def main(argv: list[str] | None = None) -> int:
    from sonovqa import tables

    args, page = parse(argv), records.ROOT / "experiments.md"
    if args.list:
        for name in experiments_blocks.names(page):
            console.print(f"{name}: {len(experiments_blocks.commands(page, name))} commands", markup=False)
        return 0
    blocks = {name: experiments_blocks.commands(page, name) for name in args.names}
    if args.dry_run:
        for command in (command for commands in blocks.values() for command in commands):
            console.print(command.text, markup=False, soft_wrap=True)
        return 0
    if args.records:
        for name, commands in blocks.items():
            tables.keep(name, commands)
        return 0
    outcomes = perform_all(blocks, jobs=args.jobs)
    for name, commands in blocks.items():
        tables.show(name, commands)
    return int(any(one.status != DONE for found in outcomes.values() for one in found))


if __name__ == "__main__":
    cli.run(main, resume=f"go on with: python -m sonovqa.experiments {shlex.join(sys.argv[1:])}")
