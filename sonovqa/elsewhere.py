"""Answers made elsewhere: predictions files of other tools, joined to the references of a prepared set or a bare sheet.

A row of such a file holds the answer (``prediction``), the image (``image_id``, or ``image`` as ``Folder/File``, with or
without what stands before the folder) and the question (``question_id``, or ``question``: its text, with or without its
``Label:``). What failed (empty, or ``ERROR: …`` in the answer's place) and what matches no reference is listed, never scored.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from sonovqa import answer_words, asking, chat, predictions
from sonovqa.asking import Item
from sonovqa.cli import UserError
from sonovqa.findings import RARE, Finding, counted, printable
from sonovqa.predictions import Key
from sonovqa.questions import QUESTIONS, REPORT_ID, report_text

SHEETS = (".xlsx", ".xlsm", ".csv")
#: How tools write a failure where the answer should be. Each alternative is what a program says, at the answer's beginning;
#: words that a sonographer may write too ("not found", "None", "no error seen", "limited") are none of them.
FAILURE = re.compile(
    r"""\s*(?:
    \{\s*["']errors?["']\s*:(?!\s*(?:null|none|false|""|''|\[\]))                    # {"error": {"message": …}}
    | <(?:!doctype|html|head|title|\?xml)\b                                          # <html>… 502
    | (?!\{)\W{0,3}(?:
        error\W?\s*(?::|code\b|\d) | error(?:\s*$|\]) | exception\b.*: | traceback\ \(most  # "ERROR: 500", "[Error] timed out"
        | [a-z_.]*[a-z](?:error|exception|timeout)\s*[:(]                             # "openai.RateLimitError: 429"
        | (?:http\S*|status(?:\ code)?)(?:\ error)?\W*[45]\d\d\b                      # "HTTP 500", "HTTP/1.1 502 Bad Gateway"
        | (?:[45]\d\d\W+)?(?:internal\ server\ error|bad\ gateway|gateway\ time-?out|service\ (?:temporarily\ )?unavailable
            |too\ many\ requests|rate\ limit\ (?:exceeded|reached))\b                # "503 Service Unavailable"
        | [45]\d\d\ (?:client|server)\ error\b                                       # "404 Client Error: …"
        | (?:the\ )?(?:request|connection|operation|read)\ (?:has\ |was\ )?(?:timed\ out|timeout|refused|reset|aborted)\b
        | (?:connection|api)\ error\b
        | (?:null|nan|undefined)\W*$                                                 # an empty value written out
    ))""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass
class Joined:
    """Predictions beside their references.

    Attributes:
        rows: like the rows of predictions.jsonl (`asking.row_of`); failed ones have ``error``.
        unmatched: rows that match no reference, each with the reason.
        missing: how many references have no prediction.
        repeated: answers to a question that a later row answers again, which is the one that counts; those that ``differ``
            from it by more than white space.
    """

    rows: list[dict] = field(default_factory=list)
    unmatched: list[dict] = field(default_factory=list)
    missing: int = 0
    repeated: int = 0
    differ: int = 0

    def keep(self, found: Mapping[Key, Sequence[dict]]) -> None:
        """Take of every question its last row; answers before it are counted, attempts that failed before it are not."""
        for *earlier, last in found.values():
            answers = [row["prediction"] for row in earlier if row["error"] is None]
            self.rows.append(last)
            self.repeated += len(answers)
            self.differ += sum(answer.split() != (last["prediction"] or "").split() for answer in answers)


def read_rows(path: Path) -> list[dict]:
    """The rows of a predictions file (.jsonl). Raises `UserError` if there is none or a needed field is missing everywhere."""
    if not path.is_file():
        raise UserError(f"no predictions there; {path}; a .jsonl file, one object a line; check the path")
    rows = predictions.read(path)
    for fields in (("prediction",), ("image_id", "image"), ("question_id", "question")):
        if not any(name in row for row in rows for name in fields):
            raise UserError(
                f"no {' or '.join(fields)} in any row; {path}; rows hold image_id, question_id and prediction; name them so"
            )
    return rows


def references(path: Path, split: str, rows: Sequence[Mapping], group_column: str | None = None):
    """The questions to score against and, where there are any, those of the training split and the images.

    Combined reports are asked for where ``rows`` hold some, single questions where they hold any.

    Args:
        path: a folder made by prepare_dataset.py, or an annotation sheet (workbook or CSV) without images.
        split: of a prepared set.
        rows: the predictions, of which only the questions are looked at.
        group_column: of a sheet: its patient column; without one every image is its own group.

    Returns:
        ``(items, items of the training split, the split with images not decoded or None)``.

    Raises:
        UserError: if ``path`` is neither, or holds no answers.
    """
    reports = [_known_question(row) == REPORT_ID for row in rows]
    tasks = ["all"] * (not all(reports)) + [REPORT_ID] * any(reports)
    if path.suffix.lower() in SHEETS:
        from sonovqa.sheets import read_sheet

        items = [item for row in enumerate(read_sheet(path, {}, group_column)) for item in _items_of_row(*row, tasks)]
        if not items:
            raise UserError(
                f"the sheet holds no finished answers; {path}; rows whose status is complete; finish some, or name another"
            )
        return items, [], None
    from sonovqa import dataset

    splits = dataset.load_undecoded(path)
    items = [item for task in tasks for item in asking.items_of(splits[split], task)]
    return items, asking.items_of(splits["train"]), splits[split]


def _items_of_row(number: int, row, tasks: Sequence[str]) -> Iterable[Item]:
    """The questions, the report or both of one row of a sheet."""
    image = f"{row.folder}/{row.image}"
    asked = {q: (QUESTIONS[q].prompts["default"], answer) for q, answer in row.answers.items() if "all" in tasks}
    if REPORT_ID in tasks and (text := report_text(row.answers)):
        asked[REPORT_ID] = (chat.prompt_for(REPORT_ID, ""), text)
    for question_id, (prompt, answer) in asked.items():
        yield Item(number, image, row.group or image, row.folder, None, question_id, prompt, "", prompt, answer)


def join(rows: Sequence[Mapping], items: Sequence[Item]) -> Joined:
    """Put each prediction beside its reference; the last of several to one question counts."""
    images: dict[str, str | None] = {}
    for image_id in {item.image_id for item in items}:
        for name in (_plain(image_id), _plain(Path(image_id).with_suffix("").as_posix())):
            images[name] = image_id if images.get(name, image_id) == image_id else None  # None: two images share the name
    by_image: dict[str, dict[str, Item]] = {}
    for item in items:
        asked = by_image.setdefault(item.image_id, {})
        asked[item.question_id] = item
        asked.setdefault(_words(item.question), item)
    joined, found = Joined(), defaultdict(list)
    for row in rows:
        image_id = _image_of(row, images)
        item = _question_of(row, by_image.get(image_id or "", {}))
        if item is None:
            reason = "no such image in the references" if image_id is None else "no such question about that image"
            joined.unmatched.append(
                {"reason": reason} | {k: row.get(k) for k in ("image_id", "image", "question_id", "question") if k in row}
            )
        else:
            found[item.key].append(_joined_row(row, item))
    joined.keep(found)
    joined.missing = sum(item.key not in found for item in items)
    return joined


def unreferenced(rows: Sequence[Mapping]) -> Joined:
    """Rows without any reference: the category is the first part of the image's path, and nothing can be scored."""
    joined, found = Joined(), defaultdict(list)
    for number, row in enumerate(rows):
        image_id = str(row.get("image_id") or row.get("image") or "").replace("\\", "/")
        question_id = _known_question(row) or str(row.get("question_id") or row.get("question") or "")
        if not image_id or not question_id:
            joined.unmatched.append({"reason": "no image or no question in the row", "row": number + 1})
            continue
        category = image_id.split("/")[0] if "/" in image_id else ""
        item = Item(number, image_id, image_id, category, None, question_id, str(row.get("question") or ""), "", "", "")
        found[item.key].append(_joined_row(row, item) | {"reference": None})
    joined.keep(found)
    return joined


def list_unmatched(joined: Joined, console: Console, most: int = 5) -> None:
    """Print what matched nothing: how many rows, why, and a few of them."""
    for reason, count in Counter(row["reason"] for row in joined.unmatched).items():
        some = [row for row in joined.unmatched if row["reason"] == reason][:most]
        named = "; ".join(" ".join(str(v) for k, v in row.items() if k != "reason" and v is not None) for row in some)
        line = f"not scored: {counted(count, 'row')}: {reason}, such as {printable(named)}"
        console.print(line, markup=False, soft_wrap=True)


def find(joined: Joined, split: str | None = None) -> list[Finding]:
    """Rows without a reference, references without an answer, questions answered more than once, a split not held out.

    Args:
        split: the evaluated one of a prepared set.
    """
    found = []
    total = len(joined.rows) + len(joined.unmatched)
    if joined.repeated:
        text = f"{counted(joined.repeated, 'row')} answered a question that a later row answers again"
        text += f", {joined.differ} of them otherwise; only the last row of a question counts"
        share = joined.repeated / (joined.repeated + len(joined.rows))
        found.append(Finding("repeated", None, share, text, joined.differ > RARE * len(joined.rows)))
    if split in ("train", "validation"):
        text = f"the {split} split is not held out: a model trained with this data set was trained or chosen on it"
        found.append(Finding("not held out", None, 0, text, split == "train"))
    if joined.unmatched:
        share = len(joined.unmatched) / total
        text = f"{len(joined.unmatched)} of {total} rows ({share:.1%}) match no reference and are not scored"
        found.append(Finding("unmatched", None, share, text, share > RARE))
    if joined.missing:
        asked = joined.missing + len(joined.rows)
        text = f"{joined.missing} of {asked} questions have no answer in the file; scores are of the rest only"
        found.append(Finding("missing", None, joined.missing / asked, text, joined.missing / asked > RARE))
    return found


def _joined_row(row: Mapping, item: Item) -> dict:
    text = row.get("prediction")
    error = row.get("error") or None  # tools write "" or false beside good answers
    if error is None and (text is None or not str(text).strip()):
        error = "empty answer"
    elif error is None and FAILURE.match(answer_words.answer_part(str(text))):
        error = " ".join(str(text).split())[:200]
    return {
        "image_id": item.image_id, "group": item.group, "category": item.category, "question_id": item.question_id,
        "question": item.question, "answer_type": item.answer_type, "prompt": item.prompt, "context": item.context,
        "reference": item.reference, "prediction": None if error is not None else str(text), "error": error,
        "finish_reason": row.get("finish_reason"), "new_tokens": row.get("new_tokens"), "seconds": row.get("seconds"),
        "size": None, "blind": False,
    }  # fmt: skip


def _plain(path: str) -> str:
    """A file's path for comparison: forward slashes, one Unicode form, no case."""
    return unicodedata.normalize("NFC", str(path)).replace("\\", "/").strip().casefold()


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", str(text).casefold()))


def _image_of(row: Mapping, images: Mapping[str, str | None]) -> str | None:
    name = _plain(row.get("image_id") or row.get("image") or "")
    parts = name.split("/")
    tails = ("/".join(parts[at:]) for at in range(len(parts)))  # "/data/images/Femur/x.png" -> "Femur/x.png"
    return next((images[tail] for tail in tails if images.get(tail)), None)


def _known_question(row: Mapping) -> str | None:
    """Q1 … Q8 or the report, from the id or from the text: a prompt, a title, or ``Label: prompt``."""
    given = str(row.get("question_id") or "").strip()
    if given.upper() in QUESTIONS or given == REPORT_ID:
        return given.upper() if given.upper() in QUESTIONS else given
    text = str(row.get("question") or "")
    marked = re.match(r"\s*(Q[1-8])\b", text, re.IGNORECASE)
    if marked:
        return marked[1].upper()
    for wording in (text, text.partition(":")[0], text.partition(":")[2]):
        for question in QUESTIONS.values():
            if _words(wording) and _words(wording) in map(_words, (question.title, *question.prompts.values())):
                return question.id
    return None


def _question_of(row: Mapping, asked: Mapping[str, Item]) -> Item | None:
    text = str(row.get("question") or "")
    names: Iterable[str | None] = (
        str(row.get("question_id")) if row.get("question_id") is not None else None,
        _known_question(row), _words(text) or None, _words(text.partition(":")[2]) or None,
    )  # fmt: skip
    return next((asked[name] for name in names if name is not None and name in asked), None)
