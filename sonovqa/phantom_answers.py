"""A phantom's answers, which follow from what is drawn, and how two annotators would write them in the sheet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sonovqa.phantom_anatomy import ANATOMIES, RADIUS_CM
from sonovqa.phantom_drawing import Spec, structures_of

ANNOTATORS = ("A", "B")

#: What else is written for a term of an answer, misspellings included. All of it is in the vocabulary of ``answers.toml``
#: or one typing error away from it: `tests/test_phantoms.py` reads every entry back.
SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "Q1": {
        "spine": ("vertebral column", "fetal spine", "vertibral column"),
        "skull": ("cranium", "calvarium", "skull bone"),
        "fetal head": ("head", "head of the fetus"),
        "midline falx": ("falx", "falx cerebri", "midline echo"),
        "cavum septi pellucidi": ("CSP", "cavum septum pellucidum", "cavum septi pelucidi"),
        "thalami": ("thalamus", "thallami"),
        "lateral ventricle": ("lateral ventricles", "lateral ventrcle"),
        "cerebellum": ("cerebellar hemispheres", "cerebelum"),
        "cisterna magna": ("cysterna magna",),
        "nuchal translucency": ("NT", "nuchal lucency", "nuchal transluceny"),
        "nasal bone": ("nasal bones",),
        "thorax": ("chest", "fetal chest"),
        "limbs": ("extremities", "limb"),
        "fetal body": ("trunk", "fetal trunk"),
        "stomach": ("stomach bubble", "stomac"),
        "umbilical vein": ("UV", "umblical vein"),
        "kidney": ("kidneys", "fetal kidneys"),
        "aortic arch": ("arch of the aorta",),
        "cervical spine": ("cervical vertebrae", "cervical vertebra"),
        "cervix": ("uterine cervix", "maternal cervix"),
        "cervical canal": ("endocervical canal",),
        "femur": ("thigh bone", "femoral shaft"),
        "pubic symphysis": ("symphysis pubis", "public symphysis"),
        "heart": ("fetal heart",),
        "rib": ("ribs",),
    },
    "Q2": {
        "cephalic": ("vertex", "head down", "cephalic presentation", "cephallic"),
        "breech": ("breech presentation", "head up", "breach"),
        "axial": ("axial view", "transverse section", "axial plane"),
        "sagittal": ("sagittal view", "saggital", "sagittal section"),
        "longitudinal": ("longitudinal view", "long axis"),
        "occiput left": ("occiput to the left", "occiput on left side"),
        "occiput right": ("occiput to the right", "occiput on right side"),
        "spine left": ("spine to the left", "spine on the left"),
        "spine right": ("spine to the right", "spine on the right"),
        "head left": ("head to the left", "fetal head on the left"),
        "head right": ("head to the right", "fetal head on the right"),
    },
    "Q3": {
        "trans-thalamic": ("transthalamic plane", "trans thalamic view", "trans-thalamic plane"),
        "trans-ventricular": ("transventricular plane", "trans ventricular view"),
        "trans-cerebellar": ("transcerebellar plane", "trans cerebellar view"),
        "axial abdomen": ("transverse abdominal plane", "abdominal circumference plane", "AC plane"),
        "axial thorax": ("four chamber view", "4 chamber view"),
        "sagittal aorta": ("aortic arch view", "long axis of the aorta"),
        "longitudinal femur": ("femur long axis", "femur view"),
        "sagittal CRL": ("CRL view", "crown rump length plane"),
        "sagittal NT": ("NT view", "nuchal translucency plane"),
        "oblique": ("oblique plane", "oblique view"),
        "sagittal spine": ("sagittal view of the spine", "spine view"),
        "sagittal cervix": ("cervical length view", "transvaginal view of the cervix"),
        "transperineal sagittal": ("transperineal view", "trans perineal plane"),
    },
    "Q4": {
        "AC": ("abdominal circumference", "abdominal circumferance"),
        "HC": ("head circumference", "head circumferance"),
        "BPD": ("biparietal diameter", "bi-parietal diameter"),
        "FL": ("femur length", "femoral length"),
        "CRL": ("crown rump length", "crown-rump length"),
        "NT": ("nuchal translucency", "NT thickness"),
        "CL": ("cervical length", "cervical lenght"),
        "TCD": ("transcerebellar diameter", "trans cerebellar diameter"),
        "CM": ("cisterna magna", "cisterna magna depth"),
        "LV": ("lateral ventricle width", "atrial width"),
        "TC": ("thoracic circumference", "chest circumference"),
        "CTR": ("cardiothoracic ratio", "cardio thoracic ratio"),
        "aortic diameter": ("diameter of the aorta", "aorta diameter"),
        "AoP": ("angle of progression",),
    },
    "Q5": {
        f"{weeks} weeks": (f"{weeks.replace('-', ' to ')} wks", f"{weeks.replace('-', ' - ')} weeks", f"around {weeks} weeks")
        for weeks in RADIUS_CM
    },
    "Q6": {
        "good": ("good quality", "clear", "high quality"),
        "medium": ("moderate", "acceptable", "meduim"),
        "low": ("poor", "low quality", "suboptimal"),
    },
    "Q7": {
        "normal": ("within normal limits", "unremarkable", "normal appearance", "norml"),
        "abnormal": ("abnoraml",),
        "thick nuchal translucency": ("increased NT", "thickened nuchal translucency"),
        "ventriculomegaly": ("dilated lateral ventricle", "wide ventricles"),
        "enlarged cisterna magna": ("mega cisterna magna",),
        "hydronephrosis": ("dilated renal pelvis", "hydronephosis"),
        "dilated aorta": ("aortic dilatation",),
        "abdominal wall defect": ("omphalocele",),
        "mass": ("tumour",),
        "cervical funnelling": ("funneling of the internal os",),
        "short femur": ("shortened femur",),
        "caput succedaneum": ("caput",),
        "cardiomegaly": ("enlarged heart",),
    },
    "Q8": {
        "routine monitoring": ("routine follow up", "routine antenatal care", "routine monitering"),
        "repeat scan": ("repeat imaging", "rescan"),
        "re-measure NT": ("repeat NT measurement", "remeasure NT"),
        "specialist referral": ("refer to fetal medicine", "fetal medicine referral"),
        "neurosonography": ("fetal neurosonography", "detailed neurosonography"),
        "fetal echocardiography": ("fetal echo", "fetal echocardiogram"),
        "invasive testing": ("amniocentesis", "karyotyping"),
        "cervical length monitoring": ("serial cervical length", "cervical surveillance"),
        "delivery assessment": ("assess mode of delivery", "labour assessment"),
    },
}  # fmt: skip

#: How terms are joined, the canonical way first: lists by a comma, a finding after a colon.
JOINS = {"Q7": (": ", " - ", ", "), **dict.fromkeys(("Q1", "Q2", "Q4", "Q8"), (", ", "; ", ","))}
#: Share of terms written in other words, of capitals, of stray spaces and of final full stops, by annotator.
HABITS = {
    "A": {"other": 0.15, "capital": 0.9, "spaces": 0.1, "stop": 0.5},
    "B": {"other": 0.6, "capital": 0.2, "spaces": 0.3, "stop": 0.1},
}


def answers_of(spec: Spec) -> dict[str, str]:
    """Answers to Q1 … Q8 that follow from what is drawn, in the wording of ``answers.toml``."""
    anatomy = ANATOMIES[spec.category]
    if spec.abnormal:
        action = anatomy.abnormal_action
    else:
        action = "repeat scan" if spec.quality == "low" else anatomy.normal_action
    return {
        "Q1": ", ".join(structures_of(spec)),
        "Q2": f"{spec.presentation}, {anatomy.view}, {anatomy.landmark} {spec.side}",
        "Q3": anatomy.plane,
        "Q4": ", ".join(anatomy.parameters) or "none",
        "Q5": f"{spec.weeks} weeks",
        "Q6": spec.quality,
        "Q7": f"abnormal: {anatomy.finding}" if spec.abnormal else "normal",
        "Q8": action,
    }


def terms_of(question_id: str, answer: str) -> list[str]:
    """A canonical answer's terms: items of a list, components of an orientation, verdict and finding."""
    return answer.split(JOINS[question_id][0]) if question_id in JOINS else [answer]


def wordings(question_id: str, answer: str) -> Iterator[str]:
    """A canonical answer with one term at a time in each of its other wordings."""
    terms = terms_of(question_id, answer)
    for index, term in enumerate(terms):
        for other in SYNONYMS[question_id].get(term, ()):
            yield JOINS.get(question_id, ("",))[0].join([*terms[:index], other, *terms[index + 1 :]])


def as_written(question_id: str, answer: str, annotator: str, rng: np.random.Generator) -> str:
    """A canonical answer as an annotator would type it; the meaning stays.

    Args:
        question_id: ``Q1`` … ``Q8``.
        answer: from `answers_of`.
        annotator: a key of `HABITS`.
        rng: decides on synonyms, order of lists, capitals, spaces and full stops.
    """
    habits, terms = HABITS[annotator], terms_of(question_id, answer)
    chosen = []
    for term in terms:
        others = SYNONYMS[question_id].get(term, ())
        chosen.append(others[rng.integers(len(others))] if others and rng.random() < habits["other"] else term)
    if question_id in ("Q1", "Q4", "Q8"):
        rng.shuffle(chosen)
    joins = JOINS.get(question_id, ("",))
    text = joins[rng.integers(len(joins)) if annotator == "B" else 0].join(chosen)
    if rng.random() < habits["capital"]:
        text = text[0].upper() + text[1:]
    if rng.random() < habits["stop"]:
        text += "."
    if rng.random() < habits["spaces"]:
        text = (f" {text}", f"{text} ", text.replace(" ", "  ", 1))[rng.integers(3)]
    return text
