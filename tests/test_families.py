"""Every family of `sonovqa.families`, on a tiny random checkpoint of its real class: train.py, evaluate.py, merging, vLLM."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import running
import torch
from conftest import ROOT
from tiny_families import FAMILIES, write

import evaluate
from sonovqa import adapting, dataset, families, families_table, files, finishing, merging, models, predictions
from sonovqa.cli import UserError
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


@pytest.fixture(scope="module")
def train_one(tokenizer, few, tmp_path_factory):
    """Runs train.py on a family's tiny checkpoint, once: fifty steps of all four images."""

    @functools.cache
    def one(name: str) -> Trained:
        folder = tmp_path_factory.mktemp(name.replace("-", ""))
        torch.manual_seed(0)
        write(name, tokenizer, folder / "base")
        made = Trained(folder / "base", folder / "run")
        how = {"batch": 16, "steps": 50, "eval_every": 50, "schedule": "constant_with_warmup", "alpha": 32}
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, made, few)
            if not families.FAMILIES[name].pixel_budget:
                patch.delitem(running.FLAGS, "max-pixels")
            made.record = running.run(made.base, few, folder, "run", **how)
        return made

    return one


def watch(patch, made: Trained, few: Path) -> None:
    """Note what train.py's model is at the start and says at the end; merge here instead of in a process of its own."""
    adapt, save = adapting.adapt, finishing.save
    start: dict[str, torch.Tensor] = {}

    def watched_adapt(*arguments):
        adapted = adapt(*arguments)
        start.update({name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad})
        return adapted

    def watched_save(args, folder, loaded, trainer, record):
        now = dict(trainer.model.named_parameters())
        made.moved = {name: not torch.equal(now[name].detach(), before) for name, before in start.items()}
        engine = LocalEngine(trainer.model.eval(), loaded.processor)
        made.live = {(r.image_id, r.question_id): r.text for r in engine.answer(asked(few), NEW_TOKENS)}
        save(args, folder, loaded, trainer, record)

    def merged_here(folder, gpu_memory):
        merging.main([str(folder)])
        return files.read_json(folder / "merge.json")

    patch.setattr(adapting, "adapt", watched_adapt)
    patch.setattr(finishing, "save", watched_save)
    patch.setattr(merging, "run", merged_here)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, train_one) -> Trained:
    """The finished run of each family."""
    return train_one(request.param)


def lines_of(record: Path) -> list[dict]:
    """The rows of a benchmark's record, or the one run that it is of; on a GPU, or there are none."""
    made = files.read_json(record)
    return made.get("rows", [made]) if "NVIDIA" in made["device"]["name"] else []


def test_the_table_says_of_every_family_what_was_run():
    """experiments.md's family table: `tests/test_project.py` holds the page to it, this holds it to what is run here."""
    assert set(families_table.TESTED) == set(FAMILIES) == set(families.FAMILIES)
    for kind, (_, names) in families_table.ON_GPU.items():
        for name in names:
            backends = {line["backend"] for line in lines_of(ROOT / "outputs" / "records" / name)}
            assert backends == {"unsloth" if families.FAMILIES[kind].unsloth else "transformers"}, name
    told = {line[1].split("`")[1]: line for line in families_table.rows()[1:]}
    assert all(("test_vllm" in told[kind][-1]) != bool(family.not_served) for kind, family in families.FAMILIES.items())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_last_vllm_that_served_a_family_is_the_one_of_its_registry():
    """Its message is "was supported in vLLM until v…", so the version there still served it."""
    registry = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor" / "models" / "registry.py"
    told = families.FAMILIES["mllama"].not_served
    assert told.startswith("supported until vLLM ")
    assert f'"MllamaForConditionalGeneration": "{told.split()[-1]}"' in registry.read_text()


def test_a_family_that_is_not_tested_says_so(monkeypatch):
    monkeypatch.setattr(families_table, "TESTED", ())
    assert all(line[6] == "not run" and "tests/" not in line[5] + line[8] for line in families_table.rows()[1:])


def test_an_unknown_family_trains_separate_rows_and_says_so(tokenizer, few, tmp_path, monkeypatch, capsys):
    """Nothing is assumed of it: its processor counts the image's tokens, it makes its own positions, it is asked one by one."""
    write("qwen2_vl", tokenizer, tmp_path / "base")
    monkeypatch.setattr(families, "FAMILIES", {"qwen3_vl": families.FAMILIES["qwen3_vl"]})
    running.run(tmp_path / "base", few, tmp_path, "run", "--no-merge", steps=1, eval_every=1, batch=16)
    said = " ".join(capsys.readouterr().out.split())
    assert "one question a sequence: qwen2_vl cannot share an image among its questions (no test has shown" in said
    evaluate.main([str(tmp_path / "run"), "--adapter", "--data", str(few), "--no-blind", "--max-new-tokens", "4",
                   "--out", str(tmp_path / "out"), "--resamples", "0"])  # fmt: skip
    assert all(r["error"] is None for r in predictions.read(tmp_path / "out" / "predictions.jsonl"))


def test_blip_2_trains_as_its_users_do_unless_told_otherwise(tokenizer, few, tmp_path, monkeypatch):
    """8 bits, LoRA on the queries and values of its language model."""
    write("blip-2", tokenizer, tmp_path / "base")
    for flag in ("bits", "max-pixels"):
        monkeypatch.delitem(running.FLAGS, flag)
    record = running.run(tmp_path / "base", few, tmp_path, "run", "--no-merge", steps=2, eval_every=2, batch=16)
    config = files.read_json(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert record["arguments"]["bits"] == 8 and (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert {name.split(".")[-1] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    assert all(name.startswith("language_model.") for name in config["target_modules"])


def test_a_text_only_model_is_one_line(tokenizer, few, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="takes none; name a vision-language model") as caught:
        running.run(tmp_path / "base", few, tmp_path, "run")
    files.write_json(tmp_path / "base" / "processor_config.json", {})
    with pytest.raises(UserError, match="cannot load --model") as other:
        models.load_for_inference(str(tmp_path / "base"))
    assert "\n" not in str(caught.value) + str(other.value)


def test_overfits(trained):
    losses = running.losses_of(trained.record)
    assert losses[-1] < losses[0] / 2
    assert [name for name, moved in trained.moved.items() if not moved] == []


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
def test_same_answers(trained, few, tmp_path, adapter):
    words = [str(trained.folder), "--data", str(few), "--split", "train", "--no-blind",
             "--max-new-tokens", str(NEW_TOKENS), "--out", str(tmp_path / "out"), "--resamples", "0"]  # fmt: skip
    evaluate.main([*words, "--adapter"] if adapter else words)
    told = {(r["image_id"], r["question_id"]): r["prediction"] for r in predictions.read(tmp_path / "out" / "predictions.jsonl")}
    assert told == trained.live


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_same_answers(train_one, few, tmp_path):
    """The merged weights of every family that vLLM is said to serve, in vLLM, against the model as it was trained."""
    served = [name for name, family in families.FAMILIES.items() if not family.not_served]
    wanted, questions = {}, {}
    for name in served:
        made = train_one(name)
        keys = [(request, question_id, prompt) for request in asked(few) for question_id, prompt in request.prompts]
        for k, (request, _, _) in enumerate(keys):
            (tmp_path / f"{k}.png").write_bytes(request.image)
        questions[str(made.folder / "merged")] = [[str(tmp_path / f"{k}.png"), prompt] for k, (_, _, prompt) in enumerate(keys)]
        wanted[str(made.folder / "merged")] = [made.live[request.image_id, question_id] for request, question_id, _ in keys]
    files.write_json(tmp_path / "asked.json", questions)
    words = [sys.executable, str(ROOT / "tests" / "ask_vllm.py"), str(tmp_path / "asked.json")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
