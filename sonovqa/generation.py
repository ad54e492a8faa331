"""The local engine: greedy answers from a model in this process, each image encoded once for all of its questions.

The prefix (system text, image, context) runs once; its KV cache is then repeated for every question, and the branches
are decoded together. Left padding stands before the prefix and between prefix and question; neither is ever attended to.
A family that cannot share its prefix (`families.Family`) is asked every question with the image of its own, several in a
batch, through transformers' own ``generate``.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterable, Iterator

import torch

from sonovqa import chat, devices, losses
from sonovqa.batching import Encoder
from sonovqa.engines import BRANCHES, ImageRequest, LabelReply, LabelRequest, Reply, one_by_one
from sonovqa.layout import Branch, Prefix


class LocalEngine:
    """Answers `ImageRequest`s with a loaded model.

    Args:
        model, processor: as `models.load_for_inference` gives them.
        batch_images: images decoded together; each brings all of its questions.
        share: encode an image once for all its questions, if the family can; off, every question is an image of its own
            (``batch_images`` 1: one question at a time).
        ignore_eos: answers do not end before ``max_new_tokens``: for measuring speed.
    """

    def __init__(self, model, processor, batch_images: int = 8, share: bool = True, ignore_eos: bool = False):
        self.model, self.encoder = model, Encoder(processor, model)
        self.batch_images, self.share = batch_images, share and self.encoder.family.shares_prefix
        self.name = "local" if self.share else "local, each question by itself"
        self.stop = set() if ignore_eos else _stop_ids(model, self.encoder)

    def answer(self, requests: Iterable[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        """Greedy answers, image by image in the order asked; an image that cannot be decoded gives failed replies."""
        requests = iter(requests) if self.share else one_by_one(requests)
        while batch := list(itertools.islice(requests, self.batch_images)):
            yield from self._answer_batch(batch, max_new_tokens)

    def _answer_batch(self, batch: list[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        started = time.perf_counter()
        asked, images = [], []
        for request in batch:
            try:
                images.append(chat.open_image(request.image))
                asked.append(request)
            except (OSError, ValueError) as fault:
                for question_id, _ in request.prompts:
                    yield Reply(request.image_id, question_id, "", f"image not readable: {fault}", None, 0, 0.0)
        if not asked:
            return
        with devices.answering_in_memory():
            tokens = self._decoded(asked, images, max_new_tokens)
        waited = time.perf_counter() - started  # every answer is there when the last one is
        pairs = [(request.image_id, question_id) for request in asked for question_id, _ in request.prompts]
        for (image_id, question_id), ids in zip(pairs, tokens, strict=True):
            ended = bool(ids) and ids[-1] in self.stop
            text = self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
            yield Reply(image_id, question_id, text, None, "stop" if ended else "length", len(ids), waited)

    def _decoded(self, asked: list[ImageRequest], images: list, max_new_tokens: int) -> list[list[int]]:
        """Token ids of the answers to all questions of the requests, whose images are decoded."""
        prefixes, vision = self.encoder.prefixes(images, [request.context for request in asked])
        branches = [[self.encoder.branch(prompt) for _, prompt in request.prompts] for request in asked]
        if self.encoder.family.shares_prefix:
            pad_id = self.encoder.tokenizer.pad_token_id
            return greedy(self.model, prefixes, vision, branches, max_new_tokens, self.stop, pad_id)
        return each_alone(self.model, self.encoder, prefixes, vision, branches, max_new_tokens, self.stop)

    def likelihoods(self, requests: Iterable[LabelRequest]) -> Iterator[LabelReply]:
        """Log-likelihoods of all wordings of all questions of an image, its end of turn included, in one pass an image:
        every wording is a branch of the image's prefix, as in training (`layout.assemble`)."""
        for request in requests:
            try:
                image = chat.open_image(request.image)
            except (OSError, ValueError) as fault:
                for question_id, _, _ in request.prompts:
                    yield LabelReply(request.image_id, question_id, (), f"image not readable: {fault}")
                continue
            branches = [self.encoder.branch(prompt, text) for _, prompt, texts in request.prompts for text in texts]
            rows = [branches] if self.encoder.family.shares_prefix else [[branch] for branch in branches]
            parts = [rows[k : k + self.batch_images] for k in range(0, len(rows), self.batch_images)]
            with devices.answering_in_memory():
                found = [branch_likelihoods(self.model, self.encoder, image, request.context, some) for some in parts]
            told = itertools.chain.from_iterable(found)
            for question_id, _, texts in request.prompts:
                yield LabelReply(request.image_id, question_id, tuple(next(told) for _ in texts))


@torch.inference_mode()
def branch_likelihoods(model, encoder: Encoder, image, context: str | None, rows: list[list[Branch]]) -> list[float]:
    """The natural log-likelihood of each branch's answer tokens (its end of turn among them) after the image.

    Args:
        image, context: as `Encoder.prefixes` takes them.
        rows: branches with answers (`Encoder.branch`), by the sequence they stand in.
    """
    prefixes, vision = encoder.prefixes([image] * len(rows), [context] * len(rows))
    batch = on_device(encoder.batch(prefixes, rows) | vision, model)
    logits, targets, _ = losses.answer_logits(model, batch)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    each = -torch.nn.functional.cross_entropy(precise, targets, reduction="none")
    return [float(part.sum()) for part in each.split([len(branch.ids) - branch.asked for row in rows for branch in row])]


def on_device(batch: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The batch where the model is, its images in the model's type; loss weights keep theirs."""
    cast = {key for key, value in batch.items() if value.is_floating_point() and key != "weights"}
    return {key: value.to(model.device, model.dtype if key in cast else None) for key, value in batch.items()}


@torch.inference_mode()
def each_alone(
    model,
    encoder: Encoder,
    prefixes: list[Prefix],
    vision: dict,
    branches: list[list[Branch]],
    max_new_tokens: int,
    stop: set[int],
) -> list[list[int]]:
    """Decode one branch a prefix greedily, all in one batch, for families that cannot share a prefix.

    Args:
        prefixes, vision: as `Encoder.prefixes` gives them for ``N`` images.
        branches: one question each.
        max_new_tokens, stop: as for `greedy`.

    Returns:
        ``N`` lists of token ids, the stop token included where one came.
    """
    if encoder.starts:
        batch = encoder.batch(prefixes, branches)
        batch = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
        given = len(encoder.starts)
    else:
        batch = encoder.asked(prefixes, [branch for (branch,) in branches])
        given = batch["input_ids"].shape[1]
    with _generating(model, encoder, max_new_tokens, stop):
        made = model.generate(**on_device(batch | vision, model))
    return [_until(row, stop) for row in made[:, given:].tolist()]


def _until(ids: list[int], stop: set[int]) -> list[int]:
    ends = [k for k, token in enumerate(ids) if token in stop]
    return ids[: ends[0] + 1] if ends else ids


@contextlib.contextmanager
def _generating(model, encoder: Encoder, max_new_tokens: int, stop: set[int]):
    """Inside, ``generate`` is greedy and goes by nothing else: it would fill what a call leaves open from the checkpoint's own
    settings, such as Florence-2's three beams or the penalty on repetition of Qwen2.5-VL."""
    from transformers import GenerationConfig

    wanted = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=sorted(stop) or None,
        pad_token_id=encoder.tokenizer.pad_token_id, decoder_start_token_id=next(iter(encoder.starts), None),
    )  # fmt: skip
    holders = [module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)]
    before = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = wanted
        yield
    finally:
        for module, own in zip(holders, before, strict=True):
            module.generation_config = own


@torch.inference_mode()
def greedy(
    model, prefixes: list[Prefix], vision: dict, branches: list[list[Branch]], max_new_tokens: int, stop: set[int], pad_id: int
) -> list[list[int]]:
    """Decode all branches of all prefixes greedily.

    Args:
        model: a causal vision-language model that takes a KV cache and explicit positions.
        prefixes, vision: as `Encoder.prefixes` gives them for ``N`` images.
        branches: for each prefix its questions; ``K`` in all.
        max_new_tokens: most tokens an answer may have, its end of turn included.
        stop: token ids that end an answer; none: every answer has ``max_new_tokens``.
        pad_id: id put where nothing is attended to.

    Returns:
        ``K`` lists of token ids, the stop token included where one came.
    """
    device = model.device
    ids, mask, positions = _left_padded([(p.ids, p.positions) for p in prefixes], pad_id)
    vision = {key: value.to(device) for key, value in vision.items()}
    first = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=True,
        logits_to_keep=1, **vision,
    )  # fmt: skip
    flat = [(i, prefixes[i], branch) for i, row in enumerate(branches) for branch in row]
    made = []
    for k in range(0, len(flat), BRANCHES):
        owners = torch.tensor([i for i, _, _ in flat[k : k + BRANCHES]])
        cache = first.past_key_values if k + BRANCHES >= len(flat) else copy.deepcopy(first.past_key_values)
        cache.reorder_cache(owners.to(device))  # each image's cache, once for each of its questions
        asked = [(prefix, branch) for _, prefix, branch in flat[k : k + BRANCHES]]
        made += _decoded(model, asked, cache, mask[owners], max_new_tokens, stop, pad_id)
    return made


def _decoded(model, asked: list[tuple[Prefix, Branch]], cache, mask, max_new_tokens: int, stop: set[int], pad_id: int):
    """Answers to branches behind their prefixes' ``cache`` and ``mask``, ``[K, prefix]``; see `greedy`."""
    device, axes = model.device, asked[0][0].positions.shape[:-1]
    told = [(torch.tensor(b.ids), (p.end + torch.arange(len(b.ids))).expand(*axes, -1)) for p, b in asked]
    ids, branch_mask, positions = _left_padded(told, pad_id)
    mask = torch.cat([mask, branch_mask], dim=1).to(device)
    ids, positions = ids.to(device), positions.to(device)
    done = torch.zeros(len(asked), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    answers = []
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True).masked_fill(done[:, None], pad_id)
        answers.append(torch.where(done, -1, ids[:, 0]))
        done = done | torch.isin(ids[:, 0], stops)
        if done.all():
            break
        positions = positions[..., -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(asked), 1)], dim=1)
    made = torch.stack(answers, dim=1).tolist()
    return [[token for token in row if token >= 0] for row in made]


def stream(model, processor, messages: list[dict], max_new_tokens: int) -> Iterator[str]:
    """Greedy answer to a whole conversation (`chat.messages`, further turns allowed), yielded piece by piece as text."""
    import threading

    from transformers import StoppingCriteriaList, TextIteratorStreamer

    encoder = Encoder(processor, model)
    image = messages[1]["content"][0]["image"]
    inputs = on_device(encoder.inputs([encoder.template.render(messages, ask=True)], [image]), model)
    if encoder.starts:
        inputs |= {"decoder_input_ids": torch.tensor([encoder.starts], device=model.device)}
    pieces = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    faults: list[BaseException] = []
    left = threading.Event()  # the reader went away: Ctrl-C, or the generator was closed

    def stop(ids, scores, **_):
        return torch.full((len(ids),), left.is_set(), dtype=torch.bool, device=ids.device)

    def run():
        try:
            with _generating(model, encoder, max_new_tokens, _stop_ids(model, encoder)), devices.answering_in_memory():
                model.generate(**inputs, streamer=pieces, stopping_criteria=StoppingCriteriaList([stop]))
        except BaseException as fault:  # handed to the reader below: a thread's fault is printed nowhere else
            faults.append(fault)
            pieces.end()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        left.set()
        worker.join()  # ends after the token in progress
    if faults:
        raise faults[0]


def _left_padded(rows: list[tuple[torch.Tensor, torch.Tensor]], pad_id: int):
    """Stack ``(ids [n], positions [..., n])`` to ``[R, L]``, ``[R, L]`` mask and ``[..., R, L]``, padded on the left."""
    length = max(len(ids) for ids, _ in rows)
    axes = rows[0][1].shape[:-1]
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    positions = torch.zeros((*axes, len(rows), length), dtype=torch.long)
    for r, (row, at) in enumerate(rows):
        ids[r, length - len(row) :], mask[r, length - len(row) :], positions[..., r, length - len(row) :] = row, 1, at
    return ids, mask, positions


def _stop_ids(model, encoder: Encoder) -> set[int]:
    told = model.generation_config.eos_token_id
    ids = set(told if isinstance(told, list) else [told]) - {None}
    end = encoder.tokenizer.convert_tokens_to_ids(encoder.template.end_of_turn)
    return ids | ({end} if isinstance(end, int) else set())
