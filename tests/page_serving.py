"""The page as tests run it: its command line, a stand-in endpoint that tells log-probabilities, a browser."""

from __future__ import annotations

import contextlib
import io
import math
import os
import resource
import shutil
import threading
import time
import zlib
from pathlib import Path

import pytest
import stand_in
from conftest import noise_image
from keys_and_ports import free_port

from sonovqa import page
from sonovqa.chat import prompt_for
from sonovqa.questions import QUESTIONS

PROMPTS = {prompt_for(question_id, ""): question_id for question_id in QUESTIONS}
ANSWERS = dict(zip(QUESTIONS, (
    "thalami, falx", "cephalic, axial", "trans-thalamic", "HC, BPD", "20-25 weeks", "good", "normal", "routine monitoring",
)))  # fmt: skip
UNSURE = 0.3  # the probability of Q8's answer; all others have `SURE`
SURE = 0.9
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
#: Buttons that a finger would miss. Source: 44 pixels, WCAG 2.2, success criterion 2.5.5.
SMALL = """() => [...document.querySelectorAll("button, .button, summary, input:not(.unseen), select, textarea")]
  .filter((node) => node.offsetHeight && node.offsetHeight < 44).map((node) => node.outerHTML)"""


def png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    noise_image(width, height, seed).save(stream, "PNG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in less than a megabyte: 1.2 GB once decoded."""
    side = 20_000

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def told(text: str, probability: float, pieces: int | None = None, pause: float = 0.0):
    """A handler that streams an answer whose words and end of turn together have that probability; cut after ``pieces``."""

    def answer(handler) -> None:
        words = text.split(" ")
        words = [word + " " * (i < len(words) - 1) for i, word in enumerate(words)]
        share = math.log(probability) / (len(words) + 1)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the page no longer listens
            for word in words[:pieces]:
                said(handler, word, share, None)
                time.sleep(pause)
            if pieces is None:
                said(handler, "", share, "stop")
                handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True

    return answer


def said(handler, text: str, logprob: float, finish: str | None) -> None:
    content = [{"token": text or "<end>", "logprob": logprob, "bytes": None, "top_logprobs": []}]
    stand_in.event(handler, {"delta": {"content": text}, "finish_reason": finish, "logprobs": {"content": content}})


def weighed(text: str, probability: float):
    """A handler for a request that weighs ``text``: vLLM's prompt log-probabilities, end of turn included."""
    entries = [None, {"5": {"logprob": math.log(probability), "decoded_token": text}}]
    entries.append({"6": {"logprob": 0.0, "decoded_token": "<end>"}})
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "run", "prompt_logprobs": entries}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
    return lambda handler: stand_in.send(handler, 200, head | {"choices": [choice]})


def script(prompt: str, attempt: int):
    """Q1 … Q8 by `ANSWERS`; a wording that is weighed has `SURE` if it is an answer, else next to nothing; else an echo."""
    question_id = PROMPTS.get(prompt.rpartition("\n")[2])  # below a line of context
    if question_id:
        return told(ANSWERS[question_id], UNSURE if question_id == "Q8" else SURE)
    wordings = {"20-25 weeks", "good", "normal", "trans-thalamic"}
    return told(f"you asked: {prompt}", SURE) if " ? " in prompt else weighed(prompt, SURE if prompt in wordings else 0.001)


def arguments(url: str, marks: Path, *more: str):
    """The page's parsed command line."""
    return page.parse(["--endpoint", url, "--port", str(free_port()), "--marks", str(marks), *more])


class Running:
    """A page behind a real server, in a thread."""

    def __init__(self, url: str, marks: Path, *more: str):
        import uvicorn

        args = arguments(url, marks, *more)
        self.page = page.make(args)
        self.page.endpoint.backoff = 0.05
        self.port, self.url = args.port, f"http://127.0.0.1:{args.port}/"
        self.server = uvicorn.Server(page.server_config(args, self.page))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *fault) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def full_disk(room: int = 0):
    """No file can grow beyond ``room`` bytes meanwhile: the kernel fails a write half-way, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal that comes with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module", name="chromium")
def system_chromium():
    """The system's browser. Of one module only: while Playwright is open, nothing else in this thread can run an event loop."""
    if BROWSER is None:
        pytest.skip("there is no chromium and no google-chrome")
    from playwright.sync_api import sync_playwright

    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS), env=env)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, url: str, width: int = 1280, height: int = 900):
    """A new user's browser page at ``url``. Fails if the page wrote an error of its own to the console."""
    context = chromium.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", locale="en-GB")
    tab = context.new_page()
    tab.set_default_timeout(120_000)  # against hanging only: a busy machine takes long for anything
    faults = []
    tab.on("pageerror", lambda fault: faults.append(str(fault)))
    tab.goto(url)
    try:
        yield tab
        assert not faults
    finally:
        context.close()


@contextlib.contextmanager
def used(chromium, marks: Path, told=script, *more: str, **server):
    """A browser page, the running page behind it and the stand-in behind that."""
    with (
        stand_in.StandIn(told, **server) as behind,
        Running(behind.url, marks, *more) as running,
        opened(chromium, running.url) as tab,
    ):
        yield tab, running, behind


def give(tab, data: bytes | None = None, name: str = "scan.png") -> None:
    tab.wait_for_selector("#Q8")
    tab.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": png() if data is None else data})


def answered(tab) -> dict[str, str]:
    """The answers, once all are there."""
    tab.wait_for_selector("#answers[aria-busy=false]")
    return {q: tab.locator(f"#{q} .text").inner_text() for q in ANSWERS}


def dialogues(tab, accept: bool) -> list[str]:
    """What the page asks from now on; all of it is answered so."""
    asked = []
    tab.on("dialog", lambda one: (asked.append(one.message), one.accept() if accept else one.dismiss()))
    tab.evaluate("0")  # Playwright is told of the listener without waiting, and until it knows dismisses dialogues itself
    return asked


@contextlib.contextmanager
def with_answers(tmp_path, chromium, answer=script):
    """A tab in which the eight answers of scan.png stand, and its page."""
    with used(chromium, tmp_path, answer, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        yield tab, running
