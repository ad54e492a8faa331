"""Mistakes on inference.py's command line: told in one line, before a model is loaded."""

from __future__ import annotations

import pytest
from conftest import noise_image

import inference
from sonovqa import conversation
from sonovqa.cli import UserError
from sonovqa.memory_peak import Batch


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--image", "x.png"], "nobody, or two, to answer"),
        (["--run", "tiny", "--endpoint", "http://h"], "nobody, or two, to answer"),
        (["--run", "tiny", "--json"], "there is no question"),
        (["--run", "tiny", "--question", "Q1"], "there is no image"),
        (["--run", "tiny", "--image", "/no/such.png"], "no such file"),
        (["--run", "tiny", "--max-new-tokens", "0"], "1 or more"),
        (["--run", "tiny", "--image", "x.png", "--question", "Q9"], "there is no question 'Q9'; Q1, Q2"),
        (["--run", "tiny", "--image", "x.png", "--question", " q 0"], "there is no question ' q 0'"),
        (["--run", "tiny", "--image", "x.png", "--question", ""], "--question; it is empty"),
        (["--run", "tiny", "--folder", ".", "--out", "x.xlsx", "--question", ""], "leave out --image, --data and --question"),
        (["--run", "tiny", "--adapter"], "--adapter; tiny has none"),
        (["--run", "sonovqa", "--adapter"], "--adapter; sonovqa has none"),
        (["--endpoint", "http://h", "--adapter"], "--adapter; an endpoint has none"),
        (["--endpoint", "http://h", "--bits", "4"], "--bits 4; an endpoint has its own"),
        (["--run", "tiny", "--model", "x"], "--model is a name at an endpoint"),
        (["--endpoint", "http://127.0.0.1:9"], "no answer from the endpoint"),
        (["--endpoint", "nonsense"], "is no URL"),
        (["--run", "tiny", "--data", "/no/such"], "no data set there"),
    ],
)
def test_mistakes_on_the_command_line(words, told, monkeypatch):
    monkeypatch.setattr(conversation, "LocalAnswerer", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match=told):
        inference.main(words)


@pytest.mark.parametrize("part", ["", "merged"])
def test_a_runs_own_adapter_is_taken(tmp_path, monkeypatch, part):
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    loaded = []
    monkeypatch.setattr(conversation, "LocalAnswerer", lambda *args: loaded.append(args))
    args = inference.parse(["--run", str(tmp_path / part), "--adapter"])
    inference.answerer(args)
    assert loaded == [(str(tmp_path / part), 16, True, Batch(questions=1))]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompts", "fancy"], "no question has a prompt named 'fancy'; default, paraphrase, short"),
        (["--prompts", "Q9=short"], "'Q9' is no question"),
        (["--prompts", "short,clinical"], "one name stands for all"),
        (["--prompts", ""], "no question has a prompt named ''"),
        (["--prompts", "simple", "--question", "Q2"], "Q2 has no such prompt; clinical, default, paraphrase, short are allowed"),
        (["--prompts", "Q7=simple", "--question", "report"], "report has no such prompt; default, paraphrase, structured"),
    ],
)
def test_prompts_that_cannot_be_asked_are_told_in_one_line_before_anything_is_loaded(words, told, tmp_path, monkeypatch):
    noise_image(64, 48, 1).save(image := tmp_path / "scan.png")
    monkeypatch.setattr(inference, "answerer", lambda args: pytest.fail("loaded"))
    with pytest.raises(UserError, match=told) as mistake:
        inference.main(["--run", "tiny", "--image", str(image), *words])
    assert "\n" not in str(mistake.value)
