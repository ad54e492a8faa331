"""What is told of a stored data set: one reader for everybody, and mistakes that are one line."""

from __future__ import annotations

import shutil

import pytest

import evaluate
from sonovqa import dataset
from sonovqa.cli import UserError

DAMAGED = [
    (b'{"fingerprint": "ab', "no JSON: Unterminated string"),
    (b"", "no JSON"),
    (b"\xff\xfe", "no JSON"),
    (b"{}", "lacks the fingerprint"),
    (b'{"fingerprint": null}', "lacks the fingerprint"),
    (b"[]", "lacks the fingerprint"),
]


def test_about_is_what_dataset_json_says(data):
    assert dataset.about(data) == {"fingerprint": "toy"}


@pytest.mark.parametrize(("content", "told"), DAMAGED)
def test_a_damaged_dataset_json_is_one_line(tmp_path, content, told):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=told) as mistake:
        dataset.about(tmp_path)
    assert "\n" not in str(mistake.value) and str(tmp_path / "dataset.json") in str(mistake.value)


@pytest.mark.parametrize("name", ["", "gone"])
def test_no_data_set_there(tmp_path, name):
    with pytest.raises(UserError, match=r"no data set there; .*prepare_dataset\.py"):
        dataset.about(tmp_path / name)


@pytest.mark.parametrize("content", [b"{", b"{}"])
def test_evaluation_of_a_damaged_set_is_refused(data, tmp_path, content):
    shutil.copytree(data, tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match="the data set cannot be read"):
        evaluate.main(["some/model", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "eval")])
