"""The shared image prefix gives exactly the loss, gradients and answers of separate samples (issue 4)."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image
from tiny_families import SHARING

from sonovqa import adapting, batching, layout, losses, models

QUESTIONS = {  # rows of 1, 3 and 8 questions; one branch far longer than the rest
    0: [("Identify the imaging plane shown.", "cephalic, axial, occiput left")],
    1: [
        ("Assess the image quality.", "good"),
        ("Is it normal?", "normal"),
        ("Describe everything at length.", "thalami, falx " * 25),
    ],
    2: [(f"Question number {k}?", f"answer {k} of eight" * (k % 3 + 1)) for k in range(8)],
}
SIZES = {0: (128, 96), 1: (60, 90), 2: (200, 80)}
CONTEXT = {0: None, 1: "Pixel size: 0.0897 mm", 2: None}


@pytest.fixture(params=SHARING)
def family(request, tokenizer):
    torch.manual_seed(0)
    return SHARING[request.param](tokenizer)


@pytest.fixture
def all_in_fp64(monkeypatch):
    """The models round to fp32 inside norms and rotary embeddings; there a difference of 1e-16 can become one of 6e-8.
    In fp64 that rounding is lifted, so that the bound speaks of the mathematics."""
    to = torch.Tensor.to
    lift = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **named: to(self, *map(lift, args), **{k: lift(v) for k, v in named.items()})
    )


def batch_of(encoder, rows, split: bool, weight=lambda row, k: 1.0):
    """One batch: a sequence a row, or a sequence a branch."""
    rows_made = (
        [(r, [k]) for r in rows for k in range(len(QUESTIONS[r]))] if split else [(r, range(len(QUESTIONS[r]))) for r in rows]
    )
    prefixes, vision = encoder.prefixes(
        [noise_image(*SIZES[r], seed=r) for r, _ in rows_made], [CONTEXT[r] for r, _ in rows_made]
    )
    branches = [[encoder.branch(*QUESTIONS[r][k], weight=weight(r, k)) for k in ks] for r, ks in rows_made]
    return layout.assemble(prefixes, branches, encoder.tokenizer.pad_token_id) | vision


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits, targets, weights = losses.answer_logits(model, batch)
    loss = losses.weighted_sum(logits, targets, weights) / weights.sum()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapted(model, processor, full: bool):
    loaded = models.Loaded(model, processor, "transformers", "test")
    model = adapting.adapt(loaded, adapting.Adapting(rank=4, full=full))
    with torch.no_grad():  # LoRA's B starts at zero, which would hide half of its gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def worst_relative(left: dict, right: dict) -> float:
    """Biases of keys are left out: what is added to all keys alike moves no attention, so their gradient is rounding alone."""
    assert left.keys() == right.keys()
    told = [n for n in left if not n.endswith("k_proj.bias")]
    return max(((left[n] - right[n]).norm() / (right[n].norm() + 1e-300)).item() for n in told)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(("dtype", "loss_bound", "gradient_bound"), [(torch.float64, 1e-10, 1e-8), (torch.float32, 1e-5, 1e-3)])
def test_loss_and_gradients_equal_separate_samples(family, full, dtype, loss_bound, gradient_bound, request):
    if dtype == torch.float64:
        request.getfixturevalue("all_in_fp64")
    model, processor = family
    model = adapted(model.to(dtype), processor, full).to(dtype)
    encoder = batching.Encoder(processor, model)
    weight = lambda row, k: 1.0 + 0.5 * k + row  # noqa: E731 - unequal weights, so that a mix-up shows
    shared = loss_and_gradients(model, batch_of(encoder, [0, 1, 2], split=False, weight=weight))
    separate = loss_and_gradients(model, batch_of(encoder, [0, 1, 2], split=True, weight=weight))
    assert shared[0] == pytest.approx(separate[0], rel=0, abs=loss_bound)
    assert any("vis" in name for name in shared[1]), "the vision tower must be trained too"
    assert all(g.norm() > 0 for n, g in separate[1].items() if "lora" in n or "proj" in n)
    assert worst_relative(shared[1], separate[1]) < gradient_bound


def branch_logits(model, batch, row: int, branch: int):
    logits, _, _ = losses.answer_logits(model, batch)
    at = losses.predicting(batch["labels"])
    where = torch.full(at.shape, -1)
    where[at] = torch.arange(int(at.sum()))
    chosen = where[row][(batch["segments"][row] == branch) & at[row]]
    return logits[chosen]


def test_changing_one_branch_moves_no_other(family):
    model, processor = family
    model = model.double().eval()
    encoder = batching.Encoder(processor, model)
    before = batch_of(encoder, [2], split=False)
    after = {key: value.clone() for key, value in before.items()}
    third = after["segments"][0] == 3
    after["input_ids"][0, third] = torch.where(after["labels"][0, third] == layout.IGNORED, 300, after["input_ids"][0, third])
    for branch in range(1, 9):
        moved = (branch_logits(model, before, 0, branch) - branch_logits(model, after, 0, branch)).abs().max().item()
        assert moved > 1e-6 if branch == 3 else moved == 0.0


@pytest.mark.parametrize("fault", ["mask", "positions"])
def test_a_wrong_mask_or_position_is_seen(family, fault, monkeypatch):
    model, processor = family
    model = model.double().eval()
    encoder = batching.Encoder(processor, model)
    right = loss_and_gradients(model, batch_of(encoder, [2], split=True))[0]
    batch = batch_of(encoder, [2], split=False)
    if fault == "mask":
        causal = lambda segments: torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()[None, None]  # noqa: E731
        monkeypatch.setattr(losses, "attention_mask", causal)
    else:
        batch["position_ids"][..., 0, :] = torch.arange(batch["position_ids"].shape[-1])
    assert abs(loss_and_gradients(model, batch)[0] - right) > 1e-6


def test_mask_lets_nothing_through_but_prefix_and_own_branch():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    seen = layout.attention_mask(segments)[0, 0]
    assert seen.shape == (7, 7)
    assert seen[5].tolist() == [True, True, False, False, True, True, False]
    assert seen[3].tolist() == [True, True, True, True, False, False, False]
    assert seen[6, 6] and not seen[:6, 6].any(), "padding sees itself, nothing sees padding"


def test_logits_only_at_labels(family):
    model, processor = family
    batch = batch_of(batching.Encoder(processor, model), [0, 2], split=False)
    logits, targets, weights = losses.answer_logits(model, batch)
    count = int((batch["labels"] != layout.IGNORED).sum())
    assert logits.shape[0] == count == len(targets) == len(weights)
    assert logits.shape[0] < batch["labels"].numel() / 2
    assert not model.get_output_embeddings()._forward_pre_hooks, "the hook must not outlive its batch"
