"""Every family of `sonovqa.families`, on a tiny random checkpoint of its real class: train.py, evaluate.py, merging, vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import running
import torch
from tiny_families import FAMILIES

import evaluate
import train
from sonovqa import dataset, families, files, finishing, merging, predictions
from sonovqa.engines import ImageRequest
from sonovqa.generation import LocalEngine
from sonovqa.questions import QUESTIONS

NEW_TOKENS = 12


@dataclass
class Trained:
    """A family's finished run.

    Attributes:
        record: its run.json.
        moved: for each trained tensor whether it is another than at the start.
        live: what the model said as it stood at the end of the training, by image and question.
    """

    base: Path
    folder: Path
    record: dict = field(default_factory=dict)
    moved: dict[str, bool] = field(default_factory=dict)
    live: dict[tuple[str, str], str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def few(data, tmp_path_factory) -> Path:
    """Four images with three questions each, to learn by heart."""
    from datasets import DatasetDict

    def three(row: dict) -> dict:
        return {"questions": [q for q in row["questions"] if q["question_id"] in ("Q2", "Q3", "Q7")]}

    splits = dataset.load_undecoded(data)
    folder = tmp_path_factory.mktemp("few") / "few"
    chosen = {
        "train": splits["train"].select(range(4, 8)),
        "validation": splits["validation"].select([0]),
        "test": splits["test"],
    }
    DatasetDict({name: split.map(three) for name, split in chosen.items()}).save_to_disk(folder)
    files.write_json(folder / "dataset.json", {"fingerprint": "few"})
    return folder


def asked(few: Path) -> list[ImageRequest]:
    """The training images with the prompts that evaluate.py asks."""
    prompts = tuple((q, QUESTIONS[q].prompts["default"]) for q in ("Q2", "Q3", "Q7"))
    rows = dataset.load_undecoded(few)["train"]
    return [ImageRequest(row["image_id"], row["image"]["bytes"], None, prompts) for row in rows]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tokenizer, few, tmp_path_factory) -> Trained:
    """train.py run on four images, fifty steps of all of them, merged here instead of in a process of its own."""
    folder = tmp_path_factory.mktemp(request.param.replace("-", ""))
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param](tokenizer)
    processor.chat_template = None if families.of(model.config).template else processor.chat_template
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    made = Trained(folder / "base", folder / "run")
    adapt, save = train.adapt, finishing.save
    start: dict[str, torch.Tensor] = {}

    def watched_adapt(*arguments):
        adapted = adapt(*arguments)
        start.update({name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad})
        return adapted

    def watched_save(args, where, loaded, trainer, record):
        now = dict(trainer.model.named_parameters())
        made.moved = {name: not torch.equal(now[name].detach(), before) for name, before in start.items()}
        engine = LocalEngine(trainer.model.eval(), loaded.processor)
        made.live = {(r.image_id, r.question_id): r.text for r in engine.answer(iter(asked(few)), NEW_TOKENS)}
        save(args, where, loaded, trainer, record)

    def merged_here(where, gpu_memory):
        merging.main([str(where)])
        return files.read_json(where / "merge.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "adapt", watched_adapt)
        patch.setattr(finishing, "save", watched_save)
        patch.setattr(merging, "run", merged_here)
        if not families.of(model.config).pixel_budget:
            patch.delitem(running.FLAGS, "max-pixels")
        how = {"batch": 16, "steps": 50, "eval_every": 50, "schedule": "constant_with_warmup", "alpha": 32}
        made.record = running.run(folder / "base", few, folder, "run", **how)
    return made


def test_overfits(trained):
    losses = running.losses_of(trained.record)
    print(losses[0], losses[-1])
    assert losses[-1] < losses[0] / 2
    assert [name for name, moved in trained.moved.items() if not moved] == []


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
def test_same_answers(trained, few, tmp_path, adapter):
    words = [str(trained.folder), "--data", str(few), "--split", "train", "--no-blind",
             "--max-new-tokens", str(NEW_TOKENS), "--out", str(tmp_path / "out"), "--resamples", "0"]  # fmt: skip
    evaluate.main([*words, "--adapter"] if adapter else words)
    told = {(r["image_id"], r["question_id"]): r["prediction"] for r in predictions.read(tmp_path / "out" / "predictions.jsonl")}
    assert told == trained.live
