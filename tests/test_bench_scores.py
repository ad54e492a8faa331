"""Scores beside speeds, the tables for a paper and the page with figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_in import StandIn, send
from test_bench_answer import bench, case
from test_report_html import Balanced

from sonovqa import (
    answer_limits,
    bench_answer,
    bench_answer_table,
    bench_cases,
    bench_report,
    bench_scores,
    files,
    predictions,
    structured,
)
from sonovqa.bench_cases import ONE_AT_A_TIME, SHARED, VLLM, Scoring
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint


@pytest.fixture(scope="module")
def scored(tmp_path_factory, base, data):
    """A tiny random model in 16 and 4 bits, scored on three images of the toy set; words, record's path and content."""
    record = tmp_path_factory.mktemp("scores") / "r.json"
    words = ("--model", base, "--bits", 16, 4, "--engines", SHARED, "--data", data, "--rows", 1, "--new-tokens", 3)
    words += ("--scores", 3, "--markdown", record.with_name("paper.md"))
    assert bench(record, *words) == 0
    return words, record, files.read_json(record)


def test_every_precision_is_scored_once_on_the_same_rows_beside_its_baselines(scored):
    _, path, record = scored
    assert [(entry["bits"], entry["where"], entry["images"]) for entry in record["scores"]] == [(16, "local", 3), (4, "local", 3)]
    one, other = (predictions_of(entry) for entry in record["scores"])
    assert one == other and len(one) == 24
    for entry in record["scores"]:
        assert (entry["error"], entry["asked"], entry["failed"]) == (None, 24, 0)
        overall = entry["overall"]
        assert overall["n"] == 24 and overall["interval"][0] <= overall["value"] <= overall["interval"][1]
        assert {"majority", "blind"} <= set(overall) and set(entry["questions"]) == {f"Q{n}" for n in range(1, 9)}
        rows = predictions.read(Path(entry["folder"]) / "predictions.jsonl")
        assert entry["new_tokens"] == 128 and entry["cut"] == sum(row["finish_reason"] == "length" for row in rows)
        assert entry["cut"] == sum(about["cut"] for about in entry["questions"].values())
    told = bench_scores.verdicts(record["scores"])
    assert len(told) == 1 and "4 bits, local against" in told[0] and "16 bits, local: " in told[0]


def predictions_of(entry: dict) -> set:
    rows = predictions.read(Path(entry["folder"]) / "predictions.jsonl")
    return {(row["image_id"], row["question_id"], row["reference"]) for row in rows}


def test_the_same_command_asks_nothing_again(scored):
    words, path, record = scored
    assert bench(path, *words) == 0
    after = files.read_json(path)
    assert (after["rows"], after["scores"]) == (record["rows"], record["scores"])
    with pytest.raises(UserError, match="settings"):
        bench(path, *words, "--scores", 2)


def test_tables_for_a_paper_and_the_page_say_what_was_asked_and_where(scored):
    _, path, record = scored
    paper, page = path.with_name("paper.md").read_text(), path.with_suffix(".html").read_text()
    for text in (paper, page):
        assert "1 images of 96x64 pixels, 8 questions an image, 3 new tokens each" in text
        assert "Describe the anatomical structures" in text and record["versions"]["torch"] in text
        assert record["device"]["name"].split()[0] in text and "min/mean/median/p95/max" in text
    assert paper.count("| Q7 |") == 2 and "**Scores of each question.**" in paper
    assert page.count("<svg") == 4
    links = re.findall(r"""(?:src|href)=["']?([^"'#\s>]+)""", page)
    assert not [link for link in links if not link.startswith(("data:", "http://www.w3.org"))], "one file, nothing fetched"
    parser = Balanced()
    parser.feed(page)
    assert not parser.open


@pytest.mark.parametrize(
    ("kind", "longest", "limit"),
    [("", 20, 128), ("open", 256, 128), ("open", 257, 256), ("open", 2000, 1024), ("open", 10**6, 2048), ("extraction", 9, 2048)],
)
def test_an_answers_limit_goes_by_what_is_asked_and_trained_on(kind, longest, limit):
    asked = [Item(kind, "normal"), Item("closed", "yes")]
    assert answer_limits.usual(asked, [Item(kind, "x" * longest), Item("closed", "no")]) == limit
    assert structured.TASKS["values"].max_tokens == answer_limits.usual([Item("extraction", "")])


@dataclass
class Item:
    answer_type: str
    reference: str


def test_scored_answers_that_were_cut_are_counted_and_said(data, tmp_path):
    how = Scoring(str(data), "test", 1, 1, folder=str(tmp_path / "s"), new_tokens=9)
    with StandIn(lambda prompt, attempt: cut_short) as server:
        entry = bench_scores.score(case(engine=VLLM, scoring=how), Endpoint(server.url, "run"))
    assert (entry["new_tokens"], entry["asked"], entry["cut"], entry["questions"]["Q1"]["cut"]) == (9, 8, 8, 1)
    assert bench_answer_table.notes({"rows": [], "scores": [entry, entry | {"cut": 0}]}) == [
        "m, 16 bits, vllm: 8 of 8 answers (100.0%) were cut at the token limit; raise --scores-new-tokens above 9"
    ]
    with pytest.raises(UserError, match="--scores-new-tokens 9; nothing is scored"):
        bench(tmp_path / "other.json", "--model", "a", "--scores-new-tokens", 9)


def cut_short(handler) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "nor"}, "finish_reason": "length"}
    send(handler, 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "run", "choices": [choice],
                        "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}})  # fmt: skip


def test_an_endpoint_is_scored_as_it_answers(data, tmp_path):
    record = tmp_path / "r.json"
    with StandIn(lambda prompt, attempt: "normal") as server:
        words = ("--engines", VLLM, "--endpoint", server.url, "--data", data, "--rows", 1, "--new-tokens", 4, "--scores", 0)
        assert bench(record, *words, "--scores-new-tokens", 9) == 0
    assert {body["max_tokens"] for body in server.bodies} == {4, 9}
    (entry,) = files.read_json(record)["scores"]
    assert (entry["where"], entry["images"], entry["asked"], entry["failed"]) == ("vllm", 4, 32, 0)
    assert entry["overall"]["value"] == pytest.approx(entry["overall"]["blind"]["value"]), "it never looks at the image"


def test_the_shared_engine_scores_for_all_and_runs_are_asked_as_trained(tmp_path):
    found = [case(label=label, engine=engine, bits=bits, levels=(4,)) for label in ("run: base", "run: merged")
             for bits in (16, 4) for engine in (ONE_AT_A_TIME, SHARED, VLLM)]  # fmt: skip
    how = Scoring("data/x", "test", 0, 1)
    done = [("run: merged", 4, "local")]
    told = bench_scores.with_scoring(found, how, done, {"run: base": "simple", "run: merged": "simple"}, tmp_path)
    chosen = [(c.label, c.bits, c.engine) for c in told if c.scoring]
    assert chosen == [(c.label, c.bits, c.engine) for c in found if c.engine != ONE_AT_A_TIME and
                      (c.label, c.bits, bench_scores.place(c.engine)) not in done]  # fmt: skip
    one = next(c.scoring for c in told if c.scoring)
    assert (one.prompt, one.at_once, one.rows) == ("simple", 4, 0)
    assert len({c.scoring.folder for c in told if c.scoring}) == len(chosen)


def test_scores_that_could_not_be_made_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_answer, "_ended", lambda *arguments: "killed by signal 9")
    wanted = case(levels=(), scoring=Scoring("d", "test", 0, 1, folder=str(tmp_path / "s")))
    (row,) = bench_answer.measured(wanted, 5, tmp_path)
    assert row["scores"]["error"] == "killed by signal 9"
    assert bench_answer_table.scores_line(row["scores"]) == "m, 16 bits, local: not scored: killed by signal 9"
    assert files.read_json(next(tmp_path.glob("*/case.json")))["scoring"]["split"] == "test"


@pytest.mark.parametrize("words", [("--scores", "3"), ("--scores", "-1", "--data", "x")])
def test_scores_need_a_data_set(words, tmp_path):
    with pytest.raises(UserError, match=r"--scores -?\d with --data"):
        bench(tmp_path / "r.json", "--model", "a", *words)


def on_a_gpu(**changes) -> dict:
    row = {"model": "owner/Qwen<b>", "bits": 4, "engine": SHARED, "level": 1, "error": None, "failed": 0, "dtype": "bfloat16",
           "memory": bench_cases.TENSORS, "memory_before": 0, "memory_loaded": 6_900_000_000, "memory_peak": 7_400_000_000,
           "predicted_loaded": 6_900_000_000, "predicted_peak": 7_290_000_000, "ratio_loaded": 1.0, "ratio_peak": 1.0151,
           "device_peak": 8_200_000_000, "load_seconds": 20.0, "disk_bytes": 16_600_000_000, "answers_per_second": 9.0,
           "tokens_per_second": 300.0,
           "image_seconds": dict.fromkeys(("min", "mean", "median", "p95", "p99", "max"), 0.5)}  # fmt: skip
    return row | changes


def test_predicted_and_measured_memory_stand_side_by_side():
    settings = {"new_tokens": 32, "ignore_eos": True, "images": {"data": None}}
    about = {"images": 8, "sizes": ["512x384"], "questions": 8, "prompts": ["What <is> it?"]}
    record = {"settings": settings, "sizes": about, "commands": ["python -m …"], "verdicts": [], "scores": [], "commit": None,
              "device": {"name": "NVIDIA H200", "count": 1, "memory": 150e9, "cpus": 16}, "dirty": None, "started": "1",
              "updated": "2", "versions": {"torch": "2.13.0"}, "drivers": [{"name": "NVIDIA H200", "driver": "580.95"}],
              "rows": [on_a_gpu(), on_a_gpu(bits=8, error="CUDA out of <memory>")]}  # fmt: skip
    paper, page = bench_answer_table.markdown(record), bench_report.render(record)
    assert "| 6.9 GB (6.9 GB, 1.00) | 7.4 GB (7.3 GB, 1.02) | 8.2 GB | torch's tensors |" in paper
    assert "- driver: 580.95" in paper and "allocator reserved" in paper
    assert "failed: CUDA out of <memory>" in paper and "CUDA out of &lt;memory&gt;" in page and "Qwen&lt;b&gt;" in page
    assert set(bench_report.figures(record)) == {"Latency", "Speed", "Memory"}
    assert "predicted" in bench_report.figures(record)["Memory"]
