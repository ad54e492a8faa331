"""What `bench answer` expects of memory, printed and in the record before a weight is loaded; and how right that was."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from sonovqa import bench_cases, families, memory, memory_peak, records, weights
from sonovqa.bench_cases import SHARED, VLLM, Case
from sonovqa.cli import UserError
from sonovqa.engines import ImageRequest


def of_case(case: Case, requests: Sequence[ImageRequest]) -> list[dict]:
    """A prediction for every level of a case, ``[]`` for a server, which takes as much memory as it is told to.

    Returns:
        ``model``, ``bits``, ``engine``, ``level``, and ``predicted_loaded``, ``predicted_peak`` and ``parts`` in bytes; or
        ``why_not`` where the model's headers, configuration or processor cannot be had. Loading it will say the same.
    """
    if case.engine == VLLM or case.model is None:
        return []
    try:
        tensors, model, encoder = _shell(case.model, case.adapter)
        return [_entry(case, level) | _predicted(case, level, tensors, model, encoder, requests) for level in case.levels]
    except (UserError, OSError, ValueError) as fault:
        return [_entry(case, level) | {"why_not": str(fault).splitlines()[0]} for level in case.levels]


@functools.lru_cache(maxsize=1)  # a model's cases follow one another
def _shell(name: str, adapter: str | None):
    """A model's stored tensors, the model without its numbers (on torch's meta device), and its encoder.

    Raises:
        UserError, OSError, ValueError: if headers, configuration or processor cannot be had.
    """
    from sonovqa import models

    name = models.locate(name)
    tensors = weights.of_model(name)
    if tensors is None:
        raise UserError("neither the hub's cache nor the hub tells its tensors")
    processor = models.load_processor(adapter or name, family=families.of_model(name))
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from sonovqa.batching import Encoder

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    return tensors, model, Encoder(processor, model)


def _entry(case: Case, level: int) -> dict:
    return {"model": case.label, "bits": case.bits, "engine": case.engine, "level": level, "made": records.now()}


def _predicted(case: Case, level: int, tensors: dict, model, encoder, requests: Sequence[ImageRequest]) -> dict:
    work = memory_peak.workload(encoder, model, requests, level, case.engine == SHARED, case.new_tokens)
    told = memory_peak.predict(tensors, model.config.to_dict(), case.bits, memory.device()[1], work)
    lora = memory_peak.adapter_bytes(case.adapter)
    parts = told.parts | {"LoRA": lora} if lora else told.parts
    return {"predicted_loaded": told.loaded + lora, "predicted_peak": told.peak + lora, "parts": parts, "work": vars(work)}


def in_words(entry: Mapping) -> str:
    """A prediction as it is printed before anything is measured."""
    who = f"{entry['model']} {entry['bits']} {entry['engine']} {entry['level']}"
    if "why_not" in entry:
        return f"no prediction for {who}: {entry['why_not']}"
    loaded, peak = (memory.gigabytes(entry[key]) for key in ("predicted_loaded", "predicted_peak"))
    beside = {name: count for name, count in entry["parts"].items() if name != "weights" and count >= 1e6}
    told = ", ".join(f"{name} {memory.gigabytes(count)}" for name, count in beside.items())
    return f"predicted for {who}: {loaded} loaded, {peak} at peak" + (f" ({told})" if told else "")


def beside(row: dict, entries: Sequence[Mapping]) -> dict:
    """The row with the last prediction of its case; on CUDA also measured over predicted, less what the process held before.

    Without CUDA what is measured is the process's resident set, which holds every imported library as well: no ratio.
    """
    named = ("model", "bits", "engine", "level")
    found = [entry for entry in entries if all(entry[name] == row[name] for name in named) and "why_not" not in entry]
    if not found:
        return row
    told = {key: found[-1][key] for key in ("predicted_loaded", "predicted_peak")}
    for what in ("loaded", "peak"):
        if row.get("memory") == bench_cases.TENSORS:
            told[f"ratio_{what}"] = round((row[f"memory_{what}"] - row["memory_before"]) / told[f"predicted_{what}"], 4)
    return row | told
