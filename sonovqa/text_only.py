"""Data sets without images and the causal language models that learn them: their processor and prompts.

A row's question is the text itself (`csv_text`), its answer the label. Nothing is added but the model's own chat template, no
system text: what an ultrasound assistant is told would be wrong here.
"""

from __future__ import annotations

from pathlib import Path

from sonovqa import chat, weights
from sonovqa.cli import UserError

_BARE = ("Text: ", "\nLabel:")  # around a text for a base model whose tokenizer has no chat template


class TextProcessor:
    """A tokenizer in the place of a multimodal processor.

    Attributes:
        tokenizer: the model's own.
        image_processor: ``None``; by it everything else tells that there are no images.
    """

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class TextTemplate:
    """A tokenizer's chat template cut at its seams, as `chat.Template` cuts a processor's: ``prefix() + branch(text)``.

    Raises:
        ValueError: if the template does not render a text once, or has nothing in front of it.
    """

    def __init__(self, tokenizer):
        mark = chat.QUESTION_MARK
        asked = mark.join(_BARE)
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": mark}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        head, *tails = asked.split(mark)
        if len(tails) != 1 or not head:
            raise ValueError("the chat template does not render a user's text once, after the mark of its turn")
        self._head, self.tail = head, tails[0]

    def prefix(self, context: str | None = None) -> str:
        """What stands before every text; a text has no context."""
        return self._head

    def branch(self, prompt: str) -> str:
        """A text from the end of the prefix to where the label would begin."""
        return prompt + self.tail


def model_class(name: str):
    """The auto class of a local folder or hub id: `AutoModelForCausalLM` for text-only models, else for images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if weights.takes_no_images(name) else AutoModelForImageTextToText


def load_processor(name: str) -> TextProcessor:
    """The tokenizer of a text-only model as a `TextProcessor`."""
    from transformers import AutoTokenizer

    return TextProcessor(AutoTokenizer.from_pretrained(name))


def has_no_images(split) -> bool:
    """Whether a split's rows, images not decoded, are texts."""
    return len(split) > 0 and split[0]["image"] is None


def check(splits, processor, chooses: bool, model: str) -> None:
    """Raise `UserError` unless data and model are both of texts or both of images, and texts are answered by a choice head.

    Args:
        splits: by name, images not decoded.
        processor: of the model.
        chooses: whether the run has, or is to have, a choice head.
        model: its name, to be told.
    """
    texts, takes = has_no_images(splits["train"]), processor.image_processor is not None
    if texts and takes:
        raise UserError(f"--data holds texts; --model {model} is for images; name a text-only one, such as Qwen/Qwen3-0.6B")
    if not texts and not takes:
        raise UserError(f"--data holds images; --model {model} takes none; name a vision-language model, or data of csv-text")
    if texts and not chooses:
        raise UserError("--data holds texts and their labels; they are learnt by --head choice only; add --head choice")
