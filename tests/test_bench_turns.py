"""Benchmarks on one device: side by side while they warm up, one at a time under the clock."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from sonovqa import bench_turns

SPELL = 0.2


@pytest.fixture(autouse=True)
def device_of_its_own(monkeypatch, tmp_path):
    """No other test session waits for these."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(tmp_path))


def spells(turns: list, ready, told) -> None:
    """Hold each turn for `SPELL` seconds and tell when, on the clock that all processes share."""
    ready.wait()
    for number, turn in enumerate(turns):
        with turn():
            begun = time.monotonic()
            time.sleep(SPELL)
            told.put((turn.__name__, begun, time.monotonic(), number))


def held(*processes: list) -> list[tuple[str, float, float]]:
    """What processes with these turns, begun together, told."""
    context = multiprocessing.get_context("fork")
    ready, told = context.Barrier(len(processes)), context.Queue()
    started = [context.Process(target=spells, args=(turns, ready, told)) for turns in processes]
    for process in started:
        process.start()
    found = [told.get(timeout=600)[:3] for turns in processes for _ in turns]
    for process in started:
        process.join()
    return found


def overlap(one: tuple, other: tuple) -> float:
    return min(one[2], other[2]) - max(one[1], other[1])


def test_nothing_goes_on_beside_what_is_timed():
    found = held(*[[bench_turns.beside_others, bench_turns.alone, bench_turns.beside_others]] * 3)
    timed = [spell for spell in found if spell[0] == "alone"]
    assert len(found) == 9 and len(timed) == 3
    assert all(overlap(one, other) <= 0 for one in timed for other in found if other is not one)


def meet(turn, both, told) -> None:
    """Wait for the other process inside a turn."""
    with turn():
        both.wait(timeout=600)
        told.put(True)


def test_warming_up_goes_on_side_by_side():
    context = multiprocessing.get_context("fork")
    both, told = context.Barrier(2), context.Queue()
    started = [context.Process(target=meet, args=(bench_turns.beside_others, both, told)) for _ in range(2)]
    for process in started:
        process.start()
    assert [told.get(timeout=600) for _ in started] == [True, True]
    for process in started:
        process.join()


def test_a_turn_ends_with_what_went_wrong_in_it():
    with pytest.raises(ZeroDivisionError), bench_turns.alone():
        raise ZeroDivisionError
    with bench_turns.alone():
        assert bench_turns.file().exists()


def test_every_gpu_has_turns_of_its_own(monkeypatch):
    def of(visible: str | None) -> Path:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return bench_turns.file()

    assert of(None) == of("0") == of("0,1") and len({of("0"), of("1"), of("")}) == 3
