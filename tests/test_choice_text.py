"""Texts with labels: a CSV file made a data set, and text-only models trained, merged and asked by the choice head."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from running import pushed, run

import evaluate
import inference
import prepare_dataset
from sonovqa import chat, csv_text, dataset, files, text_only, tiny
from sonovqa.cli import UserError

FINDINGS = {"yes": "mass seen", "no": "nothing seen"}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Ninety-six notes; a third of them urgent, told by two words."""
    path = tmp_path_factory.mktemp("csv") / "notes.csv"
    rows = [(f"Patient {n} at week {n % 20 + 15}: {FINDINGS['yes' if n % 3 == 0 else 'no']}.", "yes" if n % 3 == 0 else "no",
             f"p{n // 4}") for n in range(96)]  # fmt: skip
    write(path, [("Text", "label", "patient"), *rows])
    return path


def write(path: Path, rows: list) -> None:
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def prepared(table: Path, out: Path, *more: str) -> dict:
    prepare_dataset.main(["csv-text", str(table), "--out", str(out), *more])
    return files.read_json(out / "dataset.json")


@pytest.fixture(scope="module")
def notes(table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "notes"
    prepared(table, folder, "--group-column", "patient", "--question", "Is it urgent?")
    return folder


def test_a_text_is_a_row_without_an_image_and_patients_stay_whole(notes):
    splits, about = dataset.load_undecoded(notes), dataset.about(notes)
    row = splits["train"][0]
    assert row["image"] is None and row["questions"][0]["question"].startswith("Is it urgent?\nPatient")
    assert row["questions"][0]["label"] == row["questions"][0]["answer"] in ("yes", "no")
    groups = [set(split["group"]) for split in splits.values()]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    assert sum(len(split) for split in splits.values()) == 96 and about["leakage"]["groups"] == []
    labels = [about["splits"][name]["labels"]["label"] for name in splits]
    assert all(set(found) == {"yes", "no"} for found in labels), "labels are spread over the splits"


def test_the_same_text_is_kept_once_and_with_two_labels_not_at_all(tmp_path):
    rows = [("text", "label"), *((f"note {n}", "ab"[n % 2]) for n in range(12))]
    rows += [("NOTE  3.", "b"), ("note 4!", "b"), ("", "a"), ("empty", "")]
    write(tmp_path / "t.csv", rows)
    about = prepared(tmp_path / "t.csv", tmp_path / "out")
    dropped = {reason: len(items) for reason, items in about["dropped"].items()}
    assert dropped == {"the same text again": 1, "one text with different labels": 2, "a row without text": 1,
                       "a row without label": 1}  # fmt: skip
    texts = [
        csv_text.plain(row["questions"][0]["question"]) for split in dataset.load(tmp_path / "out").values() for row in split
    ]
    assert len(texts) == len(set(texts)) == 11 and "note 4" not in texts


@pytest.mark.parametrize(
    ("rows", "flags", "told"),
    [
        ([("note", "label"), ("a", "b")], (), "lacks text; it has note, label"),
        ([("text", "label"), ("a", "x"), ("b", "x"), ("c", "x")], (), "one label for all texts"),
        ([("text", "label")], (), "no usable row is left"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ("--export-chat", "c.jsonl"), "--export-chat is of images"),
    ],
)
def test_tables_that_cannot_be_used_are_said_in_a_line(tmp_path, rows, flags, told):
    write(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=told) as mistake:
        prepared(tmp_path / "t.csv", tmp_path / "out", *flags)
    assert "\n" not in str(mistake.value)


RAGGED = "a row with more or fewer cells than the header: a text with a comma needs quotes around it"


@pytest.mark.parametrize(
    ("extra", "dropped"),
    [
        ("The heart, is fine,normal", "t.csv row 2: 3 cells, not 2"),  # pandas: text "is fine", label "normal"
        ("The heart is fine,normal,", "t.csv row 2: 3 cells, not 2"),
        ("The heart is fine", "t.csv row 2: 1 cells, not 2"),
    ],
)
def test_a_row_with_a_cell_too_many_or_too_few_is_listed_and_shifts_nothing(tmp_path, extra, dropped):
    rows = "".join(f"note {n}.,{'ab'[n % 2]}\n" for n in range(12))
    (tmp_path / "t.csv").write_text(f'text,label\n{extra}\n{rows}\n"The head, too",a\nlate, a,b\n')
    about = prepared(tmp_path / "t.csv", tmp_path / "out")
    assert about["dropped"] == {RAGGED: [dropped, "t.csv row 17: 3 cells, not 2"]}, "row 15 is empty, as a spreadsheet shows it"
    asked = [row["questions"][0] for split in dataset.load(tmp_path / "out").values() for row in split]
    assert {(q["question"], q["answer"]) for q in asked} == {("The head, too", "a")} | {
        (f"note {n}.", "ab"[n % 2]) for n in range(12)
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('text,label\na,x\n"b,y\n', "cannot be read; .*after row 2: unexpected end of data"),
        ("text,label,Text\na,x,b\n", "has two of text"),
        ("\ntext,label\na,x\n", "no header"),
        ("", "no header"),
    ],
)
def test_a_table_of_which_nobody_can_say_what_stands_where_is_refused(tmp_path, text, told):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=told) as mistake:
        prepared(tmp_path / "t.csv", tmp_path / "out")
    assert "\n" not in str(mistake.value)


def test_a_table_that_is_no_utf_8_is_said_in_a_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\nVäinö,a\n".encode("latin-1"))
    with pytest.raises(UserError, match="a CSV file in UTF-8"):
        prepared(tmp_path / "t.csv", tmp_path / "out")


@pytest.fixture(scope="module")
def models(table, tmp_path_factory) -> dict[str, Path]:
    """Tiny random text-only models of real classes; Llama's without a chat template, as a base model has none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.06, "tie_word_embeddings": True}
    found = {}
    for name, config, kind in (("qwen3", Qwen3Config, Qwen3ForCausalLM), ("llama", LlamaConfig, LlamaForCausalLM)):
        tokenizer = tiny.make_tokenizer([table.read_text(), "Is it urgent?"] * 5, 400)
        tokenizer.chat_template = tiny.CHAT_TEMPLATE if name == "qwen3" else None
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("text") / name
        kind(config(vocab_size=len(tokenizer), **shape, **ids)).to(torch.bfloat16).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def test_a_text_model_learns_is_merged_evaluated_and_asked(models, notes, tmp_path, capsys):
    how = ("--head", "choice", "--full", "--balance", "loss", "--balance-question", "label")
    record = run(models["qwen3"], notes, tmp_path, "notes", *how, steps=40, eval_every=20, batch=16, lr=0.005)
    assert record["merge_check"]["wrong"] == [] and set(record["head"]["sets"]) == {"label"}
    folder = tmp_path / "notes"
    assert evaluate.main([str(folder), "--data", str(notes), "--confidence", "--resamples", "50"]) == 0
    scores = files.read_json(folder / "eval-test" / "scores.json")["questions"]["label"]
    assert scores["metrics"]["sensitivity"]["value"] == scores["confidence"]["AUROC"]["value"] == 1.0
    assert scores["confidence"]["of"] == "P(yes)" and scores["metrics"]["accuracy"]["majority"]["value"] < 0.8
    capsys.readouterr()
    inference.main(["--run", str(folder), "--question", "Is it urgent?\nPatient 3 at week 20: mass seen.", "--json"])
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["answer"] == "yes" and answer["probabilities"]["yes"] > 0.5


def test_lora_trains_a_text_model_and_its_adapter_answers(models, notes, tmp_path, capsys):
    record = run(models["llama"], notes, tmp_path, "lora", "--head", "choice", steps=3, batch=8)
    assert record["merge_check"]["layers"] > 0 and record["merge_check"]["wrong"] == []
    out = tmp_path / "e"
    words = [str(tmp_path / "lora"), "--data", str(notes), "--out", str(out), "--resamples", "0"]
    assert evaluate.main([*words, "--adapter"]) == 0
    assert all(json.loads(line)["probabilities"] for line in (out / "predictions.jsonl").read_text().splitlines())
    capsys.readouterr()
    inference.main(["--run", str(tmp_path / "lora"), "--adapter", "--question", "Patient 3: mass seen."])
    said = capsys.readouterr().out
    assert said.startswith(("yes (", "no ("))
    hub = pushed(tmp_path / "lora", tmp_path / "hub", models["llama"])
    inference.main(["--run", str(hub), "--adapter", "--question", "Patient 3: mass seen."])
    assert capsys.readouterr().out == said, "what was pushed to a hub knows its labels too"


def test_texts_and_images_are_not_mixed_up(models, base, data, notes, tmp_path):
    model = models["qwen3"]
    for whom, what, flags, told in ((base, notes, ("--head", "choice"), "is for images"), (model, data, (), "takes none"),
                                    (model, notes, (), "add --head choice")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            run(whom, what, tmp_path, "mixed", *flags)


def test_a_template_is_cut_where_the_text_stands(models):
    for model in models.values():
        processor = text_only.load_processor(str(model))
        template, turns = text_only.TextTemplate(processor.tokenizer), [{"role": "user", "content": "a note"}]
        whole = "Text: a note\nLabel:"
        if processor.tokenizer.chat_template:
            whole = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert template.prefix() + template.branch("a note") == whole and chat.QUESTION_MARK not in whole
