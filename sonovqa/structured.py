"""Answers as JSON by schema, and free analysis, from an OpenAI-compatible endpoint such as the one serve.sh starts.

    python -m sonovqa.structured report  --endpoint http://127.0.0.1:8000/v1 --image scan.png
    python -m sonovqa.structured extract --endpoint http://127.0.0.1:8000/v1 --image page.jpg
    python -m sonovqa.structured analyze --endpoint http://127.0.0.1:8000/v1 --image scan.png --prompt "What is unusual here?"
    python -m sonovqa.structured request report          # the request's body, to send with a client of one's own

The server is held to the schema token by token (``response_format``), so the answer has its form whatever the model is. Whether
what stands in it is right is another matter: a run that learnt Q1 … Q8 one by one answers them best so
(``inference.py --question all --json``). For curl, Python and JavaScript: docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sonovqa import answer_limits, chat, cli, extraction
from sonovqa.answers import CANONICAL
from sonovqa.cli import RESEARCH_NOTICE, UserError
from sonovqa.questions import LIST, QUALITY, QUESTIONS, REPORT_ID, REPORT_PROMPTS, WEEKS, Question

#: Every text, list and number below has an upper bound: a model that loses its thread ends, and is not cut in mid-JSON.
WEEKS_PATTERN = r"^(\d{1,2}(\.\d)?(-\d{1,2}(\.\d)?|\+)? weeks|not assessable)$"
NUMBER = {"type": "number", "minimum": -100000, "maximum": 10000000}
IMAGE, MODEL = "IMAGE", "MODEL"  # what a client puts into the body of `request`


@dataclass(frozen=True)
class Task:
    """One kind of structured answer: what is asked, the JSON schema of the answer, and its limit in tokens."""

    name: str
    prompt: str
    schema: dict
    max_tokens: int

    @property
    def response_format(self) -> dict:
        """The field of the request, as OpenAI's API has it."""
        return {"type": "json_schema", "json_schema": {"name": self.name, "schema": self.schema}}


def text(longest: int) -> dict:
    """Schema of a text of 1 to ``longest`` characters."""
    return {"type": "string", "minLength": 1, "maxLength": longest}


def listed(items: dict, most: int) -> dict:
    """Schema of a list."""
    return {"type": "array", "items": items, "maxItems": most}


def fields(required: Mapping[str, dict], optional: Mapping[str, dict] | None = None) -> dict:
    """Schema of an object with these fields in this order and no others."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def key_of(question: Question) -> str:
    """The report's field for a question: ``image_quality``."""
    return question.title.lower().replace(" ", "_")


def answer_schema(question: Question) -> dict:
    """Schema of the answer to one of Q1 … Q8, by the form that its short prompt asks for (`questions.Form`)."""
    form = question.forms["short"]
    about = {"title": question.title, "description": question.prompts["default"]}
    if form is LIST:
        return about | listed(text(40), 12)
    if form is WEEKS:
        return about | {"type": "string", "pattern": WEEKS_PATTERN}
    if form is QUALITY:
        return about | {"type": "string", "enum": list(CANONICAL[question.id])}
    if question.id == "Q7":
        return about | fields({"verdict": {"type": "string", "enum": list(CANONICAL["Q7"])}, "findings": listed(text(60), 4)})
    return about | text(80)


def blank(schema: Mapping):
    """The shape of a schema's answers with nothing in them, as prompts show it: ``{"findings": [""]}``."""
    if "anyOf" in schema:
        return blank(schema["anyOf"][0])
    if schema["type"] == "object":
        return {name: blank(schema["properties"][name]) for name in schema["required"]}
    if schema["type"] == "array":
        return [blank(schema["items"])]
    return "" if schema["type"] == "string" else 0


_REPORT = fields({key_of(question): answer_schema(question) for question in QUESTIONS.values()})
_REPORT_PROMPT = f"{REPORT_PROMPTS['default']} Answer with JSON only: {json.dumps(blank(_REPORT))}"
_MEDICATION = fields({"name": text(60), "dose": text(30), "route": text(20), "frequency": text(40)}, {"action": text(20)})
_VALUE = fields({"name": text(60), "value": {"anyOf": [NUMBER, text(20)]}, "unit": {"type": "string", "maxLength": 20}},
                {"flag": text(4), "time": text(10)})  # fmt: skip
_ENTRIES = {"medications": listed(_MEDICATION, 16), "findings": listed(text(80), 16), "values": listed(_VALUE, 40)}
#: By name. The extractions' prompts are those that a run on pages is trained with and scored by (`extraction.QUESTIONS`).
TASKS: dict[str, Task] = {REPORT_ID: Task(REPORT_ID, _REPORT_PROMPT, _REPORT, 1024)} | {
    name: Task(name, prompt, fields({name: _ENTRIES[name]}), answer_limits.EXTRACTION)
    for name, prompt in extraction.QUESTIONS.items()
}


def request(task: Task) -> dict:
    """The body of a chat completion for ``task``: a client puts its image's data URL for `IMAGE` and the model for `MODEL`."""
    messages = chat.openai_messages(b"", task.prompt)
    messages[1]["content"][0]["image_url"]["url"] = IMAGE
    limits = {"max_tokens": task.max_tokens, "temperature": 0}
    return {"model": MODEL, "messages": messages, **limits, "response_format": task.response_format}


def read(answer: str, schema: Mapping, finished: bool = True):
    """The JSON of an answer, seen to have the form of ``schema``.

    Args:
        finished: whether the answer came to its end (its finish reason is not ``length``).

    Raises:
        UserError: if it was cut off, is no JSON, or another: the endpoint then took no notice of the schema.
    """
    import jsonschema

    if not finished:
        raise UserError("the answer was cut off before its JSON was whole; raise --max-new-tokens")
    try:
        found = json.loads(answer)
        jsonschema.validate(found, schema)
    except (ValueError, jsonschema.ValidationError) as fault:
        why = str(fault).splitlines()[0][:150]
        raise UserError(f"the endpoint took no notice of the schema; {why}; vLLM does: serve the run with serve.sh") from None
    return found


def ask(endpoint, picture, prompt: str, name: str, schema: Mapping | None, max_new_tokens: int):
    """Ask an endpoint one thing about an image.

    Args:
        endpoint: an `endpoint.Endpoint` after its ``check``. picture: a `conversation.Picture`.
        name, schema: of the answer's JSON; ``schema`` ``None`` for free text.

    Returns:
        The parsed JSON, or the text.

    Raises:
        UserError: if there is no answer, or not one that `read` takes.
    """
    from sonovqa.endpoint import Endpoint
    from sonovqa.engines import ImageRequest

    wanted = {"response_format": Task(name, prompt, dict(schema), max_new_tokens).response_format} if schema else None
    engine = Endpoint(endpoint.base_url, endpoint.model, extra=wanted)
    asked = ImageRequest(picture.name, picture.data, picture.context, ((name, prompt),))
    (reply,) = engine.answer([asked], max_new_tokens)
    if reply.error:
        raise UserError(f"no answer; {reply.error}; see the server's log")
    return read(reply.text, schema, reply.finish_reason != "length") if schema else reply.text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.structured")
    kinds = parser.add_subparsers(dest="what", required=True, parser_class=cli.Parser)
    told = {REPORT_ID: "the eight sections of a report", "extract": "medications, findings and values of a clinical page",
            "analyze": "a prompt of one's own"}  # fmt: skip
    for what, about in told.items():
        one = kinds.add_parser(what, help=about, description=about)
        one.add_argument("--endpoint", required=True, metavar="URL", help="OpenAI-compatible server; key in VLLM_API_KEY")
        one.add_argument("--model", metavar="NAME", help="its name at the endpoint (unset: the only one)")
        one.add_argument("--image", type=Path, required=True, metavar="FILE", help="the image")
        one.add_argument("--context", help='line that belongs to the image: "Pixel size: 0.0897 mm"')
        one.add_argument("--max-new-tokens", type=int, help="an answer's limit in tokens (unset: the task's own; analyze: 512)")
        if what == "analyze":
            one.add_argument("--prompt", required=True, help="what is asked")
            one.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema of the answer (unset: free text)")
    one = kinds.add_parser("request", help="print a request's body", description=request.__doc__.splitlines()[0])
    one.add_argument("task", choices=tuple(TASKS))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.what == "request":
        print(json.dumps(request(TASKS[args.task]), indent=1))
        return
    from sonovqa import conversation
    from sonovqa.endpoint import Endpoint

    cli.check(cli.out_of_range(args, counts=("max_new_tokens",)))
    schema = read_schema(args.schema) if args.what == "analyze" and args.schema else None
    picture = conversation.read_picture(args.image, args.context)
    endpoint = Endpoint(args.endpoint, args.model)
    endpoint.check()
    if args.what == "analyze":
        found = {"answer": ask(endpoint, picture, args.prompt, "analysis", schema, args.max_new_tokens or 512)}
    elif args.what == "extract":
        found = {}
        for task in (TASKS[name] for name in extraction.QUESTIONS):
            with cli.stderr.status(f"reading {task.name}"):
                found |= ask(endpoint, picture, task.prompt, task.name, task.schema, args.max_new_tokens or task.max_tokens)
    else:
        task = TASKS[REPORT_ID]
        found = {REPORT_ID: ask(endpoint, picture, task.prompt, task.name, task.schema, args.max_new_tokens or task.max_tokens)}
    told = {"image": picture.name, "model": endpoint.name, **found, "notice": RESEARCH_NOTICE}
    print(json.dumps(told, indent=2, ensure_ascii=False))


def read_schema(path: Path) -> dict:
    """A JSON schema from a file. Raises `UserError` if it is not there, is none, or one that asks nothing of the answer."""
    import jsonschema

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        if not isinstance(schema, dict) or not schema:
            raise ValueError(f"{json.dumps(schema)} says nothing of the answer; a JSON object with fields is needed")
    except (OSError, ValueError, jsonschema.SchemaError) as fault:
        raise UserError(f"--schema; {path} is no JSON schema: {str(fault).splitlines()[0][:150]}; such as the schema that "
                        "`python -m sonovqa.structured request report` prints") from None  # fmt: skip
    return schema


if __name__ == "__main__":
    cli.run(main, resume="ask again")
