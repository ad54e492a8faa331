"""PathVQA, PubMedVision and MedPix: small releases written here in the form that the real ones have."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
from conftest import noise_image

import prepare_dataset
from sonovqa import dataset
from sonovqa.cli import UserError
from sonovqa.rows import SPLITS

LONG = "The micrograph shows sheets of atypical cells with prominent nucleoli. " * 60


def prepare(out, *arguments):
    prepare_dataset.main([*map(str, arguments), "--out", str(out), "--workers", "1"])
    data = dataset.load(out)
    rows = [{**row, "split": name} for name, split in data.items() for row in split.remove_columns("image")]
    return rows, json.loads((out / "dataset.json").read_text())


def encoded(seed: int) -> bytes:
    data = io.BytesIO()
    noise_image(64, 48, seed).save(data, "PNG")
    return data.getvalue()


def parquet(path, rows, **types):
    """A file as `Dataset.push_to_hub` writes it: an image column is a struct of bytes and path."""
    from datasets import Dataset, Features, Image, Value

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features({k: Image() if v == "image" else Value(v) for k, v in types.items()})).to_parquet(
        path
    )


@pytest.fixture
def path_vqa(tmp_path):
    def row(image, question, answer):
        return {"image": {"bytes": encoded(image), "path": None}, "question": question, "answer": answer}

    types = {"image": "image", "question": "string", "answer": "string"}
    for name, images in (("train", range(8)), ("validation", range(8, 10)), ("test", (7, 10, 11))):
        rows = [r for i in images for r in (row(i, "is necrosis present?", "yes"), row(i, "what is seen?", f"{name} {i}"))]
        if name == "train":
            rows += [row(0, "is necrosis present?", "yes"), row(1, "what?", ""), row(1, "describe", LONG)]
        parquet(tmp_path / "path" / "data" / f"{name}-00000-of-00001.parquet", rows, **types)
    return tmp_path / "path"


def test_path_vqa(tmp_path, path_vqa):
    rows, about = prepare(tmp_path / "out", "path-vqa", "--root", path_vqa)
    questions = [q for row in rows for q in row["questions"]]
    assert len(rows) == len({row["group"] for row in rows}) == 12 and {row["category"] for row in rows} == {"Pathology"}
    assert sum(q["answer_type"] == "closed" for q in questions) == 12 and max(len(q["answer"]) for q in questions) > 4000
    dropped = {reason: len(items) for reason, items in about["dropped"].items()}
    # image 7 is in train and in test: its yes/no question is asked twice
    assert dropped == {"a question without text or answer": 1, "the same question and answer about one image again": 2}
    assert any("derived" in note for note in about["notes"]) and about["leakage"]["groups"] == []


def test_path_vqa_official_split_is_kept_and_its_leak_named(tmp_path, path_vqa):
    rows, about = prepare(tmp_path / "out", "path-vqa", "--root", path_vqa, "--split", "official")
    assert sum(row["split"] == "test" for row in rows) == 3 and len(rows) == 13
    assert any("the official split leaks: 2 of its 6" in note for note in about["notes"])
    assert about["leakage"]["test_questions_on_images_outside_test"] == 2


def bare(path, images):
    """A file whose image column is whatever ``images`` holds, as an export by another tool may have it."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True)
    rows = [{"image": image, "question": "what is seen?", "answer": f"answer {n}"} for n, image in enumerate(images)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["path-vqa", "vqa-rad"])
def test_an_image_column_of_plain_bytes_is_read_and_any_other_refused(tmp_path, kind):
    bare(tmp_path / "bytes" / "train-0.parquet", [*map(encoded, range(4)), None])
    rows, about = prepare(tmp_path / "out", kind, "--root", tmp_path / "bytes")
    assert len(rows) == 4 and about["dropped"] == {"a row without an image": ["row 4"]}
    for name, images in (("text", ["images/a.jpg"]), ("list", [[1, 2]]), ("inside", [{"bytes": "text", "path": None}])):
        bare(tmp_path / name / "train-0.parquet", images)
        with pytest.raises(UserError, match=r"the image column holds no images but (str|list); .*--root") as mistake:
            prepare(tmp_path / "other", kind, "--root", tmp_path / name)
        assert "\n" not in str(mistake.value)


@pytest.fixture
def medpix(tmp_path):
    types = {"image_id": "image", "case_id": "string", "question": "string", "answer": "string", "ans_len": "int32"}
    types |= {"mode": "string", "split": "string"}
    for name, cases in (("Train", range(6)), ("Valid", (6, 7)), ("Test", (8, 9))):
        rows = [
            {"image_id": {"bytes": encoded(100 * case + view), "path": None}, "case_id": f"MPX{case}", "question": "Which plane?",
             "answer": f"Axial {view}", "ans_len": 2, "mode": "CT" if case % 2 else "MR", "split": name.lower()}
            for case in cases for view in range(2)
        ]  # fmt: skip
        parquet(tmp_path / "medpix" / "data" / f"{name}-00000-of-00001.parquet", rows, **types)
    return tmp_path / "medpix"


def test_medpix_groups_by_case(tmp_path, medpix):
    rows, about = prepare(tmp_path / "out", "medpix", "--root", medpix)
    assert len(rows) == 20 and {row["group"] for row in rows} == {f"MPX{n}" for n in range(10)}
    assert {row["category"] for row in rows} == {"CT", "MR"} and about["leakage"]["groups"] == []
    rows, _ = prepare(tmp_path / "out", "medpix", "--root", medpix, "--split", "official")
    assert {row["group"] for row in rows if row["split"] == "test"} == {"MPX8", "MPX9"}


def test_medpix_2_as_released(tmp_path):
    root = tmp_path / "MedPix-2-0"
    (root / "images").mkdir(parents=True)
    entries = []
    for n in range(6):
        (root / "images" / f"MPX{n}_synpic{n}.png").write_bytes(encoded(n))
        text = {"ACR Codes": "8.-1", "Age": "73", "Caption": f"{n} {LONG}", "Figure Part": None, "Modality": "CT - noncontrast",
                "Plane": "Coronal" if n else None, "Sex": "male"}  # fmt: skip
        entries.append({"Type": "CT", "U_id": f"MPX{n}", "image": f"MPX{n}_synpic{n}", "Description": text,
                        "Location": "Genitourinary", "Location Category": "Reproductive and Urinary System"})  # fmt: skip
    entries.append({**entries[0], "image": "MPX9_gone"})
    (root / "images" / "MPX6_synpic6.png").write_bytes(encoded(6))
    entries.append({**entries[0], "image": "MPX6_synpic6", "U_id": "MPX6", "Description": None})
    (root / "Descriptions.json").write_text(json.dumps(entries))
    rows, about = prepare(tmp_path / "out", "medpix", "--root", root)
    assert len(rows) == 6 and sum(len(row["questions"]) for row in rows) == 17
    assert {reason: len(items) for reason, items in about["dropped"].items()} == {
        "no such image file": 1, "a question without text or answer": 1 + 3,
    }  # fmt: skip
    with pytest.raises(UserError, match="no split"):
        prepare(tmp_path / "out", "medpix", "--root", root, "--split", "official")


def sample(number, images, answer=LONG, **more):
    turns = [{"from": "human", "value": "<image>\nWhat does the figure show?"}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": turns, "id": f"Alignment_VQA_{number}", "modality": "Microscopy Images",
            "body_part": "Cell", **more}  # fmt: skip


@pytest.fixture
def figures(tmp_path):
    root = tmp_path / "PubMedVision"
    root.mkdir()
    made = [sample(n, [f"images/pmc_{n}_0.jpg"], f"{n} {LONG}") for n in range(8)]
    made += [sample(20, ["images/pmc_0_1.jpg"]), sample(21, ["images/pmc_1_0.jpg", "images/pmc_1_1.jpg"])]
    made += [sample(22, ["images/pmc_99_0.jpg"]), {"id": "broken"}, sample(23, ["images/pmc_2_0.jpg"], conversations=[{}, {}])]
    (root / "PubMedVision_Alignment_VQA.json").write_text(json.dumps(made))
    short = [sample(n, [f"images/pmc_{n}_0.jpg"], "A cell.", modality="Computed Tomography") for n in range(2)]
    (root / "PubMedVision_InstructionTuning_VQA.json").write_text(json.dumps(short))
    for archive in range(2):
        with zipfile.ZipFile(root / f"images_{archive}.zip", "w") as packed:
            for n in range(4 * archive, 4 * archive + 4):
                packed.writestr(f"images/pmc_{n}_0.jpg", encoded(n))
            packed.writestr(f"images/pmc_{archive}_1.jpg", encoded(50 + archive))
    return root


def test_pubmedvision_keeps_long_answers(tmp_path, figures):
    rows, about = prepare(tmp_path / "out", "pubmedvision", "--root", figures)
    questions = [q for row in rows for q in row["questions"]]
    assert len(rows) == 9 and len(questions) == 11 and sum(len(q["answer"]) > 4000 for q in questions) == 9
    assert {q["question"] for q in questions} == {"What does the figure show?"}
    homes = {row["group"]: row["split"] for row in rows}
    assert len(homes) == 8 and all(homes[row["group"]] == row["split"] for row in rows)  # pmc_0_0 and pmc_0_1: one figure
    dropped = {reason.split(":")[0]: len(items) for reason, items in about["dropped"].items()}
    assert sorted(dropped.values()) == [1, 1, 2] and dropped["a sample about several images"] == 1
    assert any("none was left out or cut" in note for note in about["notes"])


def test_pubmedvision_samples_that_lack_something_are_listed(tmp_path, figures):
    def said(*values):
        return [{"from": speaker, "value": value} for speaker, value in zip(("human", "gpt"), values, strict=True)]

    answers = [("What?", None), (None, "A cell."), ("What?", ["a"]), ("How many?", 5)]
    made = [sample(n, ["images/pmc_0_0.jpg"], conversations=said(*pair)) for n, pair in enumerate(answers)]
    made += [sample(7, images) for images in ([None], [5], 5, [], {}, [""])]
    made += [sample(8, ["images/pmc_0_0.jpg"], conversations=[])]
    made += [sample(30 + n, [f"images/pmc_{n}_0.jpg"], f"{n} {LONG}") for n in range(2, 6)]
    (figures / "PubMedVision_Alignment_VQA.json").write_text(json.dumps(made))
    rows, about = prepare(tmp_path / "out", "pubmedvision", "--root", figures)
    assert [q["answer"] for row in rows for q in row["questions"] if q["question"] == "How many?"] == ["5"]
    dropped = {reason: len(items) for reason, items in about["dropped"].items()}
    assert dropped == {"a question without text or answer": 3, "a sample without id, image or whole conversation": 7}


def test_pubmedvision_unpacks_no_more_than_asked(tmp_path, figures):
    rows, about = prepare(tmp_path / "out", "pubmedvision", "--root", figures, "--max-images", 4)
    assert len(rows) == 4 == len(list((tmp_path / "out-source" / "images").iterdir()))
    assert [len(items) for reason, items in about["dropped"].items() if reason.startswith("not unpacked")] == [5]


def test_pubmedvision_reads_unpacked_images(tmp_path, figures):
    for archive in figures.glob("*.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(figures)
        archive.unlink()
    rows, _ = prepare(tmp_path / "out", "pubmedvision", "--root", figures)
    assert len(rows) == 9 and {row["split"] for row in rows} == set(SPLITS)


def test_a_source_that_comes_out_empty_is_an_error(tmp_path, figures, path_vqa):
    (figures / "PubMedVision_InstructionTuning_VQA.json").unlink()
    table = figures / "PubMedVision_Alignment_VQA.json"
    table.write_text(json.dumps([sample(1, ["images/pmc_1_0.jpg"], "")]))
    with pytest.raises(UserError, match=r"no usable row is left.*1 x a question without text or answer"):
        prepare(tmp_path / "out", "pubmedvision", "--root", figures)
    table.write_text("[{")
    with pytest.raises(UserError, match="samples cannot be read"):
        prepare(tmp_path / "out", "pubmedvision", "--root", figures)
    with pytest.raises(UserError, match="no Parquet file"):
        prepare(tmp_path / "out", "path-vqa", "--root", figures)
    with pytest.raises(UserError, match="lacks image_id, case_id, mode"):
        prepare(tmp_path / "out", "medpix", "--root", path_vqa)
    with pytest.raises(UserError, match="no such folder"):
        prepare(tmp_path / "out", "medpix", "--root", tmp_path / "nowhere")
    for path in path_vqa.rglob("*.parquet"):
        path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        prepare(tmp_path / "out", "path-vqa", "--root", path_vqa)


def test_root_and_hub_id_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", "medpix", "--root", tmp_path, "--hub-id", "a/b")
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot be fetched; a/b.*--root"):  # HF_HUB_OFFLINE: nothing is asked of a network
        prepare(tmp_path / "out", "path-vqa", "--hub-id", "a/b")
