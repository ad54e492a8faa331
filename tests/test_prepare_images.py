"""prepare_dataset.py on files of every kind: each bad image is left out with its reason, and what is merely unusual is kept."""

from __future__ import annotations

import os

import numpy as np
from clinic import NORMAL, clinic, picture, prepare, rows_of
from PIL import Image

from sonovqa import images


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
    Image.new("L", (9_000, 40)).save(folder / "slim.png")
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
        "slim.png": "times as long as it is wide",
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


def test_images_are_checked_in_worker_processes_alike(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(70)]
    for number, path in enumerate(paths):
        picture(path, number)
    paths[3].write_bytes(b"broken")
    alone = images.check_images(paths, tmp_path / "one.jsonl", workers=1)
    assert images.check_images(paths, tmp_path / "two.jsonl", workers=2) == alone
    assert [bool(found.problem) for found in alone] == [number == 3 for number in range(70)]
