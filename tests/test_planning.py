"""Plans: rows dealt under a length limit lose nothing, and every answer counts as much as it was told to."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image
from tiny_families import FAMILIES

from sonovqa import batching, dataset, families, layout, losses, models, planning, sampling, weighting
from sonovqa.cli import UserError
from sonovqa.sampling import Drawn
from sonovqa.weighting import Sample, Weighting


@pytest.fixture(scope="module")
def small(base):
    """The base model in fp64 and its encoder."""
    model = models._load_transformers(str(base), 16).double().eval()
    return model, batching.Encoder(models.load_processor(str(base), (None, 12288)), model)


@pytest.fixture(scope="module")
def splits(data):
    return dataset.load_undecoded(data)


def planned(splits, encoder, limit=4096, shared=True, how=planning.PLAIN, task="all"):
    return planning.plan_split(splits["validation"], "validation", encoder, task, "default", shared, limit, how)


def mean_loss(model, encoder, splits, plan, gamma=0.0) -> float:
    batch = batching.Collator(splits, encoder)(plan.items)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        logits, targets, weights = losses.answer_logits(model, batch)
        total = losses.focal_sum(logits, targets, weights, losses.answer_of_token(batch), gamma)
    return (total / weights.sum()).item()


@pytest.mark.parametrize("room", [1.0, 1.5, 2.2])
def test_rows_over_the_limit_are_dealt_and_lose_nothing(small, splits, room):
    model, encoder = small
    whole = planned(splits, encoder)
    prefix = whole.prefix_tokens // len(whole.items)
    longest = max(len(encoder.branch(q["question"], q["answer"]).ids) for row in splits["validation"] for q in row["questions"])
    limit = prefix + int(room * (longest + 30))
    dealt = planned(splits, encoder, limit)
    assert dealt.dealt == len(splits["validation"]) and len(dealt.items) > len(whole.items)
    assert all(item["tokens"] <= limit for item in dealt.items)
    asked = lambda plan: sorted((item["row"], k) for item in plan.items for k in item["branches"])  # noqa: E731
    assert asked(dealt) == asked(whole) and dealt.answer_tokens == whole.answer_tokens
    assert mean_loss(model, encoder, splits, dealt) == pytest.approx(mean_loss(model, encoder, splits, whole), abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_padded_to_a_multiple_lose_the_same(name, splits, tokenizer):
    """As on a GPU. An encoder-decoder's rows stay as they are."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name](tokenizer)
    encoder = batching.Encoder(processor, model.eval())
    items = planned(splits, encoder, shared=encoder.family.shares_prefix).items[:3]
    found = []
    for multiple in (1, 8, 64):
        batch = batching.Collator(splits, encoder, multiple=multiple)(items)
        rows = [
            value.shape[1]
            for key, value in batch.items()
            if key in ("input_ids", "labels", *layout.TYPE_KEYS, *layout.SIGHT_KEYS)
        ]
        with torch.no_grad():
            logits, targets, weights = losses.answer_logits(model, batch)
        found.append((rows[0], losses.weighted_sum(logits, targets, weights).item() / weights.sum().item(), len(targets)))
        assert encoder.starts or len(set(rows)) == 1
    (plain, loss, answers), *padded = found
    assert [length for length, _, _ in padded] == ([plain] * 2 if encoder.starts else [-(-plain // n) * n for n in (8, 64)])
    assert all(more == pytest.approx(loss, rel=1e-5) and count == answers for _, more, count in padded)


def test_planned_lengths_are_those_of_the_batches(small, splits):
    _, encoder = small
    plan = planned(splits, encoder)
    batch = batching.Collator(splits, encoder)(plan.items)
    assert [item["tokens"] for item in plan.items] == (batch["segments"] >= 0).sum(dim=1).tolist()
    assert plan.answer_tokens == int((batch["labels"] != layout.IGNORED).sum())


def test_a_question_longer_than_the_limit_is_an_error(small, splits):
    with pytest.raises(UserError, match="nothing is cut in silence; use --max-tokens"):
        planned(splits, small[1], limit=60)


def test_thirty_questions_an_image(small):
    """As many as no clinical set has: the branches still equal separate samples."""
    model, encoder = small
    prefixes, vision = encoder.prefixes([noise_image(96, 64, 1)], [None])
    branches = [encoder.branch(f"Question {k}?", "normal " * (k % 4 + 1)) for k in range(30)]
    shared = layout.assemble(prefixes, [branches], 0) | vision
    apart = layout.assemble(prefixes * 30, [[branch] for branch in branches], 0)
    apart |= {key: value.repeat(30, 1) for key, value in vision.items()}
    made = []
    for batch in (shared, apart):
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            logits, targets, weights = losses.answer_logits(model, batch)
        made.append(losses.weighted_sum(logits, targets, weights).item())
    assert made[0] == pytest.approx(made[1], rel=1e-7)


SAMPLES = [
    Sample(0, "a", "Q7", "normal", 2), Sample(0, "a", "Q1", "falx", 6), Sample(1, "b", "Q7", "normal", 2),
    Sample(2, "b", "Q7", "abnormal", 4), Sample(3, "c", "Q7", "normal", 2), Sample(4, "d", "Q7", "normal", 2),
    Sample(5, "e", "Q7", "normal", 2), Sample(6, "f", "Q7", "normal", 2),
]  # fmt: skip


def mass(how: Weighting, key) -> dict:
    """The share of the loss by a key of the samples, each token at its weight."""
    weights = weighting.weigh(SAMPLES, how)
    total = sum(w * s.tokens for s, w in zip(SAMPLES, weights, strict=True))
    found: dict = {}
    for sample, weight in zip(SAMPLES, weights, strict=True):
        found[key(sample)] = found.get(key(sample), 0.0) + weight * sample.tokens / total
    return found


def test_means_count_tokens_answers_or_questions_alike():
    assert mass(Weighting("token"), lambda s: s.question_id)["Q1"] == pytest.approx(6 / 22)
    assert mass(Weighting("sample"), lambda s: s.question_id)["Q1"] == pytest.approx(1 / 8)
    assert mass(Weighting("question"), lambda s: s.question_id)["Q1"] == pytest.approx(1 / 2)
    alike = mass(Weighting("sample"), lambda s: (s.row, s.question_id))
    assert all(share == pytest.approx(1 / 8) for share in alike.values())
    assert mass(Weighting("sample", {"Q7": 0.0}), lambda s: s.question_id) == {"Q7": 0.0, "Q1": pytest.approx(1.0)}


def test_class_weights_give_each_class_the_same_share():
    shares = mass(Weighting("sample", balance="loss"), lambda s: s.label)
    assert shares["normal"] == pytest.approx(shares["abnormal"])
    assert shares["falx"] == pytest.approx(1 / 8), "questions that are not balanced keep their share"


def test_oversampling_repeats_whole_patients_about_as_often_as_all_others():
    assert weighting.repeats(SAMPLES, Weighting(balance="oversample")) == {1: 2, 2: 2}  # round(5 / 2) = 2; patient b's rows
    assert weighting.repeats(SAMPLES, Weighting(balance="loss")) == {}


def test_an_answer_that_was_not_read_is_no_rare_class():
    samples = [*SAMPLES, Sample(7, "g", "Q7", "", 2)]
    assert weighting.repeats(samples, Weighting(balance="oversample")) == {1: 3, 2: 3}, "patient b only, against six others"
    weights = weighting.weigh(samples, Weighting("sample", balance="loss"))
    assert weights[-1] == pytest.approx(1 / 2), "its own, without a class weight"
    assert weights[:-1] == weighting.weigh(SAMPLES, Weighting("sample", balance="loss"))


def test_effective_size_and_class_table():
    assert weighting.effective_size([1.0] * 8) == pytest.approx(8) and weighting.effective_size([1, 0, 0]) == pytest.approx(1)
    weights = weighting.weigh(SAMPLES, Weighting("sample", balance="loss"))
    table = weighting.class_table(SAMPLES, weights, {}, "Q7")
    assert [(row["label"], row["answers"], row["groups"]) for row in table] == [("normal", 6, 6), ("abnormal", 1, 1), ("", 7, 6)]
    assert table[0]["share"] == pytest.approx(0.5) and table[-1]["effective"] == pytest.approx(49 / (6 * (7 / 12) ** 2 + 3.5**2))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (Weighting(questions={"Q9": 2.0}), "--question-weights Q9; not asked in this split; Q7, Q1 are"),
        (Weighting(balance="loss", target="Q3"), "--balance-question Q3; not asked in this split"),
    ],
)
def test_weights_for_what_is_never_asked_are_refused(how, told):
    with pytest.raises(UserError, match=told):
        weighting.weigh(SAMPLES, how)


@pytest.mark.parametrize("text", ["Q7", "Q7=", "=2", "Q7=-1", "Q7=much", "Q7=nan", "Q7=inf"])
def test_question_weights_are_read_or_refused(text):
    assert weighting.parse_question_weights(["Q7=2", "Q2=0.5"]) == {"Q7": 2.0, "Q2": 0.5}
    with pytest.raises(UserError, match="QUESTION=FACTOR"):
        weighting.parse_question_weights([text])


def test_weights_and_repeats_reach_the_loss(small, splits):
    """Only Q7 at weight 1 and all else at 0 is the loss of Q7 alone; oversampling repeats whole sequences in training."""
    model, encoder = small
    zero = dict.fromkeys(("Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "Q8"), 0.0)
    only = planned(splits, encoder, how=Weighting(questions=zero))
    alone = planned(splits, encoder, task="Q7")
    batch = batching.Collator(splits, encoder, "Q7")(alone.items)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        logits, targets, weights = losses.answer_logits(model, batch)
    wanted = (losses.weighted_sum(logits, targets, weights) / weights.sum()).item()
    assert mean_loss(model, encoder, splits, only) == pytest.approx(wanted, rel=1e-6)
    more = planned(splits, encoder, how=Weighting(balance="oversample", target="Q2"))
    assert more.repeated == len(more.items) - len(splits["validation"]) and more.classes[0]["label"]


def test_focal_loss_is_the_papers(small, splits):
    model, encoder = small
    plan = planned(splits, encoder)
    assert mean_loss(model, encoder, splits, plan, 0.0) == pytest.approx(mean_loss(model, encoder, splits, plan, 1e-12), rel=1e-9)
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)).requires_grad_()
    targets, weights, answers = torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 0, 1])
    made = losses.focal_sum(logits, targets, weights, answers, 2.0)
    wanted = (1 - 0.8 * 0.5) ** 2 * -torch.log(torch.tensor(0.8 * 0.5)) + 2 * 0.9**2 * -torch.log(torch.tensor(0.1))
    assert made.item() == pytest.approx(wanted.item(), rel=1e-6)
    sure = torch.tensor([[60.0, 0.0]], dtype=torch.float64, requires_grad=True)
    losses.focal_sum(sure, torch.tensor([0]), torch.ones(1), torch.zeros(1, dtype=torch.long), 0.5).backward()
    assert torch.isfinite(sure.grad).all(), "a certain answer must not give an infinite gradient"


def test_answers_of_tokens_are_numbered_across_rows(small, splits):
    _, encoder = small
    batch = batching.Collator(splits, encoder)(planned(splits, encoder).items)
    answers = losses.answer_of_token(batch)
    assert answers.unique().tolist() == list(range(planned(splits, encoder).questions))
    assert len(answers) == int((batch["labels"] != layout.IGNORED).sum()) and (answers.diff() >= 0).all()


def test_only_proven_families_share():
    """Each that says it shares a prefix is in the test that proves it."""
    from tiny_families import SHARING

    assert {name for name, family in families.FAMILIES.items() if family.shares_prefix} == set(SHARING)


def test_every_pass_draws_anew_and_augments_training_rows_only(small, splits):
    """A row's picture changes from pass to pass, its answers' tokens stay; validation rows are left alone."""
    from sonovqa.augmentation import Augmentation

    _, encoder = small
    plan = planning.plan_split(splits["train"], "train", encoder, "Q7", "default", True, 4096)
    rows = sampling.Sequences(plan.items)
    plain, augmented = (batching.Collator(splits, encoder, "Q7", augmentation=a) for a in (None, Augmentation("basic", 1)))
    first, second = rows[Drawn(0, 0)], rows[Drawn(0, len(rows))]
    assert first["row"] == second["row"] and first["draw"] != second["draw"]
    pictures = [collate([item])["pixel_values"] for collate, item in ((plain, first), (augmented, first), (augmented, second))]
    assert not torch.equal(pictures[1], pictures[0]) and not torch.equal(pictures[1], pictures[2])
    assert torch.equal(augmented([first])["pixel_values"], pictures[1]), "the same draw is the same picture"
    other = planned(splits, encoder).items[0] | {"draw": 0}
    kept = batching.Collator(splits, encoder, augmentation=Augmentation("advanced", 1))([other])["pixel_values"]
    assert torch.equal(kept, batching.Collator(splits, encoder)([other])["pixel_values"])


def test_class_weights_have_the_share_of_the_loss_that_is_printed():
    """Few steps hold the rare class; those without it must not make up for it with the common one."""
    samples = [Sample(k, f"g{k}", "Q7", "abnormal" if k % 20 == 0 else "normal", 6 if k % 20 == 0 else 3) for k in range(400)]
    weights = weighting.weigh(samples, Weighting(balance="loss"))
    printed = {row["label"]: row["share"] for row in weighting.class_table(samples, weights, {}, "Q7")}
    rows = torch.tensor([[weight] * s.tokens + [0.0] * (6 - s.tokens) for s, weight in zip(samples, weights, strict=True)])
    mass = rows.sum(dim=1)
    rare = torch.tensor([s.label == "abnormal" for s in samples])

    def share(average):
        steps = torch.randperm(400, generator=torch.Generator().manual_seed(0)).split(4)
        parts = [mass[step] / losses.divisor([rows[step[:2]], rows[step[2:]]], average) for step in steps]
        drawn = torch.cat(list(steps))
        return float(torch.cat(parts)[rare[drawn]].sum() / torch.cat(parts).sum())

    assert share(float(mass.mean())) == pytest.approx(printed["abnormal"], rel=1e-5)
    assert share(None) < 0.75 * printed["abnormal"], "why it is not the step's own weights"


def test_a_plan_knows_what_its_sequences_weigh(small, splits):
    _, encoder = small
    plan = planning.plan_split(splits["train"], "train", encoder, "Q7", "default", True, 4096)
    assert plan.mass * len(plan.items) == pytest.approx(plan.answer_tokens)
