"""The page's web application: a few routes between a browser, an endpoint and the sheet of marks. No model is loaded here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sonovqa import chat, cli, page_guard, page_marks
from sonovqa.conversation import LONGEST_HISTORY
from sonovqa.page_answers import Event, PageEndpoint
from sonovqa.page_guard import Gate, Guard, Refusal, Sessions, read_body
from sonovqa.page_marks import MarksSheet
from sonovqa.page_uploads import Shelf, Upload
from sonovqa.questions import CATEGORIES, QUESTIONS, REPORT_ID

FILES = Path(__file__).with_name("page_files")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # names a browser may reach the page by: no other site's name points here

LARGEST_JSON = 512 << 10  # bytes; a conversation, or eight answers with corrections
LARGEST_KEY, KEY_SECONDS = 4096, 5.0  # bytes of the request that brings a key, and until it must be whole
LONGEST_TURN, LATEST_TURNS, LONGEST_CONTEXT = 8000, 2 * LONGEST_HISTORY, 200  # characters, texts before a question, characters
WRONG_KEY_PAUSE = 1.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How the page behaves.

    Attributes:
        unsure_below: an answer less confident than this is called unsure.
        largest_file: bytes of an upload.
        at_once: requests answered at a time, and as many uploads; more are told to come again.
        room: bytes of images held in memory.
        key: what users must give; ``None`` on loopback.
        secure: whether the page is reached by https only.
        host: name or address that the page listens on; without a key it is reached by that and by loopback's names alone.
    """

    unsure_below: float = 0.5
    largest_file: int = 20_000_000
    at_once: int = 32
    room: int = 256 << 20
    key: str | None = None
    secure: bool = False
    host: str = "127.0.0.1"


class EventStream(StreamingResponse):
    """Events as lines of JSON while they happen, holding a place of ``gate`` until the last is sent or the reader is gone.

    Raises:
        Refusal: when called, if the gate has no place.
    """

    def __init__(self, events: AsyncGenerator[Event], gate: Gate):
        lines = (json.dumps(event, ensure_ascii=False) + "\n" async for event in events)
        super().__init__(lines, media_type="application/x-ndjson")
        self.events, self.gate = events, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.gate():
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.events), contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


class Page:
    """The application's state and its handlers; each takes a request and raises `Refusal` for what it does not serve."""

    def __init__(self, endpoint: PageEndpoint, sheet: MarksSheet, settings: Settings):
        self.endpoint, self.sheet, self.settings = endpoint, sheet, settings
        self.shelf, self.sessions = Shelf(settings.room), Sessions(settings.key)
        # Three gates: who has no key yet takes no place from those who have one.
        self.answering, self.uploading, self.knocking = (Gate(settings.at_once) for _ in range(3))
        self.files = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in KINDS}

    def application(self):
        """The ASGI application."""
        private = self._private
        routes = [
            Route("/", self.front),
            Route("/files/{name}", self.file),
            Route("/api/key", self.key, methods=["POST"]),
            Route("/api/status", private(self.status)),
            Route("/api/images", private(self.upload), methods=["POST"]),
            Route("/api/images/{name}", private(self.image)),
            Route("/api/answers", private(self.answers), methods=["POST"]),
            Route("/api/marks", private(self.marks), methods=["POST"]),
        ]
        names = (*LOOPBACK, self.settings.host)
        hosts = [] if self.settings.key else [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]
        handlers = {Refusal: lambda request, refusal: refusal.response(), HTTPException: refused}
        return Guard(Starlette(routes=routes, middleware=hosts, exception_handlers=handlers, lifespan=self._lifespan))

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        async with self.endpoint:
            following = asyncio.create_task(self.sheet.follow())
            try:
                yield
            finally:
                following.cancel()
                await asyncio.to_thread(self.sheet.write)

    def _private(self, handler: Callable) -> Callable:
        """The handler, for those who are signed in."""

        @functools.wraps(handler)
        async def checked(request: Request) -> Response:
            if not self.sessions.signed_in(request.cookies.get(page_guard.COOKIE)):
                raise Refusal(401, "This page asks for a key. Load it anew and give the key.")
            return await handler(request)

        return checked

    async def front(self, request: Request) -> Response:
        signed_in = self.sessions.signed_in(request.cookies.get(page_guard.COOKIE))
        return Response(self.files["index.html" if signed_in else "key.html"], media_type=KINDS[".html"])

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]  # looked up among the names known since the start; never a path
        if name not in self.files or name.endswith(".html"):
            raise Refusal(404, "There is no such file.")
        return Response(self.files[name], media_type=KINDS[Path(name).suffix])

    async def key(self, request: Request) -> Response:
        with self.knocking():
            told = await self._json(request, LARGEST_KEY, KEY_SECONDS)
            cookie = self.sessions.cookie_for(told["key"] if isinstance(told.get("key"), str) else "")
            if cookie is None:
                await asyncio.sleep(WRONG_KEY_PAUSE)
                raise Refusal(403, "This is not the page's key. Ask whoever runs the page for it.")
        response = JSONResponse({"signed_in": True})
        response.set_cookie(
            page_guard.COOKIE, cookie, page_guard.SESSION_SECONDS, httponly=True, samesite="strict", secure=self.settings.secure
        )
        return response

    async def status(self, request: Request) -> Response:
        problem = await self.endpoint.problem()
        told = {
            "problem": problem, "model": self.endpoint.model, "notice": cli.RESEARCH_NOTICE, "categories": CATEGORIES,
            "unsure_below": self.settings.unsure_below, "largest_file": self.settings.largest_file,
            "latest_turns": LATEST_TURNS, "longest_turn": LONGEST_TURN,
            "questions": [[q.id, q.title, chat.prompt_for(q.id, "", self.endpoint.variant)] for q in QUESTIONS.values()],
        }  # fmt: skip
        return JSONResponse(told)

    async def upload(self, request: Request) -> Response:
        with self.uploading():
            data = await read_body(request, self.settings.largest_file, "application/octet-stream")
            name, image = await self.shelf.add(data)
        return JSONResponse({"image": name, "width": image.width, "height": image.height})

    async def image(self, request: Request) -> Response:
        image = self.shelf.get(request.path_params["name"])
        return Response(image.seen, media_type=image.mime)

    async def answers(self, request: Request) -> Response:
        told = await self._json(request)
        image = self._image(told)
        context = text_of(told, "context", LONGEST_CONTEXT) or None
        question_id, turns = told.get("question"), told.get("turns")
        if turns is not None:
            events = self.endpoint.free(image, checked_turns(turns), context)
        elif question_id is None:
            events = self.endpoint.eight(image, context)
        elif question_id in (*QUESTIONS, REPORT_ID):
            events = self.endpoint.standard(image, question_id, context)
        else:
            raise Refusal(400, "There is no such question.")
        return EventStream(events, self.answering)

    async def marks(self, request: Request) -> Response:
        told = await self._json(request)
        image, category = self._image(told), text_of(told, "category", LONGEST_CONTEXT)
        patient = text_of(told, "patient", page_marks.LONGEST_PATIENT)
        marks = page_marks.marks_of(told["marks"] if isinstance(told.get("marks"), Mapping) else {})
        images = await asyncio.to_thread(self.sheet.save, image, category, patient, marks, self.endpoint.name)
        behind = (
            self.sheet.trouble and "Your marks are kept, but the sheet cannot be written: whoever runs the page must look at it."
        )
        return JSONResponse({"saved": len(marks), "images": images, "behind": behind})

    def _image(self, told: Mapping) -> Upload:
        return self.shelf.get(text_of(told, "image", LONGEST_CONTEXT))

    async def _json(self, request: Request, most: int = LARGEST_JSON, seconds: float | None = None) -> dict:
        data = await read_body(request, most, "application/json", seconds)
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise Refusal(400, "The page takes a JSON object here.")
        return told


def refused(request: Request, fault: HTTPException) -> Response:
    """What Starlette itself refuses (no such address, another method), in the same form."""
    return Refusal(fault.status_code, "There is nothing at this address.").response()


def text_of(told: Mapping, name: str, most: int) -> str:
    """A text of a request, without white space around it; "" where it is absent. Raises `Refusal` (400) for anything else."""
    text = told.get(name)
    if text is None:
        return ""
    if not isinstance(text, str) or len(text) > most:
        raise Refusal(400, f"{name} is a text of at most {most} characters.")
    return " ".join(text.split())


def checked_turns(turns) -> list[str]:
    """A conversation: question, answer, …, question. Raises `Refusal` (400) if it is none, or too long."""
    if not isinstance(turns, list) or len(turns) % 2 == 0 or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise Refusal(400, "A conversation is question, answer, …, question, each a text.")
    if len(turns) > LATEST_TURNS + 1:
        raise Refusal(400, f"At most {LATEST_TURNS} texts go along with a question; send the latest.")
    if len(turns[-1]) > LONGEST_TURN:
        raise Refusal(400, f"A question has at most {LONGEST_TURN} characters. Ask a shorter one.")
    if max(map(len, turns)) > LONGEST_TURN:
        raise Refusal(400, f"Of what was said before at most {LONGEST_TURN} characters a text go along. Choose the image again.")
    return turns
