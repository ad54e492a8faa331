"""Merge a run's adapter onto its 16-bit base and prove that nothing was lost on the way.

    python -m sonovqa.merging outputs/<run>      # what train.py does at its end; run it again after a full disk

A process of its own: it starts with the GPU's memory free and without Unsloth's patches, as vLLM will see the weights.
The merge itself runs in main memory; the check uses the GPU within ``--gpu-memory``, the rest is offloaded.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sonovqa import adapter_shares, adapters, cli, families, files, models, resuming, text_only, weights
from sonovqa.adapter_shares import Projection
from sonovqa.cli import UserError, console

#: Bounds of the merge check. Rounding merged weights to 16 bits moves an answer's distribution by 1e-6 to 1e-3 nats. A layer
#: left out has 0 of what 16 bits can hold of its adapter, one merged has 1.
TOP_AGREEMENT, MEAN_KL, LEAST_SHARE = 0.99, 0.01, 0.5
CHECK_ROWS = 16


def compare(reference, candidate) -> dict[str, float]:
    """Compare two models' next-token distributions at the same answer positions.

    Args:
        reference, candidate: logits ``[N, vocabulary]``.

    Returns:
        ``positions``, ``top_agreement`` (share of positions with the same most likely token) and ``mean_kl`` in nats,
        KL(reference || candidate).
    """
    import torch.nn.functional as F

    left, right = F.log_softmax(reference.double(), dim=-1), F.log_softmax(candidate.double(), dim=-1)
    kl = (left.exp() * (left - right)).sum(dim=-1)
    same = (left.argmax(dim=-1) == right.argmax(dim=-1)).double()
    return {"positions": len(left), "top_agreement": same.mean().item(), "mean_kl": kl.mean().item()}


def verdict(check: dict, shares: dict[str, float]) -> list[str]:
    """What is wrong with a merge, in words; an empty list if nothing is."""
    wrong = []
    if check["top_agreement"] < TOP_AGREEMENT:
        wrong.append(
            f"the most likely token agrees at {check['top_agreement']:.2%} of answer positions; {TOP_AGREEMENT:.0%} are needed"
        )
    if check["mean_kl"] > MEAN_KL:
        wrong.append(f"mean KL is {check['mean_kl']:.2g} nats; {MEAN_KL} are allowed")
    lost = {name: share for name, share in shares.items() if share < LEAST_SHARE}
    if lost:
        name = min(lost, key=lost.get)
        wrong.append(
            f"{len(lost)} layers lack part of their adapter; the worst, {name}, has {lost[name]:.0%} of what 16 bits hold of it"
        )
    return wrong


def check_rows(run: dict, processor, model) -> list[dict]:
    """The run's `CHECK_ROWS` rows as batches of one row each: no padding, no mixing."""
    from sonovqa import choice, dataset
    from sonovqa.batching import Collator, encoder_for

    arguments = run["arguments"]
    splits = dataset.trained_on(arguments)
    encoder = encoder_for(processor, model, choice.of_run(run))
    collate = Collator(splits, encoder, arguments["task"], run["prompt_variant"])
    return [collate([item]) for item in run["check_items"]]


def live_answers(model, batches: list[dict]) -> list[int]:
    """The most likely token at every answer position of the model as it was trained, for the drift that `merge` reports."""
    return answer_logits(model, batches).argmax(dim=-1).tolist()


def answer_logits(model, batches: list[dict]):
    """Logits of ``model`` at all answer positions of ``batches``, in fp32 on the CPU, ``[N, vocabulary]``."""
    import torch

    from sonovqa import losses

    made = []
    with torch.inference_mode():
        for batch in batches:
            on_device = {k: v.to(model.device, model.dtype) if v.is_floating_point() and k != "weights" else v.to(model.device)
                         for k, v in batch.items()}  # fmt: skip
            made.append(losses.answer_logits(model, on_device)[0].float().cpu())
    return torch.cat(made)


def greedy_answers(run: dict, processor, model) -> list[dict]:
    """What base and adapter answer to the run's check rows: `served_check` asks a server the same."""
    from sonovqa import choice, served_check
    from sonovqa.choosing import ChoiceEngine
    from sonovqa.generation import LocalEngine

    head = choice.of_run(run)
    # One image at a time: the cache of all its questions is then no more than the check itself had in memory.
    engine = ChoiceEngine(model, processor, head, batch_images=1) if head else LocalEngine(model, processor, batch_images=1)
    return served_check.answers_of(engine, served_check.check_requests(run))


def merge(folder: Path, gpu_memory: int | None = None) -> dict:
    """Merge ``folder/adapter`` onto its base, write ``folder/merged`` and check it.

    Args:
        folder: a run with ``adapter/`` and ``plan.json`` (written by train.py before it calls this).
        gpu_memory: most bytes of GPU memory the check may use; ``None``: no GPU.

    Returns:
        The check, see `check_merged`, and the ``answers`` that a server is asked for (`greedy_answers`).

    Raises:
        UserError: if the merged weights do not answer as base and adapter do. They are then not left in ``merged/``.
    """
    import torch

    run = files.read_json(folder / "plan.json")
    full = run["arguments"]["full"]
    base, adapter = (str(folder / "weights"), None) if full else (models.locate(run["base"]), folder / "adapter")
    processor = models.load_processor(str(adapter or base), family=families.of_model(base))
    model = _base_and_adapter(base, adapter, gpu_memory)
    batches = check_rows(run, processor, model)
    reference = answer_logits(model, batches)
    answers = greedy_answers(run, processor, model)
    if gpu_memory:  # merged in main memory, whatever part of the model the check had put on the GPU
        model = None
        free()
        model = _base_and_adapter(base, adapter, None)
    before = adapter_shares.projections(model.get_base_model(), adapter, storage_dtype(base)) if adapter else {}
    unchecked = folder / "merged.unchecked"
    with files.replacing_folder(unchecked) as part:
        model = model.to(storage_dtype(base))
        model = model.merge_and_unload() if adapter else model
        model.generation_config = generation_config(run["base"], model)
        model.save_pretrained(part)
        processor.save_pretrained(part)
    model = None
    free()
    check = check_merged(unchecked, adapter, batches, reference, before, gpu_memory)
    live = reference.argmax(dim=-1).eq(torch.tensor(run["live"])).double().mean().item()
    check["drift"] = {"what": "16-bit base + adapter against the model as trained", "top_agreement": live}
    if check["wrong"]:
        raise UserError(f"merge check of {folder}; {'; '.join(check['wrong'])}; the weights are left in {unchecked} for a look; "
                        f"run `python -m sonovqa.merging {folder}` again")  # fmt: skip
    shutil.rmtree(folder / "merged", ignore_errors=True)
    unchecked.rename(folder / "merged")
    return check | {"answers": answers}


def _base_and_adapter(base: str, adapter: Path | None, gpu_memory: int | None):
    model = load_16_bit(base, gpu_memory)
    return (adapters.attach(model, adapter) if adapter else model).eval()


def check_merged(
    merged: Path,
    adapter: Path | None,
    batches: list[dict],
    reference,
    before: dict[str, Projection],
    gpu_memory: int | None = None,
) -> dict:
    """Reload merged weights and compare them with base and adapter.

    Args:
        merged: a merged model folder.
        adapter: the adapter that should be in it; ``None`` after full training.
        batches, reference: answer positions and the logits of 16-bit base + adapter there.
        before: `adapter_shares.projections` of the base.
        gpu_memory: as for `merge`.

    Returns:
        ``rows``, ``positions``, ``top_agreement``, ``mean_kl``, ``layers``, ``least_share``, ``rounding``
        (`adapter_shares.rounding_of`), ``bounds`` and ``wrong``, the list of what is wrong in words.
    """
    try:
        check_complete(merged)
    except UserError as missing:
        return {"wrong": [str(missing)]}
    model = load_16_bit(str(merged), None)
    shares = adapter_shares.of_merged(before, model, adapter) if adapter else {}
    if gpu_memory:
        model = None
        free()
        model = load_16_bit(str(merged), gpu_memory)
    check = {"rows": len(batches), **compare(reference, answer_logits(model.eval(), batches))}
    check |= {
        "layers": len(shares),
        "least_share": min(shares.values(), default=None),
        "rounding": adapter_shares.rounding_of(before),
    }
    check["bounds"] = {"top_agreement": TOP_AGREEMENT, "mean_kl": MEAN_KL, "least_share": LEAST_SHARE}
    check["wrong"] = verdict(check, shares)
    return check


def check_complete(folder: Path) -> None:
    """Raise `UserError` unless everything vLLM needs stands beside the weights."""
    models.check_folder(folder)
    wanted = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    if not weights.takes_no_images(str(folder)):  # of texts the tokenizer is all, with a chat template or without
        wanted += ["chat_template.jinja", "processor_config.json"]
    for name in wanted:
        if not (folder / name).exists():
            raise UserError(
                f"{folder} lacks {name}; vLLM needs it beside the weights; run `python -m sonovqa.merging` on the run again"
            )


def load_16_bit(name: str, gpu_memory: int | None):
    """A model from its 16-bit weights: in main memory, or on the GPU up to ``gpu_memory`` bytes with the rest offloaded.

    Without a GPU small models compute in fp32, which is exact for 16-bit weights.
    """
    import torch

    options = {"device_map": "auto", "max_memory": {0: gpu_memory, "cpu": "10000GB"}} if gpu_memory else {"device_map": "cpu"}
    dtype = storage_dtype(name) if gpu_memory or torch.cuda.is_available() else torch.float32
    options |= {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    return text_only.model_class(name).from_pretrained(name, **options)


def storage_dtype(name: str):
    """The 16-bit type a model's weights are stored in: its own, bf16 where they are wider."""
    import torch
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(name).dtype
    return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16


def generation_config(base: str, model):
    """The base's generation settings, or the model's own where the base has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return model.generation_config


def free() -> None:
    """Give back the memory of models that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(folder: Path, gpu_memory: int | None) -> dict:
    """`merge` in a process of its own; returns the check.

    Raises:
        UserError: with the one line the process ended in.
    """
    words = [sys.executable, "-m", "sonovqa.merging", str(folder)] + (["--gpu-memory", str(gpu_memory)] if gpu_memory else [])
    done = subprocess.run(
        words, cwd=Path(__file__).parents[1], env=os.environ | {"UNSLOTH_IS_PRESENT": ""}, capture_output=True, text=True
    )
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"merging ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return files.read_json(folder / "merge.json")


def main(argv: list[str] | None = None) -> None:
    """Merge, check and write ``merge.json`` beside the run's other files."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.merging")
    parser.add_argument("run", type=Path, help="a run's folder with adapter/ and plan.json")
    parser.add_argument("--gpu-memory", type=int, help="most bytes of GPU memory the check may use (unset: none)")
    args = parser.parse_args(argv)
    if not (args.run / "plan.json").exists():
        raise UserError(f"{args.run} holds no plan.json, so it is no run of train.py; name a folder under outputs/")
    with open(args.run / "plan.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # a train.py that was killed leaves its merging going: wait for it
        resuming.clear_parts(args.run)
        check = merge(args.run.resolve(), args.gpu_memory)
        files.write_json(args.run / "merge.json", check)
    least = check["least_share"]
    merged = "" if least is None else f", of each layer's adapter at least {least:.0%} of what 16 bits hold"
    console.print(f"merge check: top token agrees at {check['top_agreement']:.2%} of {check['positions']} answer positions, "
                  f"mean KL {check['mean_kl']:.2g} nats{merged}")  # fmt: skip
    if note := adapter_shares.rounding_note(check):
        console.print(note)


if __name__ == "__main__":
    cli.run(main)
