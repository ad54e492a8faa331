"""Reading answers: hard phrasings with their sources, and properties that hold for every wording."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonovqa import answers
from sonovqa.answer_words import VOCABULARY, has_remains
from sonovqa.questions import CATEGORIES, QUESTIONS

HARD = {path: tomllib.loads(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("answers_hard*.toml"))}
ROWS = [(path, q, row) for path, table in HARD.items() for q, rows in table["phrasings"].items() for row in rows]


def wrong(question_id: str, row: dict) -> str:
    """What is read wrongly in a hard phrasing; empty if nothing."""
    meaning = answers.read(question_id, row["text"])
    if row.get("unread"):
        return f"read {meaning.key!r}" if meaning else ""
    if meaning is None:
        return "unread"
    parts = dict(meaning.parts)
    read = {
        "labels": sorted(meaning.labels),
        "label": answers.label(question_id, row["text"]),
        "parts": parts if question_id == "Q2" else {name: parts.get(name) for name in row.get("parts", ())},
        "weeks": [round(w, 6) for w in meaning.weeks or ()],
        "values": {q.name: q.value for q in meaning.values},
    }
    wanted = {**row, "labels": sorted(row.get("labels", ())), "weeks": [round(w, 6) for w in row.get("weeks", ())]}
    return "; ".join(f"{k}: read {got}, meant {wanted[k]}" for k, got in read.items() if k in row and got != wanted[k])


def as_test(path: Path, question_id: str, row: dict):
    """A row as a test; one with `known_miss` is expected to fail, and fails the suite once it no longer does."""
    marks = [pytest.mark.xfail(reason=row["known_miss"], strict=True)] if "known_miss" in row else []
    return pytest.param(path, question_id, row, id=f"{path.stem}-{question_id}-{row['text'][:40]}", marks=marks)


@pytest.mark.parametrize("path, question_id, row", [as_test(*r) for r in ROWS])
def test_hard_phrasing(path, question_id, row):
    assert row["source"] in HARD[path]["sources"]
    assert wrong(question_id, row) == ""


@pytest.mark.parametrize("path", HARD, ids=lambda path: path.stem)
def test_unread_rate(path, capsys):
    rows = [(q, r) for p, q, r in ROWS if p == path]
    meant = [(q, r) for q, r in rows if not r.get("unread")]
    unread = sum(answers.read(q, r["text"]) is None for q, r in meant)
    misread = sum(bool(wrong(q, r)) for q, r in rows) - unread
    with capsys.disabled():
        print(f"\n{path.name}: {len(rows)} phrasings, unread {unread} of {len(meant)} ({unread / len(meant):.1%}),", end=" ")
        known = sum("known_miss" in row for _, row in rows)
        print(f"misread {misread} of {len(rows)} ({misread / len(rows):.1%}); known misses {known}")
    assert unread <= 0.1 * len(meant)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_forty_phrasings_a_question_and_a_third_of_forty_by_fresh_eyes(question_id):
    stems = [path.stem for path, q, _ in ROWS if q == question_id]
    assert len(stems) >= 40 and stems.count("answers_hard_fresh") >= 40 / 3


# -------------------------------------------------------------------------------------------------- properties

TEXTS = [(q, row["text"]) for _, q, row in ROWS]
LISTS = {"Q1": "structures", "Q4": "parameters", "Q8": "actions"}
WORDINGS = [(q, name, text) for q, table in LISTS.items() for name, more in VOCABULARY[table].items() for text in (name, *more)]
CASES = st.sampled_from([str.upper, str.lower, str.title, str.swapcase])
BLANKS = st.sampled_from([" ", "  ", "\t", "\u00a0", "\n", " \n"])
SWALLOWED = ("no action", *VOCABULARY["actions_generic"]["names"])  # their meaning hangs on what stands beside them
FEW = settings(max_examples=300)


def key(question_id: str, text: str) -> str | None:
    meaning = answers.read(question_id, text)
    return meaning and meaning.key


@FEW
@given(st.sampled_from([t for t in TEXTS if "\n" not in t[1]]), CASES, st.data())
def test_case_white_space_and_final_punctuation_never_matter(row, case, data):
    question_id, text = row
    blanks = data.draw(st.lists(BLANKS, min_size=text.count(" "), max_size=text.count(" ")))
    words = case(text).split(" ")
    changed = "".join(f"{w}{b}" for w, b in zip(words, [*blanks, ""], strict=True))
    end = data.draw(st.sampled_from(["", ".", "!", " .", "  "])) if changed[-1:].isalnum() else ""
    assert key(question_id, f" {changed}{end}") == key(question_id, text)


@FEW
@given(st.sampled_from(sorted(LISTS)), st.data())
def test_order_and_synonyms_of_list_items_never_matter(question_id, data):
    table = VOCABULARY[LISTS[question_id]]
    names = data.draw(st.lists(st.sampled_from([n for n in table if n not in SWALLOWED]), min_size=1, max_size=6, unique=True))
    said = [data.draw(st.sampled_from([name, *table[name]])) for name in data.draw(st.permutations(names))]
    comma = data.draw(st.sampled_from([", ", " , ", "; ", " and ", "\n- "]))
    meaning = answers.read(question_id, comma.join(said))
    assert meaning is not None and meaning.labels == set(names)
    assert answers.normalise(question_id, comma.join(said)) == answers.label(question_id, ", ".join(names))


@FEW
@given(st.integers(10, 4000), st.integers(10, 4000), st.sampled_from(["AC", "NT", "aortic diameter", "CM"]))
def test_decimal_points_and_units_matter(a, b, name):
    first, second = (key("Q4", f"{name}: {v / 10:g} mm") for v in (a, b))
    assert (first == second) == (a == b)
    assert key("Q4", f"{name} = {a / 100:g} CM.") == first
    assert answers.read("Q4", f"{name} {a / 10:g}mm").values == (answers.Quantity(name, a / 10, "mm", a / 10, a / 10),)
    for other in ("-{v} mm", "< {v} mm", "> {v} mm", "{v}-{w} mm", "{v} ± 1 mm", "{v}", "{v} degrees"):
        assert key("Q4", f"{name} {other.format(v=a / 10, w=a / 10 + 1)}") != first


@FEW
@given(st.integers(8, 41), st.integers(0, 6), st.integers(8, 41), st.integers(0, 6))
def test_weeks_and_days_matter(w, d, v, e):
    forms = ["{}w+{}d", "{}+{}", "{} weeks {} days", "GA: {}w{}d", "about {} weeks and {} days.", "{}+{} weeks"]
    forms += ["{} {}/7 weeks"] * (d > 0)
    assert {answers.read("Q5", form.format(w, d)).weeks for form in forms} == {((7 * w + d) / 7,) * 2}
    assert (key("Q5", f"{w}w+{d}d") == key("Q5", f"{v}w+{e}d")) == ((w, d) == (v, e))
    low, high = sorted(((w, d), (v, e)))
    both = answers.read("Q5", f"{low[0]}+{low[1]} to {high[0]}+{high[1]} weeks")
    weeks = tuple((7 * whole + days) / 7 for whole, days in (low, high))
    assert both.weeks == weeks if weeks[1] - weeks[0] <= VOCABULARY["age"]["widest"] else both is None


LOOSE = ["no", "not", "without", "but", "and", "or", "moderate", "zwischen", "qwerty", "left", "xylophone", "7", "3.5 mm"]


@FEW
@given(st.sampled_from([*QUESTIONS]), st.data())
def test_normalised_answers_keep_their_meaning_and_unknown_words(question_id, data):
    pool = [t for q, t in TEXTS if q == question_id] + list(answers.labels_of(question_id)) + LOOSE
    words = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=5))
    text = data.draw(st.sampled_from([" ", ", ", ". ", "; "])).join(words)
    once = answers.normalise(question_id, text)
    assert answers.normalise(question_id, once) == once
    assert key(question_id, once) == key(question_id, text)
    assert all(w in once for w in ("xylophone", "qwerty", "zwischen") if w in words)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_every_canonical_label_is_read_as_itself_and_stays(question_id):
    for label in answers.labels_of(question_id):
        text = f"{label} weeks" if question_id == "Q5" else label
        assert answers.label(question_id, text) == label
        stored = answers.normalise(question_id, text)
        assert answers.label(question_id, stored) == label
        assert stored == label or question_id == "Q5"


@pytest.mark.parametrize("question_id, table", [*LISTS.items(), ("Q6", "quality"), ("Q7", "normality")])
def test_every_wording_is_read_as_its_name(question_id, table):
    for name, others in VOCABULARY[table].items():
        for text in others:
            assert answers.label(question_id, text) == name, text


@FEW
@given(st.sampled_from(WORDINGS), st.data())
def test_a_typing_error_never_makes_another_meaning(row, data):
    question_id, name, text = row
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
    typed = text[:at] + data.draw(st.sampled_from(["", letter, letter + text[at]])) + text[at + 1 :]
    meaning = answers.read(question_id, typed)
    exact = {n for q, n, wording in WORDINGS if q == question_id and wording.casefold() in typed.casefold()}
    assert meaning is None or meaning.labels <= {name} | exact


def test_speed():
    rows = [(q, f"{t} {n}") for n in range(8) for q, t in TEXTS]
    start = time.process_time()  # of this process alone: what else the machine does takes none of it
    for q, t in rows:
        answers.read(q, t)
    assert (time.process_time() - start) * 15152 / len(rows) < 30


@pytest.mark.parametrize("question_id", QUESTIONS)
@pytest.mark.parametrize(
    "piece", ["AC 12 mm, ", "20 ", "no cyst, left kidney ", "low gain ", "spine left ", "\n", "x", "- normal?\n"]
)
def test_an_answer_of_a_megabyte_is_read_in_time(question_id, piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    answers.read(question_id, text)
    answers.normalise(question_id, text)
    assert time.process_time() - start < 10, "it takes about 0.3 s; what grows with the square takes hours"


CATEGORY_PLANES = {
    "Abdomen": "axial abdomen", "Aorta": "sagittal aorta", "CRL-View": "sagittal CRL", "Cervical": "sagittal spine",
    "Cervix": "sagittal cervix", "Femur": "longitudinal femur", "NT-View": "sagittal NT",
    "Non_standard_NT": "non-standard sagittal NT",
    "Public_Symphysis_fetal_head": "transperineal sagittal", "Standard_NT": "sagittal NT", "Thorax": "axial thorax",
    "Trans-cerebellum": "trans-cerebellar", "Trans-thalamic": "trans-thalamic", "Trans-ventricular": "trans-ventricular",
}  # fmt: skip


@pytest.mark.parametrize("category", CATEGORIES)
def test_planes_of_every_category(category):
    plane = CATEGORY_PLANES[category]
    assert answers.label("Q3", plane.upper()) == plane
    rule = answers.PLANE_RULES[plane.removeprefix("non-standard ")]
    assert rule["weeks"][0] < rule["weeks"][1] and set(rule["parameters"]) <= set(answers.labels_of("Q4"))


def test_coherence_names_actions():
    for actions in answers.COHERENCE.values():
        assert set(actions) <= set(answers.labels_of("Q8"))


@pytest.mark.parametrize(
    "question, text, expected",
    [
        ("Is there a pleural effusion?", "Yes", "yes"),
        ("Is there a pleural effusion?", "no, there is none", "no"),
        ("Is it on the left or right?", "Left", "left"),
        ("Are the lungs normal?", "not sure", ""),
        ("Are the lungs normal?", "There is no abnormality.", ""),
        ("Are the lungs normal?", "No abnormality", ""),
        ("Are the lungs clear?", "There is no lung opacity", ""),
        ("Is there a fracture?", "There is no fracture.", "no"),
        ("Is there a fracture?", "The image does not show a fracture", "no"),
        ("Is there a fracture?", "No fracture is seen", "no"),
        ("Is there a fracture?", "The fracture is absent", "no"),
        ("Is there a fracture?", "Nope", "no"),
        ("Is there a fracture?", "Answer: yes", "yes"),
        ("Is there a fracture?", "The answer is no.", "no"),
        ("Is there a fracture?", "A fracture is present", ""),
        ("Is there a fracture?", "There is no doubt that there is a fracture", ""),
        ("Is there a fracture?", "No doubt there is a fracture", ""),
        ("How big is the mass?", "5cm", "50 mm"),
        ("How big is the mass?", "approximately 5.0 cm.", "50 mm"),
        ("How many kidneys?", "two", "2"),
        ("What is seen?", "No abnormality", "no abnormality"),
        ("What is seen?", "liver, the spleen", "liver, spleen"),
        ("What is seen?", "Spleen, liver.", "liver, spleen"),
        ("What weighting?", "T2-weighted", "t2-weighted"),
    ],
)
def test_other_questions(question, text, expected):
    meaning = answers.read("vqarad-1", text, question)
    assert (meaning.key if meaning else "") == expected
    assert answers.normalise("vqarad-1", f"  {text} \n") == text


@pytest.mark.parametrize(
    "question_id, text, expected",
    [
        ("Q7", "normal<|im_end|>\n<|im_start|>user\nIs it abnormal?", "normal"),
        ("Q7", "<|im_start|>assistant\nnormal<|im_end|>", "normal"),
        ("Q7", "normal</s> abnormal", "normal"),
        ("Q7", "normal<end_of_turn>abnormal", "normal"),
        ("Q7", "normal<|endoftext|>Human: abnormal?", "normal"),
        ("Q5", "<think>maybe 30 weeks</think>20 weeks", "20-25"),
        ("Q5", "maybe 30 weeks</think>\n\n20 weeks", "20-25"),
        ("Q5", "<think>It looks like 30 weeks, or", ""),
        ("Q5", "<think>30 weeks<|im_end|>", ""),
    ],
)
def test_chat_marks_and_thinking_are_no_answer(question_id, text, expected):
    assert answers.label(question_id, text) == expected
    assert has_remains(text)
    assert not has_remains("NT <3.5 mm, HC > 95% | BPD <= 47")


@pytest.mark.parametrize("text", ["", "  ", "\n"])
@pytest.mark.parametrize("question_id", ["Q1", "Q7", "vqarad-1"])
def test_nothing_is_unread(question_id, text):
    assert answers.read(question_id, text) is None
    assert answers.label(question_id, text) == "" == answers.normalise(question_id, text)


@pytest.mark.parametrize(
    "weeks, name", [((12, 12.9), "8-13"), ((13, 13), "13-15"), ((20, 25), "20-25"), ((38, 38), "38+"), ((6, 7), "under 8")]
)
def test_bins(weeks, name):
    assert answers.bin_of(weeks) == name


@pytest.mark.parametrize(
    "question_id, text, expected",
    [
        ("Q1", "Vertebral column , IVC", "spine, inferior vena cava"),
        ("Q1", "stomach, left kidney", "stomach, left kidney"),
        ("Q1", "spine; stomach NOT seen", "spine; stomach not seen"),
        ("Q2", "Vertex; axial view; back to the left", "cephalic, axial, spine left"),
        ("Q2", "either cephalic or breech, axial", "either cephalic or breech, axial"),
        ("Q3", "Trans Thalamic View (axial)", "trans-thalamic"),
        ("Q3", "transthalamic, oblique", "trans-thalamic, oblique"),
        ("Q4", "femoral length = 3.2cm; Head circumference", "HC, FL 32 mm"),
        ("Q5", "20 to 25 wks", "20-25 weeks"),
        ("Q5", "12 weeks and 4 days", "12w+4d"),
        ("Q5", "20-25 weeks by femur", "20-25 weeks by femur"),
        ("Q6", "Very good quality.", "good"),
        ("Q7", "  Within Normal limits.", "normal"),
        ("Q7", "ABNORMAL - Thickened NT", "abnormal: thick nuchal translucency"),
        ("Q8", "Repeat NT measurement and routine followup", "routine monitoring, re-measure NT"),
        ("Q8", "anomaly scan at 20 weeks", "anomaly scan at 20 weeks"),
    ],
)
def test_canonical_wording(question_id, text, expected):
    assert answers.normalise(question_id, text) == expected
