"""The order of training: every item once a pass, anew in each, whatever the trainer puts around the sampler."""

from __future__ import annotations

import pytest
from running import run
from torch.utils.data import BatchSampler

from sonovqa import batching, sampling
from sonovqa.sampling import Drawn, Draws


def test_every_item_is_drawn_once_a_pass_in_another_order():
    draws = Draws(7, seed=3)
    first = list(draws)
    draws.set_epoch(1)
    second = list(draws)
    assert sorted(d.item for d in first) == sorted(d.item for d in second) == list(range(7))
    assert [d.draw for d in first + second] == list(range(14)) and all(d.counts for d in first + second)
    assert [d.item for d in first] != [d.item for d in second] and [d.item for d in first] != list(range(7))
    again = Draws(7, seed=3)
    again.set_epoch(1)
    assert list(again) == second, "a resumed run draws what an undisturbed one does"
    assert [d.item for d in Draws(7)] == list(range(7)), "validation has no order of its own"


@pytest.mark.parametrize("count", [1, 3, 8, 9])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_as_many_batches_and_count_no_item_twice(count, processes):
    from accelerate.data_loader import BatchSamplerShard

    draws = Draws(count, seed=1, together=2 * processes)
    shards = [list(BatchSamplerShard(BatchSampler(draws, 2, False), processes, rank)) for rank in range(processes)]
    assert len({tuple(map(len, batches)) for batches in shards}) == 1 and set(map(len, shards[0])) == {2}
    seen = [drawn for batches in shards for batch in batches for drawn in batch]
    assert sorted(drawn.item for drawn in seen if drawn.counts) == list(range(count)) and len(seen) == len(draws)


def test_a_repeat_weighs_nothing():
    rows = sampling.Sequences([{"row": 0, "weights": [1.0, 2.0]}])
    assert rows[Drawn(0, 5)] == {"row": 0, "weights": [1.0, 2.0], "draw": 5}
    assert rows[Drawn(0, 5, counts=False)]["weights"] == [0.0, 0.0] and rows.items[0]["weights"] == [1.0, 2.0]


def test_training_draws_anew_in_every_pass_and_goes_on_after_a_resume(base, data, tmp_path, monkeypatch):
    """What the collator is given, so behind all that accelerate makes of a sampler. Augmentations are drawn by these numbers."""
    seen, collate = [], batching.Collator.__call__

    def note(self, items):
        seen.extend((item["draw"], item["row"]) for item in items if item["split"] == "train" and "draw" in item)
        return collate(self, items)

    monkeypatch.setattr(batching.Collator, "__call__", note)
    run(base, data, tmp_path, "whole", "--no-merge", steps=8)
    whole, seen[:] = sorted(seen), []
    assert [draw for draw, _ in whole] == list(range(32)), "two passes of sixteen images"
    assert sorted(row for _, row in whole[:16]) == sorted(row for _, row in whole[16:]) == list(range(16))
    assert [row for _, row in whole[:16]] != [row for _, row in whole[16:]]
    interrupted(base, data, tmp_path, monkeypatch)
    run(base, data, tmp_path, "half", "--no-merge", "--resume", steps=8)
    assert set(seen) == set(whole) and len(seen) < 2 * len(whole)


def interrupted(base, data, outputs, monkeypatch) -> None:
    """A run of eight steps that is stopped in its second pass, behind the checkpoint of step 6."""
    from sonovqa import training

    step, done = training.SharedImageTrainer.training_step, []

    def stop(self, *args, **kwargs):
        done.append(step(self, *args, **kwargs))
        if len(done) == 7:
            raise KeyboardInterrupt
        return done[-1]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.SharedImageTrainer, "training_step", stop)
        run(base, data, outputs, "half", "--no-merge", steps=8)
