"""The engine behind an OpenAI-compatible API: greedy, image first, many requests in flight, failures retried and then named."""

from __future__ import annotations

import asyncio
import functools
import io
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from sonovqa import chat, credentials, endpoint_cost, endpoint_likelihoods, serving_gate
from sonovqa.cli import UserError
from sonovqa.endpoint_dialect import Dialect
from sonovqa.endpoint_faults import IncompleteError, check_finished, in_words, may_pass
from sonovqa.endpoint_likelihoods import Weighed
from sonovqa.engines import EngineError, ImageRequest, LabelReply, LabelRequest, Reply

KEY_NAMES = ("VLLM_API_KEY", "OPENAI_API_KEY")
LONGEST_PAUSE = 30.0  # seconds between two tries, whatever the server asks for
LARGEST_URL = serving_gate.LARGEST_BODY - 2**20  # characters of an image's data URL: the words of a conversation need room too
LARGEST_EXACT = 8_000_000  # pixels of a JPEG that is sent as PNG where it cannot be sent as it is
NEARLY_EXACT = {"quality": 95, "subsampling": 0}  # of a JPEG in place of a PNG


@dataclass(frozen=True)
class Asked:
    """One question on its way: where the answer belongs and what is sent."""

    image_id: str
    question_id: str
    messages: list[dict]


class Endpoint:
    """Answers through an OpenAI-compatible API such as the one ``serve.sh`` starts. Call `check` before the first question.

    The key comes from ``key_env`` in the environment, unset from ``VLLM_API_KEY`` or else ``OPENAI_API_KEY``; from nowhere else.

    Args:
        base_url: ``http://host:port`` or ``…/v1``.
        model: name of a served model; `check` fills it in where the endpoint serves one only.
        in_flight: most requests open at a time.
        timeout: seconds a request may take.
        retries: further tries after the first.
        backoff: seconds before the second try; doubled for each try after it, less up to a half at random.
        key_env: name of the environment variable that holds the key.
        extra: further fields of every request's body, such as vLLM's ``ignore_eos`` (blank answers are then answers too).

    Raises:
        UserError: if ``base_url`` is no URL or holds a password, ``key_env`` is not set, or the key cannot be sent.
    """

    def __init__(self, base_url: str, model: str | None = None, in_flight: int = 16, timeout: float = 120.0,
                 retries: int = 5, backoff: float = 0.5, key_env: str | None = None, extra: dict | None = None):  # fmt: skip
        credentials.check_url("--endpoint", base_url)
        self.base_url = base_url.rstrip("/") + ("/v1" if urlsplit(base_url).path in ("", "/") else "")
        self.model, self.in_flight, self.timeout = model, in_flight, timeout
        self.retries, self.backoff = retries, backoff
        self.dialect = Dialect()
        self.key_names, self.extra = (key_env,) if key_env else KEY_NAMES, extra or {}
        if key_env:
            credentials.check_variable("--api-key-env", key_env)
        if not self._key() and key_env:
            raise UserError(f"--api-key-env; {key_env} is not set in the environment; export {key_env}=…")

    @property
    def name(self) -> str:
        return f"{self.model or 'unknown model'} at {self.base_url}"

    def check(self) -> None:
        """Ask the endpoint what it serves, and settle on a model.

        Raises:
            UserError: if it is down, is no OpenAI-compatible API, refuses the key, or does not serve the model.
        """
        import openai

        try:
            with self._client(openai.OpenAI, timeout=min(self.timeout, 15.0)) as client:
                served = [model.id for model in client.models.list().data]
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            told = f"the key in {' or '.join(self.key_names)}" if self._key() else "a request without a key"
            way_out = f"set {self.key_names[0]} to the server's key"
            raise UserError(f"the endpoint refuses {told}; {self.base_url}; {way_out}") from None
        except (openai.APIError, AttributeError, TypeError, ValueError) as fault:
            way_out = "start one with ./serve.sh outputs/<run>, or mend --endpoint"
            if isinstance(fault, openai.APIConnectionError):
                raise UserError(f"no answer from the endpoint; {self.base_url}: {self._in_words(fault)}; {way_out}") from None
            raise UserError(f"not an OpenAI-compatible API; {self.base_url}/models: {self._in_words(fault)}; {way_out}") from None
        if self.model is None and len(served) == 1:
            self.model = served[0]
        if self.model not in served:
            what = "the endpoint serves several models" if self.model is None else f"the endpoint does not serve {self.model!r}"
            raise UserError(f"{what}; {self.base_url}; served: {', '.join(served) or 'nothing'}; name one with --endpoint-model")

    def answer(self, requests: Iterable[ImageRequest], max_new_tokens: int) -> Iterator[Reply]:
        """Yield a `Reply` for every prompt as they come, at most ``in_flight`` open; see `engines.Engine.answer`."""
        return self._each(questions_of(requests), functools.partial(self._ask, max_new_tokens=max_new_tokens))

    def likelihoods(self, requests: Iterable[LabelRequest]) -> Iterator[LabelReply]:
        """Log-likelihoods by vLLM's prompt log-probabilities, see `endpoint_likelihoods`; at most ``in_flight`` open."""
        return self._each(labels_of(requests), self._weigh)

    def _each(self, asked: Iterator, ask: Callable) -> Iterator:
        """What ``await ask(client, one)`` gives for every one asked, as they come."""
        loop = asyncio.new_event_loop()
        replies = self._open(asked, ask)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(replies))
                except StopAsyncIteration:
                    return
        finally:  # also when the caller stops early: what is open is cancelled
            loop.run_until_complete(replies.aclose())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stream(self, messages: list[dict], max_new_tokens: int) -> Iterator[str]:
        """Greedy answer to a conversation (`chat.openai_messages`, further turns allowed), piece by piece.

        A stream that breaks off is asked for again; what was yielded already is not repeated.

        Raises:
            EngineError: if there is no answer after all retries, or the retried answer begins differently.
        """
        import openai

        shown = ""
        for attempt in itertools.count(1):
            text, request = "", self._request(messages, max_new_tokens)
            try:
                for piece in self._stream_once(request):
                    text += piece
                    if text.startswith(shown) and text != shown:
                        new, shown = text[len(shown) :], text
                        yield new
                if text == shown:
                    return
                raise EngineError("the connection broke and the answer then began differently; ask again")
            except (openai.APIError, IncompleteError, ValueError) as fault:
                if self.dialect.learns(fault, request):
                    continue
                if attempt > self.retries or not may_pass(fault):
                    raise EngineError(self._in_words(fault)) from None
                time.sleep(self._pause(attempt, fault))

    def _stream_once(self, request: dict) -> Iterator[str]:
        import openai

        reason, empty = None, True
        with self._client(openai.OpenAI) as client:
            for event in client.chat.completions.create(**request, stream=True):
                for choice in event.choices or ():
                    reason = choice.finish_reason or reason
                    if piece := choice.delta.content:
                        empty = empty and not piece.strip()
                        yield piece
        check_finished(reason, empty)

    async def _open(self, asked: Iterator, ask: Callable) -> AsyncIterator:
        import openai

        open_, done = set(), set()
        async with self._client(openai.AsyncOpenAI) as client:
            try:
                while True:
                    for one in itertools.islice(asked, self.in_flight - len(open_)):
                        open_.add(asyncio.ensure_future(ask(client, one)))
                    if not open_:
                        return
                    done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in open_:
                    task.cancel()
                await asyncio.gather(*open_, *done, return_exceptions=True)  # so that none is left with a fault unheard

    async def _ask(self, client, asked: Asked | Reply, max_new_tokens: int) -> Reply:
        """One question, tried up to ``1 + retries`` times."""
        if isinstance(asked, Reply):
            return asked
        started = time.perf_counter()
        request = self._request(asked.messages, max_new_tokens)
        read = functools.partial(_read, blank_allowed=bool(self.extra.get("ignore_eos")))
        told, error = await self._tried(client, request, read)
        text, reason, tokens = told or ("", None, 0)
        return Reply(asked.image_id, asked.question_id, text, error, reason, tokens, time.perf_counter() - started)

    async def _weigh(self, client, asked: Weighed | LabelReply) -> LabelReply:
        """All wordings of one question, one after another; the first that fails makes the question fail."""
        if isinstance(asked, LabelReply):
            return asked
        told = []
        for text, messages in asked.turns():
            request = self._request(messages, 1) | {"extra_body": endpoint_likelihoods.EXTRA}
            found, error = await self._tried(client, request, functools.partial(endpoint_likelihoods.read, text=text))
            if error is not None:
                return LabelReply(asked.image_id, asked.question_id, (), error)
            told.append(found)
        return LabelReply(asked.image_id, asked.question_id, tuple(told))

    async def _tried(self, client, request: dict, read: Callable) -> tuple:
        """``(read(completion), None)``, or ``(None, error)`` after all tries."""
        import openai

        for attempt in itertools.count(1):
            try:
                # The client's own limit is between two bytes: a server that drips would hold a request for ever.
                return read(await asyncio.wait_for(client.chat.completions.create(**request), self.timeout)), None
            except (openai.APIError, IncompleteError, ValueError, TimeoutError) as fault:  # ValueError: a body that is no JSON
                if self.dialect.learns(fault, request):
                    request = self.dialect.spoken(request)
                    continue
                if attempt > self.retries or not may_pass(fault):
                    return None, self._in_words(fault) + (f" (tried {attempt} times)" if attempt > 1 else "")
                await asyncio.sleep(self._pause(attempt, fault))

    def _request(self, messages: list[dict], max_new_tokens: int) -> dict:
        asked = {"model": self.model or "", "messages": messages, "max_tokens": max_new_tokens, "temperature": 0.0}
        return self.dialect.spoken(asked | ({"extra_body": self.extra} if self.extra else {}))

    def _key(self) -> str | None:
        return credentials.key(*self.key_names)

    def _in_words(self, fault: Exception) -> str:
        return in_words(fault, self._key())

    def _client(self, kind, timeout: float | None = None):
        import openai

        seconds = timeout or self.timeout
        limits = openai.Timeout(seconds, connect=min(seconds, 10.0))
        own = openai.DefaultHttpxClient if kind is openai.OpenAI else openai.DefaultAsyncHttpxClient
        # A proxy named in the environment is not on the way to this machine: it would get images and key in clear text.
        through = own(trust_env=endpoint_cost.is_elsewhere(self.base_url))
        # Retries are counted here. The key is never None: the client would then look for one in places of its own.
        return kind(base_url=self.base_url, api_key=self._key() or "none", max_retries=0, timeout=limits, http_client=through)

    def _pause(self, attempt: int, fault: Exception) -> float:
        """Seconds before the next try: exponential with jitter, or longer where the server's Retry-After says so."""
        pause = self.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        response = getattr(fault, "response", None)
        told = response.headers.get("retry-after", "") if response is not None else ""
        return min(max(pause, float(told) if told.isdigit() else 0.0), LONGEST_PAUSE)


def questions_of(requests: Iterable[ImageRequest]) -> Iterator[Asked | Reply]:
    """The questions of each image in turn; an image that cannot be read gives failed replies instead.

    An image's questions may well be open at the same time: vLLM shares blocks that are still being computed (measured with
    vLLM 0.32: the same prefix-cache hits as with the questions of 16 images dealt in turn).
    """
    for request in requests:
        image, mime, fault = _encoded(request.image)
        for question_id, prompt in request.prompts:
            if fault is not None:
                yield Reply(request.image_id, question_id, "", fault)
            else:
                yield Asked(request.image_id, question_id, chat.openai_messages(image, prompt, request.context, mime))


def labels_of(requests: Iterable[LabelRequest]) -> Iterator[Weighed | LabelReply]:
    """The same for closed questions with the wordings to weigh."""
    for request in requests:
        image, mime, fault = _encoded(request.image)
        for question_id, prompt, wordings in request.prompts:
            if fault is not None:
                yield LabelReply(request.image_id, question_id, (), fault)
            else:
                yield Weighed(request.image_id, question_id, image, mime, request.context, prompt, wordings)


def _encoded(data: bytes) -> tuple[bytes, str, str | None]:
    """`encoded_as_seen`, and as third what is wrong with the file, or ``None``."""
    from PIL import Image

    try:
        return *encoded_as_seen(data), None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:  # SyntaxError: Pillow's for broken PNGs
        return b"", "", f"image not readable: {fault}"


def is_sendable(encoded: bytes) -> bool:
    """Whether an encoded image goes into one request to ``serve.sh``, as base64 beside the words."""
    return -(-len(encoded) // 3) * 4 <= LARGEST_URL


def encoded_as_seen(data: bytes) -> tuple[bytes, str]:
    """An image file for a server: its own bytes where every decoder sees the same pixels, else a PNG of `chat.open_image`.

    Servers paint transparent pixels white where training drops the alpha channel, and some ignore EXIF rotation.

    PNG keeps every pixel, but a telephone's photograph that is to be turned grows tenfold: 12 megapixels to 20 MB, 48 to more
    than ``serve.sh`` takes (`is_sendable`). A JPEG beyond `LARGEST_EXACT`, and any image whose PNG is not sendable, becomes a
    JPEG of `NEARLY_EXACT` instead. No model sees its pixels one by one: brought down to 512 x 512, an image of 12 megapixels
    with a sensor's noise differs from the exact one by at most 1 of 255, on average by 0.14 (measured).

    Returns:
        ``(bytes, MIME type)``. Raises ``OSError`` or ``ValueError`` if the header of the file cannot be read.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        upright = image.getexif().get(0x0112, 1) == 1
        if image.format in ("PNG", "JPEG") and image.mode in ("L", "RGB") and "transparency" not in image.info and upright:
            return data, image.get_format_mimetype()
        is_huge = image.format in ("JPEG", "MPO") and image.width * image.height > LARGEST_EXACT
    shown = chat.open_image(data)
    if not is_huge:
        stream = io.BytesIO()
        shown.save(stream, "PNG", compress_level=1)  # five times as fast as the default, and hardly larger
        if is_sendable(stream.getvalue()):
            return stream.getvalue(), "image/png"
    stream = io.BytesIO()
    shown.save(stream, "JPEG", **NEARLY_EXACT)
    return stream.getvalue(), "image/jpeg"


def _read(completion, blank_allowed: bool = False) -> tuple[str, str, int]:
    """Text, finish reason and token count of a chat completion; raises `IncompleteError` where there is no answer in it."""
    try:
        choice = completion.choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
        tokens = completion.usage.completion_tokens if completion.usage else 0
    except (AttributeError, IndexError, TypeError):
        raise IncompleteError("the endpoint's answer is no chat completion") from None
    check_finished(reason, not text.strip() and not blank_allowed)
    return text.strip(), reason, tokens
