"""How branches stand behind their shared prefix: token ids, positions, segments, labels and weights of a batch, and its mask.

A branch sees the prefix and itself, never another branch, and its positions go on from the prefix's end as if it were alone.
Labels, weights and the mask are made here and nowhere else.

Source: tree attention (Cai et al., Medusa, 2024, arXiv:2401.10774, section 3.1) put to use in training; positions are
M-RoPE's (Qwen2-VL, arXiv:2409.12191, section 2.1) for the families that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from sonovqa import choice

IGNORED = -100  # torch's `ignore_index`: a token without loss
#: A processor's marks a token; after the prefix comes text, which is 0, or sees the image as the prefix's last token does.
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
SIGHT_KEYS = ("cross_attention_mask",)
TEXT_KEYS = ("input_ids", "attention_mask", *TYPE_KEYS, *SIGHT_KEYS)


@dataclass(frozen=True)
class Prefix:
    """What an image's questions share.

    Attributes:
        ids: token ids, image tokens expanded, ``[P]``.
        positions: rotary positions, ``[3, P]`` for M-RoPE families, else ``[P]``.
        types: the processor's own marks a token (such as ``mm_token_type_ids``), by name, ``[P, …]`` each.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """First position after the prefix: M-RoPE counts an image as its longer side, so this is not ``P``."""
        return int(self.positions.max()) + 1

    def types_with(self, length: int) -> dict[str, torch.Tensor]:
        """The marks of the prefix and ``length`` tokens of text after it, ``[P + length, …]`` each."""
        made = {}
        for key, marks in self.types.items():
            more = marks[-1:].expand(length, *marks.shape[1:]) if key in SIGHT_KEYS else marks.new_zeros(length, *marks.shape[1:])
            made[key] = torch.cat([marks, more])
        return made


@dataclass(frozen=True)
class Branch:
    """One question from the prefix's end on.

    Attributes:
        ids: token ids of question, tail of the template and, in training, answer and end of turn, ``[B]``.
        asked: number of leading tokens that belong to the question: no loss on them.
        weight: the loss weight of each of its answer tokens.
        place: instead of an answer's tokens, a label at the question's last one: its kind's number and its column
            (`choice.Head.place`).
    """

    ids: list[int]
    asked: int
    weight: float = 1.0
    place: tuple[int, int | None] | None = None


def assemble(
    prefixes: Sequence[Prefix], branches: Sequence[Sequence[Branch]], pad_id: int, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Lay prefixes and their branches out as one padded batch.

    Args:
        prefixes: ``R`` prefixes.
        branches: for each row its branches, one or more.
        pad_id: token id of padding.
        multiple: rows are padded to a multiple of so many tokens.

    Returns:
        ``input_ids`` ``[R, L]``; ``position_ids`` ``[3, R, L]`` or ``[R, L]``; ``segments`` ``[R, L]`` (0 prefix, k the
        k-th branch, -1 padding); ``labels`` ``[R, L]`` (`IGNORED` but at answers and ends of turn); ``weights``
        ``[R, L]``, the loss weight of each label. Of a choice ``labels`` holds the label's column, at the question's last
        token itself, and ``kinds`` ``[R, L]`` the number of its kind.
    """
    lengths = [len(p.ids) + sum(len(b.ids) for b in row) for p, row in zip(prefixes, branches, strict=True)]
    rows, length = len(lengths), -(-max(lengths) // multiple) * multiple
    axes = prefixes[0].positions.shape[:-1]
    ids = torch.full((rows, length), pad_id)
    positions = torch.zeros((*axes, rows, length), dtype=torch.long)
    segments = torch.full((rows, length), -1)
    labels = torch.full((rows, length), IGNORED)
    weights = torch.zeros((rows, length))
    kinds = torch.zeros((rows, length), dtype=torch.long)
    for r, (prefix, row) in enumerate(zip(prefixes, branches, strict=True)):
        at = len(prefix.ids)
        ids[r, :at], positions[..., r, :at], segments[r, :at] = prefix.ids, prefix.positions, 0
        for k, branch in enumerate(row, start=1):
            here, told = slice(at, at + len(branch.ids)), slice(at + branch.asked, at + len(branch.ids))
            ids[r, here] = torch.tensor(branch.ids)
            positions[..., r, here] = prefix.end + torch.arange(len(branch.ids))
            segments[r, here] = k
            labels[r, told] = ids[r, told]
            weights[r, told] = branch.weight
            at = here.stop
            if branch.place is not None and branch.place[1] is not None:
                kinds[r, at - 1], labels[r, at - 1] = branch.place
                weights[r, at - 1] = branch.weight
    made = {"input_ids": ids, "position_ids": positions, "segments": segments, "labels": labels, "weights": weights}
    return made | ({"kinds": kinds} if any(branch.place for row in branches for branch in row) else {})


def label_rows(head: choice.Head) -> dict[str, torch.Tensor]:
    """What a batch of choices needs: ``label_rows`` ``[U]``, the token ids whose rows of the LM head are compared, and
    ``label_sets`` ``[kinds, U]``, True where a token stands for a label of the kind."""
    sets = torch.zeros((len(head.sets), len(head.tokens)), dtype=torch.bool)
    for kind, columns in enumerate(head.columns.values()):
        sets[kind, columns] = True
    return {"label_rows": torch.tensor(head.tokens), "label_sets": sets}


def assemble_apart(
    prefixes: Sequence[Prefix], branches: Sequence[Branch], starts: Sequence[int], pad_id: int
) -> dict[str, torch.Tensor]:
    """Lay out a batch for an encoder-decoder: prefix and question for the encoder, the answer for the decoder.

    Args:
        prefixes, branches: ``R`` of each.
        starts: tokens that the decoder begins with.
        pad_id: token id of padding, which stands on the right: such models count positions from the left.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[R, L]``; ``decoder_input_ids``, and as `assemble` gives them ``segments``,
        ``labels`` and ``weights``, ``[R, D]``. Labels stand where their tokens are, as in `assemble`.
    """
    read = [torch.cat([p.ids, torch.tensor(b.ids[: b.asked])]) for p, b in zip(prefixes, branches, strict=True)]
    written = [torch.tensor([*starts, *b.ids[b.asked :]]) for b in branches]
    ids = pad_sequence(read, batch_first=True, padding_value=pad_id)
    decoder = pad_sequence(written, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in written])[:, None]
    at = torch.arange(decoder.shape[1])[None]
    told = (at >= len(starts)) & (at < lengths)
    weight = torch.tensor([b.weight for b in branches])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in read], batch_first=True),
        "decoder_input_ids": decoder,
        "segments": torch.where(at >= lengths, -1, told.long()),
        "labels": decoder.masked_fill(~told, IGNORED),
        "weights": told * weight,
    }


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom, from `assemble`'s ``segments`` ``[R, L]``: boolean ``[R, 1, L, L]``, True = may attend.

    A token sees what precedes it in the prefix and in its own branch. Padding sees itself: a row without any allowed
    key gives NaN in SDPA.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (causal & ((key == 0) | ((key == query) & (key > 0))) | itself)[:, None]


def padded_types(
    prefixes: Sequence[Prefix], lengths: Sequence[int], left: bool = False, total: int = 0
) -> dict[str, torch.Tensor]:
    """The processor's marks of prefixes with so many tokens of text after them, ``[R, L, …]``, padded with 0 on the right, or on
    the ``left``, to ``total`` tokens at least."""
    rows = [prefix.types_with(length) for prefix, length in zip(prefixes, lengths, strict=True)]
    side = "left" if left else "right"
    made = {key: pad_sequence([row[key] for row in rows], batch_first=True, padding_side=side) for key in rows[0]}
    missing = {key: marks.new_zeros(len(marks), max(0, total - marks.shape[1]), *marks.shape[2:]) for key, marks in made.items()}
    return {key: torch.cat([missing[key], marks] if left else [marks, missing[key]], dim=1) for key, marks in made.items()}
