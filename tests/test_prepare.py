"""prepare_dataset.py end to end: hand-made sheets and images go in, a data set comes out, and nothing is lost in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

import prepare_dataset
from sonovqa import dataset, images
from sonovqa.chat import messages, tasks_of
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS
from sonovqa.splits import SPLITS

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ["Folder Name", "Image Name", "Status", "Patient", *(f"{q.id}: {q.title}" for q in QUESTIONS.values())]
NORMAL = ["stomach, spine", "Cephalic", "Axial", "AC", "20-25 weeks", "Good", "Normal", "Routine monitoring"]


def picture(path, seed=0, size=(64, 48), **options):
    """A smooth random picture: two seeds are never near-duplicates, unlike two fields of noise over one shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **options)
    return image


def write_sheet(path, rows, headers=HEADERS):
    book = openpyxl.Workbook()
    book.active.append(headers)
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def clinic(tmp_path, patients=10, extra=()):
    """A sheet in form (a) of two images a patient in two categories, with further rows at its end."""
    rows = []
    for number in range(2 * patients):
        folder, name = ("Abdomen", "Femur")[number % 2], f"img_{number:03}.png"
        picture(tmp_path / "images" / folder / name, number)
        abnormal = number % 7 == 0
        rows.append([folder, name, "complete", f"P{number // 2}", *NORMAL[:6], "Abnormal" if abnormal else "Normal", NORMAL[7]])
    return write_sheet(tmp_path / "annotations.xlsx", [*rows, *extra])


def prepare(tmp_path, *arguments, source="sheet"):
    out = tmp_path / "data"
    first = (str(tmp_path / "annotations.xlsx"), "--images", str(tmp_path / "images")) if source == "sheet" else ()
    prepare_dataset.main([source, *first, "--out", str(out), *map(str, arguments)])
    return dataset.load(out), json.loads((out / "dataset.json").read_text())


def rows_of(data):
    from datasets import Image as Column

    return {row["image_id"]: row for split in data.values() for row in split.cast_column("image", Column(decode=False))}


def test_form_a_round_trip(tmp_path, capsys):
    clinic(tmp_path)
    data, about = prepare(tmp_path, "--group-column", "Patient")
    assert list(data) == list(SPLITS)
    rows = rows_of(data)
    assert len(rows) == 20 and about["dropped"] == {}
    for image_id, row in rows.items():
        assert row["image"]["bytes"] == (tmp_path / "images" / image_id).read_bytes()
        assert row["category"] == image_id.split("/")[0]
        assert row["group"] == f"P{int(image_id[-7:-4]) // 2}"
        assert [q["question_id"] for q in row["questions"]] == list(QUESTIONS)
        assert all(set(q) == {"question_id", "question", "answer", "label", "answer_type"} for q in row["questions"])
        abnormal = int(image_id[-7:-4]) % 7 == 0
        assert row["questions"][6]["label"] == ("abnormal" if abnormal else "normal")
    homes = {(row["group"], name) for name, split in data.items() for row in split}
    assert len(homes) == 10 == sum(split["groups"] for split in about["splits"].values())
    assert data["train"][0]["image"].size == (64, 48)
    shown = capsys.readouterr().out
    assert "train" in shown and "before" in shown


def test_form_b_and_names_typed_differently(tmp_path):
    headers = ["image name", *(f"{q.id}:\n{q.title}: Identify and describe …" for q in QUESTIONS.values())]
    root = tmp_path / "images"
    on_disk = [
        "NT 1.PNG",
        "nt_2.png",
        unicodedata.normalize("NFD", "café 3.png"),
        "four.JPEG",
        *(f"{n}.png" for n in range(5, 9)),
    ]
    for seed, name in enumerate(on_disk):
        picture(root / "Non_standard_NT" / name, seed)
    in_sheet = ["nt_1.png", "NT 2.PNG", "café_3.png", "four.jpeg", "5", 6, "7.PNG", "./8.png"]
    rows = [[name, *NORMAL] for name in in_sheet] + [["9.png", *NORMAL], ["10.png"]]
    sheet = write_sheet(tmp_path / "Non standard NT_image_list.xlsx", rows, headers)
    prepare_dataset.main(["sheet", str(sheet), "--images", str(root), "--out", str(tmp_path / "data")])
    data = rows_of(dataset.load(tmp_path / "data"))
    assert set(data) == {unicodedata.normalize("NFC", f"Non_standard_NT/{name}") for name in on_disk}
    assert {row["category"] for row in data.values()} == {"Non_standard_NT"}
    about = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert {reason: len(items) for reason, items in about["dropped"].items()} == {"no such image file": 1, "no answers yet": 1}


def bad_images(root):
    """One file for each thing that can be wrong with an image; returns file name -> part of the reason."""
    good = root / "Abdomen" / "img_000.png"
    folder = root / "Abdomen"
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good.read_bytes()[:-200])
    picture(folder / "whole.jpg", 1, (640, 480), quality=95)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-3000])
    (folder / "text.png").write_text("this is no image")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(folder / "deep.png")
    see_through = Image.new("RGBA", (64, 64), (200, 0, 0, 100)).quantize(8)
    see_through.save(folder / "palette.png", transparency=0)
    frames = [Image.new("L", (64, 64), shade) for shade in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (1, 1)).save(folder / "dot.png")
    Image.new("L", (20_000, 32)).save(folder / "wide.png")
    Image.new("1", (9_000, 9_000)).save(folder / "bomb.png")
    Image.new("1", (30_000, 30_000)).save(folder / "bigger_bomb.png")
    (folder / "folder.png").mkdir()
    os.symlink("/etc/hostname", folder / "out.png")
    os.symlink("loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    for twin in ("caf\u00e9.png", "cafe\u0301.png", "Case.png", "case.PNG"):
        picture(folder / twin, 3)
    picture(root / "top.png", 3)
    return {
        "empty.png": "is empty",
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "text.png": "not an image",
        "deep.png": "more than 8 bits",
        "palette.png": "transparent",
        "moving.gif": "animated",
        "dot.png": "smaller than",
        "wide.png": "longer than",
        "bomb.png": "megapixels",
        "bigger_bomb.png": "megapixels",
        "folder.png": "not a file",
        "out.png": "leaves the image folder",
        "loop.png": "cannot be read",
        "pipe.png": "not a file",
        "missing.png": "no such image file",
        "../../secret.png": "leaves the image folder",
        "/etc/hostname": "leaves the image folder",
        r"C:\images\1.png": "leaves the image folder",
        r"..\1.png": "leaves the image folder",
        "caf\u00e9.png": "several image files",
        "CASE.png": "several image files",
        "./": "not a file",
    }


def test_every_bad_image_is_listed_with_its_reason(tmp_path):
    clinic(tmp_path)
    expected = bad_images(tmp_path / "images")
    rows = [["Abdomen", name, "complete", "P99", *NORMAL] for name in expected]
    clinic(
        tmp_path,
        extra=[
            *rows,
            ["..", "x.png", "complete", "P99", *NORMAL],
            ["Nowhere", "x.png", "complete", "P99", *NORMAL],
            [".", "top.png", "complete", "P99", *NORMAL],
        ],
    )
    data, about = prepare(tmp_path, "--group-column", "Patient")
    assert len(rows_of(data)) == 20
    dropped = {item: reason for reason, items in about["dropped"].items() for item in items}
    assert len(dropped) == len(expected) + 3
    for name, reason in expected.items():
        found = [why for item, why in dropped.items() if item.endswith(f"Abdomen/{name}")]
        assert len(found) == 1 and reason in found[0], (name, found)
    assert {why for item, why in dropped.items() if "Nowhere" in item or "top.png" in item} == {"no such image folder"}


def test_unusual_images_that_are_fine(tmp_path):
    clinic(tmp_path)
    folder = tmp_path / "images" / "Abdomen"
    base = picture(folder / "grey.png", 100, (60, 40)).convert("RGB")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.quantize(16).save(folder / "palette.png")
    base.convert("RGBA").save(folder / "opaque.png")
    base.save(folder / "one.tiff")
    base.save(folder / "one.webp")
    turned = Image.Exif()
    turned[0x0112] = 6
    base.save(folder / "turned.jpg", exif=turned)
    names = ["cmyk.jpg", "palette.png", "opaque.png", "one.tiff", "one.webp", "turned.jpg"]
    clinic(tmp_path, extra=[["Abdomen", name, "complete", "P99", *NORMAL] for name in names])
    data, about = prepare(tmp_path, "--group-column", "Patient")
    assert about["dropped"] == {}
    sizes = {row["image_id"]: row["image"].size for split in data.values() for row in split}
    assert sizes["Abdomen/turned.jpg"] == (40, 60) and sizes["Abdomen/cmyk.jpg"] == (60, 40)


def test_duplicate_rows(tmp_path):
    clinic(tmp_path)
    same = ["Abdomen", "img_000.png", "complete", "P0", *NORMAL[:6], " ABNORMAL ", None]
    other = ["Femur", "img_001.png", "complete", "P0", *NORMAL[:6], "Abnormal", NORMAL[7]]
    clinic(tmp_path, extra=[same, other])
    data, about = prepare(tmp_path, "--group-column", "Patient")
    rows = rows_of(data)
    assert "Abdomen/img_000.png" in rows and "Femur/img_001.png" not in rows
    assert about["dropped"] == {
        "rows of one image agree: merged into one": ["annotations.xlsx row 22: Abdomen/img_000.png"],
        "rows of one image contradict each other: none is used": [
            f"annotations.xlsx row {number}: Femur/img_001.png, Q7" for number in (3, 23)
        ],
    }


def test_near_duplicates_share_a_group_without_a_patient(tmp_path):
    clinic(tmp_path)
    folder = tmp_path / "images" / "Abdomen"
    base = picture(folder / "copy.png", 0)
    base.save(folder / "copy.jpg", quality=85)
    base.resize((96, 72)).point(lambda value: value * 0.9).save(folder / "larger.png")
    names = ("copy.png", "copy.jpg", "larger.png")
    clinic(tmp_path, extra=[["Abdomen", name, "complete", None, *NORMAL] for name in names])
    data, about = prepare(tmp_path)
    rows = rows_of(data)
    assert {rows[f"Abdomen/{name}"]["group"] for name in (*names, "img_000.png")} == {"Abdomen/copy.jpg"}
    assert len({row["group"] for row in rows.values()}) == 20
    assert about["leakage"]["near_duplicates"] == about["leakage"]["identical_images"] == []
    _, about = prepare(tmp_path, "--group-column", "Patient")
    assert "3 images have no patient" in about["notes"][0]  # they take the patient of their near-duplicate
    assert about["leakage"]["groups"] == about["leakage"]["near_duplicates"] == []


def test_a_leak_between_patients_is_reported(tmp_path):
    clinic(tmp_path)
    rows = []
    for number in range(20):  # every patient's image once more under another patient's name
        folder, name = ("Abdomen", "Femur")[number % 2], f"again_{number:03}.png"
        os.link(tmp_path / "images" / folder / f"img_{number:03}.png", tmp_path / "images" / folder / name)
        rows.append([folder, name, "complete", f"R{number}", *NORMAL])
    clinic(tmp_path, extra=rows)
    _, about = prepare(tmp_path, "--group-column", "Patient")
    leak = about["leakage"]
    assert leak["groups"] == [] and leak["identical_images"] and leak["near_duplicates"]
    assert 0 < leak["test_questions_on_images_outside_test"] <= leak["test_questions"]
    assert any(note.startswith("LEAK") for note in about["notes"])


def test_group_regex(tmp_path):
    clinic(tmp_path)
    data, _ = prepare(tmp_path, "--group-regex", r"img_\d*(\d)\.")
    assert {name[-5]: row["group"] for name, row in rows_of(data).items()} == {digit: digit for digit in "0123456789"}
    splits = {digit: {split for split, rows in data.items() if digit in rows["group"]} for digit in "0123456789"}
    assert all(len(homes) == 1 for homes in splits.values())


def test_the_same_input_gives_the_same_data_set(tmp_path):
    clinic(tmp_path)
    _, first = prepare(tmp_path)
    _, second = prepare(tmp_path)
    assert first == second
    _, third = prepare(tmp_path, "--seed", 7)
    assert third["fingerprint"] != first["fingerprint"]


def test_max_images_is_drawn_across_categories(tmp_path):
    clinic(tmp_path)
    (tmp_path / "images" / "Abdomen" / "img_000.png").write_bytes(b"broken")
    data, _ = prepare(tmp_path, "--max-images", 9)
    rows = rows_of(data)
    assert len(rows) == 9 and 4 <= sum(row["category"] == "Femur" for row in rows.values()) <= 5
    assert max(rows) > "Femur/img_01"


def test_raw_answers(tmp_path):
    clinic(tmp_path, extra=[["Abdomen", "odd.png", "complete", "P99", "  Spine,  VERTEBRAL colum ", *NORMAL[1:]]])
    picture(tmp_path / "images" / "Abdomen" / "odd.png", 77)
    raw = rows_of(prepare(tmp_path, "--raw-answers")[0])["Abdomen/odd.png"]["questions"][0]
    tidy = rows_of(prepare(tmp_path)[0])["Abdomen/odd.png"]["questions"][0]
    assert raw["answer"] == "Spine,  VERTEBRAL colum" != tidy["answer"]
    assert raw["label"] == tidy["label"] == "spine"


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    clinic(tmp_path)
    calls = []

    def stops_after(limit):
        def check(path):
            calls.append(path)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return images.Checked(**{**real(path).__dict__})

        return check

    real = images.check_image
    monkeypatch.setattr(images, "check_image", stops_after(12))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert not (tmp_path / "data").exists()
    with open(tmp_path / ".data.checked.jsonl", "a") as journal:
        journal.write('{"path": "half a li')
    changed = tmp_path / "images" / "Abdomen" / "img_000.png"
    picture(changed, 500)
    calls.clear()
    monkeypatch.setattr(images, "check_image", stops_after(100))
    data, _ = prepare(tmp_path)
    assert len(calls) == 9 and changed in calls and len(rows_of(data)) == 20
    assert not (tmp_path / ".data.checked.jsonl").exists()


def test_a_killed_run_goes_on_to_the_same_data_set(tmp_path):
    """SIGKILL at several moments, the writing among them; what is there in the end is what an undisturbed run makes."""
    clinic(tmp_path, patients=150)
    _, undisturbed = prepare(tmp_path)
    shutil.rmtree(tmp_path / "data")
    command = [
        sys.executable,
        "prepare_dataset.py",
        "sheet",
        str(tmp_path / "annotations.xlsx"),
        "--images",
        str(tmp_path / "images"),
    ]
    journal, out = tmp_path / ".data.checked.jsonl", tmp_path / "data"
    moments = [
        lambda: journal.exists() and journal.stat().st_size > 0,
        lambda: journal.exists() and journal.read_bytes().count(b"\n") > 150,
        lambda: any(tmp_path.glob(".data.*.part/train/*.arrow")),
        lambda: any(tmp_path.glob(".data.*.part/test/*.arrow")),
    ]
    for moment in moments:
        run = subprocess.Popen(
            [*command, "--out", str(out), "--workers", "1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while run.poll() is None and not moment():
            time.sleep(0.001)
        run.kill()
        run.wait()
        assert not out.exists() or (out / "dataset.json").exists()
    _, again = prepare(tmp_path)
    assert again == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.xlsx", "data", "images"]


def test_a_set_that_was_being_replaced_is_put_back(tmp_path):
    clinic(tmp_path)
    _, before = prepare(tmp_path)
    os.rename(tmp_path / "data", tmp_path / ".data.x1.part.old")  # as a kill between two renames leaves it
    (tmp_path / ".data.x1.part").mkdir()
    with pytest.raises(UserError):
        prepare(tmp_path, "--group-column", "Doctor")
    assert json.loads((tmp_path / "data" / "dataset.json").read_text()) == before


def test_two_runs_at_once(tmp_path):
    clinic(tmp_path)
    with dataset.claimed(tmp_path / "data"), pytest.raises(UserError, match="another run"):
        prepare(tmp_path)
    prepare(tmp_path)


def test_a_full_disk_leaves_the_old_data_set(tmp_path, monkeypatch):
    clinic(tmp_path)
    _, before = prepare(tmp_path)
    from datasets.arrow_writer import ArrowWriter

    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path, "--seed", 7)
    assert json.loads((tmp_path / "data" / "dataset.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "no such image folder"),
        (["--group-column", "Doctor"], "no patient column"),
        (["--group-regex", "("], "no regular expression"),
        (["--group-regex", "(P[0-9]+)_"], "matches no file name"),
        (["--max-images", "2"], "--max-images is too small"),
        (["--near-duplicates", "300"], "out of range"),
        (["--out", "images"], "holds something else"),
        (["--out", "annotations.xlsx"], "--out is no folder"),
        (["--out", "annotations.xlsx/data"], "--out is no folder"),
        (["--export-chat", "chat.json"], "no .jsonl file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, message):
    clinic(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as mistake:
        prepare_dataset.main(["sheet", "annotations.xlsx", "--images", "images", "--out", "data", *arguments])
    assert "\n" not in str(mistake.value) and len(list((tmp_path / "images").iterdir())) == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [["--ratios", "70/30"], ["--ratios", "80/20/0"], ["--ratios", "a/b/c"], ["--rat", "1"]])
def test_the_parser_refuses_in_one_line(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        prepare_dataset.main(["sheet", "s.xlsx", "--images", str(tmp_path), *arguments])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_nothing_left_says_why(tmp_path):
    write_sheet(tmp_path / "annotations.xlsx", [["Abdomen", f"{n}.png", "complete", "P1", *NORMAL] for n in range(3)])
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"no usable row is left.*3 x no such image folder"):
        prepare(tmp_path)


def test_every_row_of_one_patient(tmp_path):
    clinic(tmp_path, patients=1)
    with pytest.raises(UserError, match="fewer groups than splits; 1 for 3"):
        prepare(tmp_path, "--group-column", "Patient")


@pytest.mark.parametrize("task", ["all", "report", "Q7"])
def test_export_chat(tmp_path, task):
    clinic(tmp_path)
    target = tmp_path / "chat" / "set.jsonl"
    data, _ = prepare(tmp_path, "--export-chat", target, "--task", task)
    prepare(tmp_path, "--export-chat", target, "--task", task)  # an export may replace an export
    for split, name in zip(SPLITS, ("set", "set-validation", "set-test"), strict=True):
        lines = [json.loads(line) for line in (target.parent / f"{name}.jsonl").read_text().splitlines()]
        wanted = [
            messages(f"set-images/{row['image_id']}", asked["prompt"], None, asked["answer"])
            for row in data[split]
            for asked in tasks_of(row, task)
        ]
        assert [line["messages"] for line in lines] == wanted and wanted
        for line in lines:
            content = line["messages"][1]["content"]
            assert [part["type"] for part in content] == ["image", "text"]
            source = tmp_path / "images" / content[0]["image"].removeprefix("set-images/")
            assert (target.parent / content[0]["image"]).read_bytes() == source.read_bytes()


def test_export_never_replaces_a_folder_of_someone_else(tmp_path):
    clinic(tmp_path)
    (tmp_path / "chat-images").mkdir()
    with pytest.raises(UserError, match="folder for the images exists"):
        prepare(tmp_path, "--export-chat", tmp_path / "chat.jsonl")


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no data set there"):
        dataset.load(tmp_path)
    clinic(tmp_path)
    prepare(tmp_path)
    (tmp_path / "data" / "train" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        dataset.load(tmp_path / "data")


def test_images_are_checked_in_worker_processes_alike(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(70)]
    for number, path in enumerate(paths):
        picture(path, number)
    paths[3].write_bytes(b"broken")
    alone = images.check_images(paths, tmp_path / "one.jsonl", workers=1)
    assert images.check_images(paths, tmp_path / "two.jsonl", workers=2) == alone
    assert [bool(found.problem) for found in alone] == [number == 3 for number in range(70)]
