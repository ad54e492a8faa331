"""Clinical pages for extraction: synthetic forms drawn from templates, and transcriptions (MTSamples) rendered to pages.

A model that saw rendered transcriptions alone read structured forms worse than before (an earlier project: 83.5 to 73.7 %),
so forms are drawn unless told otherwise, and what stands on them is known without a person or a model to label it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from sonovqa import cli, extraction, extraction_quantities
from sonovqa.cli import UserError
from sonovqa.documents_forms import TEMPLATES, Draw, Form, json_number
from sonovqa.documents_pages import MARGIN, SIZES, Prose, Sheet, Style, draw, draw_style, wrapped
from sonovqa.files import replacing, sha256
from sonovqa.sheets import Drops
from sonovqa.sources import Loaded, Record, claim_folder, need_records, question
from sonovqa.splits import subset_order

COLUMNS = ("description", "medical_specialty", "sample_name", "transcription", "keywords")
FOOTER = "Synthetic page for research. No real patient."
#: A release writes section breaks as commas: `EXAM: , CT chest.,FINDINGS: , Clear.`
_SECTION = re.compile(r"[\s,]*,\s*(?=[A-Z][A-Z0-9 /&()'-]{2,40}:|\d{1,2}\.\s+[A-Z])")
TRANSCRIBE = "Transcribe this page."
#: Prose does not say what a number is a value of in a form that could be read without a person, so names are not asked for.
VALUES_IN_PROSE = (
    "List every number with a unit on this page, but no ages, no durations, no gauges or French sizes and no counts of tablets, "
    "capsules, drops or puffs. "
    'Answer with JSON only: {"values": [{"value": 0, "unit": ""}]}'
)


def documents(root: Path | None, out: Path, forms: int, transcriptions: int, seed: int) -> Loaded:
    """Draw pages and load them: one record a page; the pages of one transcription, and a form, are a group each.

    Args:
        root: folder with MTSamples as a CSV file of `COLUMNS`; ``None`` for forms only.
        out: where pages are written; what an interrupted run has drawn is kept.
        forms: synthetic forms to draw, the eight templates in turn.
        transcriptions: transcriptions to render, drawn across the specialties; the rest is listed as not drawn.
        seed: of forms, their looks and the draw; form ``n`` is the same whatever their number.

    Raises:
        UserError: no page is asked for, ``out`` is somebody else's folder, or the CSV file cannot be read or lacks columns.
    """
    if min(forms, transcriptions) < 0 or not (forms or (root is not None and transcriptions)):
        raise UserError(
            f"no page to draw; --forms {forms} --transcriptions {transcriptions}; 0 or more, and transcriptions with --root; "
            "raise --forms, or give --root"
        )
    drops: Drops = {}
    samples = _chosen(read_transcriptions(root, drops), transcriptions, seed, drops) if root is not None else []
    claim_folder(out, "documents.json", {"kind": "documents"})
    records = [_form(out, number, seed) for number in _told(range(forms), "drawing forms")]
    for sample in _told(samples, "rendering transcriptions"):
        records += _rendered(out, sample, seed, drops)
    about = {"kind": "documents", "root": str(root) if root else None, "forms": forms, "transcriptions": len(samples)}
    about["synthetic"] = "forms are synthetic: entries drawn at random, no person named, no record used"
    loaded = Loaded(records, drops, about, [about["synthetic"]])
    if samples:
        loaded.notes.append(
            "transcriptions are the CSV file's own text, not synthetic; their findings are its keywords on the page"
        )
    if not forms:
        loaded.notes.append("transcriptions only: a model trained on these alone read forms worse than its base; raise --forms")
    need_records(loaded, str(root))
    return loaded


def _told(items: Sequence, what: str):
    return track(items, what, console=cli.stderr, transient=True, disable=not cli.stderr.is_terminal)


def _form(out: Path, number: int, seed: int) -> Record:
    kind = list(TEMPLATES)[number % len(TEMPLATES)]
    rng = np.random.default_rng([seed, number])
    form, style = TEMPLATES[kind](Draw(rng)), draw_style(rng)
    sizes = range(int(rng.integers(18, SIZES[0] + 1)), SIZES[-1] - 1, -1)
    path = _page(out / kind, f"{number:06}", form, style, sizes=sizes)
    asked = [
        question(name, compact(name, getattr(form, name)), extraction.QUESTIONS[name], extraction.ANSWER_TYPE)
        for name in extraction.QUESTIONS
        if getattr(form, name)
    ]
    return Record(f"{kind}/{path.name}", path, kind, f"{kind} {number:06}", asked)


def compact(name: str, entries: Sequence) -> str:
    """The stored answer: one line of JSON with ``entries`` under ``name``."""
    return json.dumps({name: entries}, ensure_ascii=False)


def _page(folder: Path, name: str, form: Form, style: Style, footer: str = FOOTER, sizes: Sequence[int] = SIZES) -> Path:
    """Draw a page unless it is there: its name holds a hash of what stands on it and how it looks."""
    path = folder / f"{name}-{sha256(repr(form), repr(style), footer, repr(sizes))[:10]}.jpg"
    if not path.exists():
        with replacing(path) as part:
            draw(form.title, form.blocks, footer, style, sizes).save(part, "JPEG", quality=style.quality)
    return path


def read_transcriptions(root: Path, drops: Drops) -> list[dict]:
    """Rows of the CSV file as ``{row, specialty, name, text, keywords}``; those without text, and repeated ones, are dropped.

    MTSamples lists a transcription under each of its specialties: the first stands for all.

    Raises:
        UserError: there is no such file, or not one only, or it lacks columns, or is no UTF-8 text.
    """
    tables = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if len(tables) != 1 or not tables[0].is_file():
        raise UserError(f"no single CSV file there; {root}; one with columns {', '.join(COLUMNS)}; mend --root")
    try:
        with open(tables[0], encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            rows = [] if lacking else list(reader)
    except (UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"the CSV file cannot be read; {tables[0]}: {fault}; UTF-8 text; mend --root") from None
    if lacking:
        raise UserError(f"columns are missing; {tables[0]} lacks {', '.join(lacking)}; the public mtsamples.csv; mend --root")
    kept: dict[str, dict] = {}
    for number, row in enumerate(rows, 2):
        text, name = sections(row["transcription"] or ""), " ".join((row["sample_name"] or "").split())
        specialty = " ".join((row["medical_specialty"] or "").split())
        if not text or text in kept:
            reason = "the same transcription under another specialty" if text else "a row without a transcription"
            drops.setdefault(reason, []).append(f"{tables[0].name} row {number}: {name}")
            continue
        terms = [" ".join(term.split()) for term in (row["keywords"] or "").split(",")]
        kept[text] = {"row": number, "specialty": specialty or "unknown", "name": name, "text": text}
        kept[text]["keywords"] = list(dict.fromkeys(term for term in terms if term))
    if not kept:
        need_records(Loaded([], drops, {}), str(tables[0]))
    return list(kept.values())


def sections(text: str) -> str:
    """A transcription with a line for each section, which the release separates by commas only."""
    lines = (line.strip(" ,\n\t") for line in _SECTION.split(re.sub(r"[ \t]+", " ", text)))
    return "\n".join(re.sub(r":\s*,[\s,]*", ": ", line) for line in lines if line)


def _chosen(samples: list[dict], count: int, seed: int, drops: Drops) -> list[dict]:
    order = subset_order([str(s["row"]) for s in samples], [(s["specialty"], "") for s in samples], seed)
    for index in sorted(order[count:]):
        reason = f"not rendered: --transcriptions {count}, drawn across the specialties"
        drops.setdefault(reason, []).append(f"row {samples[index]['row']}: {samples[index]['name']}")
    return [samples[index] for index in sorted(order[:count])]


def _rendered(out: Path, sample: dict, seed: int, drops: Drops) -> Iterator[Record]:
    """Records of a transcription's pages: what each asks is what is printed on it."""
    rng = np.random.default_rng([seed, 1, sample["row"]])  # one look a transcription
    style, size = draw_style(rng), int(rng.integers(18, 22))
    for number, printed in enumerate(pages(sample["text"], style, size), 1):
        form, text = Form(sample["name"][:48] or "Transcription", [Prose(printed)]), " ".join(printed.split())
        form.findings = [
            term for term in sample["keywords"] if re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text, re.IGNORECASE)
        ]
        form.values = [{"value": json_number(number), "unit": unit} for number, unit in extraction_quantities.quantities(text)]
        if not form.findings:
            drops.setdefault("findings not asked: no keyword of the transcription is on the page", []).append(
                f"row {sample['row']} page {number}: {sample['name']}"
            )
        kind = "transcription"
        path = _page(out / kind, f"{sample['row']:06}_{number}", form, style, f"page {number}", (size,))
        asked = [question(kind, text, TRANSCRIBE, "open")]
        asked += [
            question(name, compact(name, getattr(form, name)), asks, extraction.ANSWER_TYPE)
            for name, asks in (("findings", extraction.QUESTIONS["findings"]), ("values", VALUES_IN_PROSE))
            if getattr(form, name)
        ]
        yield Record(f"{kind}/{path.name}", path, kind, f"{kind} {sample['row']:06}", asked)


def pages(text: str, style: Style, size: int) -> list[str]:
    """The text cut into pages of whole lines, as they wrap in the style's face at ``size`` pixels."""
    lines = wrapped(text, style.face, size)
    each = (Sheet.bottom - 2 * MARGIN) // Sheet(style, size).line
    return ["\n".join(lines[start : start + each]) for start in range(0, len(lines), each)]
