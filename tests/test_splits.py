"""Splits keep groups whole and strata spread; subsets are fair; near-duplicates are found, and only they."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonovqa import duplicates
from sonovqa.cli import UserError
from sonovqa.splits import SPLITS, assign, subset_order

RATIOS = (0.70, 0.15, 0.15)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 30).map("P{}".format), st.tuples(st.sampled_from("ABC"), st.sampled_from(["normal", "abnormal", ""]))
    ),
    min_size=3,
    max_size=120,
).filter(lambda rows: len({group for group, _ in rows}) >= len(SPLITS))


@settings(max_examples=200)
@given(rows=ROWS, seed=st.integers(0, 5), shuffle=st.randoms(use_true_random=False))
def test_groups_are_whole_all_rows_are_in_and_order_is_nothing(rows, seed, shuffle):
    found = assign(*zip(*rows, strict=True), RATIOS, seed)
    home = {}
    for (group, _), split in zip(rows, found, strict=True):
        assert home.setdefault(group, split) == split
    assert set(found) == {0, 1, 2}
    moved = rows.copy()
    shuffle.shuffle(moved)
    again = dict(zip((group for group, _ in moved), assign(*zip(*moved, strict=True), RATIOS, seed), strict=True))
    assert again == home


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=100, max_size=200),
    ratios=st.sampled_from([RATIOS, (0.8, 0.1, 0.1), (0.5, 0.25, 0.25)]),
    seed=st.integers(0, 99),
)
def test_ratios_are_as_close_as_groups_allow(sizes, ratios, seed):
    groups = [f"P{number}" for number, size in enumerate(sizes) for _ in range(size)]
    found = Counter(assign(groups, [("A", "")] * len(groups), ratios, seed))
    for split, ratio in enumerate(ratios):
        assert abs(found[split] - ratio * len(groups)) <= max(sizes)


def phantoms(images, seed=0):
    """Images as in the real case: patients of one to eight images, 14 categories, 5 % abnormal."""
    draw = np.random.default_rng(seed)
    groups = [f"P{number:04}" for number in np.sort(draw.integers(0, images // 4, images))]
    categories = draw.choice(14, images, p=np.arange(1, 15) / 105)
    labels = np.where(draw.random(images) < 0.05, "abnormal", "normal")
    return groups, [(f"C{category}", str(label)) for category, label in zip(categories, labels, strict=True)]


def test_categories_and_abnormal_images_are_spread():
    groups, strata = phantoms(4000)
    found = assign(groups, strata, RATIOS, 42)
    for kind in (0, 1):
        for value in {stratum[kind] for stratum in strata}:
            counts = Counter(split for split, stratum in zip(found, strata, strict=True) if stratum[kind] == value)
            for split, ratio in enumerate(RATIOS):
                assert abs(counts[split] / counts.total() - ratio) < 0.04, (value, counts)


def test_another_seed_is_another_split_and_the_same_seed_the_same():
    groups, strata = phantoms(400)
    assert assign(groups, strata, RATIOS, 42) == assign(groups, strata, RATIOS, 42) != assign(groups, strata, RATIOS, 43)


@pytest.mark.parametrize("groups", [["one"] * 50, ["one"] * 25 + ["two"] * 25])
def test_fewer_groups_than_splits(groups):
    with pytest.raises(UserError, match="fewer groups than splits"):
        assign(groups, [("A", "")] * 50, RATIOS, 42)
    with pytest.raises(UserError, match="left out before: 11 x no folder name"):
        assign(groups, [("A", "")] * 50, RATIOS, 42, "11 x no folder name")


def test_no_split_is_empty_when_one_group_holds_nearly_all():
    assert set(assign(["big"] * 1000 + ["a", "b"], [("A", "")] * 1002, RATIOS, 42)) == {0, 1, 2}


def test_a_subset_is_spread_and_is_never_the_head():
    ids = [f"{number:05}" for number in range(2000)]
    strata = [("big" if number < 1900 else "small", "abnormal" if number % 20 == 0 else "normal") for number in range(2000)]
    order = subset_order(ids, strata, 42)
    assert sorted(order) == list(range(2000))
    head = order[:200]
    assert Counter(strata[row][0] for row in head)["small"] == pytest.approx(10, abs=1)
    assert Counter(strata[row][1] for row in head)["abnormal"] == pytest.approx(10, abs=2)
    assert max(head) > 1000 and {strata[row][0] for row in order[:2]} == {"big", "small"}
    back = subset_order(ids[::-1], strata[::-1], 42)
    assert [ids[row] for row in order] == [ids[::-1][row] for row in back]


def test_near_duplicates_are_all_found_and_nothing_else():
    draw = np.random.default_rng(0)
    words = draw.integers(0, 2**63, (700, 4), dtype=np.uint64)
    words[500:] = words[:200]
    words[600:, 1] ^= np.uint64(0b10110111)  # six bits away
    found = {tuple(pair) for pair in duplicates.near_pairs(words, 6)}
    assert found == {(n, n + 500) for n in range(200)}
    assert {tuple(pair) for pair in duplicates.near_pairs(words, 5)} == {(n, n + 500) for n in range(100)}


def test_clusters_chain_and_equal_hashes_cost_nothing():
    near = ["0" * 64, "f" + "0" * 63, "ff" + "0" * 62, "0" * 32 + "f" * 32]
    numbers = duplicates.clusters([*near, *near * 3000], 4)
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]
    assert len(set(numbers.tolist())) == 2


def test_no_hashes_no_clusters():
    assert duplicates.clusters([]).tolist() == []
