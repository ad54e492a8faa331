"""prepare_dataset.py --export-chat: the messages of training beside the images' own bytes."""

from __future__ import annotations

import json

import pytest
from clinic import clinic, prepare

from sonovqa.chat import messages, tasks_of
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS
from sonovqa.splits import SPLITS


@pytest.mark.parametrize("task", ["all", "report", "Q7"])
def test_export_chat(tmp_path, task):
    clinic(tmp_path)
    target = tmp_path / "chat" / "set.jsonl"
    data, _ = prepare(tmp_path, "--export-chat", target, "--task", task)
    prepare(tmp_path, "--export-chat", target, "--task", task)  # an export may replace an export
    for split, name in zip(SPLITS, ("set", "set-validation", "set-test"), strict=True):
        lines = [json.loads(line) for line in (target.parent / f"{name}.jsonl").read_text().splitlines()]
        wanted = [
            messages(f"set-images/{row['image_id']}", asked["prompt"], None, asked["answer"])
            for row in data[split]
            for asked in tasks_of(row, task)
        ]
        assert [line["messages"] for line in lines] == wanted and wanted
        for line in lines:
            content = line["messages"][1]["content"]
            assert [part["type"] for part in content] == ["image", "text"]
            source = tmp_path / "images" / content[0]["image"].removeprefix("set-images/")
            assert (target.parent / content[0]["image"]).read_bytes() == source.read_bytes()


def test_export_asks_and_answers_as_a_prompt_variant_wants(tmp_path):
    clinic(tmp_path)
    _, plain = prepare(tmp_path)
    data, about = prepare(tmp_path, "--export-chat", tmp_path / "set.jsonl", "--task", "Q7", "--prompts", "structured")
    assert about == plain, "prompts are the export's alone: the stored set is the same"
    turns = [json.loads(line)["messages"] for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert {turn[1]["content"][1]["text"] for turn in turns} == {QUESTIONS["Q7"].prompts["structured"]}
    said = [turn[2]["content"][0]["text"] for turn in turns]
    assert said == [row["questions"][6]["answer"].upper() for row in data["train"]]
    assert {"NORMAL", "ABNORMAL"} >= set(said)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--export-chat", "set.jsonl", "--prompts", "fancy"], "no question has a prompt named 'fancy'; default, paraphrase"),
        (["--export-chat", "set.jsonl", "--prompts", "Q2=simple"], "Q2 has no prompt named 'simple'"),
        (["--export-chat", "set.jsonl", "--prompts", "simple", "--task", "Q2"], "--task Q2 has no such prompt"),
        (["--prompts", "clinical"], "--prompts is for --export-chat only; clinical"),
    ],
)
def test_prompts_that_cannot_be_asked_are_told_in_one_line_before_anything_is_read(tmp_path, monkeypatch, arguments, told):
    clinic(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as mistake:
        prepare(tmp_path, *arguments)
    assert "\n" not in str(mistake.value) and not (tmp_path / "data").exists()


def test_export_never_replaces_a_folder_of_someone_else(tmp_path):
    clinic(tmp_path)
    (tmp_path / "chat-images").mkdir()
    with pytest.raises(UserError, match="folder for the images exists"):
        prepare(tmp_path, "--export-chat", tmp_path / "chat.jsonl")
