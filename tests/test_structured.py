"""Answers as JSON by schema: the forms fit what is drawn and taught, and what an endpoint sends is looked at."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from conftest import noise_image
from stand_in import StandIn, complete

from sonovqa import extraction, structured
from sonovqa.cli import UserError
from sonovqa.documents_forms import TEMPLATES, Draw
from sonovqa.questions import QUESTIONS
from sonovqa.structured import TASKS

REPORT = {
    "anatomical_structures": ["spine", "stomach"], "fetal_orientation": "cephalic, axial", "imaging_plane": "axial abdomen",
    "biometric_measurements": ["AC"], "gestational_age": "20-25 weeks", "image_quality": "good",
    "normality_assessment": {"verdict": "normal", "findings": []}, "clinical_recommendations": ["routine monitoring"],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_every_form_that_is_drawn_fits_the_schema_of_its_extraction(kind):
    """What `prepare_dataset.py documents` teaches can be said under the schema, and is scored as right."""
    for seed in range(40):
        form = TEMPLATES[kind](Draw(np.random.default_rng(seed)))
        for name in extraction.QUESTIONS:
            answer = {name: getattr(form, name)}
            jsonschema.validate(answer, TASKS[name].schema)
            assert extraction.score(json.dumps(answer), json.dumps(answer))["combined"] == 1


def test_the_report_has_a_field_for_each_question_in_order():
    schema = TASKS["report"].schema
    assert schema["required"] == list(REPORT) == [q.title.lower().replace(" ", "_") for q in QUESTIONS.values()]
    jsonschema.validate(REPORT, schema)
    for name, wrong in (("gestational_age", "twenty weeks"), ("image_quality", "fine"), ("anatomical_structures", "spine, rib")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(REPORT | {name: wrong}, schema)
    for weeks in ("20-25 weeks", "13.5 weeks", "38+ weeks", "not assessable"):
        jsonschema.validate(REPORT | {"gestational_age": weeks}, schema)


def bounded(schema: dict) -> bool:
    if "anyOf" in schema:
        return all(map(bounded, schema["anyOf"]))
    if schema["type"] == "object":
        return all(map(bounded, schema["properties"].values()))
    if schema["type"] == "array":
        return "maxItems" in schema and bounded(schema["items"])
    limits = {"number": {"minimum", "maximum"}, "string": {"maxLength", "enum", "pattern"}}[schema["type"]]
    return bool(limits & set(schema))


@pytest.mark.parametrize("name", list(TASKS))
def test_every_answer_has_an_end_and_a_grammar(name):
    assert bounded(TASKS[name].schema)
    xgrammar = pytest.importorskip("xgrammar")
    xgrammar.Grammar.from_json_schema(json.dumps(TASKS[name].schema), any_whitespace=False, separators=(",", ":"))


@pytest.fixture
def image(tmp_path):
    noise_image(40, 30, 1).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def ask(url: str, what: str, image, *more: str) -> None:
    structured.main([what, "--endpoint", url, "--image", str(image), *more])


def test_report_and_extraction_by_command_line(image, capsys):
    found = {"medications": [], "findings": ["anemia"], "values": [{"name": "Hb", "value": 9.1, "unit": "g/dL"}]}

    def script(prompt, attempt):
        name = next((name for name, asked in extraction.QUESTIONS.items() if asked == prompt), None)
        return json.dumps({name: found[name]} if name else REPORT)

    with StandIn(script) as server:
        ask(server.url, "report", image)
        told = said(capsys)
        assert told["report"] == REPORT and "Not a medical device" in told["notice"] and told["model"].startswith("run at ")
        ask(server.url, "extract", image)
        told = said(capsys)
        assert {name: told[name] for name in found} == found
    formats = [body["response_format"]["json_schema"] for body in server.bodies]
    assert [one["name"] for one in formats] == ["report", "medications", "findings", "values"]
    assert all(one["schema"] == TASKS[one["name"]].schema for one in formats)


def test_free_analysis_and_a_schema_of_ones_own(image, tmp_path, capsys):
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"side": {"type": "string"}}, "required": ["side"]}')
    with StandIn(lambda prompt, attempt: "on the left" if "Say" in prompt else '{"side": "left"}') as server:
        ask(server.url, "analyze", image, "--prompt", "Say where.")
        assert said(capsys)["answer"] == "on the left" and "response_format" not in server.bodies[0]
        ask(server.url, "analyze", image, "--prompt", "Where?", "--schema", str(tmp_path / "schema.json"))
        assert said(capsys)["answer"] == {"side": "left"}
        for broken in ('{"type": "nothing"}', "true", "false", "{}", "[]"):
            (tmp_path / "broken.json").write_text(broken)
            with pytest.raises(UserError, match=r"broken.json is no JSON schema"):
                ask(server.url, "analyze", image, "--prompt", "Where?", "--schema", str(tmp_path / "broken.json"))
        assert len(server.bodies) == 2


def test_what_is_no_answer_is_said_in_one_line(image, capsys):
    def cut_short(handler):
        complete(handler, '{"anatomical_structures": ["spi', "length")

    faults = {
        "took no notice of the schema": "a normal scan",
        "cut off before": cut_short,
        "no answer; HTTP 400: no such": (400, "no such"),
    }
    for told, script in faults.items():
        with StandIn(lambda prompt, attempt, script=script: script) as server, pytest.raises(UserError, match=told) as mistake:
            ask(server.url, "report", image)
        assert "\n" not in str(mistake.value)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="no such file"):
        ask("http://127.0.0.1:1/v1", "report", image.with_name("none.png"))
    with pytest.raises(UserError, match="--max-new-tokens 0"):
        ask("http://127.0.0.1:1/v1", "report", image, "--max-new-tokens", "0")
