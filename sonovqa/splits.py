"""Splits and subsets: stratified, seeded, groups never cut, and the same whatever order the rows come in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from sonovqa.cli import UserError
from sonovqa.files import sha256

SPLITS = ("train", "validation", "test")
Strata = Sequence[tuple[str, str]]


def assign(groups: Sequence[str], strata: Strata, ratios: Sequence[float], seed: int, left_out: str = "") -> list[int]:
    """Put every row into a split so that a group stays whole and categories and labels are spread as the ratios ask.

    Greedy: groups with rare strata and large groups go first, each to the split that it leaves closest to its share of
    every count that matters: all rows, each category, each label and each pair of them.
    Source: the greedy step of scikit-learn's `StratifiedGroupKFold`, with unequal shares.

    Args:
        groups: one name a row.
        strata: one (category, label) a row.
        ratios: share of each split, all above 0; they need not add up to 1.
        seed: breaks ties.
        left_out: rows that never came here and why, in words: often the cause of too few groups.

    Returns:
        The index of its split for each row.

    Raises:
        UserError: there are fewer groups than splits.
    """
    members = defaultdict(Counter)
    for group, stratum in zip(groups, strata, strict=True):
        members[group].update(_levels(stratum))
    if len(members) < len(ratios):
        raise UserError(
            f"fewer groups than splits; {len(members)} for {len(ratios)} splits; at least one group (patient or cluster of "
            "near-duplicates) a split; add patients, or check the patient column"
            + (f"; left out before: {left_out}" if left_out else "")
        )
    totals = sum(members.values(), Counter())
    wanted = [{level: count * ratio / sum(ratios) for level, count in totals.items()} for ratio in ratios]
    have = [Counter() for _ in ratios]
    order = sorted(members, key=lambda g: (min(totals[level] for level in members[g]), -members[g][()], sha256(str(seed), g)))
    home = {}
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        home[group] = _best_split(members[group], have, wanted, left)
        have[home[group]].update(members[group])
    return [home[group] for group in groups]


def _levels(stratum: tuple[str, str]) -> tuple[tuple, ...]:
    category, label = stratum
    return (), ("category", category), ("label", label), ("both", category, label)


def _best_split(counts: Counter, have: list[Counter], wanted: list[dict], left: int) -> int:
    """The split whose distance from its wanted counts grows least; an empty one while there is a group for each of them."""
    empty = [split for split, held in enumerate(have) if not held]
    choices = empty if left <= len(empty) else range(len(have))

    def growth(split: int) -> float:  # of the sum of (have - wanted)^2 / wanted
        held, want = have[split], wanted[split]
        return sum(n * (n + 2 * (held[level] - want[level])) / want[level] for level, n in counts.items())

    return min(choices, key=growth)


def subset_order(ids: Sequence[str], strata: Strata, seed: int) -> list[int]:
    """An order of the rows whose every beginning is a fair sample: spread over categories, and over labels within each.

    Each category's first row comes before any second one; after that a beginning of N rows holds each category and label
    in its own proportion. Never the head of the file: within a stratum the order is drawn by the seed.

    Args:
        ids: one unique name a row.
        strata: one (category, label) a row.
        seed: draws the order.
    """
    lot = {name: sha256(str(seed), name) for name in ids}
    rows = sorted(range(len(ids)), key=lambda row: lot[ids[row]])
    within = _spread(rows, list(strata), 0.5)
    rows.sort(key=lambda row: (within[row], lot[ids[row]]))
    across = _spread(rows, [category for category, _ in strata], 0.0)
    return sorted(rows, key=lambda row: (across[row], lot[ids[row]]))


def _spread(rows: list[int], kinds: list, offset: float) -> dict[int, float]:
    """Place each row at (its number among its kind + offset) / (size of its kind)."""
    sizes = Counter(kinds)
    seen = Counter()
    place = {}
    for row in rows:
        place[row] = (seen[kinds[row]] + offset) / sizes[kinds[row]]
        seen[kinds[row]] += 1
    return place
