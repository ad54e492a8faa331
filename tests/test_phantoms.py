"""Phantoms: deterministic, resumable, with answers that follow from what is drawn and hang on no trivial cue."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import openpyxl
import pytest
from PIL import Image

from sonovqa import answers, files
from sonovqa.cli import UserError
from sonovqa.phantom_anatomy import ANATOMIES, RADIUS_CM
from sonovqa.phantom_answers import HABITS, answers_of, as_written, wordings
from sonovqa.phantom_drawing import structures_of
from sonovqa.phantoms import QUALITY, draw, plan, sample_spec, write_phantoms
from sonovqa.questions import CATEGORIES, QUESTIONS

SMALL = (160, 120)


def rows_of(workbook) -> list[dict]:
    header, *rows = openpyxl.load_workbook(workbook).active.iter_rows(values_only=True)
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    return root, write_phantoms(root, 40, seed=3, size=SMALL)


def every_answer() -> list[tuple[str, str]]:
    """Every (question, canonical answer) that phantoms can have."""
    rng, found = np.random.default_rng(0), set()
    for category in CATEGORIES:
        for abnormal in (False, True):
            for quality in QUALITY:
                for weeks in RADIUS_CM:
                    for side in ("left", "right"):
                        for presentation in ("cephalic", "breech"):
                            spec = sample_spec(
                                rng,
                                category,
                                abnormal=abnormal,
                                quality=quality,
                                weeks=weeks,
                                side=side,
                                presentation=presentation,
                            )
                            found |= set(answers_of(spec).items())
    return sorted(found)


def test_sheet_is_in_form_a(drawn):
    root, workbook = drawn
    rows = rows_of(workbook)
    assert list(rows[0]) == [
        "Folder Name",
        "Image Name",
        "Patient",
        "Status",
        *(f"{q.id}: {q.title}" for q in QUESTIONS.values()),
    ]
    complete = [row for row in rows if row["Status"] == "complete"]
    assert len(complete) == 40
    assert {row["Status"] for row in rows} > {"complete"}
    for row in rows:
        path = root / "images" / row["Folder Name"] / row["Image Name"]
        assert row["Folder Name"] in CATEGORIES and path.name.startswith(row["Patient"] + "_")
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", SMALL)
    for question in QUESTIONS.values():
        assert all(row[f"{question.id}: {question.title}"] for row in complete)
        assert not any(row[f"{question.id}: {question.title}"] for row in rows if row["Status"] != "complete")


def test_sheet_says_what_the_record_says(drawn):
    root, workbook = drawn
    truth = files.read_json(root / "phantoms.json")["truth"]
    compared = 0
    for row in rows_of(workbook):
        known = truth[f"{row['Folder Name']}/{row['Image Name']}"]
        assert known["status"] == row["Status"]
        if row["Status"] != "complete":
            continue
        for question in QUESTIONS.values():
            written = row[f"{question.id}: {question.title}"]
            compared += written != known["answers"][question.id]
            assert answers.read(question.id, written).key == answers.read(question.id, known["answers"][question.id]).key
    assert compared > 100  # the annotators do write in their own way


def test_same_seed_same_files_whatever_the_workers(drawn, tmp_path):
    root, workbook = drawn
    again = write_phantoms(tmp_path, 40, seed=3, size=SMALL, workers=2)
    assert rows_of(again) == rows_of(workbook)
    assert (tmp_path / "phantoms.json").read_bytes() == (root / "phantoms.json").read_bytes()
    names = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")}
    assert names == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert [row.spec for row in plan(40, seed=4)] != [row.spec for row in plan(40, seed=3)]


def test_resumes_without_drawing_twice(tmp_path):
    write_phantoms(tmp_path, 6, size=SMALL)
    paths = sorted(tmp_path.rglob("*.png"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
    paths[0].write_bytes(before[paths[0]][1][:-20])  # cut off from outside
    paths[1].unlink()
    write_phantoms(tmp_path, 6, size=SMALL)
    for path in paths:
        assert path.read_bytes() == before[path][1]
        assert (path.stat().st_mtime_ns == before[path][0]) == (path not in paths[:2])


def test_other_arguments_leave_nothing_of_the_earlier_call(tmp_path):
    for sub, seeds in (("twice", (1, 2)), ("once", (2,))):
        for seed in seeds:
            write_phantoms(tmp_path / sub, 6, seed=seed, size=SMALL)
    found = [
        {path.relative_to(tmp_path / sub): path.read_bytes() for path in (tmp_path / sub).rglob("*.png")}
        for sub in ("twice", "once")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["", "[]", '{"truth": 3, "size": [1, 1]}'])
def test_a_foreign_record_is_left_alone(tmp_path, text):
    (tmp_path / "phantoms.json").write_text(text)
    with pytest.raises(UserError, match="not a record of phantoms"):
        write_phantoms(tmp_path, 3, size=SMALL)
    assert (tmp_path / "phantoms.json").read_text() == text


def test_more_images_keep_the_first_patients():
    first = plan(30, seed=5)[:30]
    assert [row.spec for row in plan(300, seed=5)[:30]] == [row.spec for row in first]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"images": 0}, "too few phantoms: 0"),
        ({"abnormal_rate": 1.5}, "1.5"),
        ({"size": (10, 600)}, "10x600"),
        ({"categories": ("Elbow",)}, "Elbow"),
        ({"images_per_patient": 0}, "--images-per-patient"),
    ],
)
def test_wrong_arguments_are_the_users_mistake(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        write_phantoms(tmp_path, **{"images": 5, **wrong})
    assert not list(tmp_path.iterdir())


def test_patients_rates_and_majorities():
    rows = plan(4000, seed=1, abnormal_rate=0.05)
    patients = collections.Counter(row.patient for row in rows)
    assert all(2 <= n <= 6 for n in list(patients.values())[:-1]) and 3.7 < len(rows) / len(patients) < 4.3
    assert 0.035 < np.mean([row.spec.abnormal for row in rows]) < 0.065
    assert 0.46 < np.mean([row.spec.abnormal for row in plan(2000, seed=1, abnormal_rate=0.5)]) < 0.54
    assert not any(row.spec.abnormal for row in plan(500, abnormal_rate=0))
    assert {row.spec.category for row in rows} == set(CATEGORIES)
    for question in ("Q1", "Q2", "Q3", "Q5"):
        commonest = collections.Counter(answers_of(row.spec)[question] for row in rows).most_common(1)[0][1] / len(rows)
        assert commonest < 0.4, question
    q2 = collections.Counter((row.spec.side, row.spec.presentation) for row in rows)
    assert len(q2) == 4 and max(q2.values()) / len(rows) < 0.3


def test_nothing_incidental_depends_on_category():
    rows = plan(6000, seed=2)
    overall = np.mean(
        [[row.spec.centre[0], row.spec.gain_db, row.spec.radius_cm, row.spec.side == "left"] for row in rows], axis=0
    )
    spread = np.std([[row.spec.centre[0], row.spec.gain_db, row.spec.radius_cm, row.spec.side == "left"] for row in rows], axis=0)
    for category in CATEGORIES:
        own = np.array(
            [
                [row.spec.centre[0], row.spec.gain_db, row.spec.radius_cm, row.spec.side == "left"]
                for row in rows
                if row.spec.category == category
            ]
        )
        assert (abs(own.mean(0) - overall) < 4 * spread / len(own) ** 0.5).all(), category


def test_answers_follow_from_the_drawing():
    spec = sample_spec(
        np.random.default_rng(0), "Trans-thalamic", weeks="20-25", quality="good", side="left", presentation="breech"
    )
    assert answers_of(spec) == {
        "Q1": "skull, midline falx, cavum septi pellucidi, thalami", "Q2": "breech, axial, occiput left", "Q3": "trans-thalamic",
        "Q4": "HC, BPD", "Q5": "20-25 weeks", "Q6": "good", "Q7": "normal", "Q8": "routine monitoring",
    }  # fmt: skip
    low = dataclasses.replace(spec, quality="low")
    assert (answers_of(low)["Q6"], answers_of(low)["Q8"]) == ("low", "repeat scan")
    ill = answers_of(dataclasses.replace(spec, abnormal=True, side="right"))
    assert (ill["Q2"], ill["Q7"], ill["Q8"]) == ("breech, axial, occiput right", "abnormal: ventriculomegaly", "neurosonography")
    assert "lateral ventricle" in ill["Q1"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_what_decides_an_answer_is_drawn_large(category):
    """Each deciding change alters the image over 50 x 25 pixels or more even at the smallest scale, whatever the gain."""
    rng = np.random.default_rng(1)
    spec = sample_spec(rng, category, weeks="15-20", quality="good", side="left", presentation="cephalic", tilt=0.0)
    image = draw(spec).astype(int)
    for change in ({"abnormal": True}, {"side": "right"}, {"presentation": "breech"}, {"radius_cm": RADIUS_CM["20-25"]}):
        moved = abs(draw(dataclasses.replace(spec, **change)).astype(int) - image) > 40
        assert moved.sum() > 1200, change


def test_trans_thalamic_and_trans_ventricular_differ_by_one_structure():
    thalamic, ventricular = (ANATOMIES[name].structures for name in ("Trans-thalamic", "Trans-ventricular"))
    assert set(thalamic) - set(ventricular) == {"thalami"} and set(ventricular) - set(thalamic) == {"lateral ventricle"}
    assert all(thalamic[name] == ventricular[name] for name in set(thalamic) & set(ventricular))
    assert ANATOMIES["Trans-thalamic"].body == ANATOMIES["Trans-ventricular"].body


def test_drawing_is_a_function_of_the_specification():
    spec = sample_spec(np.random.default_rng(7), "Femur")
    image = draw(spec, SMALL)
    assert (image.dtype, image.shape) == (np.uint8, (120, 160))
    assert (image == draw(spec, SMALL)).all()
    corners = image[:20, :20], image[:20, -20:-6], image[-6:, :6], image[-6:, -12:-6]  # outside the fan, short of the ticks
    assert not any(corner.any() for corner in corners) and image.max() > 150
    brighter = draw(dataclasses.replace(spec, gain_db=spec.gain_db + 6), SMALL)
    assert brighter.mean() > image.mean() + 5


def test_every_category_has_its_anatomy():
    assert set(ANATOMIES) == set(CATEGORIES)
    assert all(
        structures_of(sample_spec(np.random.default_rng(0), name, abnormal=flag)) for name in CATEGORIES for flag in (False, True)
    )


@pytest.mark.parametrize(("question", "canonical"), every_answer())
def test_all_wordings_mean_the_same(question, canonical):
    assert answers.normalise(question, canonical) == canonical
    meant, rng = answers.read(question, canonical), np.random.default_rng(0)
    assert meant is not None
    for text in [
        *wordings(question, canonical),
        *(as_written(question, canonical, who, rng) for who in HABITS for _ in range(12)),
    ]:
        assert answers.read(question, text).key == meant.key, text
        assert answers.normalise(question, text) == canonical, text


# ---------------------------------------------------------------------------------------- no trivial cue (issue 2)


def pixels(images: int, rate: float) -> tuple[np.ndarray, list, np.ndarray]:
    """Standardised 32x32 grey pixels [images, 1024], the phantoms, and which of them belong to held-out patients."""
    rows = plan(images, seed=11, abnormal_rate=rate)[:images]
    small = [Image.fromarray(draw(row.spec, (200, 150))).resize((32, 32), Image.Resampling.BOX) for row in rows]
    flat = np.stack([np.asarray(image, float).ravel() for image in small])
    held_out = np.array([int(row.patient[1:]) % 4 == 0 for row in rows])
    return (flat - flat[~held_out].mean(0)) / (flat[~held_out].std(0) + 1e-6), rows, held_out


def fitted(features, target, held_out):
    """Logistic regression, its ridge chosen among three on the training patients themselves."""
    from sklearn.linear_model import LogisticRegressionCV

    model = LogisticRegressionCV(
        Cs=[1e-4, 1e-3, 1e-2], cv=3, max_iter=400, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
    )
    return model.fit(features[~held_out], target[~held_out])


def test_orientation_cannot_be_told_by_a_linear_model():
    features, rows, held_out = pixels(800, 0.05)
    told = np.array([answers_of(row.spec)["Q2"] for row in rows])
    core = np.array([f"{row.spec.side} {row.spec.presentation}" for row in rows])
    for target in (told, core):
        assert fitted(features, target, held_out).score(features[held_out], target[held_out]) < 0.6


def test_normality_cannot_be_told_by_a_linear_model():
    from sklearn.metrics import roc_auc_score

    features, rows, held_out = pixels(800, 0.4)
    target = np.array([row.spec.abnormal for row in rows])
    scores = fitted(features, target, held_out).decision_function(features[held_out])
    assert roc_auc_score(target[held_out], scores) < 0.7
