"""The end of a run: save what was trained, merge and check it, write run.json last."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from sonovqa import adapter_shares, cli, dataset, files, hub, merging, models, records, resuming, tracking
from sonovqa.cli import console
from sonovqa.planning import Plan


def record(args: argparse.Namespace, base: str, loaded, trainer, plan: Plan, progress, head=None) -> dict:
    """What run.json says: arguments, commit, versions, device, data and model, and the figures of the training.

    Args:
        args: the parsed command line of train.py.
        base: folder or hub id of the base weights.
        loaded: the `models.Loaded` base.
        trainer: after ``trainer.train()``.
        plan: of the training split.
        head: the `choice.Head` that was trained; ``None``: answers are generated.
        progress: the run's `training.Progressing`: curve and seconds over all of its sessions.
    """
    curve, seconds = progress.curve, progress.seconds
    passes = trainer.state.epoch / seconds
    return {
        "run": args.run,
        "finished": records.now(),
        "arguments": json.loads(json.dumps(vars(args), default=str)) | {"data": str(args.data.resolve())},
        "started_with": resuming.started(args.outputs / args.run),  # before unset arguments were filled in from the data
        "base": base,
        "base_is_local": Path(base).exists(),  # a model card is made elsewhere and later, where nobody could tell
        "base_revision": getattr(trainer.model.config, "_commit_hash", None),
        "backend": loaded.backend,
        "prompt_variant": args.prompts,
        "head": head and head.json(),
        "pixels": models.pixel_budget(loaded.processor),
        "data": dataset.about(args.data)["fingerprint"],
        "check_items": plan.items[: merging.CHECK_ROWS],
        **records.commit(),
        "versions": records.versions(),
        "device": records.device(),
        "processes": trainer.accelerator.num_processes,
        "training": {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "seconds": round(seconds, 3),
            "answers_per_second": plan.questions * passes,
            "tokens_per_second": plan.tokens * passes,
            "peak_memory_bytes": max([records.peak_memory(), *(entry.get("peak_memory_bytes", 0) for entry in curve)]),
            "loss": mean_loss(curve),
            "resumed_at": progress.resumed_at,
            "kept_step": trainer.state.best_global_step or trainer.state.global_step,  # whose weights are the result
            "best_validation_loss": best_validation_loss(curve),
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "curve": curve,
        },
    }


def best_validation_loss(curve: list[dict]) -> float | None:
    """The least validation loss of a curve, whichever checkpoint was kept; ``None`` without a validation split."""
    return min((entry["eval_loss"] for entry in curve if "eval_loss" in entry), default=None)


def mean_loss(curve: list[dict]) -> float:
    """Mean training loss over all steps of a curve, whose losses are means over the steps since the one before."""
    logged = [(entry["step"], entry["loss"]) for entry in curve if "loss" in entry]
    starts = [0, *(step for step, _ in logged)]
    return sum((step - start) * loss for start, (step, loss) in zip(starts, logged)) / logged[-1][0]


def finish(args: argparse.Namespace, folder: Path, loaded, trainer, run: dict, tracker=None) -> None:
    """Save, free the device, merge and check in a process of its own, write the record, say where everything is.

    Raises:
        UserError: if the merge check fails; adapter and plan.json are kept, run.json is not written.
    """
    save(args, folder, loaded, trainer, run)
    trainer.model = trainer.model_wrapped = loaded.model = None
    merging.free()
    merge_and_record(args, folder, run, tracker)


def no_step_is_left(args: argparse.Namespace, folder: Path) -> bool:
    """Whether a run's training is over. One that was stopped after it is finished here: merged, checked and recorded.

    Raises:
        UserError: as `finish` does.
    """
    stage = resuming.stage(folder)
    if stage == "finished":
        unmerged = args.merge and not (folder / "merged").is_dir()
        hint = f"; merge it with python -m sonovqa.merging {folder}" if unmerged else ""
        console.print(f"{folder} is finished; nothing is left to do{hint}", soft_wrap=True)
    elif stage == "trained" and int(os.environ.get("RANK", 0)) == 0:
        console.print("the training was finished before: " + ("merging only" if args.merge else "only its record is written"))
        tracker = tracking.start(args.report_to, args.outputs, args.run, vars(args))
        merge_and_record(args, folder, files.read_json(folder / "plan.json"), tracker)
    return stage in ("finished", "trained")


def merge_and_record(args: argparse.Namespace, folder: Path, run: dict, tracker=None) -> None:
    """Merge what `save` wrote unless that is done already, write run.json last. Raises as `finish` does."""
    import torch

    if args.merge:
        if not ((folder / "merge.json").exists() and (folder / "merged").is_dir()):  # merge.json comes after merged/
            with console.status("merging and checking"):
                merging.run(folder, run["training"]["peak_memory_bytes"] if torch.cuda.is_available() else None)
        run["merge_check"] = {key: told for key, told in files.read_json(folder / "merge.json").items() if key != "answers"}
        shutil.rmtree(folder / "weights", ignore_errors=True)
    path = records.write_run(folder, run)
    if tracker:
        tracker.finish(path)
    say_end(args, folder, run)
    hub.push_if_asked(args, folder)


def save(args: argparse.Namespace, folder: Path, loaded, trainer, run: dict) -> None:
    """``adapter/`` (with ``--full`` ``weights/``) with its processor, and plan.json: all that `merging` needs."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    with files.replacing_folder(folder / ("weights" if args.full else "adapter")) as part:
        model.save_pretrained(part)
        loaded.processor.save_pretrained(part)
        config = part / "adapter_config.json"
        if config.exists():  # the exact weights it was trained on and is merged onto
            files.write_json(config, files.read_json(config) | {"base_model_name_or_path": run["base"]})
    run["live"] = merging.live_answers(model, merging.check_rows(run, loaded.processor, model))
    files.write_json(folder / "plan.json", run)


def say_end(args: argparse.Namespace, folder: Path, run: dict) -> None:
    """The run in four lines: time and memory, merge check, files, what comes next."""
    made, check = run["training"], run.get("merge_check")
    loss = made["best_validation_loss"]
    validated = "not validated" if loss is None else f"least validation loss {loss:.4f}"
    console.print(
        f"trained {made['steps']} steps in {records.duration(made['seconds'])}: {made['answers_per_second']:.1f} answers/s, "
        f"peak {records.gigabytes(made['peak_memory_bytes'])}, {validated}; "
        f"kept: after {made['kept_step']} steps"
    )
    if check:
        console.print(
            f"merge check passed on {check['rows']} rows: top token agrees at {check['top_agreement']:.2%} of "
            f"{check['positions']} answer positions, mean KL {check['mean_kl']:.1e} nats; the "
            f"{args.bits}-bit model as trained agrees at "
            f"{check['drift']['top_agreement']:.2%}"
        )
        if note := adapter_shares.rounding_note(check):
            console.print(note)
    name = os.path.relpath(folder)
    console.print(f"{name}/  {'adapter/ ' if not args.full else ''}{'merged/ ' if check else ''}run.json\n{cli.RESEARCH_NOTICE}")
    console.print(f"next: python evaluate.py {name} --data {args.data}   then: bash serve.sh {name}")
