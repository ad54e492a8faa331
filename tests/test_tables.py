"""Tables of experiments.md from records: what a row says, what may be kept, and that a page out of date is noticed."""

from __future__ import annotations

import json

import pytest

from sonovqa import experiments_records, experiments_table, files, tables
from sonovqa.cli import UserError
from sonovqa.experiments_blocks import Command


def evaluation(value: float, **more) -> dict:
    """scores.json of one question as evaluate.py writes it, as far as tables read it."""
    figure = {"value": value, "interval": [value - 0.1, value + 0.1], "n": 40, "groups": 12, "higher_is_better": True}
    figure |= {"majority": {"value": 0.5}, "blind": {"value": 0.25}}
    sure = {"AUROC": {"value": 0.75, "interval": [0.5, 0.9], "n": 40, "groups": 12}, "n": 40}
    sure["balanced accuracy"] = {"value": 0.99, "interval": None, "n": 40, "groups": 12}  # of likeliest labels, not of answers
    return {
        "arguments": {"task": "Q7", "prompt": "default", "adapter": True, "run": "outputs/r", "data": "/tmp/set"},
        "verdict": "so so",
        "data": {"fingerprint": "abcdef0123", "split": "test", "images": 40},
        "intervals": {"groups": 12},
        "overall": {"metrics": {"accuracy": figure}},
        "questions": {"Q7": {"headline": "balanced accuracy", "unread": 0, "failed": 0, "confidence": sure,
                             "metrics": {"balanced accuracy": figure, "ROUGE-L": figure}}},
        "speed": {"answers_per_second": 5.0}, "finished": "2026-01-02T00:00:00+00:00", **more,
    }  # fmt: skip


def run_folder(root, name: str, seed: int, value: float | None = None, **more):
    """A finished run with an evaluation."""
    curve = [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    made = {"steps": 100, "seconds": 61.0, "answers_per_second": 10.0, "peak_memory_bytes": 2e9, "loss": 0.5, "curve": curve}
    record = {
        "run": name, "finished": "2026-01-01T00:00:00+00:00", "base": "/x/base", "data": "abcdef0123", "check_items": [1],
        "arguments": {"model": "/x/tiny", "bits": 16, "data": "/x/set", "seed": seed, "outputs": "o", "max_images": None},
        "training": made | {"trainable_parameters": 1234}, **more,
    }  # fmt: skip
    files.write_json(root / name / "run.json", record)
    if value is not None:
        files.write_json(root / name / "eval-test-Q7" / "scores.json", evaluation(value))
    return root / name


def test_a_row_holds_all_seeds_with_scores_beside_their_baselines(tmp_path):
    found = {}
    for seed, value in ((1, 0.6), (2, 0.8)):
        run = run_folder(tmp_path, f"tiny-3-A-s{seed}", seed, value)
        experiments_records.write(tmp_path / f"{run.name}.json", experiments_records.record_of(run), "3", "python train.py")
        found[f"{run.name}.json"] = files.read_json(tmp_path / f"{run.name}.json")
    head, row = experiments_table.rows(found, ["Q7", "Q7 AUROC", "Q5"])
    told = dict(zip(head, row, strict=True))
    assert told["Q7 balanced accuracy ↑ [95 %]"] == "0.700 [0.500, 0.900] (0.600, 0.800); majority 0.500, blind 0.250"
    assert told["Q7 AUROC [95 %]"].startswith("0.750 [0.500, 0.900]") and told["Q5 [95 %]"] == "-"
    assert (told["run"], told["seeds"], told["trained"], told["time"]) == ("tiny-3-A", "1, 2", "1,234", "1:01")
    assert told["data"] == "set `abcdef01`; test: 40 images of 12 groups" and told["command"] == "`python train.py`"
    assert told["record"].count("outputs/records/tiny-3-A-s") == 2


def test_the_speed_of_answering_stands_in_its_column_where_records_have_it(tmp_path):
    found = {}
    for seed, speed in ((1, {"answers_per_second": 180.25, "peak_memory_bytes": 8e8}), (2, {"answers_per_second": 190.25})):
        run = run_folder(tmp_path, f"choice-s{seed}", seed, 0.6)
        files.write_json(run / "eval-test-Q7" / "scores.json", evaluation(0.6, speed=speed))
        found[f"{run.name}.json"] = experiments_records.record_of(run)
    assert found["choice-s1.json"]["evaluations"]["eval-test-Q7"]["speed"]["answers_per_second"] == 180.25
    old = experiments_records.record_of(run_folder(tmp_path, "old-s1", 1, 0.6))
    for one in old["evaluations"].values():
        one["speed"] = None  # answers that were made elsewhere, or before speeds were kept
    head, new, before = experiments_table.rows(found | {"old-s1.json": old}, ["Q7", experiments_table.SPEED])
    at = head.index("answering: answers/s, peak memory")
    assert (new[at], before[at]) == ("185.2 (180.2, 190.2), 0.8 GB", "-") and len(head) == len(new)
    assert experiments_table.rows({"old-s1.json": old}, ["Q7", experiments_table.SPEED]) == experiments_table.rows(
        {"old-s1.json": old}, ["Q7"]
    )


def test_a_record_is_small_names_no_folder_of_the_machine_and_belongs_to_all_its_experiments(tmp_path):
    run = run_folder(tmp_path, "all", 1, 0.6, live=[0])
    for name in ("5", "1", "1"):
        experiments_records.write(tmp_path / "all.json", experiments_records.record_of(run), name)
    made = files.read_json(tmp_path / "all.json")
    assert made["experiments"] == ["1", "5"] and not {"check_items", "live"} & set(made)
    assert "/x" not in json.dumps(made) and "/tmp" not in json.dumps(made) and len(made["training"]["curve"]) <= 10
    assert list(made["evaluations"]["eval-test-Q7"]["questions"]["Q7"]["metrics"]) == ["balanced accuracy"]
    with pytest.raises(UserError, match="at most 20000"):
        experiments_records.write(tmp_path / "large.json", {"x": "y" * 20_001})
    with pytest.raises(UserError, match="not finished"):
        experiments_records.record_of(tmp_path / "absent")


def test_every_kind_of_record_stands_in_its_table(tmp_path):
    compared = {"first": "outputs/a", "comparisons": {"outputs/b": {"questions": {"Q7": {"accuracy": {
        "first": 0.5, "second": 0.75, "difference": 0.25, "interval": [0.125, 0.375], "n": 40}}}}}}  # fmt: skip
    experiments_records.write(tmp_path / "a-b.json", experiments_records.comparison_of(compared), "3", "python evaluate.py")
    run = run_folder(tmp_path / "runs", "r-s1", 1, 0.6)
    experiments_records.write(tmp_path / "r-s1.json", experiments_records.record_of(run), "3")
    found = tables.table(tmp_path)
    assert {name: list(records) for name, records in found.items()} == {"3": ["a-b.json", "r-s1.json"]}
    text = "x\n<!-- table: 3 | Q7 -->\nold\n<!-- end of table -->\ny\n<!-- table: 4 -->\n<!-- end of table -->\n"
    new = tables.rewritten(text, found)
    assert "| b | Q7 | accuracy | 0.500 | 0.750 | +0.250 [+0.125, +0.375] | 40 |" in new and "old" not in new
    assert new.count("Not run yet.") == 1 and new.startswith("x\n") and tables.rewritten(new, found) == new
    assert "`python evaluate.py`" in new and "| r |" in new


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!-- table: 3 -->\n<!-- end of table -->\n" * 2, "a pair a name"),
        ("<!-- table: 3 -->\n", "a pair a name"),
        ("<!-- table: 4 -->\n<!-- end of table -->\n", "belongs to table 3"),
    ],
)
def test_markers_that_are_not_right_are_named(text, why):
    with pytest.raises(UserError, match=why):
        tables.rewritten(text, {"3": {"a.json": {}}})


def test_a_page_out_of_date_is_noticed_and_left(tmp_path, monkeypatch):
    page = tmp_path / "experiments.md"
    page.write_text("<!-- table: spine -->\nstale\n<!-- end of table -->\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    assert tables.main(["--check"]) == 1 and "stale" in page.read_text()
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0 and "Not run yet." in page.read_text()


def test_coherence_stands_beside_what_the_references_hold_themselves():
    record = files.read_json(tables.RECORDS / "tiny-all.json")
    _, figure = experiments_table.figure_of(record, "coherent")
    assert figure["value"] < figure["references"] and figure["value"] < figure["beyond references"]
    score = {"value": 0.5, "n": 4, "groups": 2, "higher_is_better": True, "interval": None}
    about = {"coherent": score | {"references": {"value": 0.6}}, "beyond_references": score | {"value": 0.75}}
    made = experiments_records._coherent(about)
    assert experiments_table._cell([made]) == "0.500; references 0.600, beyond references 0.750"


def test_prompt_records_are_of_the_split_that_was_asked_and_say_which(tmp_path, monkeypatch):
    """Both splits' answers lie in the run's folder; a record of one must not be the other's."""
    monkeypatch.chdir(tmp_path)
    for split, value in (("test", 0.9), ("validation", 0.1)):
        found = {"metrics": {"accuracy": {"value": value, "interval": None, "n": 4}}, "form": None}
        question = {"headline": "accuracy", "own": "default", "prompts": {"default": found}}
        data = {"path": "data/d", "fingerprint": "f" * 64, "split": split, "images": 4, "groups": 2}
        made = {"questions": {"Q7": question}, "trained_with": "default", "arguments": {"run": "r"}, "data": data}
        files.write_json(tmp_path / "r" / f"eval-{split}-prompts" / "prompts.json", made)
    for words, split in (((), "test"), (("--split", "validation"), "validation")):
        ((name, record),) = tables._made_beside(Command(("evaluate.py", "prompts", "r", *words)))
        assert name == "prompts-r.json" and record["data"]["split"] == split
        assert f"d `ffffffff`, {split}: 4 images of 2 groups" in tables._source(name, record)
