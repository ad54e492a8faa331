"""The combined report taken apart: its titled sections, each scored as its question, and rules that hold across them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sonovqa import answers, coherence
from sonovqa.metrics import Score, mean
from sonovqa.questions import QUESTIONS, REPORT_ID

_TITLES = {re.sub(r"\W+", " ", q.title.lower()).strip(): q.id for q in QUESTIONS.values()} | {i.lower(): i for i in QUESTIONS}
#: "## Imaging Plane", "**3. Imaging Plane:** axial", "Q3: axial": a title alone on its line, or with the text after a colon.
_HEADING = re.compile(
    r"^\s*(?:#+\s*|[*_]{1,3}|\d+[.)]\s*)*(?P<title>[A-Za-z][A-Za-z0-9 /&-]*?)\s*[*_]{0,3}\s*(?::\s*[*_]{0,3}\s*(?P<rest>.*))?$"
)


def sections_of(text: str) -> dict[str, str]:
    """The sections of a combined report by question id; text before the first title, and empty sections, are left out.

    Titles are those of `questions.report_text`, in any heading style (``## Title``, ``**Title:**``, ``3. Title``, ``Q3:``).
    A section that comes twice keeps its first text; what follows its second title is in no section.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        heading = _HEADING.match(line)
        name = _TITLES.get(re.sub(r"\W+", " ", heading["title"].lower()).strip()) if heading else None
        if name:
            current = [heading["rest"] or ""]
            found.setdefault(name, current)
        else:
            current.append(line)
    joined = {name: "\n".join(lines).strip() for name, lines in found.items()}
    return {name: body for name, body in joined.items() if body}


def expand(rows: Iterable[Mapping]) -> list[dict]:
    """Rows of reports as rows of their sections (those the reference has); all other rows as they are.

    A section that the answer lacks is an empty answer, hence wrong; a failed report is a failure of all its sections.
    """
    out = []
    for row in rows:
        if row["question_id"] != REPORT_ID:
            out.append(dict(row))
            continue
        said = sections_of(row.get("prediction") or "")
        for question_id, reference in sections_of(row["reference"]).items():
            section = {"question_id": question_id, "question": "", "reference": reference, "section": True}
            out.append({**row, **section, "prediction": None if row.get("error") is not None else said.get(question_id, "")})
    return out


def violations(text: str) -> list[str]:
    """What a report says in one section that does not go with another (`coherence.rules`)."""
    broken = coherence.rules({q: answers.read(q, body) for q, body in sections_of(text).items()})
    return [wrong for wrong in broken.values() if wrong]


def measure(rows: Sequence[Mapping], texts: Sequence[str]) -> dict[str, Score]:
    """``completeness``: share of the reference's sections that are there; ``coherent``: share of reports without violation."""
    complete = []
    for row, text in zip(rows, texts, strict=True):
        wanted = sections_of(row["reference"])
        complete.append(len(wanted.keys() & sections_of(text).keys()) / len(wanted) if wanted else float("nan"))
    return {"completeness": mean(complete), "coherent": mean([not violations(text) for text in texts])}


def listed(rows: Sequence[Mapping]) -> list[dict]:
    """Every violation of every report: image, and what does not go together."""
    return [{"image_id": r["image_id"], "violation": v} for r in rows for v in violations(r["prediction"])]
