"""Whose answers an evaluation may go on with: weights that changed under the same name are others."""

from __future__ import annotations

import argparse

import pytest

from sonovqa import answering, models


def identity(name) -> str | None:
    return answering.identity(argparse.Namespace(run=str(name), adapter=False))


def test_tiny_weights_built_anew_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "locate", lambda name: str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identity("tiny-small")
    assert before is not None and before == identity("tiny-small") == identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert identity("tiny-small") not in (before, None)


def test_the_shipped_tiny_model_has_an_identity():
    assert identity("tiny") is not None


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / "snapshots" / "c0ffee" / file))
    assert identity("owner/model") == "c0ffee"


@pytest.mark.parametrize("name", ["owner/not-in-the-cache", "no hub id/at all"])
def test_what_cannot_be_asked_is_nobodys(name):
    assert identity(name) is None
