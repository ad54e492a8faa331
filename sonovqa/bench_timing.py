"""The clock of a benchmark: how long an engine takes for the questions of each image, and how fast answers come."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from sonovqa.engines import Engine, ImageRequest


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Least, mean, median, 95th and 99th percentile and most of some durations; ``None`` of none."""
    import numpy as np

    if not len(seconds):
        return None
    told = {"min": np.min(seconds), "mean": np.mean(seconds), "median": np.median(seconds)}
    told |= {"p95": np.quantile(seconds, 0.95), "p99": np.quantile(seconds, 0.99), "max": np.max(seconds)}
    return {name: round(float(value), 6) for name, value in told.items()}


def measure(engine: Engine, requests: Sequence[ImageRequest], new_tokens: int) -> tuple[dict, dict[str, str]]:
    """Ask everything once and time it.

    Args:
        engine: warm already.
        requests: all images with their prompts.
        new_tokens: an answer's limit.

    Returns:
        Figures and the answers by ``<image_id> <question_id>``. An image's seconds go from the start of its first question
        to the end of its last answer; an answer's are its own. Rates count answers that came, over the whole wall time.
        ``client_cpu`` is this process's CPU time over the wall time: near 1 a client, not its server, was the limit.
    """
    answers, errors, tokens, seconds = {}, Counter(), 0, []
    begun, ended = {}, {}
    started, cpu = time.perf_counter(), time.process_time()
    for reply in engine.answer(iter(requests), new_tokens):
        now = time.perf_counter()
        begun[reply.image_id] = min(begun.get(reply.image_id, now), now - reply.seconds)
        ended[reply.image_id] = now
        if reply.error is not None:
            errors[reply.error] += 1
            continue
        answers[f"{reply.image_id} {reply.question_id}"] = reply.text
        seconds.append(reply.seconds)
        tokens += reply.new_tokens
        if len(answers) % 8 == 0:
            print(f"{len(answers)} answers", file=sys.stderr, flush=True)
    wall = time.perf_counter() - started
    figures = {
        "wall_seconds": round(wall, 6),
        "answered": len(answers),
        "failed": sum(errors.values()),
        "errors": dict(errors.most_common(5)),
        "new_tokens": tokens,
        "answers_per_second": round(len(answers) / wall, 3),
        "tokens_per_second": round(tokens / wall, 2),
        "image_seconds": spread([ended[name] - begun[name] for name in begun]),
        "answer_seconds": spread(seconds),
        "client_cpu": round((time.process_time() - cpu) / wall, 3),
    }
    return figures, answers


def same_share(answers: dict[str, str], reference: dict[str, str]) -> float | None:
    """Share of the answers both have that are the same text; ``None`` if they share none."""
    shared = answers.keys() & reference.keys()
    return round(sum(answers[key] == reference[key] for key in shared) / len(shared), 4) if shared else None


def run_through(engine: Engine, requests: Iterable[ImageRequest], new_tokens: int) -> None:
    """Ask and throw away: warming up."""
    for _ in engine.answer(iter(requests), new_tokens):
        pass
