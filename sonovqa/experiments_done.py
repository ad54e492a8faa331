"""Whether a sweep's command is done: what it makes is there, was made by the same arguments, and is newer than what it reads."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sonovqa import answering, comparing, dataset, families, files, provenance, records, resuming, weights
from sonovqa.cli import UserError
from sonovqa.experiments_blocks import Command

#: What train.py fills in where it is unset, by the model's family; and, later, by the data, the device and the model.
BY_FAMILY = frozenset({"bits", "max_pixels", "rank", "alpha", "dropout"})
LATER = frozenset({"steps", "eval_every", "optimizer", "batching"})


def made_by(command: Command) -> Path | None:
    """The record that a training or a preparation writes last."""
    if command.script == "train.py" and command.run:
        return command.run / "run.json"
    out = command.value("--out")
    return Path(out) / "dataset.json" if command.script == "prepare_dataset.py" and out else None


def check_same(command: Command, path: Path) -> bool:
    """True if the record at ``path`` was made with the command's arguments, those left out included.

    Raises:
        UserError: naming those that differ, or if the script does not take the command's.
    """
    wrong = _unlike_run(command, path.parent) if command.script == "train.py" else _unlike_set(command, path)
    if wrong:
        raise UserError(f"{path.parent} was made by another command; {'; '.join(wrong)}; delete it, or set RUNS or DATA")
    return True


def has_scores(command: Command) -> bool:
    """Whether an evaluation's scores.json (of ``evaluate.py prompts`` prompts.json) is there and of the command's arguments:
    another evaluation of the same run writes into the same folder. ``True`` of other commands.
    """
    if command.script != "evaluate.py" or command.words[1] in ("compare", "score"):
        return True
    several = command.words[1] == "prompts"
    try:
        args = _parsed(command.script, command.words[2 if several else 1 :], several=several)
        if args.endpoint and args.model is None:  # only the endpoint knows its name, and so the folder
            return True
        folder = answering.output_folder(args)
        prompts = args.prompt if several else args.prompt or provenance.own_prompts(answering.run_of(args))
    except UserError:  # the command itself says it
        return False
    path = (args.out or folder.with_name(f"{folder.name}-prompts")) / "prompts.json" if several else folder / "scores.json"
    if not path.exists():
        return False
    before, now = files.read_json(path)["arguments"], _plain(vars(args) | {"prompt": prompts})
    # `unset` are those that evaluate.py fills in by what is asked; of records older than it nobody can tell.
    return all(before.get(name, value) == value for name, value in now.items() if name not in now["unset"])


def read_by(command: Command) -> Iterator[Path]:
    """The records of runs and data sets that a command names; of a comparison also the evaluations that it compares.

    Raises:
        UserError: if one of these is not there.
    """
    yield from (Path(word) / name for word in command.words for name in ("run.json", "dataset.json"))
    if command.words[:2] == ("evaluate.py", "compare"):
        options = {at + 1 for at, word in enumerate(command.words) if word.startswith("--") and "=" not in word}
        for at, word in enumerate(command.words[2:], 2):
            if at not in options and not word.startswith("--"):
                folder = comparing.folder_of(Path(word), command.value("--split") or "test")
                yield from (folder / name for name in ("predictions.jsonl", "confidence.jsonl", "scores.json"))


def _unlike_run(command: Command, folder: Path) -> list[str]:
    """What a finished run was trained with, unlike the command; as `train.py --resume` compares, and whether it was merged."""
    run = files.read_json(folder / "run.json")
    args, unset = _parsed(command.script, command.words[1:]), _parsed(command.script, ("--data", command.value("--data")))
    known = _fill_in(args, unset)
    started = run.get("started_with") or resuming.started(folder)
    before, now, defaults = started or run["arguments"], _plain(vars(args)), _plain(vars(unset))
    untold = (frozenset() if known else BY_FAMILY) | (frozenset() if started else LATER)  # unset now: nobody can tell
    compared = [name for name in now if name not in resuming.FREE and not (name in untold and now[name] == defaults[name])]
    # A record older than a flag was made without it.
    wrong = [_told(command, name, before.get(name, defaults[name]), now[name]) for name in compared]
    if now["merge"] and run["arguments"].get("merge") is False and not (folder / "merged").is_dir():
        wrong.append("--no-merge was given")
    if run.get("processes", 1) != 1:
        wrong.append(f"it was trained by {run['processes']} processes, not 1")
    if (args.data / "dataset.json").exists() and run.get("data") != dataset.about(args.data)["fingerprint"]:
        wrong.append(f"--data held other images or answers than {args.data} does now")
    return [told for told in wrong if told]


def _fill_in(*commands: argparse.Namespace) -> bool:
    """Fill in what train.py would, by the first one's model; ``False`` if its configuration is not on this machine."""
    name = commands[0].model
    tiny = name.partition("-")[0] == "tiny"
    if not tiny and not weights.config_of(name):
        return False
    for args in commands:
        families.fill_in(args, families.of_model(name), tiny)
    return True


def _unlike_set(command: Command, path: Path) -> list[str]:
    """What a data set was made with, unlike the command; dataset.json holds what decides its content."""
    before, now = files.read_json(path)["arguments"], _plain(vars(_parsed(command.script, command.words[1:])))
    return [told for name in now if name in before and (told := _told(command, name, before[name], now[name]))]


def _told(command: Command, name: str, before, now) -> str:
    """How an argument differs, in words; empty if it does not."""
    if before == now:
        return ""
    flag = resuming.flag(name)
    opposite = f"--no-{flag[2:]}"
    if isinstance(now, bool):
        given = next((word for word in (flag, opposite) if word in command.words), None)
        return f"{given} was not given" if given else f"{opposite if now else flag} was given"
    return f"{flag} was {_shown(before)}, not {_shown(now)}"


def _shown(value) -> str:
    return (" ".join(map(str, value)) or "unset") if isinstance(value, list) else resuming.shown(value)


def _plain(arguments: Mapping) -> dict:
    """Arguments as a record holds them."""
    return json.loads(json.dumps(arguments, default=str))


def _parsed(script: str, words: tuple[str, ...], **options) -> argparse.Namespace:
    """The words as the script itself reads them; its parser alone knows its defaults.

    Raises:
        UserError: if it does not take them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _script(script).parse(list(words), **options)
    except SystemExit:
        told = said.getvalue().strip().removeprefix("error: ").partition("; see `")[0]
        raise UserError(f"{script} cannot be called so; {told}; its own flags are allowed; python {script} --help") from None


@functools.cache
def _script(name: str):
    """A script of the project as a module. The sweep is above the scripts: it runs them, and reads their commands as they do."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, records.ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
