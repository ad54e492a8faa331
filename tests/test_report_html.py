"""report.html: whole, offline, escaped, the worst first; in headless Chromium where there is one."""

from __future__ import annotations

import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from sonovqa import findings, plots, report_html, scoring, weak_slices

VOID = {"meta", "img", "input", "br", "link", "path", "use", "rect", "circle", "line"}
PLANES = ("trans-thalamic", "axial abdomen", "longitudinal femur")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def a_row(number: int, question_id: str, reference: str, prediction: str | None) -> dict:
    return {
        "image_id": f"Femur/{number:02d}.png", "group": f"p{number // 2}", "category": ("Femur", "Abdomen")[number % 2],
        "question_id": question_id, "question": "", "answer_type": "", "prompt": question_id, "context": None,
        "reference": reference, "prediction": prediction, "error": None if prediction is not None else "HTTP 500",
        "finish_reason": "stop", "size": [4, 4],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page():
    rows = []
    for n in range(24):
        plane = PLANES[n % 3]
        rows.append(a_row(n, "Q3", plane, plane if n % 4 else "<script>alert(1)</script>"))
        rows.append(a_row(n, "Q7", "abnormal" if n % 5 == 0 else "normal", None if n == 7 else "normal"))
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400), np.uint8)).save(stream, "PNG")

    class Raw(list):
        def __getitem__(self, key):
            if key == "image_id":
                return [row["image_id"] for row in self]
            return super().__getitem__(key)

    raw = Raw({"image_id": f"Femur/{n:02d}.png", "image": {"bytes": stream.getvalue(), "path": None}} for n in range(24))
    scores = scoring.score(rows, scoring.Baselines({"Q3": PLANES[0], "Q7": "normal"}, "the training split", None), 100)
    found = findings.find(scores, rows)
    record = scores | {"verdict": findings.describe(found, scores), "findings": [f.json() for f in found], "finished": "now"}
    record |= {"arguments": {"run": "outputs/x"}, "weakest": weak_slices.worst(scores["questions"])}
    return report_html.render(record, rows, raw, 10)


class Balanced(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_whole_and_offline(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for tag, attributes in parser.seen:
        for name in ("src", "href", "xlink:href"):
            link = attributes.get(name) or "#"
            assert link.startswith(("data:image/jpeg;base64,", "#")), (tag, link[:60])
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert sum(tag == "svg" for tag, _ in parser.seen) >= 3


def test_findings_come_before_scores(page):
    assert 0 < page.index("Not above its baselines") < page.index("hardly ever found") < page.index("All scores")


def test_the_worst_slice_is_named_with_what_it_is_taken_for(page):
    (weakest,) = re.findall(r'<ul id="weakest">(.*?)</ul>', page, re.DOTALL)
    assert "Q7 by answer, “abnormal”: accuracy 0.00 (n=5)" in weakest and "“abnormal” taken for “normal” 5 times" in weakest


@pytest.mark.parametrize("name", [r"A$\frac{$", "$x$", "$", "a_b^{c}", "\\", "%"])
def test_names_are_never_taken_for_formulas(name):
    figure = {"value": 0.5, "interval": [0.4, 0.6], "n": 9}
    assert "<svg" in plots.slices({name: figure}, "accuracy")
    assert "<svg" in plots.confusion({"rows": [name, "b"], "columns": [name, "b"], "counts": [[1, 0], [0, 1]]})
    about = {"headline": "accuracy", "metrics": {"accuracy": figure}}
    assert "<svg" in plots.overview({name: about}) and "<svg" in plots.coverage({name: {"curve": []}})


def test_answers_are_escaped(page):
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_gallery_begins_with_the_worst(page):
    images = re.findall(r'<article class="card" data-category="\w+" data-image="([^"]+)"', page)
    assert len(images) == 10 and images[:2] == ["Femur/00.png", "Femur/20.png"]  # both questions wrong
    assert "10 of 24 images" in page and page.count("data:image/jpeg") == 10
    assert re.search(r'data-verdict="failed"', page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_opens_in_chromium(page, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    shot = tmp_path / f"{width}.png"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=600, check=True)
    assert "20 answers of 10 images" in dom.stdout  # the script ran and counted
    subprocess.run(
        [CHROMIUM, *flags, f"--window-size={width},900", f"--screenshot={shot}", path.as_uri()], timeout=600, check=True
    )
    assert np.asarray(Image.open(shot).convert("L")).std() > 5
