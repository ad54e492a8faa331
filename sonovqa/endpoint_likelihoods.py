"""How likely a vLLM endpoint finds a given answer: the log-probabilities of the prompt that ends with it.

The answer is sent as the assistant's turn with ``add_generation_prompt`` off, so that the server renders question, answer
and end of turn with the model's own template, and ``prompt_logprobs=0`` asks for the log-probability of every token of
that prompt. Those of the answer and its end of turn are found from the end by their text: this client has no tokenizer.
One request a wording; vLLM encodes the image once for all of them (its multi-modal cache). Top log-probabilities of the
first tokens would not do: they name at most 20 tokens, and labels share their first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sonovqa import chat
from sonovqa.cli import UserError

#: What vLLM wants beside the fields of the OpenAI API.
EXTRA = {"prompt_logprobs": 0, "add_generation_prompt": False}


@dataclass(frozen=True)
class Weighed:
    """One closed question on its way: an image as the server gets it and the wordings to weigh."""

    image_id: str
    question_id: str
    image: bytes
    mime: str
    context: str | None
    prompt: str
    wordings: tuple[str, ...]

    def turns(self) -> Iterator[tuple[str, list[dict]]]:
        """Each wording with the conversation that ends with it."""
        asked = chat.openai_messages(self.image, self.prompt, self.context, self.mime)
        for text in self.wordings:
            yield text, [*asked, {"role": "assistant", "content": text}]


def read(completion, text: str) -> float:
    """Natural log-likelihood of ``text`` and the token that ends its turn.

    Args:
        completion: a chat completion whose prompt ends with ``text`` as the assistant's turn.

    Raises:
        UserError: if the server gives no prompt log-probabilities: it is not vLLM.
        ValueError: if no token begins where ``text`` does, as when a template ends in a space: in generation it does begin there.
    """
    told = getattr(completion, "prompt_logprobs", None)
    if not told:
        told = "the endpoint gives no prompt log-probabilities; vLLM does; serve the run with serve.sh"
        raise UserError(f"--confidence; {told}, or leave --confidence out")
    tokens = [next(iter(entry.values())) if entry else {"decoded_token": "", "logprob": 0.0} for entry in told]
    spelt = [token["decoded_token"] or "" for token in tokens]
    for first in range(len(spelt) - 1, -1, -1):
        said = "".join(spelt[first:])
        if not said.startswith(text):
            continue
        last = first  # of the answer's own tokens
        while len("".join(spelt[first : last + 1])) < len(text):
            last += 1
        if "".join(spelt[first : last + 1]) == text and last + 1 < len(tokens):
            return sum(token["logprob"] for token in tokens[first : last + 2])
    raise ValueError(f"no token begins where the answer {text!r} begins: …{spelt[-12:]}; the chat template glues them together")
