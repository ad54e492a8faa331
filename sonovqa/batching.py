"""From rows of the data set to batches: one sequence a row, whose questions share the image's prefix.

A sequence is the prefix (system text, image, context) once, then the branches (question, answer, end of turn), laid out by
`layout`. So the vision tower and the image's tokens run once for all questions, and the loss is that of separate samples,
which are the same thing with one branch a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sonovqa import chat, choice, families, text_only
from sonovqa.layout import SIGHT_KEYS, TEXT_KEYS, TYPE_KEYS, Branch, Prefix, assemble, assemble_apart, label_rows, padded_types
from sonovqa.questions import REPORT_ID


class Encoder:
    """Turns images, prompts and answers into token ids, positions and pixel tensors with a model's own processor.

    Args:
        processor: a Hugging Face processor; its image sizes are the pixel budget.
        model: the model the ids are for; its `get_rope_index` gives M-RoPE positions. ``None`` for a Qwen-VL's processor alone
            and plain positions.
        head: the labels of a run that answers by a choice head, or ``None``.
        family: where there is no model, and the processor is no Qwen-VL's.

    Attributes:
        family: of the model. Unless it shares a prefix, the model makes positions and mask itself, from the processor's
            marks, and a row holds one branch.
        starts: of an encoder-decoder, the tokens that its decoder begins with; else empty.
    """

    def __init__(self, processor, model=None, head: choice.Head | None = None, family: families.Family | None = None):
        self.family = (family or families.of_type("qwen3_vl")) if model is None else families.of(model.config)
        self.head = head
        self.processor = processor
        self.tokenizer = processor.tokenizer
        texts = processor.image_processor is None
        self.template = text_only.TextTemplate(self.tokenizer) if texts else chat.Template(processor, self.family.system_turn)
        self.starts = _decoder_starts(model.config) if self.family.encoder_decoder else []
        self._rope = _rope_index(model) if self.family.shares_prefix else None

    def prefixes(self, images: Sequence, contexts: Sequence[str | None]) -> tuple[list[Prefix], dict[str, torch.Tensor]]:
        """Encode one prefix an image.

        Args:
            images: ``N`` RGB PIL images.
            contexts: ``N`` context lines as stored, or ``None``; see `chat.context_for`.

        Returns:
            ``N`` prefixes, and the vision tensors of all images as the processor makes them (for Qwen-VL
            ``pixel_values`` ``[sum of patches, patch values]`` and ``image_grid_thw`` ``[N, 3]``).
        """
        told = [chat.context_for(context, image.size) for context, image in zip(contexts, images, strict=True)]
        made = self.inputs([self.template.prefix(context) for context in told], images)
        types = made.get("mm_token_type_ids")
        lengths = made["attention_mask"].sum(dim=1).tolist()
        vision = {key: value for key, value in made.items() if key not in TEXT_KEYS}
        found = []
        for i, length in enumerate(lengths):
            if self.starts and made["input_ids"][i, length - 1] == self.tokenizer.eos_token_id:
                length -= 1  # the processor ends the text, but here a question follows
            ids = made["input_ids"][i, :length]
            if self._rope is None:
                positions = torch.arange(length)
            else:
                grid = vision["image_grid_thw"][i : i + 1]
                positions = self._rope(ids[None], types[i : i + 1, :length], image_grid_thw=grid)[0][:, 0]
            marks = {key: made[key][i, :length] for key in (*TYPE_KEYS, *SIGHT_KEYS) if key in made}
            found.append(Prefix(ids, positions, marks))
        return found, vision

    def inputs(self, texts: list[str], images: Sequence):
        """What the processor makes of ``N`` rendered texts and their images, padded on the right; the tokenizer adds its
        beginning of text where the template did not."""
        begun = bool(self.tokenizer.bos_token) and texts[0].startswith(self.tokenizer.bos_token)
        more = {"add_special_tokens": False} if begun else {}
        each = [[image] for image in images]
        return self.processor(text=texts, images=each, padding=True, padding_side="right", return_tensors="pt", **more)

    def branch(self, prompt: str, answer: str | None = None, weight: float = 1.0) -> Branch:
        """Encode one question and, in training, its answer and end of turn. They are tokenised apart, as at inference
        the prompt ends where the answer begins; the answer as it is behind that end, where some tokenizers have other tokens
        than at the beginning of a text."""
        asked = self._ids(self.template.branch(prompt)) + ([self.tokenizer.eos_token_id] if self.starts else [])
        told = [] if answer is None else self._answer_ids(answer)
        return Branch(asked + told, len(asked), weight)

    def asked(self, prefixes: Sequence[Prefix], branches: Sequence[Branch]) -> dict[str, torch.Tensor]:
        """Prefixes with a question each to be answered by a model that makes its own positions: ``input_ids``,
        ``attention_mask`` and the processor's marks, ``[R, L, …]``, padded on the left."""
        rows = [torch.cat([p.ids, torch.tensor(b.ids)]) for p, b in zip(prefixes, branches, strict=True)]
        padding = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **padding)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **padding)
        types = padded_types(prefixes, [len(b.ids) for b in branches], left=True)
        return {"input_ids": ids, "attention_mask": mask} | types

    def tasks_of(self, row: dict, task: str, variant: str) -> list[dict]:
        """What is asked of a row: `chat.tasks_of`, or `choice.tasks_of` where there is a choice head."""
        return choice.tasks_of(row, task, variant, self.head) if self.head else chat.tasks_of(row, task, variant)

    def branch_of(self, asked: dict, weight: float = 1.0) -> Branch:
        """The training branch of one of `tasks_of`: with its answer, or with its label at the last token of the question."""
        if self.head is None:
            return self.branch(asked["prompt"], asked["answer"], weight)
        return dataclasses.replace(self.branch(asked["prompt"], weight=weight), place=asked["place"])

    def batch(
        self, prefixes: Sequence[Prefix], branches: Sequence[Sequence[Branch]], vision: dict | None = None, multiple: int = 1
    ) -> dict[str, torch.Tensor]:
        """`assemble` for this family (as it is, for a model that makes its own positions, or for an encoder-decoder, whose rows
        ``multiple`` leaves as they are), with the vision tensors and the rows of the LM head that a choice is between."""
        if self.starts:
            made = assemble_apart(prefixes, [branch for (branch,) in branches], self.starts, self.tokenizer.pad_token_id)
        else:
            made = assemble(prefixes, branches, self.tokenizer.pad_token_id, multiple)
            if not self.family.shares_prefix:
                del made["position_ids"]
                lengths = [sum(len(b.ids) for b in row) for row in branches]
                made |= padded_types(prefixes, lengths, total=made["input_ids"].shape[1])
        return made | (vision or {}) | (label_rows(self.head) if self.head else {})

    def prefix_lengths(self, sizes: Sequence[tuple[int, int]], contexts: Sequence[str | None]) -> list[int]:
        """Tokens of each prefix from image sizes ``(width, height)`` alone: nothing is decoded or resized."""
        contexts = [chat.context_for(context, size) for context, size in zip(contexts, sizes, strict=True)]
        text = {context: len(self._ids(self.template.prefix(context))) for context in set(contexts)}
        if self.family.pixel_budget is not False:
            counted = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
            return [text[context] - 1 + n for context, n in zip(contexts, counted.num_image_tokens, strict=True)]
        return [text[context] + self._added_tokens for context in contexts]

    @functools.cached_property
    def _added_tokens(self) -> int:
        """Tokens that the processor adds to a prefix's text for an image of any size, the beginning of text among them."""
        from PIL import Image

        (prefix,), _ = self.prefixes([Image.new("RGB", (64, 64))], [None])
        return len(prefix.ids) - len(self._ids(self.template.prefix(None)))

    def _answer_ids(self, answer: str) -> list[int]:
        tail, text = self.template.tail, self.template.lead + answer + self.template.end_of_turn
        before, whole = self._ids(tail), self._ids(tail + text)
        return whole[len(before) :] if whole[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class TextEncoder(Encoder):
    """The `Encoder` of texts: one text a row, plain positions, which the model makes itself.

    Args:
        processor: a `text_only.TextProcessor`.
        model: ``None``.
        head: the choice head that answers.
    """

    def __init__(self, processor, model=None, head: choice.Head | None = None):
        super().__init__(processor, None, head, families.of_type(None))

    def prefixes(self, images: Sequence, contexts: Sequence[str | None]) -> tuple[list[Prefix], dict[str, torch.Tensor]]:
        """One prefix a text, all alike, and no vision tensors; ``images`` are counted only."""
        ids = torch.tensor(self._ids(self.template.prefix()))
        return [Prefix(ids, torch.arange(len(ids))) for _ in images], {}

    def prefix_lengths(self, sizes: Sequence, contexts: Sequence[str | None]) -> list[int]:
        """Tokens of each text's prefix, which no size changes."""
        return [len(self._ids(self.template.prefix()))] * len(sizes)


def encoder_for(processor, model, head: choice.Head | None = None) -> Encoder:
    """The encoder of a model, or of texts, with a run's choice head."""
    return TextEncoder(processor, None, head) if processor.image_processor is None else Encoder(processor, model, head)


@dataclass
class Collator:
    """Makes training batches in worker processes from a plan's rows and the stored image bytes.

    Args:
        source: the splits by name, their ``image`` columns not decoded (``datasets.Image(decode=False)``).
        encoder: the run's encoder.
        task, variant: what is asked, see `chat.tasks_of`.
        augmentation: an `augmentation.Augmentation` for training rows, or ``None``; other splits are left as they are.
        multiple: rows are padded to a multiple of so many tokens, see `devices.row_multiple`.
    """

    source: object
    encoder: Encoder
    task: str = "all"
    variant: str = "default"
    augmentation: object = None
    multiple: int = 1

    def __call__(self, plan: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Batch the plan's items ``{split, row, branches, weights}``, with an augmentation ``draw`` too; see `Encoder.batch`
        for what comes back, with the vision tensors."""
        rows = [self.source[item["split"]][item["row"]] for item in plan]
        images = [None if row["image"] is None else chat.open_image(row["image"]["bytes"]) for row in rows]
        for i, item in enumerate(plan):
            if self.augmentation is not None and item["split"] == "train":
                images[i], rows[i] = self.augmentation(images[i], self._only_asked(rows[i]), item["draw"])
        prefixes, vision = self.encoder.prefixes(images, [row.get("context") for row in rows])
        branches = []
        for item, row in zip(plan, rows, strict=True):
            tasks = self.encoder.tasks_of(row, self.task, self.variant)
            chosen = zip(item["branches"], item["weights"], strict=True)
            branches.append([self.encoder.branch_of(tasks[k], weight) for k, weight in chosen])
        return self.encoder.batch(prefixes, branches, vision, self.multiple)

    def _only_asked(self, row: dict) -> dict:
        """The row with the questions of the task: what nobody asks need not stay true of the picture."""
        kept = [q for q in row["questions"] if self.task == REPORT_ID or chat.is_asked(q, self.task)]
        return {**row, "questions": kept}


def _decoder_starts(config) -> list[int]:
    """What an encoder-decoder's decoder is given before its answer: its start, then the beginning of text that BART forces."""
    text = config.get_text_config(decoder=True)
    return [token for token in (text.decoder_start_token_id, text.bos_token_id) if token is not None]


def _rope_index(model):
    """The model's own M-RoPE function, freed from its weights so that worker processes can hold it; else ``None``."""
    if model is None:
        return None
    for module in model.modules():
        if hasattr(type(module), "get_rope_index"):
            shell = type(module).__new__(type(module))  # the method reads nothing but the configuration
            shell.__dict__["config"] = module.config
            return shell.get_rope_index
    return None
