"""What is refused before loading: the peak of what a command answers at once; and the ways out, which fit by the same count."""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import replace

import pytest
import real_sizes
import torch
from conftest import ROOT, noise_image
from PIL import Image

import evaluate
import inference
from sonovqa import (
    answer_limits,
    architectures,
    asking,
    bench_cases,
    bench_images,
    bench_scores,
    bench_worker,
    conversation,
    dataset,
    files,
    memory,
    memory_check,
    memory_peak,
    memory_plan,
    models,
    robustness,
    weights,
)
from sonovqa.cli import UserError
from sonovqa.memory_peak import Batch
from sonovqa.questions import QUESTIONS

LLAVA, QWEN = "LLaVA-1.5-7B", "Qwen3-VL-8B"
ALONE = {"alone": "--no-shared-prefix"}  # evaluate.py's flag


@pytest.fixture(scope="module")
def sizes():
    """Both real sizes, made once: transformers' classes are slow to import."""
    return {name: (real_sizes.shapes(name), real_sizes.meta_model(name).config.to_dict()) for name in (LLAVA, QWEN)}


@pytest.fixture
def check(monkeypatch, sizes):
    """Whether one of the real sizes fits so many GB that are free on a GPU: "" or the line that says why not."""

    def told(name: str, free: float, bits: int, batch: Batch | None = None, config: dict | None = None) -> str:
        tensors, stored = sizes[name]
        monkeypatch.setattr(weights, "of_model", lambda _: tensors)
        monkeypatch.setattr(weights, "config_of", lambda _: stored if config is None else config)
        monkeypatch.setattr(memory, "free", lambda cuda: free * 1e9)
        monkeypatch.setattr(memory, "device", lambda: (True, 2))
        try:
            memory_check.check_inference(name, bits, batch)
        except UserError as fault:
            return str(fault)
        return ""

    return told


@pytest.mark.parametrize(
    ("name", "free", "bits", "batch", "told"),
    [
        (LLAVA, 8, 16, Batch(), "18 GB in 16 bits; 8 GB are free on the GPU; --bits 4 would need 8.5 GB: use a smaller model"),
        (LLAVA, 8, 16, Batch(questions=1), "15 GB in 16 bits; 8 GB are free on the GPU; --bits 4 needs about 5.6 GB"),
        (LLAVA, 8, 4, Batch(8), "32 GB in 4 bits with 8 images at once; 8 GB are free .*; --batch-images 1 would need 8.5 GB"),
        (LLAVA, 8, 4, Batch(8, **ALONE), "free on the GPU; --batch-images 1 --no-shared-prefix needs about 5.6 GB"),
        (LLAVA, 9, 4, Batch(8, **ALONE), "9 GB are free on the GPU; --batch-images 1 needs about 8.5 GB"),
        (LLAVA, 16, 4, Batch(8), "32 GB in 4 bits with 8 images at once; 16 GB are free .*; --batch-images 3 needs about 15 GB"),
        (LLAVA, 16, 16, Batch(8), "41 GB in 16 bits with 8 images at once; .*; --bits 8 --batch-images 2 needs about 15 GB"),
        (QWEN, 8, 4, None, "8.7 GB in 4 bits; 8 GB are free on the GPU; use a smaller model or a machine with more"),
        (QWEN, 8.001, 4, Batch(questions=1), r"8\.\d\d\d? GB in 4 bits; 8 GB are free on the GPU; use a smaller model"),
        (QWEN, 12, 4, Batch(8), "15 GB in 4 bits with 8 images at once; 12 GB are free on the GPU; --batch-images 4 needs"),
        (QWEN, 16, 16, Batch(8), "25 GB in 16 bits with 8 images at once; .*; --bits 8 --batch-images 5 needs about 16 GB"),
        (QWEN, 16, 4, Batch(8), None),
        (LLAVA, 48, 16, Batch(8), None),
    ],
)  # fmt: skip
def test_what_is_answered_at_once_is_counted(check, name, free, bits, batch, told):
    said = check(name, free, bits, batch)
    assert not said if told is None else re.match(f"{name} needs about .*{told}", said), said


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_only_ways_out_that_fit_are_named(check, name):
    named = 0
    for free in (6, 8, 9, 12, 24):
        for bits in (16, 4):
            for images in (1, 30):
                said = check(name, free, bits, Batch(images, **ALONE)).rpartition("; ")[2]
                if "needs about" in said:
                    flags = argparse.ArgumentParser()
                    flags.add_argument("--bits", type=int, default=bits)
                    flags.add_argument("--batch-images", type=int, default=images)
                    flags.add_argument("--no-shared-prefix", action="store_false", default=True)
                    found = flags.parse_args(said.partition(" needs")[0].split())
                    batch, named = Batch(found.batch_images, share=found.no_shared_prefix), named + 1
                    assert check(name, free, found.bits, batch) == "", said
                    if batch.share and batch.images < images:
                        assert check(name, free, found.bits, replace(batch, images=batch.images + 1)), "one more would fit"
    assert named > 5


def test_an_architecture_that_nobody_knows_is_judged_by_its_weights(check):
    assert check(LLAVA, 16, 16, Batch(8), {"model_type": "unheard_of", "vision_config": {"patch_size": 14}}) == ""
    assert check(LLAVA, 16, 16, Batch(8), {"model_type": "llava", "vision_config": ["odd"]}) == "", (
        "loading will say what is wrong"
    )
    said = check(LLAVA, 12, 16, Batch(8), {})
    assert said.startswith(f"{LLAVA} needs about 15 GB in 16 bits; 12 GB are free on the GPU; --bits 8 needs about 8.2 GB")


RECORDS = ("bench-memory-h200", "bench-answer-h200", "bench-memory-16-bits-h200", "bench-memory-4-8-bits-h200",
           "bench-memory-8-bits-h200", "bench-4-answer-4-bits", "bench-4-answer-16-bits",
           "bench-answer-beside-vllm-h200")  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_what_the_configuration_tells_is_what_was_measured(record):
    """Peaks of tensors on an H200, with a workload from config.json in place of the processor's own."""
    made, compared = files.read_json(ROOT / "outputs" / "records" / f"{record}.json"), 0
    for row in made["rows"]:
        size = next((size for size in architectures.SIZES if row["model"].endswith((f"-{size}", f"/{size}"))), None)
        if size is None or row.get("memory") != bench_cases.TENSORS:
            continue
        width, height = made["settings"]["images"]["size"]
        shared = row["engine"] == bench_cases.SHARED
        batch = Batch(row["level"], 8, made["settings"]["new_tokens"], width * height, share=shared)
        tensors, config = memory_plan.shapes(size)
        told, compared = memory_check.peak(tensors, config, row["bits"], 2, batch), compared + 1
        print(f"{row['model']} {row['bits']} {row['engine']}: {told / 1e9:.2f} GB, {row['memory_peak'] / 1e9:.2f} measured")
        assert told == pytest.approx(row["memory_peak"], rel=0.03)
    assert compared


def test_a_plan_and_the_check_count_the_same():
    tensors, config = memory_plan.shapes("8B")
    planned = memory_plan.plan("8B", 4, 8, 16, 800 * 600, 128)["answering_bytes"]
    assert planned == round(memory_check.peak(tensors, config, 4, 2, Batch(pixels=800 * 600)) + memory.CUDA_CONTEXT)


def test_a_choice_head_makes_no_cache_for_each_question(sizes):
    tensors, config = sizes[QWEN]
    chosen, written = (memory_peak.expected(config, Batch(8, 8, tokens)) for tokens in (0, 128))
    assert (chosen.rows, written.rows, chosen.new_tokens) == (8, 64, 0)
    assert chosen.prefix == written.prefix + 8 * written.branch
    peaks = [memory_peak.predict(tensors, config, 16, 2, work).peak for work in (chosen, written)]
    assert peaks[0] < peaks[1]


def test_long_questions_and_many_of_them_are_counted(sizes):
    config = sizes[QWEN][1]
    assert memory_peak.expected(config, Batch(letters=4000)).branch == 1020
    assert memory_peak.expected(config, Batch(64)).rows == 128, "no more are decoded at once"


@pytest.mark.parametrize(
    ("largest", "pixels", "encoded"),
    [
        (None, (None, None), 9216),
        (100 * 100, (None, None), 9216),
        (64 * 64, (None, None), 64 * 64),
        (10, (None, None), 64 * 64),
        (100 * 100, (None, 128 * 128), 100 * 100),
        (None, (None, 10**7), memory.USUAL_PIXELS),
        (None, (10**6, 10**7), 10**6),
    ],
)
def test_an_image_counts_as_large_as_it_is_encoded(base, tmp_path, monkeypatch, largest, pixels, encoded):
    """The base's own budget is 64x64 to 96x96; flags override it, and no image is larger than it is."""
    shutil.copytree(base, tmp_path / "m")
    path = tmp_path / "m" / "processor_config.json"
    stored = files.read_json(path)
    stored["image_processor"]["size"] = {"shortest_edge": 4096, "longest_edge": 9216}
    files.write_json(path, stored)
    seen = []
    monkeypatch.setattr(memory_check, "peak", lambda *told: seen.append(told[-1].pixels) or 0)
    memory_check.check_inference(str(tmp_path / "m"), 16, Batch(pixels=largest), pixels)
    assert set(seen) == {encoded}


@pytest.mark.parametrize("stored", ["not JSON", '{"size": 224}', '{"image_processor": {"size": {"longest_edge": 8}}}'])
def test_processor_files_without_a_budget_leave_a_usual_image(base, tmp_path, monkeypatch, stored):
    shutil.copytree(base, tmp_path / "m")
    (tmp_path / "m" / "processor_config.json").write_text(stored)
    seen = []
    monkeypatch.setattr(memory_check, "peak", lambda *told: seen.append(told[-1].pixels) or 0)
    memory_check.check_inference(str(tmp_path / "m"), 16)
    assert seen == [memory.USUAL_PIXELS]


def test_an_adapter_brings_its_budget_and_its_matrices(base, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    size = {"shortest_edge": 1024, "longest_edge": 2048}
    files.write_json(tmp_path / "processor_config.json", {"image_processor": {"size": size}})
    save_file({"a": torch.zeros(10**6)}, tmp_path / "adapter_model.safetensors")
    seen = []
    monkeypatch.setattr(memory_check, "peak", lambda *told: seen.append(told[-1].pixels) or 0)
    monkeypatch.setattr(memory, "free", lambda cuda: 3_999_999)
    memory_check.check_inference(str(base), 16)
    with pytest.raises(UserError, match=r"needs about 0\.004 GB in 16 bits; 4 MB of memory"):
        memory_check.check_inference(str(base), 16, adapter=tmp_path)
    assert seen[-1] == 2048


def test_the_batch_of_a_split_is_its_largest_image_most_questions_and_longest_prompt(data):
    raw = dataset.load_undecoded(data)["test"]
    items, sizes = asking.items_of(raw), asking.image_sizes(raw, range(len(raw)))
    batch = asking.batch_of(items, sizes, 8, 100)
    assert batch == Batch(8, len(QUESTIONS), 100, 96 * 64, max(len(item.prompt) for item in items))
    assert asking.batch_of(items, sizes, 8, 100, head=True).new_tokens == 0
    assert asking.batch_of(asking.items_of(raw, "report"), sizes, 8, 100).new_tokens == 8 * 100
    assert asking.batch_of(asking.items_of(raw, "Q7"), sizes, 8, 100).questions == 1
    other = [replace(item, prompt=f"{item.image_id} {item.prompt}") for item in items]
    assert asking.batch_of(other, sizes, 8, 100, blind=True).questions == len(items), "all are asked about one grey image"


@pytest.fixture
def loaded(monkeypatch) -> list[Batch]:
    """What is told to be answered at once when a model is about to be loaded; nothing is."""
    told = []

    def load(name, bits=16, adapter=None, pixels=(None, None), batch=None):
        told.append(batch)
        raise UserError("enough")

    monkeypatch.setattr(models, "load_for_inference", load)
    return told


def test_evaluate_and_robustness_tell_what_they_will_ask(base, data, tmp_path, loaded):
    words = [str(base), "--data", str(data), "--out", str(tmp_path / "o"), "--batch-images", "3", "--max-new-tokens", "9"]
    for more in ([], ["--no-shared-prefix", "--task", "Q7", "--fresh"]):
        with pytest.raises(UserError, match="enough"):
            evaluate.main([*words, *more])
    with pytest.raises(UserError, match="enough"):
        evaluate.main(["prompts", *words, "--prompts", "short", "default"])
    first, alone, several = loaded
    assert (first.images, first.questions, first.new_tokens, first.pixels) == (3, 8, 9, 96 * 64)
    assert first.share and first.alone == "--no-shared-prefix" and not alone.share and alone.questions == 1
    assert (several.images, several.questions, several.new_tokens) == (3, 8, 9)
    shutil.copytree(base, tmp_path / "run" / "merged")
    files.write_json(tmp_path / "run" / "run.json", {"run": "run", "arguments": {"augmentation": "none", "seed": 1}})
    with pytest.raises(UserError, match="enough"):
        robustness.main([str(tmp_path / "run"), *words[1:4], str(tmp_path / "o.json"), "--batch-images", "2"])
    assert (loaded[-1].images, loaded[-1].questions, loaded[-1].pixels, loaded[-1].alone) == (2, 8, 96 * 64, "")


def test_inference_tells_one_question_or_a_folder_of_images(base, tmp_path, loaded):
    for k, size in enumerate(((64, 48), (400, 300))):
        noise_image(*size, k).save(tmp_path / f"{k}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    Image.new("L", (9000, 9000)).save(tmp_path / "huge.png")  # more than is ever decoded
    one, folder = ["--run", str(base), "--image", str(tmp_path / "1.png"), "--question"], ["--folder", str(tmp_path)]
    sheet = ["--out", str(tmp_path / "o.xlsx")]
    for words in (
        [*one, "Q7"],
        [*one, "report"],
        [*one[:2], *folder, *sheet],
        [*one[:2], *folder, *sheet, "--batch-images", "2"],
    ):
        with pytest.raises(UserError, match="enough"):
            inference.main(words)
    assert loaded[:2] == [Batch(questions=1, pixels=120_000), Batch(questions=1, pixels=120_000, new_tokens=1024)]
    assert loaded[2:] == [Batch(8, pixels=120_000), Batch(2, pixels=120_000)]
    with pytest.raises(UserError, match="--batch-images; 0; 1 or more"):
        inference.main([*one, "Q7", "--batch-images", "0"])


def test_a_folder_is_answered_in_batches_of_so_many_images(base):
    engine = conversation.LocalAnswerer(str(base), 16, False, Batch(3)).engine()
    assert engine.batch_images == 3


def test_a_benchmark_tells_its_largest_level_and_what_it_scores(base, data, tmp_path, monkeypatch):
    images = bench_images.noise(2, (96, 64), 1)
    case = bench_cases.Case("m", str(base), None, 4, bench_cases.SHARED, (1, 4), 12, True, {"data": None, "size": None})
    measured = Batch(4, 8, 12, 96 * 64, max(len(prompt) for _, prompt in images[0].prompts))
    assert bench_worker.batches_of(case, images) == [measured]
    raw = dataset.load_undecoded(data)["test"]
    asked = asking.items_of(raw, "all"), asking.image_sizes(raw, range(len(raw)))
    how = bench_cases.Scoring(str(data), "test", 0, 1, new_tokens=300)
    scoring = bench_scores.with_work(*bench_scores.with_scoring([case], how, [], {}, tmp_path))
    told = asking.batch_of(*asked, 4, 300, blind=True)
    assert bench_worker.batches_of(scoring, images) == [measured, told]
    only = replace(scoring, levels=())  # what is left of a case whose scoring was interrupted
    bench_cases.save(only, tmp_path / "case.json")
    assert bench_worker.batches_of(bench_cases.load(tmp_path / "case.json"), images) == [told]
    monkeypatch.setattr(answer_limits, "usual", lambda *told: answer_limits.EXTRACTION)
    pages = bench_scores.with_work(*bench_scores.with_scoring([case], replace(how, new_tokens=None), [], {}, tmp_path))
    assert bench_worker.batches_of(pages, images)[1].new_tokens == 2048


def test_a_command_names_its_own_flag_before_anything_is_loaded(base, data, tmp_path, monkeypatch):
    """On a CPU main memory is judged the same way."""
    tensors, config = weights.of_folder(base), weights.config_of(str(base))
    one, all_ = (memory_check.peak(tensors, config, 16, 4, Batch(n, 8, 9, 96 * 64)) for n in (1, 4))
    monkeypatch.setattr(memory, "free", lambda cuda: (one + all_) / 2)
    monkeypatch.setattr(models, "_load_transformers", lambda *told: pytest.fail("loaded"))
    words = [str(base), "--data", str(data), "--out", str(tmp_path / "o"), "--batch-images", "4", "--max-new-tokens", "9"]
    with pytest.raises(
        UserError, match=r"in 16 bits with 4 images at once; .* of memory are free here; --batch-images [12] needs"
    ):
        evaluate.main(words)
