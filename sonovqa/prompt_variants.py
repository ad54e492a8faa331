"""Prompt variants by name: which prompt a question is asked with, the form it asks for, and what short answers to it say.

The prompts themselves are data in `questions`. What a run is trained with or asked under is one line of text:
``clinical`` (every question that has a prompt of that name; the others keep their default), ``Q7=structured,Q2=short``
(these, the others by default), or both, ``short,Q7=simple``. `run.json` records it as ``prompt_variant``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from sonovqa import answers
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS, REPORT_FORMS, REPORT_ID, REPORT_PROMPTS, Form

DEFAULT = "default"
#: By question id, the prompts by name; ``report`` is one of the ids.
PROMPTS: Mapping[str, Mapping[str, str]] = {q.id: q.prompts for q in QUESTIONS.values()} | {REPORT_ID: REPORT_PROMPTS}
_FORMS = {q.id: q.forms for q in QUESTIONS.values()} | {REPORT_ID: REPORT_FORMS}
#: Every name that some question has a prompt of.
NAMES = tuple(dict.fromkeys(name for prompts in PROMPTS.values() for name in prompts))
_LEAD = re.compile(r"[\W_]*(yes|no|none)[\W_]*(?:$|[.,;:!\n–-])", re.IGNORECASE)
_VERDICT = re.compile(r"(?:[\W_]*(?:Answer|Assessment|Evaluation|Response|Verdict)[\W_]*:)?[\W_]*(NORMAL|ABNORMAL|UNCLEAR)\b")


@functools.cache
def variants(text: str) -> Mapping[str, str]:
    """The name of every question's prompt, by question id (``Q1`` … ``Q8``, ``report``), from a line as described above.

    Raises:
        UserError: for a question or a name that there is not, or two names for all.
    """
    chosen, for_all = {}, []
    for part in (part.strip() for part in text.split(",")):
        question_id, named, name = part.rpartition("=")
        allowed = PROMPTS.get(question_id, {}) if named else NAMES
        if named and not allowed:
            raise UserError(f"--prompts {text}; {question_id!r} is no question; {', '.join(PROMPTS)} are; such as Q7=simple")
        if name not in allowed:
            whose = f"{question_id} has no prompt" if named else "no question has a prompt"
            raise UserError(f"--prompts {text}; {whose} named {name!r}; {', '.join(allowed)} are allowed; mend --prompts")
        if named:
            chosen[question_id] = name
        else:
            for_all.append(name)
    if len(for_all) > 1:
        raise UserError(f"--prompts {text}; one name stands for all questions, here are {len(for_all)}; write Q7={for_all[-1]}")
    name = for_all[0] if for_all else DEFAULT
    return MappingProxyType({q: chosen.get(q, name if name in prompts else DEFAULT) for q, prompts in PROMPTS.items()})


def asked(task: str) -> tuple[str, ...]:
    """The questions with prompts of their own that ``--task`` asks: Q1 … Q8 for ``all``, none for ``yes-no``, else itself."""
    return tuple(QUESTIONS) if task == "all" else (task,) if task in PROMPTS else ()


def check(text: str, task: str) -> None:
    """See that a line of `variants` can be read and, unless it is ``default``, changes something that ``task`` asks.

    Raises:
        UserError: if it does not.
    """
    found = variants(text)
    if text != DEFAULT and all(found[q] == DEFAULT for q in asked(task)) and any(name != DEFAULT for name in found.values()):
        allowed = sorted({name for q in asked(task) for name in PROMPTS[q]})
        raise UserError(f"--prompts {text}; --task {task} has no such prompt; {', '.join(allowed)} are allowed; mend --prompts")


def differing(text: str, other: str, task: str) -> dict[str, tuple[str, str]]:
    """Of the questions that ``task`` asks, those whose prompt differs between two lines: ``{question id: (name, other)}``."""
    ours, theirs = variants(text), variants(other)
    return {q: (ours[q], theirs[q]) for q in asked(task) if ours[q] != theirs[q]}


@functools.cache
def named(question_id: str, prompt: str) -> str | None:
    """The name of a prompt by its text; ``None`` for a text that is none of the question's prompts (VQA-RAD)."""
    return next((name for name, text in PROMPTS.get(question_id, {}).items() if text == prompt), None)


def form_of(question_id: str, prompt: str) -> Form | None:
    """The form a prompt asks for; ``None`` if it leaves the form open."""
    return _FORMS.get(question_id, {}).get(named(question_id, prompt) or "")


def in_form(form: Form, text: str) -> bool:
    """Whether an answer has the form."""
    return re.fullmatch(form.pattern, text.strip(), re.DOTALL) is not None


def understood(question_id: str, prompt: str, text: str) -> str:
    """An answer to one of Q1 … Q8 as the default prompt would be answered, for `answers.read`.

    "Yes." to "Is this ultrasound normal?" says that it is; to the structured prompt the verdict counts and its reasoning,
    which may well speak of what would be abnormal, does not. All other answers stay as they are.
    """
    name = named(question_id, prompt)
    if name is None or name == DEFAULT or question_id == REPORT_ID:
        return text
    says = QUESTIONS[question_id].says.get(name, {})
    lead = _LEAD.match(text) if says else None
    if lead and lead[1].lower() in says:
        return " ".join((says[lead[1].lower()] + ".", text[lead.end() :].strip())).strip()
    form = form_of(question_id, prompt)
    verdict = _VERDICT.match(text) if form and form.verdict else None
    return verdict[1].lower() if verdict else text


def answer_for(question_id: str, answer: str, variant: str) -> str:
    """The answer to train on: to a prompt that wants the verdict first, so; to every other prompt as it is stored.

    Of Q7, structured, "abnormal: mass" becomes "ABNORMAL. mass"; what cannot be read stays.
    """
    names = variants(variant)
    form = _FORMS[question_id].get(names[question_id]) if question_id in QUESTIONS else None
    label = answers.label(question_id, answer) if form and form.verdict else ""
    if not label:
        return answer
    reasoning = re.sub(rf"^{label}\b[\s:;,.-]*", "", answer, flags=re.IGNORECASE)
    return f"{label.upper()}. {reasoning}".removesuffix(". ")


def wordings(items: Iterable, variant: str) -> list:
    """Training items with their answers as `confidence.Labels` is to know them under a variant.

    To a prompt that wants the verdict first or can be answered by yes or no, those answers stand beside the stored ones: the
    label's probability is the sum over its wordings, and nobody knows in which of them a model was trained.

    Args:
        items: `asking.Item`; ``question_id``, ``prompt`` and ``reference`` are read.
    """
    items = list(items)
    told = [replace(i, reference=r) for i in items if (r := answer_for(i.question_id, i.reference, variant)) != i.reference]
    one_each = {item.prompt: item for item in items if item.question_id in QUESTIONS}
    for item in one_each.values():
        says = QUESTIONS[item.question_id].says.get(named(item.question_id, item.prompt) or "", {})
        told += [replace(item, reference=word.capitalize()) for word in says]
    return items + told
