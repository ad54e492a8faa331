"""Users of an endpoint: each asks, waits for the answer to stream in, and asks the next question."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sonovqa import chat
from sonovqa.bench_caches import Fresh
from sonovqa.endpoint import encoded_as_seen
from sonovqa.endpoint_faults import IncompleteError, check_finished, in_words, may_pass
from sonovqa.engines import ImageRequest

IMAGE_FIRST, QUESTION_FIRST = ORDERS = ("image-first", "question-first")


@dataclass
class Asked:
    """One question of one user, and what came of it.

    Attributes:
        seconds: from its first try to the end of its answer or of all tries: what the user waited.
        first_token: seconds from its first try to the first text; ``None`` without a stream or without text.
        tokens: of the answer, as the server counts them.
        error: kind of the fault that ended it, see `kind_of`; ``None``: it was answered.
        retried: kinds of the faults before that, each one further try.
    """

    seconds: float = 0.0
    first_token: float | None = None
    tokens: int = 0
    error: str | None = None
    retried: list[str] = field(default_factory=list)


class Users(Fresh):
    """Many users of one endpoint at once; connection, key and retries are `endpoint.Endpoint`'s.

    Args:
        stream: answers are streamed, so that the time to the first token is known.
        rest: see `bench_caches.Fresh`.
    """

    def __init__(self, *rest, stream: bool = True, **named):
        super().__init__(*rest, **named)
        self.stream_on = stream

    def ask(self, messages: Iterator[list[dict]], users: int, new_tokens: int, heard: Callable[[Asked], None]) -> None:
        """Let ``users`` users ask until ``messages`` are used up; ``heard`` gets every question as it ends."""
        asyncio.run(self._all(messages, users, new_tokens, heard))

    async def _all(self, messages, users: int, new_tokens: int, heard) -> None:
        import openai

        async def user(client) -> None:
            for asked in messages:  # one iterator for all: nobody waits for another's turn
                heard(await self._question(client, asked, new_tokens))

        async with self._client(openai.AsyncOpenAI) as client, asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(user(client))

    async def _question(self, client, messages: list[dict], new_tokens: int) -> Asked:
        import openai

        told, started = Asked(), time.perf_counter()
        request = self._request(messages, new_tokens)
        for attempt in itertools.count(1):
            try:
                await (self._streamed if self.stream_on else self._whole)(client, request, told, started)
                break
            except (openai.APIError, IncompleteError, ValueError) as fault:
                if attempt > self.retries or not may_pass(fault):
                    told.error, told.first_token, told.tokens = kind_of(fault), None, 0
                    break
                told.retried.append(kind_of(fault))
                await asyncio.sleep(self._pause(attempt, fault))
        told.seconds = time.perf_counter() - started
        return told

    async def _whole(self, client, request: dict, told: Asked, started: float) -> None:
        made = await client.chat.completions.create(**request)
        if not made.choices:
            raise IncompleteError("the endpoint's answer is no chat completion")
        check_finished(made.choices[0].finish_reason, self._is_blank(made.choices[0].message.content or ""))
        told.tokens = made.usage.completion_tokens if made.usage else 0

    async def _streamed(self, client, request: dict, told: Asked, started: float) -> None:
        reason, text, told.first_token, told.tokens = None, "", None, 0
        async with await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}) as events:
            async for event in events:
                told.tokens = event.usage.completion_tokens if event.usage else told.tokens
                for choice in event.choices or ():
                    reason = choice.finish_reason or reason
                    text += choice.delta.content or ""
                    if text and told.first_token is None:
                        told.first_token = time.perf_counter() - started
        check_finished(reason, self._is_blank(text))

    def _is_blank(self, text: str) -> bool:
        return not text.strip() and not self.extra.get("ignore_eos")


def kind_of(fault: Exception) -> str:
    """A fault's kind, without what differs from one request to the next: ``HTTP 503``, ``connection failed``, …"""
    return re.split(r"[:(]", in_words(fault), maxsplit=1)[0].strip()[:80]


def messages_of(requests: list[ImageRequest], order: str) -> list[list[dict]]:
    """The conversation of every question about every image, image by image.

    Args:
        order: `IMAGE_FIRST`, as everything else asks; `QUESTION_FIRST` puts the question's text before its image, after
            which no two questions of an image share more than the system text.
    """
    found = []
    for request in requests:
        data, mime = encoded_as_seen(request.image)
        image = None
        for _, prompt in request.prompts:
            messages = chat.openai_messages(data, prompt, request.context, mime)
            image = image or messages[-1]["content"][0]
            messages[-1]["content"][0] = image  # one copy of its characters for all its questions
            if order == QUESTION_FIRST:
                messages[-1]["content"].reverse()
            found.append(messages)
    return found


def count(kinds: list[str]) -> dict[str, int]:
    """How often each kind occurs, commonest first."""
    return dict(Counter(kinds).most_common())
