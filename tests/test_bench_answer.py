"""Speed, load time and memory of engines side by side: what is measured, and that a failure is a row."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stand_in import StandIn

from sonovqa import (
    bench_answer,
    bench_answer_table,
    bench_images,
    bench_records,
    bench_serving,
    bench_timing,
    bench_worker,
    chat,
    cli,
)
from sonovqa.bench_cases import ONE_AT_A_TIME, SHARED, VLLM, Case
from sonovqa.cli import UserError
from sonovqa.engines import Reply


def bench(record, *words: str) -> int:
    parser = cli.Parser()
    bench_answer.add_arguments(parser)
    return bench_answer.run(parser.parse_args([*map(str, words), "--record", str(record)]))


def case(**named) -> Case:
    images = {"data": None, "split": "test", "rows": 1, "seed": 1, "size": [32, 24]}
    told = {"label": "m", "model": "m", "adapter": None, "bits": 16, "engine": SHARED, "levels": (1,), "new_tokens": 2}
    return Case(**told | {"ignore_eos": True, "images": images} | named)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, base):
    """A tiny random model by both local engines and a model that is not there, on the same images; exit status and rows."""
    record = tmp_path_factory.mktemp("bench") / "r.json"
    words = ("--model", base, "/no/such/model", "--engines", ONE_AT_A_TIME, SHARED, "--batch-images", 3, "--size", "96x64")
    status = bench(record, *words, "--rows", 3, "--new-tokens", 6, "--no-ignore-eos")
    return status, bench_records.rows(record), record


def test_both_engines_give_the_same_answers_and_their_own_figures(measured):
    status, rows, _ = measured
    assert status == 0
    alone, shared = rows[:2]
    assert [(row["engine"], row["level"]) for row in (alone, shared)] == [(ONE_AT_A_TIME, 1), (SHARED, 3)]
    for row in (alone, shared):
        assert (row["answered"], row["failed"], row["error"]) == (24, 0, None)
        assert 0 < row["memory_before"] < row["memory_loaded"] <= row["memory_peak"] < 8e9
        assert row["image_seconds"]["min"] <= row["image_seconds"]["median"] <= row["image_seconds"]["max"] <= row["wall_seconds"]
        assert row["answers_per_second"] == pytest.approx(24 / row["wall_seconds"], rel=0.01)
        assert (row["dtype"], row["disk_bytes"] > 1e5, "answers" in row) == ("float32", True, False)
    assert (shared["identical"], shared["identical_to"]) == (1.0, "one-at-a-time 1")
    assert alone["new_tokens"] == shared["new_tokens"]


def test_failures_are_rows_that_say_why_and_stop_nothing(measured):
    rows = measured[1]
    assert len(rows) == 4
    assert all("no model folder at /no/such/model" in row["error"] for row in rows[2:])
    assert bench_answer_table.note(rows[2]).startswith("failed: ")
    assert bench_answer_table.line(rows[2]).startswith("/no/such/model 16 one-at-a-time · note failed")


def test_same_command_measures_only_what_is_missing(measured, base):
    _, rows, record = measured
    words = ("--model", base, "--engines", SHARED, "--batch-images", 3, "--size", "96x64", "--rows", 3, "--new-tokens", 6)
    assert bench(record, *words, "--no-ignore-eos") == 0
    assert bench_records.rows(record) == rows
    with pytest.raises(UserError, match="settings"):
        bench(record, *words)
    assert "one-at-a-time" in record.with_suffix(".md").read_text()


def test_fixed_length_does_not_end_at_the_end_of_the_turn(base):
    from sonovqa.generation import LocalEngine
    from sonovqa.models import load_for_inference

    model, processor = load_for_inference(str(base))
    head = model.get_output_embeddings().weight
    head.data.zero_()  # every token as likely: the first one is always chosen
    requests = bench_images.noise(1, (64, 48), 1)
    engine = LocalEngine(model, processor, ignore_eos=True)
    assert [reply.new_tokens for reply in engine.answer(requests, 5)] == [5] * 8
    engine.stop = {0}
    assert [reply.new_tokens for reply in engine.answer(requests, 5)] == [1] * 8
    assert LocalEngine(model, processor).stop, "ends are what they were for everybody else"


def test_endpoint_is_measured_at_every_number_in_flight(tmp_path):
    before = 2 * 8 * bench_worker.WARM_UPS + 16  # asked before the second level is measured
    four_at_once = threading.Barrier(4)

    def slow(prompt, attempt):
        if len(server.bodies) > before:
            four_at_once.wait(120)  # nobody is answered before there are four, whichever they are
        time.sleep(0.02)
        return "normal"

    record = tmp_path / "r.json"
    with StandIn(slow) as server:
        words = ("--engines", VLLM, "--endpoint", server.url, "--in-flight", 1, 4, "--rows", 2, "--size", "32x24")
        assert bench(record, *words) == 0
    one, four = bench_records.rows(record)
    assert (one["level"], four["level"], server.most_open) == (1, 4, 4)
    assert one["answered"] == four["answered"] == 16
    for row in (one, four):
        assert row["answers_per_second"] == pytest.approx(16 / row["wall_seconds"], rel=0.01)
    assert one["image_seconds"]["min"] >= 8 * 0.02, "an image's eight questions one after another"
    assert "no vLLM" in bench_answer_table.note(one)
    assert one["cache_hits"] == {"prefix": None, "image": None}


def test_endpoint_that_is_gone_is_a_failed_row(tmp_path):
    record = tmp_path / "r.json"
    assert bench(record, "--engines", VLLM, "--endpoint", "http://127.0.0.1:9/v1", "--rows", 1) == 1
    assert [row["error"][:29] for row in bench_records.rows(record)] == ["no answer from the endpoint; "[:29]]


def test_a_killed_or_endless_process_is_named(tmp_path):
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert "signal 9" in bench_answer._ended(case(), kill, tmp_path / "log", 30)
    started = time.monotonic()
    assert bench_answer._ended(case(), ["sleep", "600"], tmp_path / "log", 1) == "stopped after --limit 1 s"
    assert time.monotonic() - started < 300, "it was waited for"


class Scripted:
    """An engine whose replies take the seconds told, one after another or all at once, on a clock of its own (``now``)."""

    name = "scripted"

    def __init__(self, seconds: list[list[float]], together: bool):
        self.seconds, self.together, self.now = seconds, together, 0.0

    def answer(self, requests, max_new_tokens):
        for request, seconds in zip(requests, self.seconds, strict=True):
            if self.together:
                self.now += max(seconds)
            for (question_id, _), took in zip(request.prompts, seconds, strict=False):
                if not self.together:
                    self.now += took
                error = "HTTP 500: no" if took == 0.01 else None
                yield Reply(request.image_id, question_id, "" if error else "yes", error, "stop", 3, took)


@pytest.mark.parametrize(("together", "wanted"), [(True, (0.05, 0.08)), (False, (0.1, 0.24))])
def test_an_image_s_seconds_reach_from_its_first_question_to_its_last_answer(together, wanted, monkeypatch):
    requests = bench_images.noise(2, (32, 24), 1)
    engine = Scripted([[0.05, 0.04, 0.01], [0.08, 0.08, 0.08]], together)
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: engine.now)
    figures, answers = bench_timing.measure(engine, requests, 3)
    told = figures["image_seconds"]
    assert (told["min"], told["max"]) == pytest.approx(wanted)
    assert figures["errors"] == {"HTTP 500: no": 1}
    assert (figures["answered"], figures["failed"], figures["new_tokens"], len(answers)) == (5, 1, 15, 5)
    assert figures["answer_seconds"]["max"] == 0.08


def test_same_share_counts_answers_that_both_gave():
    assert bench_timing.same_share({"a": "x", "b": "y", "c": "z"}, {"a": "x", "b": "n", "d": "z"}) == 0.5
    assert bench_timing.same_share({"a": "x"}, {}) is None


def test_all_engines_see_the_same_images(data):
    drawn = [bench_images.make(data, "train", 4, None, 7) for _ in range(2)]
    assert drawn[0] == drawn[1] and len({request.image for request in drawn[0]}) == 4
    assert all(request.prompts == bench_images.PROMPTS and len(request.prompts) == 8 for request in drawn[0])
    resized = bench_images.make(data, "train", 4, (40, 30), 7)
    assert {chat.open_image(request.image).size for request in resized} == {(40, 30)}
    assert bench_images.described(drawn[0])["sizes"] == ["96x64"]
    warm = bench_images.warm_up(drawn[0], 2)
    assert chat.open_image(warm[0].image).size == (96, 64)
    assert not {request.image for request in warm} & {request.image for request in drawn[0]}


def test_memory_of_a_server_is_that_of_all_its_processes(monkeypatch):
    monkeypatch.setattr(bench_serving, "device_used", lambda: None)
    monkeypatch.setattr(bench_serving, "SAMPLE_SECONDS", 0.05)
    hold = "import sys; x = b'1' * 90_000_000; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with bench_serving.TreeMemory(process.pid) as memory:
        process.stdout.readline()
        now = memory.now()
        process.stdin.close()
        process.wait(300)
    process.stdout.close()
    assert 90e6 < now <= memory.peak < 400e6
    assert memory.kind == "main memory of its processes"


def nvidia_smi(folder: Path, *processes: str) -> None:
    """A box of two GPUs, with 90,000 and 3,000 MiB in use and these processes (``GPU-b, 100``) on them."""
    gpus = {"index": "01", "uuid": ("GPU-a", "GPU-b"), "memory.used": ("90000", "3000")}
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"gpus, processes = {gpus}, {list(processes)}",
        "kind, _, fields = sys.argv[1].partition('=')",
        "found = [', '.join(gpus[field][k] for field in fields.split(',')) for k in (0, 1)] if 'gpu' in kind else processes",
        "print(*found, sep='\\n')",
    ]
    (folder / "nvidia-smi").write_text("\n".join(lines))
    (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("processes", "known"), [(["GPU-b, 100"], True), (["GPU-b, 100", "GPU-b, 200"], False), (["GPU-a, 100"], False), ([], False)]
)
def test_a_device_that_others_use_too_tells_nothing_about_this_process(processes, known, tmp_path, monkeypatch):
    nvidia_smi(tmp_path, *processes)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert bench_serving.device_used() == 3000 * 2**20
    taken = bench_worker._taken("peak", 1000 * 2**20)
    assert taken["device_peak"] == (2000 * 2**20 if known else None)


def test_memory_in_use_is_that_of_the_gpu_that_this_process_has(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "GPU-a, 100", "GPU-a, 200", "GPU-b, 300")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for visible, used, processes in (("1", 3000, 1), ("GPU-a", 90000, 2), ("", None, 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        told = bench_serving.device_used(), bench_serving.device_processes()
        assert told == (used and used * 2**20, processes)


def test_what_vllms_log_states_is_read(tmp_path):
    log = tmp_path / "log"
    log.write_text("(Worker) INFO gpu_model_runner.py: Model loading took 16.78 GiB memory and 5.31 seconds\n")
    assert bench_serving.stated_weights(log) == round(16.78 * 2**30)
    log.write_text("nothing of the kind\n")
    assert bench_serving.stated_weights(log) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "nobody to answer"),
        (("--model", "a", "--rows", "0"), "--rows 0; must be 1 or more"),
        (("--model", "a", "--in-flight", "0", "4"), "--in-flight 0; must be 1 or more"),
        (("--run", "tests"), "no run of train.py"),
        (("--model", "a", "b", "--endpoint", "http://x/v1"), "serves one model"),
        (("--engines", VLLM, "--endpoint", "http://127.0.0.1:9/v1", "--bits", "16", "8", "4"), "a server has one precision"),
        (("--model", "a", "--data", "/no/such/set"), "no data set there"),
    ],
)
def test_wrong_arguments_are_one_line(words, told, tmp_path):
    with pytest.raises(UserError, match=told):
        bench(tmp_path / "r.json", *words)
    assert not os.listdir(tmp_path)


def test_a_record_that_was_cut_off_is_one_line(tmp_path):
    record = tmp_path / "r.json"
    record.write_text('{"benchmark": "answer", "rows": [')
    with pytest.raises(UserError, match=r"the file is no whole JSON; .*r.json.*move it away"):
        bench(record, "--model", "tiny", "--rows", 1, "--size", "32x24")


def test_a_run_is_its_base_its_adapter_and_its_merged_weights(tmp_path):
    run = tmp_path / "tuned"
    (run / "adapter").mkdir(parents=True)
    (run / "run.json").write_text('{"arguments": {"model": "tiny"}}')
    parser = cli.Parser()
    bench_answer.add_arguments(parser)
    args = parser.parse_args(["--run", str(run), "--bits", "16", "4", "--engines", SHARED, VLLM, "--in-flight", "1", "16"])
    found = [(c.label, c.model, c.adapter, c.bits, c.engine, c.levels) for c in bench_answer.cases(args, {})]
    assert len(found) == 3 * 2 * 2
    assert found[0] == ("tuned: base", "tiny", None, 16, SHARED, (1,))
    assert found[5] == ("tuned: adapter", "tiny", str(run / "adapter"), 16, VLLM, (1, 16))
    assert found[-2][:3] == ("tuned: merged", str(run / "merged"), None)
