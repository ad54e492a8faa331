"""Scores against slow, plain implementations and against cases whose answer is known."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
from sklearn import metrics as reference

from sonovqa import metrics, overlap
from sonovqa.metrics import Resamples, mean

RNG = np.random.default_rng(7)


def grouped(groups: int = 30, most: int = 6) -> list[str]:
    return [f"p{g:02d}" for g in range(groups) for _ in range(1 + int(RNG.integers(most)))]


def slow_bootstrap(statistic, groups: list[str], count: int, seed: int) -> list[float]:
    """The cluster bootstrap spelt out: draw groups, gather their rows as often as drawn, compute the score of the rows."""
    names = sorted(set(groups))
    members = {name: [i for i, g in enumerate(groups) if g == name] for name in names}
    draws = np.random.default_rng(seed).integers(len(names), size=(count, len(names)))
    return [statistic([i for name in draw for i in members[names[name]]]) for draw in draws]


def test_resamples_equal_plain_python():
    groups = grouped()
    values = RNG.random(len(groups))
    truth, said = RNG.random(len(groups)) < 0.4, RNG.random(len(groups)) < 0.5
    draws = Resamples(groups, 200, seed=3)
    plain = slow_bootstrap(lambda rows: values[rows].mean(), groups, 200, 3)
    assert np.allclose(draws.values(mean(values), groups), plain)
    plain = slow_bootstrap(lambda rows: reference.matthews_corrcoef(truth[rows], said[rows]), groups, 200, 3)
    assert np.allclose(draws.values(metrics.binary(truth, said.tolist())["MCC"], groups), plain)


def test_bleu_resamples_equal_sacrebleu():
    from sacrebleu.metrics import BLEU

    words = ["the", "fetal", "head", "in", "a", "cephalic", "trans", "thalamic", "plane", "with", "normal", "spine", "and"]
    pick = random.Random(1)
    texts = [" ".join(pick.choices(words, k=pick.randint(1, 12))) for _ in range(120)]
    said = [t if pick.random() < 0.4 else " ".join(pick.choices(words, k=pick.randint(1, 12))) for t in texts]
    groups = [f"g{i // 3}" for i in range(len(texts))]
    score = overlap.wording(texts, said)["BLEU-4"]
    bleu = BLEU(lowercase=True)

    def plain(rows):
        return bleu.corpus_score([said[i] for i in rows], [[texts[i] for i in rows]]).score / 100

    assert score.value == pytest.approx(plain(range(120)))
    assert np.allclose(Resamples(groups, 20, 5).values(score, groups), slow_bootstrap(plain, groups, 20, 5))


def test_interval_of_independent_rows_is_the_binomial_one():
    right = np.repeat([1.0, 0.0], [140, 60])
    groups = [str(i) for i in range(200)]
    low, high = Resamples(groups, 4000, 1).interval(mean(right), groups)
    error = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert (low, high) == pytest.approx((0.7 - error, 0.7 + error), abs=0.01)


def test_interval_knows_that_rows_of_a_group_are_not_independent():
    """20 groups of 10 equal rows: the variance is that of 20 rows, not of 200 (design effect 10)."""
    right = np.repeat((np.arange(20) < 14).astype(float), 10)
    clustered = Resamples([str(i // 10) for i in range(200)], 4000, 1)
    low, high = clustered.interval(mean(right), [str(i // 10) for i in range(200)])
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 20), rel=0.08)


def test_paired_difference_sees_what_two_intervals_hide():
    groups = [str(i) for i in range(300)]
    other = (RNG.random(300) < 0.5).astype(float)
    better = other.copy()
    better[np.flatnonzero(other == 0)[:12]] = 1
    draws = Resamples(groups, 1000, 2)
    low, high = draws.difference(mean(better), mean(other), groups)
    assert 0 < low < 0.04 < high
    assert draws.interval(mean(better), groups)[0] < draws.interval(mean(other), groups)[1]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_has_no_interval_of_width_zero(value):
    groups = [str(i % 40) for i in range(80)]
    low, high = Resamples(groups, 500).interval(mean([value] * 80), groups)
    assert high - low == pytest.approx(1 - 0.025 ** (1 / 40))  # Clopper-Pearson for 40 of 40
    assert value in (low, high)


def test_mean_leaves_out_what_is_not_known():
    score = mean([1.0, math.nan, 3.0], higher=False, bounds=None)
    assert score.value == 2.0 and int(score.columns.any(axis=1).sum()) == 2
    assert math.isnan(mean([math.nan]).value)
    assert Resamples(["a"], 10).interval(mean([math.nan]), ["a"]) is None


def test_binary_scores_equal_scikit_learn():
    truth, said = RNG.random(400) < 0.2, RNG.random(400) < 0.3
    ours = {name: score.value for name, score in metrics.binary(truth, said.tolist()).items()}
    assert ours["sensitivity"] == pytest.approx(reference.recall_score(truth, said))
    assert ours["specificity"] == pytest.approx(reference.recall_score(~truth, ~said))
    assert ours["balanced accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, said))
    assert ours["precision"] == pytest.approx(reference.precision_score(truth, said))
    assert ours["F1"] == pytest.approx(reference.f1_score(truth, said))
    assert ours["MCC"] == pytest.approx(reference.matthews_corrcoef(truth, said))


def test_binary_is_not_flattered_by_a_constant_or_by_silence():
    truth = [True] * 3 + [False] * 197
    normal = {n: s.value for n, s in metrics.binary(truth, [False] * 200).items()}
    assert normal["sensitivity"] == 0 and normal["specificity"] == 1
    assert normal["balanced accuracy"] == 0.5 and normal["MCC"] == 0
    silent = {n: s.value for n, s in metrics.binary(truth, [None] * 200).items()}
    assert silent["sensitivity"] == silent["specificity"] == silent["balanced accuracy"] == 0
    assert math.isnan(metrics.binary([False] * 5, [False] * 5)["sensitivity"].value)


def test_sets():
    scores = metrics.sets([frozenset("abc"), frozenset(), frozenset("a"), frozenset("ab")],
                          [frozenset("ab"), frozenset(), None, frozenset("abcd")])  # fmt: skip
    assert scores["precision"].value == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert scores["recall"].value == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)
    assert scores["F1"].value == pytest.approx((0.8 + 1 + 0 + 2 / 3) / 4)
    assert scores["F2"].value == pytest.approx((5 * (2 / 3) / (4 + 2 / 3) + 1 + 0 + 5 * 0.5 / (2 + 1)) / 4)


def test_information():
    assert metrics.entropy(list("aabb")) == pytest.approx(1.0)
    assert metrics.entropy(["a"] * 9) == 0.0
    categories = [f"c{i % 4}" for i in range(400)]
    assert metrics.mutual_information(categories, categories) == pytest.approx(2.0, abs=0.05)
    shuffled = [categories[i] for i in RNG.permutation(400)]
    assert metrics.mutual_information(shuffled, categories) < 0.03
    few = [f"x{i}" for i in range(20)]  # as many labels as rows: plain mutual information would say 2 bits
    assert metrics.mutual_information(few, categories[:20]) < 1e-9


def test_rouge_l():
    assert overlap.rouge_l("Femur, thigh.", "femur thigh") == 1.0
    assert overlap.rouge_l("a b c d", "a c d e") == pytest.approx(0.75)
    assert overlap.rouge_l("a", "") == 0.0


def test_a_thousand_resamples_of_many_scores_are_fast():
    groups = [f"p{i // 4}" for i in range(1894)]
    draws = Resamples(groups, 1000)
    started = time.process_time()
    for _ in range(100):
        draws.interval(mean(RNG.random(len(groups))), groups)
    assert time.process_time() - started < 10.0


def test_an_interval_is_as_wide_as_the_groups_that_carry_the_score_allow():
    """200 images, 2 of them abnormal and both found: what is known of sensitivity is two trials, not 200."""
    truth = [True] * 2 + [False] * 198
    groups = [str(i) for i in range(200)]
    draws = Resamples(groups, 300)
    two, many = 0.025 ** (1 / 2), 0.025 ** (1 / 198)
    found, missed = metrics.binary(truth, truth), metrics.binary(truth, [not t for t in truth])
    for name in ("sensitivity", "precision", "F1", "balanced accuracy"):
        assert draws.interval(found[name], groups) == pytest.approx((two, 1)), name
    assert draws.interval(missed["sensitivity"], groups) == pytest.approx((0, 1 - two))
    assert draws.interval(found["MCC"], groups) == pytest.approx((2 * two - 1, 1))
    assert draws.interval(found["specificity"], groups) == pytest.approx((many, 1))
    one_wrong = metrics.binary(truth, [True, False] + [False] * 198)
    assert draws.interval(one_wrong["balanced accuracy"], groups) is None, "two groups of the rarer class: no interval"


def test_too_few_groups_give_no_interval_and_no_difference():
    patient, four, five = ["p"] * 10, [str(i % 4) for i in range(20)], [str(i % 5) for i in range(20)]
    six_of_ten = mean([1.0] * 6 + [0.0] * 4)
    assert Resamples(patient, 100).interval(six_of_ten, patient) is None
    assert Resamples(patient, 100).difference(six_of_ten, mean([0.5] * 10), patient) is None
    assert Resamples(["a"], 100).difference(mean([1.0]), mean([0.0]), ["a"]) is None
    assert Resamples(["a"], 100).interval(mean([1.0]), ["a"]) == pytest.approx((0.025, 1)), "exact for one trial too"
    mixed = mean([1.0, 0.0, 1.0, 1.0, 0.0] * 4)
    assert Resamples(four, 100).interval(mixed, four) is None and Resamples(five, 100).interval(mixed, five) is not None


def test_a_difference_that_is_alike_everywhere_has_no_interval_of_width_zero():
    groups = [str(i) for i in range(60)]
    low, high = Resamples(groups, 200).difference(mean([0.0] * 60), mean([1.0] * 60), groups)
    assert (low, high) == pytest.approx((-1, -1 + 2 * (1 - 0.025 ** (1 / 60))))
