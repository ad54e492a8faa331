"""train.py by running it: files, losses that do not hang on how work is dealt, resuming, and merges that are caught lying."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from running import losses_of, run
from safetensors.torch import load_file, save_file

import train
from sonovqa import adapter_shares, adapters, devices, families, files, losses, merging, models, tiny
from sonovqa.cli import UserError


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Path:
    """One finished run, shared by the tests below."""
    outputs = tmp_path_factory.mktemp("outputs")
    run(base, data, outputs, "whole")
    return outputs / "whole"


def test_a_run_leaves_exactly_these_files(trained):
    record = json.loads((trained / "run.json").read_text())
    assert {p.name for p in trained.iterdir()} == {"adapter", "merged", "checkpoints", "plan.json", "merge.json", "run.json"}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= {
        p.name for p in (trained / "adapter").iterdir()
    }
    merging.check_complete(trained / "merged")
    assert {t.dtype for t in load_file(trained / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert record["merge_check"]["wrong"] == [] and record["merge_check"]["rows"] == 16
    assert record["training"]["steps"] == 6 and len(losses_of(record)) == 6
    assert losses_of(record)[-1] < losses_of(record)[0]
    assert record["pixels"] == list(tiny.PIXELS) and record["versions"]["torch"] and record["data"] == "toy"


def test_a_finished_run_is_never_overwritten(trained, base, data):
    with pytest.raises(UserError, match="finished run; it is never overwritten"):
        run(base, data, trained.parent, "whole")


@pytest.mark.parametrize("how", [{"batch": 2, "accumulate": 2}, {"batch": 1, "accumulate": 4, "workers": 1}])
def test_loss_does_not_hang_on_how_a_step_is_dealt(trained, base, data, tmp_path, how):
    """Rows of one and of eight questions: a mean of means would differ."""
    record = run(base, data, tmp_path, "dealt", "--no-merge", **how)
    whole = json.loads((trained / "run.json").read_text())
    assert losses_of(record) == pytest.approx(losses_of(whole), rel=2e-4)


def test_separate_batching_starts_from_the_same_validation_loss(trained, base, data, tmp_path):
    shared = run(base, data, tmp_path, "shared", "--no-merge", steps=1, eval_every=1, lr=1e-9)
    separate = run(base, data, tmp_path, "separate", "--batching", "separate", "--no-merge", steps=1, eval_every=1, lr=1e-9)
    assert shared["training"]["best_validation_loss"] == pytest.approx(separate["training"]["best_validation_loss"], rel=1e-5)


def test_a_family_that_cannot_share_trains_separate_rows_and_says_so(base, data, tmp_path, monkeypatch, capsys):
    """It makes its mask and positions itself; the loss is still that of separate samples."""
    once = {"steps": 1, "eval_every": 1, "lr": 1e-9}
    separate = run(base, data, tmp_path, "separate", "--batching", "separate", "--no-merge", **once)
    capsys.readouterr()
    monkeypatch.setattr(families, "FAMILIES", {"qwen3_vl": families.Family("Qwen3-VL", False, "for this test")})
    own = run(base, data, tmp_path, "own", "--no-merge", **once)
    assert "one question a sequence: Qwen3-VL cannot share an image" in " ".join(capsys.readouterr().out.split())
    assert own["training"]["best_validation_loss"] == pytest.approx(separate["training"]["best_validation_loss"], rel=1e-5)
    assert losses_of(own) == pytest.approx(losses_of(separate), rel=1e-5)


def test_balanced_and_focal_runs_say_what_they_weigh(base, data, tmp_path, capsys, monkeypatch):
    gammas, focal_sum = [], losses.focal_sum
    monkeypatch.setattr(losses, "focal_sum", lambda *a: (gammas.append(a[-1]), focal_sum(*a))[1])
    how = ("--no-merge", "--task", "Q2", "--balance", "oversample", "--balance-question", "Q2", "--focal", "2")
    entry = run(base, data, tmp_path, "focal", *how, steps=1)["training"]["curve"][0]
    assert "effective sample size" in capsys.readouterr().out and gammas == [2.0], "validation is never focal"
    assert entry["step_seconds"] > entry["data_wait_seconds"] > 0


KEPT = {"": "best", "--focal 2": "last", "--balance loss": "last", "--keep last": "last", "--focal 2 --keep best": "best"}


@pytest.mark.parametrize(("how", "keeps"), KEPT.items())
def test_validation_loss_chooses_the_checkpoint_only_where_it_is_what_is_trained(base, data, tmp_path, monkeypatch, how, keeps):
    """The validation loss grows; it never holds a balance or focal weight, so a run that learns these keeps its last step."""
    grown = iter(range(1, 9))
    monkeypatch.setattr("sonovqa.losses.weighted_sum", _growing(losses.weighted_sum, grown))
    made = run(base, data, tmp_path, "kept", "--no-merge", "--task", "Q7", *how.split(), steps=4, eval_every=1)
    steps = {"best": 1, "last": 4}
    assert made["training"]["kept_step"] == steps[keeps]
    kept = load_file(tmp_path / "kept" / "adapter" / "adapter_model.safetensors")
    stored = load_file(tmp_path / "kept" / "checkpoints" / f"checkpoint-{steps[keeps]}" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())


def _growing(weighted_sum, times):
    """The loss of the project, greater from one validation to the next."""

    def grown(*given):
        total = weighted_sum(*given)
        return total if torch.is_grad_enabled() else total * next(times)

    return grown


def test_a_validation_takes_no_more_rows_at_a_time_than_training(base, data, tmp_path, monkeypatch):
    """Twice as many took more of an H200's memory than training did."""
    rows, answer_logits = {True: [], False: []}, losses.answer_logits

    def counted(model, batch, wrapped=None):
        rows[model.training].append(len(batch["labels"]))
        return answer_logits(model, batch, wrapped)

    monkeypatch.setattr("sonovqa.losses.answer_logits", counted)
    run(base, data, tmp_path, "rows", "--no-merge", batch=2, steps=1)
    assert (set(rows[True]), rows[False][:2]) == ({2}, [2, 2])


def test_a_step_whose_answers_all_weigh_nothing_leaves_the_weights_finite(base, data, tmp_path):
    """Separate sequences, one a step: most steps hold no Q2."""
    zero = [f"Q{k}=0" for k in (1, 3, 4, 5, 6, 7, 8)]
    record = run(base, data, tmp_path, "zero", "--batching", "separate", "--question-weights", *zero, "--no-merge", batch=1)
    assert 0.0 in losses_of(record) and all(math.isfinite(loss) for loss in losses_of(record))
    stored = load_file(tmp_path / "zero" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_report_and_single_questions_train(base, data, tmp_path):
    for task, answers in (("report", 4), ("Q7", 3)):
        record = run(base, data, tmp_path, task, "--task", task, "--no-merge", steps=2)
        assert record["training"]["loss"] > 0, answers


def test_dry_run_writes_nothing(base, data, tmp_path, capsys):
    run(base, data, tmp_path, "dry", "--dry-run")
    said = capsys.readouterr().out
    assert "s a step" in said and "nothing was written" in said and "121 answers" in said
    assert not list(tmp_path.rglob("*")), "not even a folder"


@pytest.mark.parametrize("dry", [True, False])
def test_a_gpu_without_memory_ends_training_in_a_line_and_the_run_goes_on(base, data, tmp_path, monkeypatch, dry):
    """It is full in the third step; a run has a checkpoint of the second."""
    steps, flags = iter(range(1, 9)), {"steps": 4, "eval_every": 2}

    def full(*given):
        if torch.is_grad_enabled() and next(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a\ntotal capacity of 16 GiB")
        return losses_sum(*given)

    losses_sum = losses.weighted_sum
    monkeypatch.setattr("sonovqa.losses.weighted_sum", full)
    told = r"memory is full; .*2.00 GiB; .*--batch.*--accumulate.*--max-pixels.*--bits 4"
    with pytest.raises(UserError, match=told) as mistake:
        run(base, data, tmp_path, "full", *["--dry-run"][:dry], **flags)
    assert "\n" not in str(mistake.value)
    monkeypatch.setattr("sonovqa.losses.weighted_sum", losses_sum)
    if not dry:
        again = run(base, data, tmp_path, "full", "--resume", "--no-merge", "--no-checkpointing", **flags)
        assert again["training"]["steps"] == 4 and len(losses_of(again)) == 4


def test_full_training_moves_every_weight_and_needs_16_bits(base, data, tmp_path):
    record = run(base, data, tmp_path, "full", "--full")
    assert record["merge_check"]["wrong"] == []
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "full" / "merged" / "model.safetensors")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "norm" not in name and "bias" not in name], "weights that did not move"


def tampered(run_folder: Path, tmp_path: Path) -> tuple[Path, dict]:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    return copy, load_file(copy / "merged" / "model.safetensors")


def check_again(folder: Path, base: Path) -> list[str]:
    plan = files.read_json(folder / "plan.json")
    processor = models.load_processor(str(folder / "adapter"))
    model = adapters.attach(merging.load_16_bit(str(base), None), folder / "adapter").eval()
    batches = merging.check_rows(plan, processor, model)
    reference = merging.answer_logits(model, batches)
    before = adapter_shares.projections(model.get_base_model(), folder / "adapter", merging.storage_dtype(str(base)))
    return merging.check_merged(folder / "merged", folder / "adapter", batches, reference, before)["wrong"]


def test_merge_check_passes_an_untouched_copy_and_catches_what_is_left_out(trained, base, tmp_path):
    copy, weights = tampered(trained, tmp_path)
    assert check_again(copy, base) == []
    own = load_file(base / "model.safetensors")
    save_file(own, copy / "merged" / "model.safetensors", {"format": "pt"})
    assert any("lack part of their adapter" in line for line in check_again(copy, base)), "the whole adapter left out"
    layer = "model.language_model.layers.1.self_attn.o_proj.weight"
    save_file(weights | {layer: own[layer]}, copy / "merged" / "model.safetensors", {"format": "pt"})
    assert any("1 layers lack" in line and layer.removesuffix(".weight") in line for line in check_again(copy, base)), (
        "one layer's"
    )
    save_file(weights, copy / "merged" / "model.safetensors", {"format": "pt"})
    (copy / "merged" / "processor_config.json").unlink()
    assert any("processor" in line for line in check_again(copy, base)), "the processor left out"


def test_rows_padded_as_on_a_gpu_train_the_same(base, data, tmp_path, monkeypatch):
    plain = run(base, data, tmp_path, "plain", "--no-merge", steps=3)
    lengths, forward = set(), losses.answer_logits

    def watched(model, batch, **named):
        if model.training:  # a merge check's rows stand alone
            lengths.add(batch["input_ids"].shape[1])
        return forward(model, batch, **named)

    monkeypatch.setattr(losses, "answer_logits", watched)
    monkeypatch.setattr(devices, "row_multiple", lambda: 8)
    padded = run(base, data, tmp_path, "padded", "--no-merge", steps=3)
    assert lengths and all(length % 8 == 0 for length in lengths)
    assert losses_of(padded) == pytest.approx(losses_of(plain), abs=2e-4)


def test_an_adapter_that_rounding_swallows_is_merged_and_told(base, data, tmp_path, capsys):
    """Two steps at train.py's own rate: 16 bits hold little of so small a change. That is no fault of the merge; one layer left
    out still is one."""
    record = run(base, data, tmp_path, "brief", steps=2, lr=2e-4, warmup=5)
    check, said = record["merge_check"], " ".join(capsys.readouterr().out.split())
    assert check["wrong"] == [] and check["least_share"] == pytest.approx(1, abs=0.3)
    assert check["rounding"]["layers"] > 10 and check["rounding"]["least"] < 0.5
    assert f"of {check['rounding']['layers']} layers' adapters 16 bits hold less than 50%" in said and "--lora" in said
    own, merged = load_file(base / "model.safetensors"), tmp_path / "brief" / "merged" / "model.safetensors"
    moved = next(name for name, value in load_file(merged).items() if name in own and not torch.equal(value, own[name]))
    save_file(load_file(merged) | {moved: own[moved]}, merged, {"format": "pt"})
    assert any("1 layers lack" in line for line in check_again(tmp_path / "brief", base))


def test_a_base_in_32_bits_is_rounded_before_the_merge_and_so_it_is_checked(base, data, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(base, wide)
    torch.manual_seed(0)
    weights = {
        n: w.float() + 2e-5 * torch.randn_like(w, dtype=torch.float32) for n, w in load_file(base / "model.safetensors").items()
    }
    save_file(weights, wide / "model.safetensors", {"format": "pt"})
    config = files.read_json(wide / "config.json")
    files.write_json(wide / "config.json", config | {"dtype": "float32"})
    check = run(wide, data, tmp_path, "run", steps=2, lr=2e-4, warmup=5)["merge_check"]
    assert check["wrong"] == [] and check["least_share"] > 0.7 and check["rounding"]["least"] >= 0


def test_first_step_has_decoded_no_more_than_its_batch(base, data, tmp_path, monkeypatch):
    from sonovqa import chat, training

    decoded, at_first_step = [], []
    opened, step = chat.open_image, training.SharedImageTrainer.training_step
    monkeypatch.setattr(chat, "open_image", lambda data: (decoded.append(1), opened(data))[1])
    monkeypatch.setattr(
        training.SharedImageTrainer, "training_step", lambda *a, **k: (at_first_step.append(len(decoded)), step(*a, **k))[1]
    )
    run(base, data, tmp_path, "lazy", "--no-merge", steps=2)
    assert at_first_step[0] <= 2 * 4, "16 images stand in the training split; the loader looks one batch ahead"


def test_arguments_are_all_checked_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        train.main(["--data", str(tmp_path / "none"), "--batch", "0", "--lr", "-1"])
    assert all(part in str(caught.value) for part in ("no data set there", "--batch 0", "--lr -1"))


def test_a_model_folder_with_pickled_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights"):
        models.locate(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--full --bits 4", "--full with --bits 4; quantised weights cannot be trained"),
        ("--max-pixels 0", "--max-pixels 0; at least 784"),
        ("--min-pixels 100000 --max-pixels 1000", "the fewest must not exceed the most"),
        ("--lr nan --epochs inf", "--epochs inf; must be above 0.*--lr nan; must be above 0"),
        ("--warmup -5 --workers -1 --seed -1", "--warmup -5; must be 0 or more.*--workers -1.*--seed -1"),
        ("--weight-decay nan --dropout 1", "--weight-decay nan.*--dropout 1.0; must be below 1"),
        ("--prompts poetry", "no question has a prompt named 'poetry'"),
        ("--task Q2 --question-weights Q7=x", "QUESTION=FACTOR"),
        ("--balance loss --balance-question Q99", "--balance-question Q99; not asked in this split; Q1, "),
        ("--task Q2 --question-weights Q7=2", "--question-weights Q7; not asked in this split; Q2 are"),
        ("--head choice --balance loss --balance-question Q1", "--balance-question Q1; not asked"),
    ],
)
def test_numbers_that_cannot_be_are_said_before_anything_is_loaded(base, data, tmp_path, flags, told, capsys):
    words = ["--data", str(data), "--model", str(base), "--outputs", str(tmp_path), "--bits", "16", *flags.split()]
    with pytest.raises(UserError) as caught:
        train.main(words)
    assert re.search(told, " ".join(str(caught.value).split())) and not list(tmp_path.iterdir())
