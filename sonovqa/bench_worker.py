"""One case of `bench answer` in a process of its own, so that its peak memory and load time are its own.

    python -m sonovqa.bench_worker CASE.json ROWS.jsonl

It appends a row for each level (images at a time, requests in flight) as it is measured, then the scores if any are asked
for; how it failed is its last line.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sonovqa import (
    bench_caches,
    bench_cases,
    bench_images,
    bench_scores,
    bench_serving,
    bench_timing,
    bench_turns,
    cli,
    images,
    memory_check,
    predictions,
)
from sonovqa.bench_cases import RESIDENT, SHARED, TENSORS, VLLM, Case, row_of
from sonovqa.cli import UserError
from sonovqa.endpoint import KEY_NAMES, Endpoint
from sonovqa.engines import Engine, ImageRequest
from sonovqa.memory_peak import Batch

WARM_UPS = 2  # images that a server is asked about before every level


def local(case: Case, requests: list[ImageRequest]) -> Iterator[dict]:
    """Measure a model in this process.

    Memory is that of torch's tensors on CUDA, as papers give it; what its caching allocator reserved and what the device has
    in use over before, CUDA's context among it, stand beside it. Without CUDA it is this process's resident set.
    """
    from sonovqa import models, torchvision_ops

    models.locate(case.model)  # a name that is none says so before the slow imports
    torchvision_ops.declare()
    import torch
    import transformers  # noqa: F401 - its import is not the model's load time

    from sonovqa.generation import LocalEngine

    cuda, device = torch.cuda.is_available(), bench_serving.device_used()
    bare = memory_now(cuda)
    adapter, (batch, *more) = case.adapter and Path(case.adapter), batches_of(case, requests)
    for other in more:
        memory_check.check_inference(models.locate(case.model), case.bits, other, (None, None), adapter)
    with bench_turns.beside_others():
        started = time.perf_counter()
        model, processor = models.load_for_inference(case.model, case.bits, adapter, batch=batch)
        seconds = time.perf_counter() - started
    told = {"load_seconds": round(seconds, 2), "memory_before": bare, "memory_loaded": memory_now(cuda)}
    told |= {"memory": TENSORS if cuda else RESIDENT, "dtype": str(model.dtype).removeprefix("torch.")}
    told |= {"disk_bytes": disk_bytes(case.model, case.adapter), "memory_loading_peak": memory_peak(cuda)}
    told |= _taken("loaded", device) if cuda else {}
    for level in case.levels:
        engine = LocalEngine(model, processor, level, case.engine == SHARED, case.ignore_eos)
        with bench_turns.beside_others():
            bench_timing.run_through(engine, bench_images.warm_up(requests, level), case.new_tokens)
        with bench_turns.alone():
            figures, answers = bench_timing.measure(engine, requests, case.new_tokens)
        figures |= {"memory_peak": memory_peak(cuda)} | (_taken("peak", device) if cuda else {})
        yield row_of(case, level, told | figures | {"answers": answers})
    if case.scoring:
        yield scored(case, LocalEngine(model, processor, case.scoring.at_once, case.engine == SHARED))


def batches_of(case: Case, requests: list[ImageRequest]) -> list[Batch]:
    """The most that a case has in work at one time: while it is measured, if it still is to be, and while it scores."""
    measured = [_measured(case, requests)] if case.levels else []
    return measured + ([Batch(**case.scoring.work)] if case.scoring else [])


def _measured(case: Case, requests: list[ImageRequest]) -> Batch:
    sizes = [images.size_of(request.image) for request in requests]
    return Batch(
        images=max(case.levels),
        questions=max(len(request.prompts) for request in requests),
        new_tokens=case.new_tokens,
        pixels=max(width * height for width, height in sizes),
        letters=max(len(prompt) for request in requests for _, prompt in request.prompts),
        share=case.engine == SHARED,
    )


def scored(case: Case, engine: Engine) -> dict:
    """What `bench_scores.score` gives, told from a row by its one key."""
    return {"scores": bench_scores.score(case, engine)}


def _taken(when: str, before: int | None) -> dict:
    """What torch's allocator reserved (it gives nothing back, so after the last answer that is its peak), and what the whole
    device has in use over ``before``, by nvidia-smi; that is unknown unless it shows this process there and no other."""
    import torch

    used, alone = bench_serving.device_used(), bench_serving.device_processes() == 1
    taken = None if used is None or before is None or not alone else used - before
    return {f"reserved_{when}": torch.cuda.memory_reserved(), f"device_{when}": taken}


def memory_now(cuda: bool) -> int:
    """Bytes this process holds: in torch's tensors on the device, or resident."""
    if cuda:
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def memory_peak(cuda: bool) -> int:
    """The most it ever held, loading included. (``ru_maxrss`` would hand on the peak of whoever started this process.)"""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    """A size of this process in bytes, from ``/proc/self/status`` (proc(5))."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024


def disk_bytes(model: str, adapter: str | None) -> int:
    """Size of all safetensors files that are loaded."""
    from sonovqa import models, weights

    folder = Path(models.locate(model))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        folder = Path(try_to_load_from_cache(model, "config.json")).parent
    names = [folder / weights.SINGLE] if (folder / weights.SINGLE).exists() else sorted(folder.glob("model-*.safetensors"))
    return sum(path.stat().st_size for path in [*names, *(Path(adapter).glob("*.safetensors") if adapter else ())])


def behind_endpoint(case: Case, requests: list[ImageRequest], log: Path) -> Iterator[dict]:
    """Measure a vLLM server: the one at ``case.endpoint``, or one started here and stopped afterwards."""
    if case.endpoint:
        yield from levels(case, requests, case.endpoint, case.endpoint_model, lambda: {})
        return
    if case.bits != 16:
        raise UserError(f"not measured: vLLM serves 16-bit weights here, not --bits {case.bits}; give a server of your own with "
                        "--endpoint")  # fmt: skip
    from sonovqa import models

    folder = Path(case.adapter).parent if case.adapter else Path(models.locate(case.model))
    with bench_serving.served(folder, bool(case.adapter), log, case.server_flags) as server:
        told = {"load_seconds": round(server.load_seconds, 2), "memory_before": 0, "memory_loaded": server.memory.now()}
        told |= {"memory": server.memory.kind, "weights_bytes": bench_serving.stated_weights(log), "dtype": _dtype(log)}
        told |= {"disk_bytes": disk_bytes(case.model, case.adapter)}

        def memory() -> dict:
            server.memory.now()
            return told | {"memory_peak": server.memory.peak}

        yield from levels(case, requests, server.url, server.model, memory)


def levels(case: Case, requests: list[ImageRequest], url: str, model: str | None, memory) -> Iterator[dict]:
    """A row for each number of requests in flight, none of which finds another's images in vLLM's caches.

    Args:
        memory: gives what a row says about the server beside its speed.
    """
    keys = (case.key_env,) if case.key_env else KEY_NAMES
    known = bench_caches.is_vllm(url, keys)
    for level in case.levels:
        engine = bench_caches.Fresh(url, model, level, timeout=600.0, key_env=case.key_env, ignore_eos=case.ignore_eos,
                                    vllm=known)  # fmt: skip
        engine.check()
        bench_timing.run_through(engine, bench_images.warm_up(requests, WARM_UPS), case.new_tokens)
        before = bench_caches.counters(url, keys)
        with bench_turns.alone():
            figures, answers = bench_timing.measure(engine, requests, case.new_tokens)
        told = {
            "endpoint": case.endpoint,
            "vllm": known,
            "cache_hits": bench_caches.hit_rates(before, bench_caches.counters(url, keys)),
        }
        yield row_of(case, level, told | memory() | figures | {"answers": answers})
    if case.scoring:
        engine = Endpoint(url, model, case.scoring.at_once, timeout=600.0, key_env=case.key_env)
        engine.check()
        yield scored(case, engine)


def _dtype(log: Path) -> str | None:
    """What vLLM's log says it computes in."""
    told = re.findall(r"dtype=torch\.(\w+)", log.read_text(errors="replace"))
    return told[-1] if told else None


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m sonovqa.bench_worker", description=__doc__)
    parser.add_argument("case", type=Path, help="a JSON file of a case's attributes")
    parser.add_argument("rows", type=Path, help="takes a line a row")
    args = parser.parse_args(argv)
    case = bench_cases.load(args.case)
    requests = bench_images.make(**case.images)
    found = behind_endpoint(case, requests, args.rows.with_suffix(".vllm.log")) if case.engine == VLLM else local(case, requests)
    with contextlib.redirect_stdout(sys.stderr), predictions.Log(args.rows) as rows:
        for row in found:
            rows.append(row)


if __name__ == "__main__":
    cli.run(main)
