"""Scores beside speeds, the tables for a paper and the page with figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from stand_in import StandIn
from test_bench_answer import bench, case
from test_report_html import Balanced

from sonovqa import bench_answer, bench_answer_table, bench_cases, bench_report, bench_scores, files
from sonovqa.bench_cases import ONE_AT_A_TIME, SHARED, VLLM, Scoring
from sonovqa.cli import UserError


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
    told = bench_scores.verdicts(record["scores"])
    assert len(told) == 1 and "4 bits, local against" in told[0] and "16 bits, local: " in told[0]


def predictions_of(entry: dict) -> set:
    from sonovqa import predictions

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


def test_an_endpoint_is_scored_as_it_answers(data, tmp_path):
    record = tmp_path / "r.json"
    with StandIn(lambda prompt, attempt: "normal") as server:
        words = ("--engines", VLLM, "--endpoint", server.url, "--data", data, "--rows", 1, "--new-tokens", 4, "--scores", 0)
        assert bench(record, *words) == 0
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
