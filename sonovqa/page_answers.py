"""Answers for the page: streamed from the endpoint, each with how confident the model is in it.

The confidence of an answer is its probability: of the label it stands for among all labels of a closed question (Q3, Q5, Q6,
Q7), as `evaluate.py --confidence` measures it (`confidence`, `calibration`), and of exactly this wording and its end of
turn elsewhere. Neither says that the answer is right: how far it can be believed is in the run's report.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from sonovqa import chat, confidence, endpoint_likelihoods
from sonovqa.cli import UserError
from sonovqa.conversation import LONGEST_HISTORY, followed
from sonovqa.endpoint import Endpoint
from sonovqa.endpoint_faults import IncompleteError, check_finished, in_words, may_pass
from sonovqa.page_uploads import Upload
from sonovqa.questions import QUESTIONS, REPORT_ID

#: Least share of the model's probability that the labels' wordings must hold before labels are compared with each other:
#: a model that says other things has a preference among them, but it means nothing (`calibration.find` warns there too).
LEAST_MASS = 0.5
LABELS = confidence.Labels(())
KEY_PART = 8  # characters of the endpoint's key that are hidden even where its end is cut off
FRESH_SECONDS = 2.0  # for which what the endpoint said of itself is told to everybody else who asks

#: What the page is told while an answer is made: ``{"piece": …}``, ``{"again": why}`` (what was said is void), and last
#: ``{"answer": …, "confidence": …}`` or ``{"error": …}``.
Event = dict


@dataclass
class Said:
    """An answer as it grows. ``log_likelihood``: natural, of all tokens with the end of the turn; ``None`` where untold."""

    text: str = ""
    log_likelihood: float | None = 0.0
    finish: str | None = None

    def hear(self, choice) -> str:
        """Take in one chunk's choice; its text."""
        self.finish = choice.finish_reason or self.finish
        piece = choice.delta.content or ""
        told = choice.logprobs.content if choice.logprobs else None
        if told and self.log_likelihood is not None:
            self.log_likelihood += sum(token.logprob for token in told)
        elif piece:
            self.log_likelihood = None
        self.text += piece
        return piece


class PageEndpoint(Endpoint):
    """An endpoint for many users at once, in one event loop. ``async with`` opens and closes its connections.

    Args:
        url, model, in_flight, timeout, retries: of `Endpoint`.
        max_new_tokens: an answer's limit; a report may have eight times it.
        variant: line of prompt variants (`prompt_variants.variants`).
        labels: whether closed questions are asked for the probabilities of their labels (some 40 short requests an image).
    """

    def __init__(self, url: str, model: str | None = None, in_flight: int = 16, timeout: float = 120.0, retries: int = 4,
                 max_new_tokens: int = 128, variant: str = "default", labels: bool = True):  # fmt: skip
        super().__init__(url, model, in_flight, timeout, retries)
        self.asked_for, self.max_new_tokens, self.variant, self.labels = model, max_new_tokens, variant, labels
        self.slots = asyncio.Semaphore(in_flight)
        self.checking, self.checked, self.trouble = asyncio.Lock(), -math.inf, None

    async def __aenter__(self) -> PageEndpoint:
        import openai

        self.client = self._client(openai.AsyncOpenAI)
        return self

    async def __aexit__(self, *fault) -> None:
        await self.client.close()

    async def problem(self, trouble_before: float = -math.inf) -> str | None:
        """Ask the endpoint whether it can answer. ``None``, or why not, for the person in front of the page.

        Args:
            trouble_before: a time (`time.monotonic`); that there was trouble before it is no answer.
        """
        async with self.checking:  # once, however many ask at the same time
            outdated = self.trouble is not None and self.checked < trouble_before
            if outdated or time.monotonic() - self.checked > FRESH_SECONDS:
                probe = Endpoint(self.base_url, self.asked_for)  # another, as a restarted server may serve another model
                try:
                    await asyncio.to_thread(probe.check)
                    self.model, self.trouble = probe.model, None
                except UserError as fault:
                    self.trouble = self._without_key(f"The model's server cannot be used: {fault}.")
                self.checked = time.monotonic()
        return self.trouble

    def _without_key(self, words: str) -> str:
        """Words without the endpoint's key: proxies send headers back in errors, and `in_words` may cut those in mid key."""
        key = self._key() or ""
        for length in range(len(key), min(KEY_PART, len(key)) - 1, -1) if key else ():
            words = words.replace(key[:length], "[key]")
        return words

    async def eight(self, image: Upload, context: str | None) -> AsyncGenerator[Event]:
        """Q1 … Q8 about an image, all at once; every event says of which ``question``.

        Not by a `TaskGroup`: it would turn the `GeneratorExit` of a reader who has gone into an exception group.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        async def one(question_id: str) -> None:
            async for event in self.standard(image, question_id, context):
                events.put_nowait({"question": question_id} | event)

        tasks = [asyncio.create_task(one(question_id)) for question_id in QUESTIONS]
        asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            for task in tasks:
                task.result()  # raises the fault of one that failed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def standard(self, image: Upload, question_id: str, context: str | None) -> AsyncGenerator[Event]:
        """One of Q1 … Q8, or ``report``, asked alone: as in training, and as it was evaluated."""
        prompt = chat.prompt_for(question_id, "", self.variant)
        longer = len(QUESTIONS) if question_id == REPORT_ID else 1
        streamed = self._streamed(messages_of(image, [prompt], context), self.max_new_tokens * longer)
        async with contextlib.aclosing(streamed):
            async for event in streamed:
                if "answer" in event and self.labels and question_id in confidence.CLOSED:
                    yield event | {"confidence": None, "weighing": True}  # the answer is there; what it is worth follows
                    event |= await self._labelled(image, question_id, prompt, context, event)
                yield event

    def free(self, image: Upload, turns: Sequence[str], context: str | None) -> AsyncGenerator[Event]:
        """The answer to the last of ``turns`` (question, answer, …, question) with the latest of what was said before."""
        return self._streamed(messages_of(image, turns[-2 * LONGEST_HISTORY - 1 :], context), self.max_new_tokens)

    async def _streamed(self, messages: list[dict], max_new_tokens: int) -> AsyncGenerator[Event]:
        """An answer, asked for again where the connection breaks, the server is busy or its model refuses a field."""
        import openai

        # The page may be up before the server is: what was so when nobody asked is looked at anew.
        if self.model is None and (problem := await self.problem(trouble_before=time.monotonic())):
            yield {"error": problem}
            return
        request = self._request(messages, max_new_tokens) | {"stream": True, "logprobs": True}
        # Of this answer: by the time it is marked or printed the server may run another.
        model = {"model": self.name, "served": self.model}
        for attempt in itertools.count(1):
            said = Said()
            try:
                async with self.slots, contextlib.aclosing(self._pieces(request, said)) as pieces:
                    async for piece in pieces:
                        yield {"piece": piece}
                check_finished(said.finish, not said.text.strip())
                yield ended(said) | model
                return
            except (openai.APIError, IncompleteError, ValueError) as fault:
                if self.dialect.learns(fault, request):
                    request = self.dialect.spoken(request)
                    continue
                words = self._without_key(told_of(fault))
                if attempt > self.retries or not may_pass(fault):
                    yield {"error": words + (" Ask again in a while." if may_pass(fault) else "")}
                    return
                yield {"again": f"{words} Asking again ({attempt} of {self.retries})."}
                await asyncio.sleep(self._pause(attempt, fault))

    async def _pieces(self, request: dict, said: Said) -> AsyncGenerator[str]:
        async with await self.client.chat.completions.create(**request) as stream:
            async for chunk in stream:
                for choice in chunk.choices or ():
                    if piece := said.hear(choice):
                        yield piece

    async def _labelled(self, image: Upload, question_id: str, prompt: str, context: str | None, event: Event) -> Event:
        """The label's probability in place of the wording's; nothing where the labels cannot be weighed or hold too little."""
        row = {"question_id": question_id, "prompt": prompt}
        label = confidence.label_of(row, event["answer"])
        if label == "unread" or event["confidence"] is None or event["cut"]:
            return {}
        wordings = dict(LABELS.of_id(question_id))
        asked = messages_of(image, [prompt], context)
        found = await asyncio.gather(*(self._weighed(asked, text) for text in confidence.texts_of(wordings)))
        if None in found:
            return {}
        names = confidence.canonical_answers(question_id)
        return compared(wordings, found, label, event["answer"], event["confidence"], names)

    async def _weighed(self, asked: list[dict], text: str) -> float | None:
        """Natural log-likelihood of one wording, or ``None`` where the server does not tell."""
        request = self._request([*asked, {"role": "assistant", "content": text}], 1)
        read: Callable = functools.partial(endpoint_likelihoods.read, text=text)
        try:
            async with self.slots:
                return (await self._tried(self.client, request | {"extra_body": endpoint_likelihoods.EXTRA}, read))[0]
        except UserError:  # no prompt log-probabilities: it is not vLLM
            return None


def messages_of(image: Upload, turns: Sequence[str], context: str | None) -> list[dict]:
    """A conversation about an image, by the one prompt builder: image first."""
    return chat.openai_messages(image.seen, turns[0], context, image.mime, image.url) + followed(list(turns))


def ended(said: Said) -> Event:
    """The last event of an answer that came to its end. ``cut``: at the limit of tokens."""
    told = None if said.log_likelihood is None else math.exp(min(0.0, said.log_likelihood))
    return {"answer": said.text.strip(), "confidence": told, "of": "this wording", "cut": said.finish == "length"}


def compared(wordings: Mapping[str, Sequence[str]], found: Sequence[float], label: str, answer: str, own: float,
             names: Mapping[str, str]) -> Event:  # fmt: skip
    """The confidence in an answer as the probability of its label among all labels.

    Args:
        wordings: of each label, in the order of ``found``.
        found: natural log-likelihoods of the wordings.
        label: what the answer stands for.
        answer, own: the answer and the probability of its wording, which counts for its label.
        names: of labels, as they are shown (`confidence.canonical_answers`); a label without one is shown as it is.

    Returns:
        ``confidence``, ``of`` and ``others``, the two likeliest other labels with their probabilities, of which one may be
        likelier than the answer's own: the model wrote the likeliest wording. Empty if the wordings hold less than
        `LEAST_MASS` of the model's probability.
    """
    told = dict(zip(confidence.texts_of(wordings), found, strict=True))
    if answer not in told:
        wordings = {**wordings, label: (*wordings.get(label, ()), answer)}
        told[answer] = math.log(max(own, 1e-300))
    chances, mass = confidence.probabilities([told[text] for text in confidence.texts_of(wordings)], wordings)
    if mass < LEAST_MASS:
        return {}
    others = sorted(((name, p) for name, p in chances.items() if name != label), key=lambda entry: -entry[1])[:2]
    shown = [[names.get(name, name), round(p, 4)] for name, p in others]
    return {"confidence": chances[label], "of": "this label", "others": shown}


def told_of(fault: Exception) -> str:
    """A fault of the endpoint in words for the person in front of the page."""
    import openai

    if isinstance(fault, openai.AuthenticationError | openai.PermissionDeniedError):
        return "The model's server refuses this page's key. Whoever runs the page must set VLLM_API_KEY to the server's key."
    if isinstance(fault, openai.APITimeoutError):
        return "The model's server did not answer in time."
    if isinstance(fault, openai.APIConnectionError):
        return "The model's server cannot be reached, or broke off."
    if isinstance(fault, openai.NotFoundError):
        return f"The model's server does not know this model ({in_words(fault)})."
    if isinstance(fault, IncompleteError):
        return "The answer broke off." if "cut off" in str(fault) else f"No answer came: {fault}."
    return f"The model's server could not answer ({in_words(fault)})."
