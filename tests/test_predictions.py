"""The file of answers: a broken line is named, nothing is written twice, and a failure never replaces an answer."""

from __future__ import annotations

import pytest

from sonovqa import predictions
from sonovqa.cli import UserError


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n{"c": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        predictions.read(path)
    path.write_bytes(b'{"a": 1}\n{"b": ')
    assert predictions.read(path) == [{"a": 1}]


def test_two_evaluations_never_write_one_file(tmp_path):
    with predictions.Log(tmp_path / "p.jsonl"), pytest.raises(UserError, match="another evaluation"):
        predictions.Log(tmp_path / "p.jsonl")


def test_a_failure_never_replaces_an_answer():
    answer = {"image_id": "a", "question_id": "Q1", "error": None, "prediction": "x"}
    failure = answer | {"error": "HTTP 500", "prediction": None}
    assert predictions.latest([answer, failure]) == {("a", "Q1"): answer}
    assert predictions.latest([failure, answer]) == {("a", "Q1"): answer}
