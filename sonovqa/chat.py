"""The one place that builds messages. Training, evaluation, inference and the OpenAI client all render here.

Image first, then the question, after one fixed system text: all questions of an image then share a prefix, both in
training (`sonovqa.batching`) and in vLLM's prefix cache.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Mapping

from sonovqa import images, prompt_variants
from sonovqa.questions import REPORT_ID, SYSTEM_TEXT, YES_NO_TASK, report_text

QUESTION_MARK, _ANSWER = "\u2060QUESTION\u2060", "\u2060ANSWER\u2060"  # word joiners: no sheet and no template holds these

_CHOICE = re.compile(r"\bor\b", re.IGNORECASE)
_PIXEL_SIZE = re.compile(r"Pixel size: (\d+(?:\.\d+)?) mm")


def context_for(context: str | None, size: tuple[int, int]) -> str | None:
    """A context line as a model is told it about an image of ``size`` (width, height) pixels: the field of view, not the pixel.

    A pixel size is true of the file's own pixels, and no model sees those: each image is resized to the pixel budget, its
    sides rounded apart to whole patches, and a client does not know the budget of the server it asks. The millimetres across
    the image are what resizing leaves alone, so they are right at any budget, in training and behind any endpoint; divided
    by the sides a model sees they are its pixel size. ``Pixel size: 0.0897 mm`` of 800 x 540 pixels becomes
    ``Image size: 71.8 x 48.4 mm``. Other lines stay as they are.
    """
    if not context:
        return context
    width, height = size

    def extent(found: re.Match) -> str:
        pixel = float(found[1])
        return f"Image size: {width * pixel:.1f} x {height * pixel:.1f} mm"

    return _PIXEL_SIZE.sub(extent, context)


def prompt_for(question_id: str, question: str, variant: str = "default") -> str:
    """The text asked for a question: its prompt under a variant for Q1 … Q8 and the report, else the question itself.

    Args:
        variant: a line of `prompt_variants.variants`.

    Raises:
        UserError: if the line names a question or a prompt that there is not.
    """
    prompts = prompt_variants.PROMPTS.get(question_id)
    return prompts[prompt_variants.variants(variant)[question_id]] if prompts else question


def tasks_of(row: dict, task: str = "all", variant: str = "default") -> list[dict]:
    """What is asked of a row of the data set under ``--task``.

    Args:
        row: a row of the data set; only ``questions`` is read.
        task: one of `questions.TASKS`, or another question id.
        variant: a line of `prompt_variants.variants`.

    Returns:
        Dictionaries ``{question_id, prompt, answer}``: one a question, or a single one for the report; the answer is in the
        form that the prompt asks for (`prompt_variants.answer_for`). A row without an answer to what is asked gives none.

    Raises:
        UserError: if the line names a question or a prompt that there is not.
    """
    asked = [q for q in row["questions"] if q["answer"]]
    if task == REPORT_ID:
        text = report_text({q["question_id"]: q["answer"] for q in asked})
        return [{"question_id": REPORT_ID, "prompt": prompt_for(REPORT_ID, "", variant), "answer": text}] if text else []
    return [
        {
            "question_id": q["question_id"],
            "prompt": prompt_for(q["question_id"], q["question"], variant),
            "answer": prompt_variants.answer_for(q["question_id"], q["answer"], variant),
        }
        for q in asked
        if is_asked(q, task)
    ]


def is_yes_no(entry: Mapping) -> bool:
    """Whether a question, with its ``question`` and ``answer_type``, is closed and not of the form "… or …"."""
    return entry["answer_type"] == "closed" and not _CHOICE.search(entry["question"])


def is_asked(entry: Mapping, task: str) -> bool:
    """Whether a stored question is asked as such under ``--task``; ``report`` asks none, for it asks about all at once."""
    return task in ("all", entry["question_id"]) or (task == YES_NO_TASK and is_yes_no(entry))


def messages(image, prompt: str, context: str | None = None, answer: str | None = None) -> list[dict]:
    """Chat messages as Hugging Face processors take them.

    Args:
        image: a PIL image, path or URL, or ``None`` for a placeholder that a processor fills from ``images=``.
        prompt: the question's text.
        context: a line that belongs to the image (such as a pixel size), shared by all its questions; with a PIL image it
            goes through `context_for`.
        answer: the assistant's turn; without it the messages end at the question.
    """
    if hasattr(image, "size"):
        context = context_for(context, image.size)
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    text = f"{context}\n{prompt}" if context else prompt
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_TEXT}]},
        {"role": "user", "content": [picture, {"type": "text", "text": text}]},
    ]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def data_url(image: bytes, mime: str = "image/png") -> str:
    """An encoded file's bytes as an OpenAI-compatible endpoint takes them within a message."""
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def openai_messages(image: bytes, prompt: str, context: str | None = None, mime: str = "image/png",
                    url: str | None = None) -> list[dict]:  # fmt: skip
    """The same messages for an OpenAI-compatible endpoint; ``image`` holds an encoded file's bytes, sent as a data URL.

    Args:
        url: `data_url` of ``image`` where it is at hand already: requests at the same time then share one text.
    """
    if context and _PIXEL_SIZE.search(context):
        context = context_for(context, images.size_of(image))
    turns = messages(None, prompt, context)
    turns[0]["content"] = SYSTEM_TEXT  # some servers refuse a list here; templates render both alike
    turns[1]["content"][0] = {"type": "image_url", "image_url": {"url": url or data_url(image, mime)}}
    return turns


def folded(turns: list[dict]) -> list[dict]:
    """Messages whose system text begins the first question, for templates without a system turn beside an image."""
    system, first, *rest = turns
    picture, question = first["content"]
    text = {"type": "text", "text": f"{system['content'][0]['text']}\n{question['text']}"}
    return [{"role": first["role"], "content": [picture, text]}, *rest]


class Template:
    """A processor's chat template cut at its seams, so that an image's questions can share their prefix.

    ``prefix(context) + branch(prompt) + lead + answer + end_of_turn`` is what the processor's own template renders for
    `messages`, up to white space after the end of the turn. `tests/test_chat.py` holds it to that. A template that leaves
    the end of an answer open gets the tokenizer's end of text: a model would else never learn to stop.

    Args:
        processor: a Hugging Face processor with a chat template.
        system_turn: whether its template takes a system turn; else the text goes where `folded` puts it.

    Attributes:
        tail, lead: what stands between question and answer: before the model begins to write, and written by it.
        end_of_turn: what the model writes after its answer.

    Raises:
        ValueError: if the template reorders or rewrites what it is given, so that no prefix is shared.
    """

    def __init__(self, processor, system_turn: bool = True):
        self._processor, self.system_turn = processor, system_turn
        whole = self.render(messages(None, QUESTION_MARK, answer=_ANSWER))
        asked = self.render(messages(None, QUESTION_MARK), ask=True)
        if asked.count(QUESTION_MARK) != 1 or whole.count(_ANSWER) != 1 or not whole.startswith(asked):
            raise ValueError("the chat template does not render question and answer once, in order")
        self.tail = asked.split(QUESTION_MARK)[1]
        self.lead = whole[len(asked) :].split(_ANSWER)[0]
        self.end_of_turn = whole.split(_ANSWER)[1].rstrip() or processor.tokenizer.eos_token

    def render(self, turns: list[dict], ask: bool = False) -> str:
        """Messages as `messages` makes them, further turns allowed, as text; with ``ask`` up to where the answer begins."""
        turns = turns if self.system_turn else folded(turns)
        return self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a handful of templates live as long as the process
    def prefix(self, context: str | None = None) -> str:
        """System text, image placeholder and context: what all questions of one image share."""
        return self.render(messages(None, QUESTION_MARK, context), ask=True).split(QUESTION_MARK)[0]

    def branch(self, prompt: str) -> str:
        """One question from the end of the shared prefix to where the answer begins."""
        return prompt + self.tail


def open_image(data: bytes):
    """Decode an image file's bytes to RGB, its EXIF rotation applied. Raises what Pillow raises on a broken file."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
