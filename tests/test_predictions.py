"""The file of answers: a broken line is named, nothing is written twice, and a failure never replaces an answer."""

from __future__ import annotations

import pytest

from sonovqa import elsewhere, predictions
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


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("ERROR: 500", True), ("Error code: 429 - rate limit", True), ("[Error] timed out", True), ("error 503", True),
        ("Exception in thread: boom", True), ("ERROR", True), ("measurement error is small", False), ("Errors: none", False),
        ("HTTP 500", True), ("HTTP/1.1 502 Bad Gateway", True), ("Internal Server Error", True), ("RateLimitError: 429", True),
        ("openai.APITimeoutError: Request timed out.", True), ("Request timed out", True), ("null", True), ("nan", True),
        ('{"error": {"message": "overloaded"}}', True), ("<html><body>502 Bad Gateway</body></html>", True),
        ("404 Client Error: Not Found for url", True), ("**Error:** no answer", True), ("Connection refused", True),
        ("None", False), ("no error seen", False), ("not found", False), ("nulliparous", False), ("HC 429 mm", False),
        ('{"answer": "normal", "error": null}', False), ('{"error": null, "answer": "normal"}', False), ("N/A", False),
        ("undefined margins", False), ("500 g", False), ("connection between the ventricles", False), ("not available", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_failure(text, failed):
    assert bool(elsewhere.FAILURE.match(text)) == failed
