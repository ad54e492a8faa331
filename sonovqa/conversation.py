"""A conversation about one image: what was said, what is asked next, and who answers. No terminal in here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from sonovqa import chat, choice, cli, images, prompt_variants, records
from sonovqa.cli import UserError
from sonovqa.engines import Engine, EngineError, ImageRequest
from sonovqa.memory_peak import Batch
from sonovqa.questions import QUESTIONS, REPORT_ID, TEXT_LABEL

LONGEST_HISTORY = 12  # questions that go along with a free one; older ones are left out so that the context stays bounded


@dataclass(frozen=True)
class Picture:
    """The image talked about: what it is called, its file's bytes (``None``: there is no image), and its line of context."""

    name: str
    data: bytes | None
    context: str | None = None


NO_PICTURE = Picture("text", None)  # what a run of texts is asked about


class Answerer(Protocol):
    """Streams an answer to questions about a picture; ``name`` is shown. Raises `engines.EngineError`."""

    name: str

    def engine(self) -> Engine: ...

    def stream(self, picture: Picture, turns: list[str], max_new_tokens: int) -> Iterator[str]:
        """``turns``: question, answer, question, …, ending with the question to answer now."""
        ...


class LocalAnswerer:
    """Answers with a model in this process, loaded from a run, a model folder, a hub id or ``tiny``, if it fits the memory at
    hand with ``batch``: what is answered at one time, one question if that is left out."""

    def __init__(self, run: str, bits: int = 16, adapter: bool = False, batch: Batch | None = None):
        from sonovqa import answering, models, serving_plan

        name, added = run, None
        if is_of_texts(run):  # it is asked with its tokenizer's template or with none, so it need not be fit to be served
            name, added = answering.model_of(argparse.Namespace(run=run, adapter=adapter))
        elif Path(run).is_dir():
            weights = serving_plan.find_weights(Path(run), adapter)
            name, added = weights.model, weights.adapter
        self.name, self._run, self._head, self._batch = run, run, choice.behind(run), batch or Batch(questions=1)
        asked = replace(self._batch, new_tokens=0) if self._head else self._batch
        self.model, self.processor = models.load_for_inference(name, bits, added, batch=asked)
        answering.engine_of(run, self.model, self.processor)  # a text-only model without a head has no answers
        self.probabilities: Mapping[str, float] | None = None  # of the labels of the last answer, by a choice head

    def engine(self):
        """The same model as an engine for many images."""
        from sonovqa import answering

        made = answering.engine_of(self._run, self.model, self.processor, self._batch.images)
        made.name = self.name
        return made

    def stream(self, picture: Picture, turns: list[str], max_new_tokens: int) -> Iterator[str]:
        from sonovqa import generation

        if self._head or picture.data is None:
            text, self.probabilities = chosen(self.engine(), self._head, picture, turns[-1])
            yield text
            return
        first = chat.messages(chat.open_image(picture.data), turns[0], picture.context)
        yield from generation.stream(self.model, self.processor, first + followed(turns), max_new_tokens)


class EndpointAnswerer:
    """Answers through an OpenAI-compatible API."""

    def __init__(self, url: str, model: str | None = None, head: Path | None = None, key_env: str | None = None):
        from sonovqa import answering, endpoint_cost

        self._head = choice.behind(head) if head else None
        asked = {"endpoint": url, "model": model, "in_flight": 1, "head": head, "api_key_env": key_env, "run": None}
        self.endpoint = answering.open_endpoint(argparse.Namespace(**asked))
        self.name = self.endpoint.name
        self.probabilities: Mapping[str, float] | None = None
        if endpoint_cost.is_elsewhere(url):
            cli.stderr.print(f"images and questions leave this machine for {self.name}", style="yellow", markup=False)

    def engine(self):
        """The same endpoint as an engine for many images."""
        return self.endpoint

    def stream(self, picture: Picture, turns: list[str], max_new_tokens: int) -> Iterator[str]:
        from sonovqa.endpoint import encoded_as_seen

        if self._head:
            text, self.probabilities = chosen(self.endpoint, self._head, picture, turns[-1])
            yield text
            return
        image, mime = encoded_as_seen(picture.data)
        first = chat.openai_messages(image, turns[0], picture.context, mime)
        yield from self.endpoint.stream(first + followed(turns), max_new_tokens)


@dataclass
class Conversation:
    """One image and what was said about it.

    Attributes:
        variant: line of prompt variants for Q1 … Q8 and the report (`prompt_variants.variants`).
        max_new_tokens: an answer's limit; a report may have eight times it.
        history: question, answer, question, answer, …
    """

    answerer: Answerer
    variant: str = "default"
    max_new_tokens: int = 128
    picture: Picture | None = None
    history: list[str] = field(default_factory=list)

    @property
    def probabilities(self) -> Mapping[str, float] | None:
        """Of the labels of the last answer, where a choice head gave it."""
        return getattr(self.answerer, "probabilities", None)

    def look_at(self, picture: Picture) -> None:
        """Talk about another image; nothing said about the last one goes along."""
        self.picture, self.history = picture, []

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer to a free question, with the latest history."""
        yield from self._said(question, [*self.history[-2 * LONGEST_HISTORY :], question])

    def ask_standard(self, question_id: str) -> Iterator[str]:
        """Stream the answer to ``Q1`` … ``Q8`` or ``report``, asked alone: as in training, and as it was evaluated."""
        prompt = chat.prompt_for(question_id, "", self.variant)
        yield from self._said(prompt, [prompt], len(QUESTIONS) if question_id == REPORT_ID else 1)

    def _said(self, question: str, turns: list[str], longer: int = 1) -> Iterator[str]:
        if self.picture is None:
            raise UserError("there is no image yet; name one: /image PATH")
        pieces = []
        for piece in self.answerer.stream(self.picture, turns, self.max_new_tokens * longer):
            pieces.append(piece)
            yield piece
        self.history += [question, "".join(pieces).strip()]  # an answer that was broken off is not remembered


def batch_of(args: argparse.Namespace) -> Batch:
    """What inference.py's arguments have answered at one time: ``--batch-images`` images of a folder with all their questions,
    or one question, which a report's length belongs to."""
    if args.folder:
        from sonovqa import folder_sheet

        found = [image.path for image in folder_sheet.find_images(args.folder)]
        return Batch(args.batch_images, new_tokens=args.max_new_tokens, pixels=images.most_pixels(found))
    report = question_id_of(args.question or "") == REPORT_ID
    pixels = images.most_pixels([Path(args.image)] if args.image and not args.data else [])
    return Batch(questions=1, new_tokens=args.max_new_tokens * (len(QUESTIONS) if report else 1), pixels=pixels)


def is_of_texts(run: str | Path | None) -> bool:
    """Whether a run was trained on texts: it is asked about no image."""
    head = choice.behind(run)
    return head is not None and TEXT_LABEL in head.sets


def problem_of_folder(run: str | Path | None) -> str:
    """Why a run cannot fill a sheet of all eight questions, or ""."""
    head = choice.behind(run)
    return (
        f"--folder asks Q1 … Q8; {run} answers a {head.describe()}; evaluate.py asks what it knows; use --image" if head else ""
    )


def chosen(engine: Engine, head: choice.Head | None, picture: Picture, question: str) -> tuple[str, Mapping[str, float]]:
    """A choice head's answer to a question, asked alone, and the probabilities of its labels.

    Raises:
        EngineError: if the head was not trained on the question, or the engine gave no answer.
    """
    request = ImageRequest(picture.name, picture.data, picture.context, (("", question),))
    reply = next(iter(engine.answer([request], 1)))
    if reply.error is not None:
        raise EngineError(f"{reply.error} ({head.describe()})" if reply.error == choice.NOT_ITS_OWN else reply.error)
    return reply.text, reply.probabilities


def chances(probabilities: Mapping[str, float] | None) -> str:
    """Probabilities behind an answer, such as `` (normal 0.87, abnormal 0.13)``; "" where there are none."""
    told = sorted((probabilities or {}).items(), key=lambda entry: -entry[1])[:3]
    return f" ({', '.join(f'{name} {chance:.2f}' for name, chance in told)})" if told else ""


def followed(turns: list[str]) -> list[dict]:
    """Messages after the first question, in the form that both processors and the API take."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(turns[1:], start=1)]


def read_picture(path: Path, context: str | None = None) -> Picture:
    """Read and check an image file.

    Raises:
        UserError: in one line, if it is not there or is not an image that a model was or could be trained on.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"no such file; {path}; an image file is needed; check the path")
    checked = images.check_image(path)
    if checked.problem:
        raise UserError(f"cannot use {path}; {checked.problem}")
    return Picture(str(path), path.read_bytes(), context)


def picture_of_set(folder: Path, image_id: str | None = None, split: str = "test", context: str | None = None) -> Picture:
    """An image of a prepared set, with its context.

    Args:
        image_id: ``<folder>/<file>``; ``None`` takes the split's first image.
        context: a line in place of the set's own; "" for none at all, ``None`` for the set's.

    Raises:
        UserError: if ``folder`` is no prepared set or its split holds no such image.
    """
    from sonovqa import asking, dataset

    rows = dataset.load_undecoded(folder).get(split, [])
    if not rows:
        raise UserError(f"there is no image in the {split} split of {folder}; another set, or --image FILE without --data")
    ids = rows["image_id"][:]
    if image_id is not None and image_id not in ids:
        held = ", ".join(ids[:3])
        raise UserError(f"no image {image_id!r} in the {split} split of {folder}; it holds {held} …; leave it out for the first")
    row = 0 if image_id is None else ids.index(image_id)
    if context is None and "context" in rows.column_names:
        context = rows["context"][row]
    return Picture(ids[row], asking.image_bytes(rows, row), context)


def prompts_line(line: str | None, run: str | None, question: str | None = None) -> str:
    """The line of prompt variants to ask with: ``line``, or where that is ``None`` the one the run was trained with.

    Args:
        line: as ``--prompts`` takes it; see `prompt_variants.variants`.
        run: a run of train.py, or its ``merged/``. What else there is, and an endpoint (``None``), is asked the default.
        question: the one thing that is asked: ``all``, ``report``, ``Q1`` … ``Q8`` or any text; ``None`` if all that may come.

    Raises:
        UserError: if the line names a question or a prompt that there is not, or changes nothing of what is asked.
    """
    from sonovqa import provenance

    if line is None:
        line, question = provenance.own_prompts(records.run_behind(run)), None
    names = prompt_variants.variants(line)
    task = "all" if (question or "").strip().lower() == "all" else question_id_of(question or "")
    asked = prompt_variants.asked(task) if task else tuple(names)
    default = prompt_variants.DEFAULT
    if any(name != default for name in names.values()) and all(names[q] == default for q in asked):
        allowed = ", ".join(sorted({name for q in asked for name in prompt_variants.PROMPTS[q]}))
        raise UserError(f"--prompts {line}; {', '.join(asked)} has no such prompt; {allowed} are allowed; mend --prompts")
    return line


def problem_of_question(text: str) -> str:
    """Why ``--question`` cannot be asked with ``text``, or "": nothing in it, or a number that no question has.

    ``Q9`` would else be put to the model as free text, and whatever it says to that be taken for the answer to a question.
    """
    allowed = f"{', '.join(QUESTIONS)}, all, {REPORT_ID} or any text"
    if not text.strip():
        return f"--question; it is empty; {allowed}; leave it out for a conversation"
    if re.fullmatch(r"[Qq]\s*\d+", text.strip()) and question_id_of(text) is None:
        return f"--question; there is no question {text!r}; {allowed}; mend --question"
    return ""


def question_id_of(text: str, allow_number: bool = False) -> str | None:
    """``Q1`` … ``Q8`` or ``report`` if ``text`` says so in any case (``allow_number``: a bare 1 … 8 too), else ``None``."""
    text = text.strip().upper()
    if allow_number and text.isdigit():
        text = f"Q{text}"
    if text == REPORT_ID.upper():
        return REPORT_ID
    return text if text in QUESTIONS else None
