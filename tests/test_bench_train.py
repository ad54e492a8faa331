"""`python -m sonovqa.bench train`: ways of training that differ in speed only, and records that lose nothing."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from sonovqa import bench, bench_peers, bench_records, bench_steps, bench_train, cli, dataset, devices
from sonovqa.cli import UserError

SIZE = (96, 64)
MEASURED = ("seconds", "losses", "median_seconds", "mean_seconds", "spread_seconds", "pairs_per_second", "peak_memory_bytes",
            "loss", "first_loss", "warmup_seconds", "backend")  # fmt: skip
ABOUT = ("questions_an_image", "image_tokens", "prefix_tokens", "branch_tokens", "token_limit", "micro_batch", "accumulate",
         "sequence_tokens", "model", "size", "pairs", "layers", "batching")  # fmt: skip


@pytest.fixture(scope="module")
def work(base, data, tmp_path_factory) -> bench_steps.Work:
    """Raw steps of shared batching on the shared fixtures, their record begun."""
    record = tmp_path_factory.mktemp("bench") / "raw.json"
    bench_records.start(record, "train", {"steps": 3}, {"data": "toy"})
    return bench_steps.Work(
        record, data, str(base), "shared", "all", ((SIZE, 16), (SIZE, 32)), None, 2, 3, 2, 16, rank=4, checkpointing=True, seed=1
    )


@pytest.fixture(scope="module")
def rows(work) -> list[dict]:
    """Both ways of batching, then micro-batches of one image."""
    bench_steps.measure(work)
    bench_steps.measure(replace(work, batching="separate"))
    bench_steps.measure(replace(work, cells=((SIZE, 16),), micro=1))
    return bench_records.rows(work.record)


def words(data: Path, base: Path, record: Path, *more: str) -> list[str]:
    sizes = ("--size", "96x64", "--steps", "2", "--warmup", "1", "--prepared", "1", "--rank", "4")
    return ["train", "--data", str(data), "--model", str(base), "--record", str(record), *sizes, *more]


def test_shared_and_separate_steps_are_the_same_training(rows):
    """Same rows, same weights, fp32, over several updates: the losses must agree, whatever way and micro-batch."""
    shared, larger, separate, larger_separate, accumulated = rows
    assert shared["losses"] == pytest.approx(separate["losses"], abs=1e-4)
    assert shared["losses"] == pytest.approx(accumulated["losses"], abs=1e-4)
    assert larger["losses"] == pytest.approx(larger_separate["losses"], abs=1e-4)
    assert len(set(shared["losses"])) == 3 and shared["loss"] != larger["loss"], "nothing was trained, or cells are alike"
    assert (shared["micro_batch"], shared["accumulate"]) == (2, 1) and (separate["micro_batch"], separate["accumulate"]) == (
        16,
        1,
    )
    assert (accumulated["micro_batch"], accumulated["accumulate"]) == (1, 2)


def test_raw_steps_pad_their_rows_as_training_does(rows, work, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "row_multiple", lambda: 32)
    record = tmp_path / "padded.json"
    bench_records.start(record, "train", {}, {})
    bench_steps.measure(replace(work, record=record, cells=((SIZE, 16),)))
    (padded,) = bench_records.rows(record)
    assert padded["sequence_tokens"] == -(-rows[0]["sequence_tokens"] // 32) * 32 > rows[0]["sequence_tokens"]
    assert padded["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4)


def test_numbers_of_a_row_go_together(rows, work):
    record = json.loads(work.record.read_text())
    assert {"benchmark", "commands", "commit", "dirty", "versions", "device", "settings", "sizes", "rows"} <= set(record)
    for row in rows:
        assert set(MEASURED) | set(ABOUT) <= set(row)
        assert row["median_seconds"] == pytest.approx(statistics.median(row["seconds"]), abs=1e-4) and len(row["seconds"]) == 3
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / row["median_seconds"], rel=0.01)
        assert row["spread_seconds"] == [min(row["seconds"]), max(row["seconds"])]
        assert row["loss"] == pytest.approx(statistics.mean(row["losses"]), abs=1e-5) and row["peak_memory_bytes"] > 1e8
        n, prefix, branch = row["questions_an_image"], row["prefix_tokens"], row["branch_tokens"]
        assert n == 8 and row["token_limit"] == pytest.approx(n * (prefix + branch) / (prefix + n * branch), abs=1e-3)
        assert row["image_tokens"] == 3 * 2 < prefix, "96 x 64 pixels in patches of 16, four to a token"


def test_tables_show_the_ratio_beside_the_token_limit(rows, work):
    made = bench_train.compared(rows[:4][::-1])
    told = [(row["pairs"], row["batching"]) for row in made]
    assert told == [(16, "shared"), (16, "separate"), (32, "shared"), (32, "separate")], "what is compared stands together"
    assert made[0]["ratio"] == pytest.approx(made[0]["pairs_per_second"] / made[1]["pairs_per_second"], abs=1e-3)
    assert made[0]["against"] == "separate" and "ratio" not in made[1]
    table = bench_train.markdown({"rows": [*rows[:2], rows[2] | {"failed": "out of memory"}]})
    assert f"{rows[0]['token_limit']:.2f}" in table and "out of memory" in table and len(table.splitlines()) == 5


def test_end_to_end_the_ratio_is_to_the_fastest_peer():
    named = {"kind": "end to end", "model": "m", "size": "96x64", "pairs": 8}
    ours = named | {"batching": "shared", "way": "train.py, shared", "setting": "1 x 1", "pairs_per_second": 50.0}
    alone = named | {"batching": "separate", "way": "train.py, separate", "setting": "8 x 1", "pairs_per_second": 20.0}
    peers = [
        named | {"way": "peers", "setting": setting, "pairs_per_second": speed}
        for setting, speed in (("2 gc", 5.0), ("8 gc", 10.0))
    ]
    failed = named | {"way": "peers", "setting": "8 none", "failed": "out of memory"}
    assert bench_train.compared([ours, alone, *peers, failed])[0]["ratio"] == 5.0
    assert bench_train.compared([ours, alone, failed])[0]["against"] == "8 x 1"


def test_a_stopped_run_keeps_its_rows_and_goes_on_after_them(base, data, tmp_path, monkeypatch):
    record, begun = tmp_path / "raw.json", []
    timed = bench_steps.time_steps

    def dying(*args):
        begun.append(args[-1])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return timed(*args)

    monkeypatch.setattr(bench_steps, "in_process", lambda function, work: function(work))
    monkeypatch.setattr(bench_steps, "time_steps", dying)
    command = words(data, base, record, "--pairs", "8", "16", "--batching", "shared")
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    kept = bench_records.rows(record)
    assert [row["pairs"] for row in kept] == [8]
    assert bench.main(command) == 0
    assert bench_records.rows(record)[0] == kept[0] and begun == [8, 16, 16]
    assert record.with_suffix(".md").read_text().count("\n") == 4
    with pytest.raises(UserError, match="measured with another settings"):
        bench.main([*command, "--rank", "8"])


def test_layers_left_out_are_not_trained(work, tmp_path):
    """The first loss is the same, since LoRA begins at nothing; those after it are not."""
    record = tmp_path / "layers.json"
    bench_records.start(record, "train", {"steps": 3}, {"data": "toy"})
    for layers in bench_steps.LAYERS:
        bench_steps.measure(replace(work, record=record, layers=layers, cells=((SIZE, 16),)))
    found = {row["layers"]: row for row in bench_records.rows(record)}
    trained = {layers: row["trained_parameters"] for layers, row in found.items()}
    assert list(found) == list(bench_steps.LAYERS)
    assert trained["no-vision"] + trained["no-language"] == trained["no-attention"] + trained["no-mlp"] == trained["all"]
    assert len({row["first_loss"] for row in found.values()}) == 1 < len({row["loss"] for row in found.values()}) - 3
    table = bench_train.markdown({"rows": list(found.values())})
    assert "| LoRA on | trained |" in table and f"| no vision | {trained['no-vision']:,} |" in table
    assert not any("ratio" in row for row in bench_train.compared(list(found.values()))), "they do other work, so no ratio"


def test_layers_are_raw_steps_only(base, data, tmp_path):
    with pytest.raises(UserError, match="--layers no-mlp with --end-to-end"):
        bench.main(words(data, base, tmp_path / "r.json", "--pairs", "8", "--end-to-end", "--layers", "no-mlp"))


def test_end_to_end_the_peers_train_on_the_same_pairs(base, data, tmp_path):
    """train.py and TRL's own trainer, each in a process: the same images in the same order, so the same losses, step by step."""
    same, record = tmp_path / "same", tmp_path / "ends.json"
    splits = dataset.load_undecoded(data)
    splits["train"] = splits["train"].filter(lambda row: len(row["questions"]) == 8)
    splits.save_to_disk(str(same))
    shutil.copy(data / "dataset.json", same)
    ways = ("--batching", "shared", "--end-to-end", "--peer-settings", "16 none", "--processes", "1", "2")
    assert bench.main(words(same, base, record, "--pairs", "16", *ways)) == 0
    ours, peers, two = bench_train.compared(bench_records.rows(record))
    assert (two["processes"], two["pairs"], two["against"], "ratio" in ours) == (2, 32, "1 process", True)
    assert two["pairs_per_second"] == pytest.approx(32 / two["median_seconds"], rel=0.01)
    assert two["ratio"] == pytest.approx(two["pairs_per_second"] / ours["pairs_per_second"], abs=0.001)
    assert (ours["way"], ours["setting"], peers["way"], peers["setting"]) == (
        "train.py, shared",
        "2 x 1",
        "TRL without Unsloth",
        "16 none",
    )
    assert ours["losses"] == pytest.approx(peers["losses"], abs=1e-4) and ours["first_loss"] == pytest.approx(
        peers["first_loss"], abs=1e-4
    )
    for row in (ours, peers):
        assert set(MEASURED) | {"data_wait_share", "wall_seconds"} <= set(row) and 0 <= row["data_wait_share"] < 1
        assert row["pairs_per_second"] == pytest.approx(16 / row["median_seconds"], rel=0.01) and len(row["seconds"]) == 2


def test_every_problem_of_the_arguments_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        bench.main(["train", "--data", str(tmp_path), "--pairs", "0", "--warmup", "1", "--prepared", "2"])
    assert all(part in str(caught.value) for part in ("no data set there", "--pairs 0", "at least --prepared 2"))
    with pytest.raises(UserError, match="no multiple of 5"):
        bench.main(["train", "--data", str(tmp_path), "--end-to-end", "--peer-settings", "5 gc"])


@pytest.mark.parametrize("text", ["gc", "0 gc", "8 half", "8 gc packed", "8"])
def test_a_setting_that_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="samples a micro-batch"):
        bench_peers.setting_of(text)


def test_settings_are_named_as_they_are_written():
    assert [str(bench_peers.setting_of(text)) for text in ("2 gc", "16 none padding-free")] == ["2 gc", "16 none padding-free"]


def test_too_few_images_and_pairs_that_do_not_fit_are_refused(base, data, tmp_path, work):
    with pytest.raises(UserError, match="such as 64"):
        bench.main(words(data, base, tmp_path / "r.json", "--pairs", "12"))
    with pytest.raises(UserError, match="32 are needed"):
        bench_steps.drawn(bench_steps.like_rows(data)[0], 32, data, 1)
    with pytest.raises(UserError, match="different numbers of questions"):
        bench.main(words(data, base, tmp_path / "r.json", "--pairs", "8", "--end-to-end"))


def test_help_names_the_three_benchmarks(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"sonovqa.bench {name}" in said for name in ("train", "answer", "load"))
    parser = cli.Parser()
    bench_train.add_arguments(parser)
    assert isinstance(parser.parse_args(["--data", "x"]), argparse.Namespace)
