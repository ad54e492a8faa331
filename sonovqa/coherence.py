"""Do the answers about one image go together? Rules that tie Q1 … Q8 to each other; their data is ``answers.toml``.

They hold for eight separate answers and for the sections of one report alike. A model that says the same of every image
may well be coherent: the figure stands beside the references' own and never instead of accuracy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sonovqa import answers, measures
from sonovqa.answers import Meaning
from sonovqa.metrics import Score, mean
from sonovqa.questions import QUESTIONS

#: By image, by rule that could be applied: what is wrong, or ``None``.
Found = Mapping[str, Mapping[str, str | None]]
RECOMMENDATION, MEASUREMENT, AGE = "finding and recommendation", "plane and measurements", "plane and age"


def rules(read: Mapping[str, Meaning | None]) -> dict[str, str | None]:
    """What the answers about one image say against each other.

    An abnormal or unclear finding wants a matching recommendation; a measurement must belong to the plane; the age must
    lie within the plane's range of weeks.

    Args:
        read: meanings by question id; unread answers are ``None`` or left out.

    Returns:
        By rule, what is wrong or ``None``; a rule one of whose two answers is missing or unread, or whose plane no
        measurements and weeks are known of, is left out.
    """
    found: dict[str, str | None] = {}
    verdict, actions, plane = read.get("Q7"), read.get("Q8"), read.get("Q3")
    if verdict and actions:
        called_for = set(answers.COHERENCE.get(f"{verdict.key}_actions", ()))
        wrong = called_for and not actions.labels & called_for
        found[RECOMMENDATION] = f"{verdict.key}, but recommended is only: {actions.key}" if wrong else None
    name = dict(plane.parts).get("plane", "") if plane else ""
    if name not in answers.PLANE_RULES:
        return found
    of_plane = answers.PLANE_RULES[name]
    if read.get("Q4"):
        alien = sorted(read["Q4"].labels - set(of_plane["parameters"]) - {answers.NOT_ASSESSABLE})
        found[MEASUREMENT] = f"{', '.join(alien)} cannot be measured in the plane {name}" if alien else None
    weeks, (first, last) = read["Q5"].weeks if read.get("Q5") else None, of_plane["weeks"]
    if weeks:
        wrong = weeks[1] < first or weeks[0] > last
        found[AGE] = f"{weeks[0]:g}-{weeks[1]:g} weeks in the plane {name}, used at {first}-{last}" if wrong else None
    return found


def by_image(rows: Iterable[Mapping], column: str) -> dict[str, dict[str, str | None]]:
    """`rules` of every image.

    Args:
        rows: of separate questions or of sections (`report_sections.expand`); failed requests are left out.
        column: ``prediction``, or ``reference`` for those of the same questions.
    """
    read: dict[str, dict[str, Meaning | None]] = defaultdict(dict)
    for row in rows:
        if row["error"] is None and row["question_id"] in QUESTIONS:
            read[row["image_id"]][row["question_id"]] = measures.meaning(row, row[column])
    return {image: rules(found) for image, found in read.items()}


def score(found: Found, images: Sequence[str], excused: Found | None = None) -> Score:
    """The share of images without a violation, over those of ``images`` where at least one rule could be applied.

    Args:
        excused: the references' rules: one that they break too for an image is not held against the answers.
    """

    def kept(image: str) -> float:
        if not found.get(image):
            return float("nan")
        broken = {rule for rule, wrong in found[image].items() if wrong}
        theirs = {rule for rule, wrong in (excused or {}).get(image, {}).items() if wrong}
        return float(not broken - theirs)

    return mean([kept(image) for image in images])


def tally(found: Found) -> dict[str, dict[str, int]]:
    """By rule, images it could be applied to (``checked``) and broken in (``broken``)."""
    checked = Counter(rule for image in found.values() for rule in image)
    broken = Counter(rule for image in found.values() for rule, wrong in image.items() if wrong)
    return {rule: {"checked": checked[rule], "broken": broken[rule]} for rule in checked}


def listed(found: Found) -> list[dict]:
    """Every violation: ``image_id``, ``rule`` and ``violation`` in words."""
    return [{"image_id": i, "rule": r, "violation": wrong} for i, of in found.items() for r, wrong in of.items() if wrong]


def line(about: Mapping) -> str:
    """`scores.json`'s ``coherence`` in one line for a terminal."""
    figure, references = about["coherent"], about["coherent"]["references"]
    if figure["value"] is None:
        return f"Coherence: in none of {about['images']} images could two answers be held against each other."
    told = ", ".join(f"{rule} {n['broken']} of {n['checked']}" for rule, n in about["rules"].items() if n["broken"])
    theirs = "-" if references["value"] is None else f"{references['value']:.2f}"
    return (
        f"Coherence: {_told(figure)} of {figure['n']} images without answers that contradict each other (references {theirs}), "
        f"{_told(about['beyond_references'])} without a contradiction that the references do not hold"
    ) + (f"; broken: {told}." if told else ".")


def _told(figure: Mapping) -> str:
    span = figure["interval"]
    return f"{figure['value']:.2f}" + (f" [{span[0]:.2f}, {span[1]:.2f}]" if span else "")
