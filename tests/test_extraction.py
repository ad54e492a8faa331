"""Extractions as models write them: where their JSON stands, how it is shaped, and what its words and units mean."""

from __future__ import annotations

import json

import pytest

from sonovqa import extraction

ONE = '{"values": [{"name": "X", "value": 5, "unit": "mmol/L"}]}'
OTHER = ONE.replace("5", "6")


@pytest.mark.parametrize(
    "text",
    [
        f"Page [1]: {ONE}", f"{ONE}\nSee reference [1].", f"[See below] {ONE}", f"Values (mmol/L) [as of {ONE}",
        f'<think>Perhaps {{"values": [...]}} or {OTHER}</think>{ONE}', f"it may be {OTHER}</think>\n{ONE}",
        f'{{"values": []}}\nSorry: {ONE}', f"{OTHER}\nSorry: {ONE}", f'{ONE}\n{{"values": []}}', f'{{"values": [5,]}} {ONE}',
        f'{{"values": [{{"name": "", "value": 0, "unit": ""}}]}} becomes {ONE}', f"{ONE}<|im_end|>\n{{",
        "```json\n" + json.dumps(json.loads(ONE), indent=2) + "\n```",
    ],
)  # fmt: skip
def test_of_several_brackets_the_answer_is_read(text):
    assert extraction.score(ONE, text)["combined"] == 1


def test_json_as_deep_as_an_extraction_may_be_is_read():
    assert extraction.score(ONE, "[" * 45 + ONE + "]" * 45)["combined"] == 1
    assert not extraction.score(ONE, "[" * 50 + ONE + "]" * 50)["read"]
