"""Whether a server answers as the run did: a first request to warm it up, then the rows that the merge was checked on.

`sonovqa.merging` writes down what base and adapter answer to those rows (``answers`` in ``merge.json``). A server that lost
the adapter, part of it, the pixel budget or the chat template on the way answers otherwise, whatever its health check says.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sonovqa import asking, chat, choice, dataset, files
from sonovqa.choosing import ChoiceEndpoint
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import Engine, ImageRequest
from sonovqa.questions import QUESTIONS

#: Tokens of each answer that are compared. Two exact implementations part at near-ties, and all that follows then differs.
ANSWER_TOKENS = 16
#: Least share of equal answers, and the share below which it is remarked on. The merge check lets 1 % of tokens differ, and a
#: model that learnt little has near-ties: a tiny one after 24 steps gave 125 of 128 (vLLM in bf16, the check in fp32), the
#: demo's run 128 of 128. The demo's run without its vision adapter, which vLLM left out, gave 114.
BOUND, EXPECTED = 0.9, 0.97
WARM_SIZE = (512, 384)  # pixels of the grey image that warms a server up


@dataclass(frozen=True)
class Agreement:
    """How many of a run's answers a server repeats: ``equal`` of ``asked``, and where not ``(question, expected, served)``."""

    asked: int
    equal: int
    images: int
    differing: list[tuple[str, str, str]]

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.equal / self.asked

    def told(self) -> str:
        """In words, with the first answer that differs."""
        line = f"{self.equal} of {self.asked} answers to {self.images} images are those of the merge check"
        if self.differing:
            question, expected, served = self.differing[0]
            line += f"; such as {question}: {expected[:60]!r} then, {served[:60]!r} now"
        return line


def check_requests(run: dict) -> list[ImageRequest]:
    """The run's check rows as requests, each image once with all of its questions.

    Args:
        run: plan.json or run.json.

    Raises:
        UserError: if its data set is not there.
    """
    arguments = run["arguments"]
    splits, head = dataset.trained_on(arguments), choice.of_run(run)
    prompts: dict[tuple[str, int], dict[str, str]] = {}
    for item in run["check_items"]:
        stored, how = splits[item["split"]][item["row"]], (arguments["task"], run["prompt_variant"])
        tasks = choice.tasks_of(stored, *how, head) if head else chat.tasks_of(stored, *how)
        asked = prompts.setdefault((item["split"], item["row"]), {})
        asked.update((tasks[k]["question_id"], tasks[k]["prompt"]) for k in item["branches"])
    made = []
    for (split, row), asked in prompts.items():
        context = splits[split][row].get("context") or None
        made.append(ImageRequest(f"{split} {row}", asking.image_bytes(splits[split], row), context, tuple(asked.items())))
    return made


def answers_of(engine: Engine, requests: Iterable[ImageRequest]) -> list[dict]:
    """``{row, question_id, answer}`` of every question, at most `ANSWER_TOKENS` tokens each, greedily.

    Raises:
        UserError: if a question got no answer.
    """
    made = []
    for reply in engine.answer(requests, ANSWER_TOKENS):
        if reply.error and "empty" not in reply.error:  # a model may well answer with nothing
            raise UserError(f"{engine.name} gave no answer; {reply.question_id} of row {reply.image_id}: {reply.error}; "
                            "see the server's log")  # fmt: skip
        made.append({"row": reply.image_id, "question_id": reply.question_id, "answer": reply.text})
    return made


def compare(expected: list[dict], served: list[dict]) -> Agreement:
    """Hold a server's answers against those written down; both as `answers_of` gives them, in any order."""
    said = {(one["row"], one["question_id"]): one["answer"] for one in served}
    pairs = [
        (f"{one['question_id']} of {one['row']}", one["answer"], said.get((one["row"], one["question_id"]), ""))
        for one in expected
    ]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    return Agreement(len(pairs), len(pairs) - len(differing), len({one["row"] for one in expected}), differing)


def check(url: str, name: str, run: Path) -> Agreement | str:
    """Ask a server the rows of a run.

    Args:
        url, name: the server's API and the run's name there.
        run: the run's folder.

    Returns:
        The agreement, or in words why there was nothing to ask.

    Raises:
        UserError: if a question got no answer.
    """
    try:
        expected = read(run / "merge.json").get("answers") if (run / "merge.json").exists() else None
        if not expected:
            return f"{run} holds no answers of its merge check; python -m sonovqa.merging {run} writes them"
        trained = read(run / "plan.json", "arguments", "data", "check_items", "prompt_variant")
        folder = Path(trained["arguments"]["data"])
        if dataset.about(folder)["fingerprint"] != trained["data"]:
            return f"its check rows cannot be asked; {folder} is another data set by now; prepare the one it was trained on"
        requests = check_requests(trained)
    except (UserError, OSError) as fault:
        return f"its check rows cannot be asked; {fault}"
    head = choice.of_run(trained)
    engine = ChoiceEndpoint(url, name, head=head, retries=2) if head else Endpoint(url, name, retries=2)
    return compare(expected, answers_of(engine, requests))


def read(path: Path, *fields: str) -> dict:
    """A record of a run. Raises ``OSError``, or `UserError` if it is no JSON object with these fields."""
    try:
        found = files.read_json(path)
    except ValueError as fault:  # no JSON, or no text
        raise UserError(f"{path} is broken: {fault}; bring the whole run's folder here again") from None
    lacking = "an object" if not isinstance(found, dict) else next((name for name in fields if name not in found), None)
    if lacking:
        raise UserError(f"{path} is broken: {lacking} is missing; bring the whole run's folder here again")
    return found


def warm_up(url: str, name: str) -> float:
    """Ask the eight questions about a grey image, so that no user waits for what a server does once. Returns the seconds.

    Raises:
        UserError: if the server is healthy and yet does not answer.
    """
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", WARM_SIZE, (128, 128, 128)).save(stream, "PNG")
    prompts = tuple((question_id, chat.prompt_for(question_id, "")) for question_id in QUESTIONS)
    replies = list(Endpoint(url, name, retries=2).answer([ImageRequest("grey", stream.getvalue(), None, prompts)], ANSWER_TOKENS))
    failed = [reply.error for reply in replies if reply.error and "empty" not in reply.error]
    if failed:
        raise UserError(f"{name} is healthy and does not answer; {failed[0]}; see the server's log")
    return max(reply.seconds for reply in replies)
