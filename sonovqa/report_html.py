"""report.html: one file that opens offline, with the findings first and a gallery of images, the worst first."""

from __future__ import annotations

import base64
import functools
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sonovqa import asking, chat, measures, plots, report_sections, weak_slices
from sonovqa.cli import RESEARCH_NOTICE
from sonovqa.metrics import FEWEST_GROUPS
from sonovqa.questions import QUESTIONS

TEMPLATE = Path(__file__).with_name("report.html.j2")
THUMBNAIL = 320  # pixels, the longer side: about 10 kB of JPEG each
ORDER = ("failed", "unread", "wrong", "right")


@functools.cache
def _template():
    from jinja2 import Environment, StrictUndefined, select_autoescape

    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(record: Mapping, rows: Sequence[Mapping], raw=None, most: int = 200) -> str:
    """The report as one HTML text.

    Args:
        record: what scores.json holds.
        rows: the predictions.
        raw: the data set's split with images not decoded; ``None`` leaves images out.
        most: images in the gallery, the worst first.
    """
    questions = record["questions"]
    figures = {kind: plots.confusion(about["answers"]["confusion"]) for kind, about in questions.items() if _drawable(about)}
    slices = {
        (kind, by): plots.slices(found, next(iter(found.values()))["score"])
        for kind, about in questions.items()
        for by, found in about["slices"].items()
    }
    sure = {kind: about["confidence"] for kind, about in questions.items() if "confidence" in about}
    offered = {(o["image_id"], o["question_id"]): o for found in sure.values() for o in found["fallback"]["offered"]}
    cards = gallery(rows, raw, most, offered)
    asked = record["arguments"]
    return _template().render(
        name=asked.get("run") or asked.get("model") or asked.get("predictions"),
        record=record, notice=RESEARCH_NOTICE, titles={q.id: q.title for q in QUESTIONS.values()},
        overview=plots.overview(questions), confusion=figures, slices=slices, cards=cards, verdicts=ORDER,
        taken=weak_slices.taken,
        images=len({row["image_id"] for row in rows}), categories=sorted({card["category"] for card in cards}),
        number=number, interval=interval, between=between, sure=sure, coverage=plots.coverage(sure) if sure else "",
        reliability={kind: plots.reliability(found) for kind, found in sure.items()},
    )  # fmt: skip


def _drawable(about: Mapping) -> bool:
    table = about["answers"]["confusion"]
    return bool(table) and len(table["rows"]) > 1


def gallery(rows: Sequence[Mapping], raw, most: int, offered: Mapping) -> list[dict]:
    """One card an image with its questions and verdicts: those with most failed, unread or wrong answers come first.

    Args:
        offered: by image and question id, the likeliest label in place of an unread answer (`calibration.add`).
    """
    by_image: dict[str, list[dict]] = defaultdict(list)
    for row in report_sections.expand(rows):
        by_image[row["image_id"]].append({
            "question": row["question_id"], "prompt": row["question"] or row["prompt"], "reference": row["reference"],
            "prediction": row["prediction"] if row["error"] is None else row["error"], "verdict": verdict(row),
            "kind": measures.kind_of(row), "category": row["category"],
            "offered": offered.get((row["image_id"], row["question_id"])),
        })  # fmt: skip
    worst = sorted(by_image, key=lambda i: (-sum(a["verdict"] != "right" for a in by_image[i]) / len(by_image[i]), i))[:most]
    places = {} if raw is None else {image_id: number for number, image_id in enumerate(raw["image_id"])}
    return [
        {
            "image_id": image_id, "category": by_image[image_id][0]["category"] or "", "answers": by_image[image_id],
            "image": thumbnail(asking.image_bytes(raw, places[image_id])) if image_id in places else None,
        }
        for image_id in worst
    ]  # fmt: skip


def verdict(row: Mapping) -> str:
    """``failed``, ``unread`` (and wrong), ``wrong`` or ``right``."""
    if row["error"] is not None:
        return "failed"
    if measures.right(row, row["prediction"]):
        return "right"
    return "unread" if measures.meaning(row, row["prediction"]) is None else "wrong"


def thumbnail(data: bytes) -> str:
    """A data URL with a small JPEG of an image file."""
    image = chat.open_image(data)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def between(figure: Mapping) -> str:
    """A figure's interval, or that its groups are too few for one."""
    return interval(figure["interval"]) or ("too few groups" if figure["carriers"] < FEWEST_GROUPS else "")


def interval(pair: Sequence[float] | None) -> str:
    """``0.71 to 0.80``, or nothing."""
    return "" if pair is None else f"{pair[0]:.2f} to {pair[1]:.2f}"
