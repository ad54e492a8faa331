"""The training loss over a batch of `sonovqa.batching`: logits only where there is a label."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from sonovqa.layout import IGNORED, attention_mask

_NOT_FOR_MODEL = ("labels", "weights", "segments", "kinds", "label_rows", "label_sets")


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Boolean ``[R, L]``: the positions whose next token carries a label. A label never stands first in its branch."""
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != IGNORED
    return at


@contextlib.contextmanager
def logits_at(model: torch.nn.Module, at: torch.Tensor) -> Iterator[None]:
    """Inside, the model's LM head sees the hidden states at ``at`` ``[R, L]`` only, and its logits are ``[N, vocabulary]``.

    So memory grows with the answers' tokens, not with vocabulary times sequence. A hook on the head works through PEFT,
    DistributedDataParallel and patched forwards alike, since all of them end in the same module.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][at.to(args[0].device)], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def label_logits_at(model: torch.nn.Module, at: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """Inside, the model's LM head is its ``rows`` ``[U]`` at ``at`` ``[R, L]`` only, and its logits are ``[N, U]``.

    The head's own weights are used where they are, so a tied or trained head keeps its gradient; accelerate, which loads
    offloaded weights around a module's ``forward``, keeps doing so.
    """
    head = model.get_output_embeddings()
    name = "_old_forward" if hasattr(head, "_old_forward") else "forward"  # the former is what accelerate's hook calls

    def restricted(hidden: torch.Tensor) -> torch.Tensor:
        bias = getattr(head, "bias", None)
        return F.linear(hidden[at.to(hidden.device)], head.weight[rows], None if bias is None else bias[rows])

    own = head.__dict__.get(name)
    setattr(head, name, restricted)
    try:
        yield
    finally:
        if own is None:
            delattr(head, name)  # the class's own shows again
        else:
            setattr(head, name, own)


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], wrapped: torch.nn.Module | None = None):
    """Run the model on a batch of `sonovqa.batching`.

    Args:
        model: the model (or PEFT model) whose head is hooked.
        batch: as `batching.Encoder.batch` gives it, with vision tensors, on the model's device. Without ``position_ids``
            (one branch a row) the model makes positions and its causal mask itself.
        wrapped: what to call instead of ``model``, such as its DistributedDataParallel wrapper.

    Returns:
        Logits ``[N, vocabulary]``, their targets ``[N]`` and weights ``[N]``, in row-major order of the labels. Of choices
        logits over ``label_rows``, ``[N, U]``, as low as they can be for tokens that are no label of the question.
    """
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_MODEL}
    if "position_ids" in batch:
        inputs["attention_mask"] = attention_mask(batch["segments"])
    elif "decoder_input_ids" not in batch:
        inputs["attention_mask"] = (batch["segments"] >= 0).long()
    if "label_rows" in batch:
        at = batch["labels"] != IGNORED
        with label_logits_at(model, at, batch["label_rows"]):
            logits = (wrapped or model)(**inputs, use_cache=False).logits
        foreign = ~batch["label_sets"][batch["kinds"][at]]  # not -inf: the difference of two would be NaN in a comparison
        logits = logits.masked_fill(foreign.to(logits.device), torch.finfo(logits.dtype).min)
        return logits, batch["labels"][at], batch["weights"][at]
    at = predicting(batch["labels"])
    with logits_at(model, at):
        logits = (wrapped or model)(**inputs, use_cache=False).logits
    after = torch.roll(at, 1, dims=1)
    return logits, batch["labels"][after], batch["weights"][after]


def divisor(weights: Sequence[torch.Tensor], mass: float | None = None) -> torch.Tensor:
    """What the summed loss of an optimiser step is divided by.

    Args:
        weights: of its micro-batches, ``[R, L]`` each: a row a sequence, 0 at tokens that are not supervised.
        mass: what a sequence with any weight weighs on average; ``None``: all weights are added up.
    """
    each = torch.cat([rows.sum(dim=1) for rows in weights]) if weights else torch.zeros(1)
    return each.sum() if mass is None else (each > 0).sum() * mass


def weighted_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight times negative log-likelihood, in fp32 or better; divide by the sum of weights for a mean."""
    return (_surprise(logits, targets) * weights).sum()


def answer_of_token(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which answer of the batch each supervised token belongs to, ``[N]`` numbers from 0, in the order of `answer_logits`."""
    labelled = batch["labels"] != IGNORED
    rows, columns = labelled.nonzero(as_tuple=True)
    keys = rows * (batch["segments"].max() + 1) + batch["segments"][rows, columns]
    return torch.unique(keys, return_inverse=True)[1]


def focal_sum(logits, targets, weights, answers: torch.Tensor, gamma: float) -> torch.Tensor:
    """`weighted_sum` with each answer's loss multiplied by ``(1 - p) ** gamma``, ``p`` the likelihood of the whole answer.

    Args:
        logits, targets, weights: as `answer_logits` gives them, ``[N, vocabulary]``, ``[N]``, ``[N]``.
        answers: `answer_of_token`, ``[N]``.
        gamma: 0 gives `weighted_sum` itself.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv:1708.02002, equation 4; the class there is the
    answer here, whose likelihood is the product over its tokens.
    """
    surprise = _surprise(logits, targets)
    total = surprise.new_zeros(int(answers.max()) + 1).index_add(0, answers, surprise)
    factor = (-torch.expm1(-total)).clamp_min(torch.finfo(total.dtype).tiny) ** gamma
    return (surprise * weights * factor[answers]).sum()


def _surprise(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise, targets, reduction="none")
