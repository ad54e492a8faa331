"""In which order a plan's items are drawn, in training and validation, by one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Drawn(NamedTuple):
    """One item drawn.

    Attributes:
        item: its number among the plan's items.
        draw: how many were drawn before it in the whole training: an augmentation's draw, anew in each pass.
        counts: false for a repeat that only fills up the last batch of several processes.
    """

    item: int
    draw: int
    counts: bool = True


class Draws(torch.utils.data.Sampler):
    """Every item once a pass, in an order by seed and pass (`set_epoch`), or in the items' own order.

    The last batch of several processes is filled up with repeats that weigh nothing, so that every process has as many batches
    and no loss counts an item twice: accelerate, left to itself, would begin anew with the first items.

    Not a ``RandomSampler``: accelerate replaces every one of those with a sampler of its own, which draws the same numbers in
    every pass.

    Args:
        count: number of items.
        seed: of the order; ``None``: the items' own order.
        together: items that all processes draw at once, batch size times processes; 1 with one process.
    """

    def __init__(self, count: int, seed: int | None = None, together: int = 1):
        self.count, self.seed, self.epoch = count, seed, 0
        self._repeats = -count % together

    def __len__(self) -> int:
        return self.count + self._repeats

    def set_epoch(self, epoch: int) -> None:
        """The pass that is drawn next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Drawn]:
        order = self.order()
        first = self.epoch * self.count
        yield from (Drawn(item, first + number) for number, item in enumerate(order))
        yield from (Drawn(order[k % self.count], first + k % self.count, counts=False) for k in range(self._repeats))

    def order(self) -> list[int]:
        """The item numbers of this pass in their order, as accelerate's ``SeedableRandomSampler`` shuffles them."""
        if self.seed is None:
            return list(range(self.count))
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()


class Sequences(torch.utils.data.Dataset):
    """A plan's items by `Drawn`: ``{split, row, branches, weights, tokens, draw}``; a repeat's weights are 0.

    Args:
        items: of a `planning.Plan`, as a list or a `datasets.Dataset`.
    """

    def __init__(self, items):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, drawn: Drawn) -> dict:
        item = self.items[drawn.item] | {"draw": drawn.draw}
        return item if drawn.counts else item | {"weights": [0.0] * len(item["weights"])}
