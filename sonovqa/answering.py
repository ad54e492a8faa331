"""Who answers an evaluation, and where its answers lie: weights, settings that must not be mixed, folders, the run's base."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sonovqa import choice, comparing, credentials, files, records
from sonovqa.cli import UserError


def output_folder(args: argparse.Namespace) -> Path:
    """``--out``, else ``eval-<split>`` in the run's folder, or for bare models and endpoints in ``outputs/<name>``.

    Raises:
        UserError: if the endpoint's address holds a password: all that is written there names the address.
    """
    if args.endpoint:
        credentials.check_url("--endpoint", args.endpoint)
    name = args.run or args.model or re.sub(r"^https?://", "", args.endpoint)
    slug = re.sub(r"[^\w.-]+", "-", Path(name).name if args.run else name).strip("-.") or "model"  # a served name may be ".."
    task = "" if args.task == "all" else f"-{args.task}"
    kind = f"eval-{args.split}{task}" + ("-adapter" if args.adapter else "-endpoint" if args.endpoint else "")
    root = Path(args.run) if args.run and (Path(args.run) / "run.json").exists() else Path("outputs") / slug
    return args.out or root / kind


def model_of(args: argparse.Namespace) -> tuple[str, Path | None]:
    """The weights to load and the adapter to put on them.

    Raises:
        UserError: if the run has no merged weights, or no adapter where that is asked for.
    """
    folder = Path(args.run)
    if args.adapter and (folder / "adapter").is_dir():
        return files.read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"], folder / "adapter"
    if not (folder / "run.json").exists():
        return args.run, None
    if args.adapter:
        raise UserError(f"--adapter; {folder} has no adapter/; only a run of LoRA keeps one; leave --adapter out")
    if not (folder / "merged").is_dir():
        raise UserError(f"{folder} has no merged/ weights; use --adapter, or train.py with --merge")
    return str(folder / "merged"), None


def run_of(args: argparse.Namespace) -> dict | None:
    """run.json of what is evaluated: of a run, or of the choice run that an endpoint serves (``--head``); else ``None``.

    Raises:
        UserError: if ``--head`` names none.
    """
    if not args.head:
        return records.run_behind(args.run)
    run = records.read_run(args.head)
    if choice.of_run(run) is None:
        raise UserError(f"--head {args.head}; it is no finished choice run; one of train.py --head choice; leave --head out")
    return run


def open_endpoint(args: argparse.Namespace):
    """The endpoint's engine, seen to be there: of a choice run the one that asks for labels."""
    from sonovqa.choosing import ChoiceEndpoint
    from sonovqa.endpoint import Endpoint

    where, how = (args.endpoint, args.model, args.in_flight), {"key_env": args.api_key_env}
    head = choice.of_run(run_of(args))
    endpoint = ChoiceEndpoint(*where, head=head, **how) if head else Endpoint(*where, **how)
    endpoint.check()
    return endpoint


def engine_of(run: str | Path, model, processor, batch_images: int = 8, share: bool = True):
    """The local engine that answers as a run was trained to: `choosing.ChoiceEngine` or `generation.LocalEngine`.

    Args:
        run: the folder of a run or its ``merged/``; anything else generates its answers.
        model, processor: as `models.load_for_inference` gives them.
        batch_images, share: of either engine.

    Raises:
        UserError: if a text-only model is to generate answers.
    """
    head = choice.behind(run)
    if head:
        from sonovqa.choosing import ChoiceEngine

        return ChoiceEngine(model, processor, head, batch_images, share)
    if processor.image_processor is None:
        raise UserError(f"{run} is a text-only model without a choice head; it answers nothing here; train it with --head choice")
    from sonovqa.generation import LocalEngine

    return LocalEngine(model, processor, batch_images, share)


def settings_of(args: argparse.Namespace, about: dict) -> dict:
    """Everything that changes an answer: predictions made under other settings are never mixed with these."""
    who = {"endpoint": args.endpoint, "model": args.model, "head": args.head and str(args.head)}
    if not args.endpoint:
        who = {"model": args.run, "weights": identity(args), "bits": args.bits, "shared_prefix": args.shared_prefix}
    return who | {
        "adapter": args.adapter, "data": about["fingerprint"], "split": args.split, "prompt": args.prompt,
        "max_new_tokens": args.max_new_tokens, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels,
    }  # fmt: skip


def identity(args: argparse.Namespace) -> str | None:
    """Tells other weights under the same name: a hash over the weight files' names, sizes and times, or the hub's commit.

    ``None`` for a hub model of which neither the hub nor its cache can tell anything; loading it will say why.

    Raises:
        UserError: if the run has no merged weights, or there is no such tiny model.
    """
    name, adapter = model_of(args)
    if adapter is None and (name == "tiny" or name.startswith("tiny-")):
        from sonovqa import models

        name = models.locate(name)
    folder = adapter or Path(name)
    if not folder.is_dir():
        return _commit(name)
    found = sorted(folder.glob("*.safetensors"))
    return files.sha256(*(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in found))[:16] if found else None


def _commit(name: str) -> str | None:
    """The commit of a hub model that loading it would take, as its config.json in the hub's cache lies in; asks the hub."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except (errors.HFValidationError, OSError):  # the hub's own errors are OSErrors
        return None


def base_folder(args: argparse.Namespace, run: dict | None, about: dict) -> Path | None:
    """Where the base's answers to the same questions lie: ``--base``, or where this script writes those of the run's base.

    Args:
        run: run.json, or ``None`` for what is no run.
        about: dataset.json.

    Raises:
        UserError: if ``--base`` names an evaluation that is not there, or one of other questions.
    """
    if args.base is None and run is None:
        return None
    name = args.base or run["arguments"]["model"]
    of_base = {"run": name, "out": None, "adapter": False, "endpoint": None, "model": None}
    folder = Path(name) if (Path(name) / "settings.json").exists() else output_folder(argparse.Namespace(**vars(args) | of_base))
    if comparing.same_questions(folder, settings_of(args, about)):
        return folder
    if args.base is not None:
        raise UserError(
            f"--base; {folder} holds no evaluation of the same data, split and prompts; "
            f"make it first: python evaluate.py {args.base} --data {args.data} --split {args.split}"
        )
    return None


def data_asked(args: argparse.Namespace, about: dict, rows: list[dict]) -> dict:
    """Which data and how much of it a file of scores is about; ``about`` is dataset.json."""
    images, groups = (len({row[name] for row in rows}) for name in ("image_id", "group"))
    return {"path": str(args.data), "fingerprint": about["fingerprint"], "split": args.split, "images": images, "groups": groups}


def stamp(args: argparse.Namespace) -> dict:
    """How and when a file of scores was made."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {"arguments": arguments, "versions": records.versions(), **records.commit(), "finished": records.now()}
