"""The engines of a choice run: one forward pass a batch answers all closed questions of its images, probabilities included.

`ChoiceEngine` does it in this process; `ChoiceEndpoint` asks a vLLM server for one token among the labels' own
(``allowed_token_ids``) and for the log-probabilities of just these (``logprob_token_ids``). Constraining by the labels' texts
(``structured_outputs`` with ``choice``) would not do: it also lets through tokens that merely begin a label, such as "n" of
"normal", which training never compared. The log-probabilities are of the whole vocabulary; their softmax over the labels is
the head's.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sonovqa import chat, choice, confidence, prompt_variants
from sonovqa.choice import Head
from sonovqa.cli import UserError
from sonovqa.endpoint import Asked, Endpoint, questions_of
from sonovqa.endpoint_faults import IncompleteError
from sonovqa.engines import ImageRequest, LabelReply, LabelRequest, Reply, one_by_one

#: A server renders texts as `text_only.TextTemplate` did in training: Qwen3's template else opens a block for thinking.
AS_TRAINED = {"chat_template_kwargs": {"enable_thinking": False}}
NEVER = -1e9  # log-likelihood of a wording that a choice cannot give; its probability is 0


class ChoiceEngine:
    """Answers `ImageRequest`s with a loaded model and a run's head; see `engines.Engine` and `engines.Weigher`.

    Args:
        model, processor: as `models.load_for_inference` gives them.
        head: of the run.
        batch_images: images, or texts, answered together.
        share: encode an image once for all its questions; off, or where the family cannot, each is an image of its own.
    """

    def __init__(self, model, processor, head: Head, batch_images: int = 8, share: bool = True):
        from sonovqa.batching import encoder_for

        self.model, self.head, self.batch_images = model, head, batch_images
        self.encoder = encoder_for(processor, model, head)
        self.share = share and self.encoder.family.shares_prefix
        self.name = "local, choice head" if self.share else "local, choice head, each question by itself"

    def answer(self, requests: Iterable[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        """The likeliest label of every question, image by image; no token is generated, so ``max_new_tokens`` plays no part."""
        requests = iter(requests) if self.share else one_by_one(requests)
        while batch := list(itertools.islice(requests, self.batch_images)):
            started = time.perf_counter()
            told = self._probabilities(batch)
            waited = time.perf_counter() - started
            for request in batch:
                for question_id, prompt in request.prompts:
                    yield _reply(self.head, request, question_id, prompt, told[request.image_id, question_id], waited)

    def likelihoods(self, requests: Iterable[LabelRequest]) -> Iterator[LabelReply]:
        """Log-probabilities of the labels at their first wordings, `NEVER` at others: the sum over a label's wordings is the
        label's, and the mass is 1."""
        for request in requests:
            asked = ImageRequest(request.image_id, request.image, request.context, tuple(p[:2] for p in request.prompts))
            for reply, (question_id, _, texts) in zip(self.answer([asked], 1), request.prompts, strict=True):
                yield LabelReply(request.image_id, question_id, *_by_wording(reply, texts))

    def _probabilities(self, batch: list[ImageRequest]) -> dict[tuple[str, str], dict | str]:
        """By image and question the probabilities of its labels, or why there are none."""
        told: dict[tuple[str, str], dict | str] = {}
        images, contexts, branches, owners = [], [], [], []
        for request in batch:
            kinds = {q: kind_of(self.head, q, prompt) for q, prompt in request.prompts}
            told |= {(request.image_id, q): choice.NOT_ITS_OWN for q, kind in kinds.items() if kind is None}
            try:
                image = None if request.image is None else chat.open_image(request.image)
            except (OSError, ValueError) as fault:
                told |= {(request.image_id, q): f"image not readable: {fault}" for q in kinds}
                continue
            asked = [(q, prompt, kinds[q]) for q, prompt in request.prompts if kinds[q]]
            if asked:
                images.append(image)
                contexts.append(request.context)
                branches.append([(prompt, kind) for _, prompt, kind in asked])
                owners += [(request.image_id, q, kind) for q, _, kind in asked]
        for (image_id, question_id, kind), values in zip(owners, self._logits(images, contexts, branches), strict=True):
            told[image_id, question_id] = softmax(self.head.of_row(kind, values))
        return told

    def _logits(self, images: list, contexts: list, asked: list[list[tuple[str, str]]]) -> list[list[float]]:
        """Logits over the head's tokens of every ``(prompt, kind)``, in order."""
        import torch

        from sonovqa import devices, losses
        from sonovqa.generation import on_device

        if not images:
            return []
        numbers = list(self.head.sets)
        # Any column will do for a label: it says where a question ends, and of which kind it is.
        branches = [
            [self.encoder.branch_of({"prompt": prompt, "place": (numbers.index(kind), 0)}) for prompt, kind in row]
            for row in asked
        ]
        with torch.inference_mode(), devices.answering_in_memory():
            prefixes, vision = self.encoder.prefixes(images, contexts)
            batch = self.encoder.batch(prefixes, branches, vision)
            return losses.answer_logits(self.model, on_device(batch, self.model))[0].float().cpu().tolist()


class ChoiceEndpoint(Endpoint):
    """Answers a choice run's questions through the vLLM server that serves it; arguments are `Endpoint`'s, and ``head``."""

    def __init__(self, *arguments, head: Head, **options):
        super().__init__(*arguments, **options)
        self.head = head

    def answer(self, requests: Iterable[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        """One request a question, for a single token among its labels'; at most ``in_flight`` open."""
        return self._each(self._questions(requests), self._choose)

    def likelihoods(self, requests: Iterable[LabelRequest]) -> Iterator[LabelReply]:
        """As `ChoiceEngine.likelihoods`."""
        wanted: dict[tuple[str, str], tuple[str, ...]] = {}

        def asked() -> Iterator[ImageRequest]:
            for request in requests:
                wanted.update({(request.image_id, q): texts for q, _, texts in request.prompts})
                yield ImageRequest(request.image_id, request.image, request.context, tuple(p[:2] for p in request.prompts))

        for reply in self.answer(asked(), 1):
            texts = wanted.pop((reply.image_id, reply.question_id))
            yield LabelReply(reply.image_id, reply.question_id, *_by_wording(reply, texts))

    def _questions(self, requests: Iterable[ImageRequest]) -> Iterator:
        for request in requests:
            for one in questions_of([request]) if request.image is not None else _texts(request):
                prompt = dict(request.prompts)[one.question_id]
                kind = kind_of(self.head, one.question_id, prompt)
                lost = isinstance(one, Asked) and kind is None
                yield Reply(one.image_id, one.question_id, "", choice.NOT_ITS_OWN) if lost else one, kind

    async def _choose(self, client, asked: tuple[Asked | Reply, str | None]) -> Reply:
        one, kind = asked
        if isinstance(one, Reply):
            return one
        started = time.perf_counter()
        tokens = [label.token for label in self.head.sets[kind]]
        extra = {"allowed_token_ids": tokens, "logprob_token_ids": tokens, "return_tokens_as_token_ids": True}
        if kind == confidence.TEXT:
            extra |= AS_TRAINED
        request = self._request(one.messages, 1) | {"logprobs": True, "extra_body": extra}
        told, error = await self._tried(client, request, functools.partial(_read, tokens=tokens))
        waited = time.perf_counter() - started
        if error is not None:
            return Reply(one.image_id, one.question_id, "", error, seconds=waited)
        found = softmax({label.name: value for label, value in zip(self.head.sets[kind], told, strict=True)})
        best = self.head.answer_of(kind, max(found, key=found.get))
        return Reply(one.image_id, one.question_id, best, None, "stop", 1, waited, found)


def _read(completion, tokens: list[int]) -> list[float]:
    """Log-probabilities of ``tokens`` from a completion of one token.

    Raises:
        UserError: if the server does not give them.
        IncompleteError: if there is no answer in it.
    """
    try:
        entries = completion.choices[0].logprobs.content[0].top_logprobs
        found = {entry.token: entry.logprob for entry in entries}
    except (AttributeError, IndexError, TypeError):
        raise IncompleteError("the endpoint's answer has no log-probabilities") from None
    names = [f"token_id:{token}" for token in tokens]
    if any(name not in found for name in names):
        told = f"--head; the endpoint gives no log-probabilities of the labels' tokens; {', '.join(names)}"
        raise UserError(f"{told}; vLLM 0.32 does; serve the run with serve.sh")
    return [found[name] for name in names]


def serving_note(run: Path) -> str:
    """How a served run wants to be asked if it answers by a choice head; "" of any other."""
    head = choice.behind(run)
    if head is None:
        return ""
    spelt = {label.spelt: label.token for labels in head.sets.values() for label in labels}
    extra = {"max_tokens": 1, "temperature": 0, "allowed_token_ids": list(head.tokens)}
    extra |= AS_TRAINED if confidence.TEXT in head.sets else {}
    return (
        f"{run} answers by a {head.describe()}: asked freely it says anything. evaluate.py and inference.py ask it "
        f"rightly with --head {run}; of other clients each request needs {json.dumps(extra)}, of these tokens the ones of the "
        f"question's own labels: {json.dumps(spelt)}. The page (python -m sonovqa.page) cannot ask it: it asks freely"
    )


def kind_of(head: Head, question_id: str, prompt: str) -> str | None:
    """The kind under which a head answers a prompt, or ``None``: by its question's id, else by its wording (a question about a
    grey image has no such id), else as what has no labels of its own: a yes-or-no question, or a text."""
    for name, prompts in prompt_variants.PROMPTS.items():
        if question_id == name or prompt in prompts.values():
            return name if name in head.sets else None
    other = (confidence.TEXT, confidence.YES_NO)
    return next((kind for kind in other if choice.kind_asked(head, question_id, prompt, kind)), None)


def softmax(values: Mapping[str, float]) -> dict[str, float]:
    """Probabilities from logits, or from log-probabilities of a larger whole; six significant digits, as they are stored."""
    top = max(values.values())
    parts = {name: math.exp(value - top) for name, value in values.items()}
    total = sum(parts.values())
    return {name: float(f"{part / total:.6g}") for name, part in parts.items()}


def _reply(head: Head, request: ImageRequest, question_id: str, prompt: str, told: dict | str, waited: float) -> Reply:
    if isinstance(told, str):
        return Reply(request.image_id, question_id, "", told, None, 0, 0.0)
    best = head.answer_of(kind_of(head, question_id, prompt), max(told, key=told.get))
    return Reply(request.image_id, question_id, best, None, "stop", 0, waited, told)


def _texts(request: ImageRequest) -> Iterator[Asked]:
    """A text's turn as `text_only.TextTemplate` renders it: the text and nothing else; the server's template does the rest."""
    for question_id, prompt in request.prompts:
        yield Asked(request.image_id, question_id, [{"role": "user", "content": prompt}])


def _by_wording(reply: Reply, texts: tuple[str, ...]) -> tuple[tuple[float, ...], str | None]:
    if reply.error is not None:
        return (), reply.error
    left, found = dict(reply.probabilities), []
    for text in texts:
        chance = left.pop(confidence.label_of({"question_id": reply.question_id}, text), 0.0)
        found.append(math.log(chance) if chance > 0 else NEVER)
    return tuple(found), None
