"""VQA-RAD and HC18: small copies made by hand, and the real releases where they are at hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_dataset
from sonovqa import dataset, vqa_rad
from sonovqa.cli import UserError
from sonovqa.sources import week_interval, weeks_from_hc

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real releases are not in ../shared/data")


def prepare(out, *arguments):
    prepare_dataset.main([*map(str, arguments), "--out", str(out)])
    return dataset.load(out), json.loads((out / "dataset.json").read_text())


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).resize((64, 64)).save(path)
    return path


@pytest.mark.parametrize(("hc_mm", "weeks"), [(100, 14.66), (175, 20.02), (200, 22.16), (300, 33.26), (350, 40.72)])
def test_weeks_from_head_circumference(hc_mm, weeks):
    assert weeks_from_hc(hc_mm) == pytest.approx(weeks, abs=0.01)


@pytest.mark.parametrize(
    ("weeks", "answer"), [(7, "8-13 weeks"), (12.99, "8-13 weeks"), (13, "13-15 weeks"), (37.9, "35-38 weeks"), (38, "38+ weeks")]
)
def test_week_intervals_leave_no_gap(weeks, answer):
    assert week_interval(weeks) == answer


@pytest.fixture
def heads(tmp_path):
    root = tmp_path / "hc18"
    lines = ["filename,pixel size(mm),head circumference (mm)", "missing_HC.png,0.1,100", "bad_HC.png,x,100"]
    for subject in range(8):
        for frame in ("", "2"):
            name = f"{subject:03}_{frame}HC.png"
            picture(root / "training_set" / name, len(lines))
            lines.append(f"{name},0.0896{subject},{150 + subject}.25")
    (root / "training_set_pixel_size_and_HC.csv").write_text("\n".join(lines))
    return root


def test_hc18(tmp_path, heads):
    data, about = prepare(tmp_path / "out", "hc18", "--root", heads)
    rows = {row["image_id"]: row for split in data.values() for row in split}
    row = rows["training_set/003_2HC.png"]
    assert row["context"] == "Pixel size: 0.0896 mm" and row["group"] == "003" and len(rows) == 16
    assert {q["question_id"]: q["label"] for q in row["questions"]}["Q5"] == "15-20"
    assert "153.2 mm" in {q["question_id"]: q["answer"] for q in row["questions"]}["Q4"]
    assert about["constant_questions"] == ["Q1", "Q3", "Q5"]
    assert sorted(map(len, about["dropped"].values())) == [1, 1]
    data, _ = prepare(tmp_path / "out", "hc18", "--root", heads, "--no-context")
    assert "context" not in data["train"].column_names


def test_hc18_lacks_files(tmp_path, heads):
    table = heads / "training_set_pixel_size_and_HC.csv"
    table.write_text(table.read_text().replace("pixel size(mm)", "pixels"))
    with pytest.raises(UserError, match="lacks pixel size"):
        prepare(tmp_path / "out", "hc18", "--root", heads)
    with pytest.raises(UserError, match="file of the data set is missing"):
        prepare(tmp_path / "out", "hc18", "--root", tmp_path / "nowhere")


@pytest.fixture
def hub_copy(tmp_path):
    """Parquet files as on the hub: image bytes, question, answer; every test image is a training image too."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path / "hub"
    root.mkdir()
    images = [picture(tmp_path / f"{seed}.png", seed).read_bytes() for seed in range(8)]
    for split, chosen in (("train", images), ("test", images[:3])):
        rows = [
            {"image": {"bytes": data, "path": None}, "question": f"{text} {split}?", "answer": answer}
            for data in chosen
            for text, answer in (("Is it normal", "Yes"), ("Is it left or right", "left"), ("What is it", "a heart"))
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{split}-00000-of-00001-x.parquet")
    return root


def test_vqa_rad_from_the_hub(tmp_path, hub_copy):
    data, about = prepare(tmp_path / "out", "vqa-rad", "--root", hub_copy)
    rows = [row for split in data.values() for row in split]
    assert len(rows) == 8 and about["leakage"]["test_questions_on_images_outside_test"] == 0
    assert Counter(q["answer_type"] for row in rows for q in row["questions"]) == {"closed": 22, "open": 11}
    assert "9 of its 9 test questions" in " ".join(about["notes"]) and "types derived" in " ".join(about["notes"])
    data, about = prepare(tmp_path / "out", "vqa-rad", "--root", hub_copy, "--split", "official")
    assert [about["splits"][name]["questions"] for name in ("train", "validation", "test")] != [0, 0, 0]
    assert data["test"].num_rows == 3 and about["leakage"]["test_questions_on_images_outside_test"] == 9
    assert any(note.startswith("LEAK") for note in about["notes"])


def test_vqa_rad_that_is_not_there(tmp_path, hub_copy):
    with pytest.raises(UserError, match="no VQA-RAD in this folder"):
        prepare(tmp_path / "out", "vqa-rad", "--root", tmp_path / "nowhere")
    (hub_copy / "train-00000-of-00001-x.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="Parquet file cannot be read"):
        prepare(tmp_path / "out", "vqa-rad", "--root", hub_copy)
    (tmp_path / "rad").mkdir()
    (tmp_path / "rad" / vqa_rad.ANNOTATIONS).write_text('[{"qid": 1}]')
    with pytest.raises(UserError, match="annotations cannot be read"):
        prepare(tmp_path / "out", "vqa-rad", "--root", tmp_path / "rad")


def test_vqa_rad_entries_that_lack_something(tmp_path):
    root = tmp_path / "rad"
    entries = []
    for n in range(4):
        picture(root / vqa_rad.IMAGES / f"{n}.jpg", n)
        entries.append({"image_name": f"{n}.jpg", "image_organ": "HEAD", "phrase_type": "freeform", "qid": n,
                        "question": "Is it?", "answer": "Yes", "answer_type": "CLOSED"})  # fmt: skip
    del entries[1]["answer_type"], entries[1]["qid"], entries[2]["answer"]
    (root / vqa_rad.ANNOTATIONS).write_text(json.dumps(entries))
    data, about = prepare(tmp_path / "out", "vqa-rad", "--root", root)
    types = [q["answer_type"] for split in data.values() for row in split.remove_columns("image") for q in row["questions"]]
    assert types == ["closed"] * 3 and list(map(len, about["dropped"].values())) == [1]


@real
def test_the_real_vqa_rad(tmp_path):
    data, about = prepare(tmp_path / "out", "vqa-rad", "--root", DATA / "vqa_rad")
    rows = [row for split in data.values() for row in split.remove_columns("image")]
    types = Counter(q["answer_type"] for row in rows for q in row["questions"])
    assert len(rows) == 314 == len({row["image_id"] for row in rows}) and types == {"closed": 1299, "open": 949}
    leak = about["leakage"]
    assert leak["groups"] == leak["identical_images"] == leak["near_duplicates"] == [] and about["dropped"] == {}
    _, about = prepare(tmp_path / "out", "vqa-rad", "--root", DATA / "vqa_rad", "--split", "official")
    assert about["splits"]["test"]["images"] == 203 and about["leakage"]["test_questions"] == 451
    assert about["leakage"]["test_questions_on_images_outside_test"] == 446


@real
def test_derived_answer_types_agree_with_the_release():
    entries = json.loads((DATA / "vqa_rad" / vqa_rad.ANNOTATIONS).read_text())
    same = [vqa_rad.derived_type(e["question"], str(e["answer"])) == e["answer_type"].strip().lower() for e in entries]
    assert np.mean(same) > 0.9


@real
def test_the_real_hc18(tmp_path):
    data, about = prepare(tmp_path / "out", "hc18", "--root", DATA / "hc18")
    homes = {(row["group"], name) for name, split in data.items() for row in split.remove_columns("image")}
    assert sum(split.num_rows for split in data.values()) == 492 and len(homes) == 394
    assert about["constant_questions"] == ["Q1", "Q3"] and about["dropped"] == {}
    labels = [q["label"] for split in data.values() for row in split.remove_columns("image") for q in row["questions"]]
    assert all(labels)
