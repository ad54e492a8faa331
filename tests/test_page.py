"""The page end to end: a real browser, the page, a real vLLM with the tiny model; by keyboard, on a phone, on paper."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from keys_and_ports import KEYS, free_port
from page_serving import SMALL, Running, opened, system_chromium  # noqa: F401 - a fixture
from PIL import Image

from sonovqa import chat, confidence, page_app, phantom_drawing, phantoms, sources, tiny
from sonovqa.cli import RESEARCH_NOTICE
from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest, LabelRequest
from sonovqa.questions import QUESTIONS

KEY = "a-key-of-the-page-test"
START_SECONDS = 400

#: Inputs and buttons without a name that a screen reader could say.
NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button")].filter((node) => {
  const label = node.labels?.length ? [...node.labels].map((each) => each.textContent).join("") : "";
  return !(node.getAttribute("aria-label") || label || node.textContent).trim();
}).map((node) => node.outerHTML)"""


def phantom(seed: int) -> bytes:
    """A synthetic scan of a kind that the tiny model was taught."""
    rng = np.random.default_rng(seed)
    spec = phantoms.sample_spec(rng, "Abdomen")
    stream = io.BytesIO()
    Image.fromarray(phantom_drawing.draw(spec, (400, 300))).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The URL of a real vLLM that serves the shipped tiny model, with a key."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("vllm") / "tiny" / "merged"
    shutil.copytree(tiny.SHIPPED, folder)
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k not in KEYS and not k.lower().endswith("_proxy")}
    env |= {"PYTHON": sys.executable, "VLLM_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    words = ["bash", str(ROOT / "serve.sh"), str(folder.parent), "--port", str(port), "--wait", str(START_SECONDS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as server:
        told = []
        try:
            for line in server.stdout:
                told.append(line)
                if "is served at" in line:
                    break
            assert told and "is served at" in told[-1], "".join(told)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.communicate(timeout=60)
            server.kill()


@pytest.fixture
def running(vllm, tmp_path, monkeypatch):
    """The page in front of that server."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with Running(vllm, tmp_path / "marks") as page:
        yield page


def in_a_thread(work, *args):
    """Playwright's event loop owns this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result()


def said_directly(url: str, image: bytes) -> tuple[dict[str, str], float]:
    """The eight answers without the page, and the probability of "normal" among Q7's labels as evaluate.py has it."""
    endpoint = Endpoint(url)
    endpoint.check()
    prompts = tuple((question_id, chat.prompt_for(question_id, "")) for question_id in QUESTIONS)
    answers = {reply.question_id: reply.text for reply in endpoint.answer([ImageRequest("0", image, None, prompts)], 128)}
    wordings = confidence.Labels(()).of_id("Q7")
    request = LabelRequest("0", image, None, (("Q7", chat.prompt_for("Q7", ""), confidence.texts_of(wordings)),))
    (reply,) = endpoint.likelihoods([request])
    return answers, confidence.probabilities(reply.log_likelihoods, wordings)[0]


def tab_to(tab, selector: str) -> None:
    """Press Tab until the element has the focus, as someone without a mouse does."""
    for _ in range(80):
        tab.keyboard.press("Tab")
        if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
            outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or selector == "#file", f"{selector} does not show that it has the focus"
            return
    raise AssertionError(f"{selector} cannot be reached with Tab")


def choose(tab, path: Path) -> None:
    """Give the page a file by keyboard.

    Space is pressed again when nothing opens, as a user would: Chromium opens a file dialogue only within five seconds of
    the key, and a machine that serves a model on the same two cores can stall for longer (one CI run of many did).
    """
    dialogues = []
    # Asked for before the walk to the field, so that the browser has been told by the time of the key.
    tab.on("filechooser", lambda dialogue: dialogues.append(dialogue))
    tab_to(tab, "#file")
    for _ in range(3):
        tab.keyboard.press("Space")
        for _ in range(100):
            if dialogues:
                return dialogues[0].set_files(path)
            tab.wait_for_timeout(100)
    raise AssertionError("Space on the file field opens no dialogue")


def give(tab, image: bytes) -> None:
    tab.wait_for_selector("#Q8")
    tab.set_input_files("#file", {"name": "scan.png", "mimeType": "image/png", "buffer": image})
    tab.wait_for_selector("#answers[aria-busy=false]")


def test_by_keyboard_alone_from_the_image_to_the_sheet(chromium, running, vllm, tmp_path):
    """Choose, read, mark, correct, save, ask on; the answers and their confidence are what the model says without the page."""
    image = phantom(1)
    (tmp_path / "scan.png").write_bytes(image)
    with opened(chromium, running.url) as tab:
        tab.wait_for_selector("#model[data-state=well]")
        tab.wait_for_selector("#Q8")
        assert tab.locator(".notice").inner_text() == RESEARCH_NOTICE and "tiny" in tab.locator("#model").inner_text()
        assert tab.evaluate(NAMELESS) == [] and not tab.locator("#save").is_enabled()
        choose(tab, tmp_path / "scan.png")
        tab.wait_for_selector("#answers[aria-busy=false]")
        shown = {q: tab.locator(f"#{q} .text").inner_text() for q in QUESTIONS}
        answers, labels = in_a_thread(said_directly, vllm, image)
        assert shown == answers and "Imaging Plane: " + answers["Q3"] in tab.locator("#live").inner_text()
        told = tab.locator("#Q7 .percent").inner_text()
        expected = 100 * labels[confidence.label_of({"question_id": "Q7"}, answers["Q7"])]
        assert float(re.search(r"\d+", told)[0]) == pytest.approx(expected, abs=1.01)
        for question_id in QUESTIONS:
            percent = float(re.search(r"\d+", tab.locator(f"#{question_id} .percent").inner_text())[0])
            assert tab.locator(f"#{question_id} .unsure").is_visible() == (percent < 50) or percent == 50
        tab_to(tab, "#Q1 .right")
        tab.keyboard.press("Space")
        tab_to(tab, "#Q3 .wrong")
        tab.keyboard.press("Enter")
        tab.keyboard.type("axial thorax")  # the field for it has the focus
        tab_to(tab, "#save")
        tab.keyboard.press("Enter")
        tab.locator("#marked").get_by_text("Saved: 2 marks").wait_for()
        tab_to(tab, "#question")
        tab.keyboard.type("Which plane is this?")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#send:enabled")
        assert tab.locator(".said").inner_text().strip() and tab.locator(".asked").inner_text() == "Which plane is this?"
    loaded = sources.sheet([tmp_path / "marks" / "marks.xlsx"], tmp_path / "marks" / "images")
    (record,) = loaded.records
    assert {q["question_id"]: q["answer"] for q in record.questions} == {"Q1": answers["Q1"], "Q3": "axial thorax"}
    assert record.path.read_bytes() == image


def test_on_a_phone_nothing_is_cut_off_and_everything_can_be_hit(chromium, running):
    with opened(chromium, running.url, 390, 844) as tab:
        give(tab, phantom(2))
        tab.locator("#Q2 .wrong").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate(SMALL) == []
        assert tab.locator("#Q2 .correction input").is_visible() and tab.locator("#picture").bounding_box()["width"] <= 390


def test_the_report_on_paper_has_image_date_model_notice_answers_and_marks(chromium, running):
    with opened(chromium, running.url) as tab:
        give(tab, phantom(3))
        tab.click("#Q5 .wrong")
        tab.fill("#Q5 input", "13-15 weeks")
        tab.click("#whole")
        tab.wait_for_selector("#whole:enabled")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        tab.emulate_media(media="print")
        paper = tab.locator("#report").inner_text()
        assert tab.locator(".screen").is_hidden() and tab.locator("#report img").evaluate("node => node.naturalWidth") == 400
        assert paper.count(RESEARCH_NOTICE) == 2 and "tiny" in paper and time.strftime("%Y", time.gmtime()) in paper
        assert "found wrong; instead: 13-15 weeks" in paper and "The model's report in one answer" in paper
        for question_id, question in QUESTIONS.items():
            assert question.title in paper and tab.locator(f"#{question_id} .text").text_content() in paper
        assert tab.pdf(format="A4").startswith(b"%PDF")


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours. Source: WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_every_text_stands_out_from_its_ground():
    colour = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6});", (page_app.FILES / "page.css").read_text()))
    pairs = (
        "ink/paper soft/paper soft/ground accent/paper accent/accent-pale paper/accent amber/amber-pale red/red-pale red/paper"
    )
    for pair in [*pairs.split(), "red/paper", "green/green-pale", "ink/accent-pale"]:
        assert contrast(*(colour[name] for name in pair.split("/"))) >= 4.5, pair


def test_no_rule_has_a_text_too_pale_for_the_ground_it_names_or_for_paper():
    """Literal colours too. A rule that names no colour for its ground is taken to stand on paper."""
    css = (page_app.FILES / "page.css").read_text()
    colour = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6});", css))
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", re.sub(r"var\(--([a-z-]+)\)", lambda name: colour[name[1]], css))
    checked = 0
    for selector, body in rules:
        text = re.search(r"(?:^|[\s;])color: (#[0-9a-f]{3,6})", body)
        ground = re.search(r"background(?:-color)?: (#[0-9a-f]{3,6})", body)
        if text:
            checked += 1
            assert contrast(text[1], ground[1] if ground else colour["paper"]) >= 4.5, selector.strip()
    assert checked > 20
