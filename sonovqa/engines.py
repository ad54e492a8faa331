"""What every engine that answers questions takes and gives: a local model and an endpoint look the same from above."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

LETTERS_A_TOKEN = 4  # of English; source: OpenAI's rule of thumb, "1 token ~= 4 chars in English"
BRANCHES = 128  # answers decoded at once: each holds a copy of its prefix's cache, 40 MB of an 8B model and 280 tokens


@dataclass(frozen=True)
class ImageRequest:
    """One image and everything asked about it, so that an engine can share the work on the image.

    Attributes:
        image_id: ``<folder>/<file>``, given back with every reply.
        image: the encoded file's bytes; ``None``: the prompts are texts about no image.
        context: a line that belongs to the image (such as a pixel size), or ``None``.
        prompts: pairs ``(question_id, prompt)``.
    """

    image_id: str
    image: bytes | None
    context: str | None
    prompts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reply:
    """One answer, or the reason why there is none.

    Attributes:
        text: the answer; empty if the request failed.
        error: why it failed, or ``None``. A failed request is never an answer and is never scored.
        finish_reason: ``stop``, ``length`` (cut at ``max_new_tokens``) or ``None``.
        new_tokens: tokens generated, the end of the turn included where the engine counts it.
        seconds: from the request's start to its answer, retries included.
        probabilities: of a choice head, by label; ``None`` of a generated answer.
    """

    image_id: str
    question_id: str
    text: str
    error: str | None = None
    finish_reason: str | None = None
    new_tokens: int = 0
    seconds: float = 0.0
    probabilities: Mapping[str, float] | None = None


class Engine(Protocol):
    """Answers greedily. ``name`` is what tables and records call it."""

    name: str

    def answer(self, requests: Iterable[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        """Yield one `Reply` for each prompt of each request, in any order, as they come.

        ``requests`` is read as needed, never as a whole: memory does not grow with the data set. A request that fails
        is a `Reply` with ``error``, never an exception and never text.
        """
        ...


@dataclass(frozen=True)
class LabelRequest:
    """One image and, for each closed question about it, the wordings to weigh.

    Attributes:
        image_id, image, context: as in `ImageRequest`.
        prompts: ``(question_id, prompt, wordings)``.
    """

    image_id: str
    image: bytes
    context: str | None
    prompts: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class LabelReply:
    """Natural log-likelihoods of a question's wordings, in the order asked; empty, with ``error``, if the request failed."""

    image_id: str
    question_id: str
    log_likelihoods: tuple[float, ...]
    error: str | None = None


class Weigher(Protocol):
    """An engine that can say how likely an answer is."""

    name: str

    def likelihoods(self, requests: Iterable[LabelRequest]) -> Iterator[LabelReply]:
        """Yield one `LabelReply` for each prompt of each request, in any order; a failure is a reply with ``error``."""
        ...


def one_by_one(requests: Iterable[ImageRequest]) -> Iterator[ImageRequest]:
    """The same requests, each prompt with an image of its own: for who shares no image among its questions."""
    return (ImageRequest(r.image_id, r.image, r.context, (prompt,)) for r in requests for prompt in r.prompts)


class EngineError(Exception):
    """An engine could not answer a conversation's question; the message is one line, fit to be shown."""
