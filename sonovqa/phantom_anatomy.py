"""What the phantoms show: each of the 14 categories' structures, as shapes, and what can be said of it. Data only.

Anatomy coordinates: the unit is the anatomy's radius, x runs from the landmark's end (-1: occiput, spine or head) to the
other end (+1), y downwards. What decides an answer is at least half a radius across, so that it survives being shrunk to
96 pixels. These are cartoons of the textbook planes, not simulations of them. Sources: ISUOG practice guidelines
(second-trimester scan 2022, 11-14-week scan 2023, fetal neurosonography 2020, intrapartum ultrasound 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

#: Echo levels on the display, 0 … 1.
FLUID, DARK, TISSUE, SOFT, FIRM, BRIGHT, BONE = 0.02, 0.16, 0.36, 0.46, 0.64, 0.80, 0.98

#: Radius of the anatomy in cm by gestational age in weeks: about half the occipito-frontal diameter at mid-interval, and
#: the same for every category, so that weeks cannot be told from the plane. Neighbours differ by a quarter.
RADIUS_CM = {"15-20": 3.2, "20-25": 3.95, "25-30": 4.85, "30-35": 6.0}


@dataclass(frozen=True)
class Shape:
    """A filled polygon (``width`` 0) or a stroke, in anatomy coordinates.

    Attributes:
        points: corners, in radii.
        level: echo level, 0 … 1.
        width: width of the stroke, in radii; 0 fills the polygon.
        shadow: how much sound it keeps from what lies behind it, 0 … 1.
    """

    points: tuple[tuple[float, float], ...]
    level: float
    width: float = 0.0
    shadow: float = 0.0


Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Anatomy:
    """A category's drawing and the words that follow from it, in the wording of ``answers.toml``.

    Attributes:
        view, landmark: Q2's view, and the structure at x = -1 whose side is told.
        plane: answer to Q3.
        parameters: answer to Q4, what can be measured on the plane.
        body: shapes beneath the structures that Q1 does not name.
        structures: canonical name to shapes, in drawing order; the names are the answer to Q1.
        finding: what an abnormal image shows (Q7) ...
        altered: ... the structures that it redraws or adds ...
        lesion: ... and the shapes that it lays on top.
        normal_action, abnormal_action: answer to Q8 for an image of sufficient quality.
    """

    view: str
    landmark: str
    plane: str
    parameters: tuple[str, ...]
    body: Shapes
    structures: dict[str, Shapes]
    finding: str
    abnormal_action: str
    altered: dict[str, Shapes] = field(default_factory=dict)
    lesion: Shapes = ()
    normal_action: str = "routine monitoring"


def arc(
    x: float, y: float, rx: float, ry: float, start: float, stop: float, width: float, level: float, shadow: float = 0.0
) -> Shape:
    """A stroke along an ellipse from ``start`` to ``stop`` degrees: 0 is +x, 90 downwards, 180 the landmark's end."""
    steps = max(6, int(abs(stop - start) / 9))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return Shape(tuple((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles), level, width, shadow)


def oval(x: float, y: float, rx: float, ry: float, level: float, turn: float = 0.0) -> Shape:
    """A filled ellipse, turned by ``turn`` degrees."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    edge = [(rx * math.cos(math.radians(a)), ry * math.sin(math.radians(a))) for a in range(0, 360, 10)]
    return Shape(tuple((x + u * c - v * s, y + u * s + v * c) for u, v in edge), level)


def ring(x: float, y: float, rx: float, ry: float, width: float, level: float) -> Shape:
    """A closed elliptical stroke."""
    return arc(x, y, rx, ry, 0, 360, width, level)


def stroke(width: float, level: float, *points: tuple[float, float], shadow: float = 0.0) -> Shape:
    """A line through points."""
    return Shape(points, level, width, shadow)


def pair(make: Callable[..., Shape], x: float, y: float, *sizes: float) -> Shapes:
    """The same shape above and below the long axis."""
    return make(x, -y, *sizes), make(x, y, *sizes)


_BRAIN = (oval(0, 0, 1.0, 0.78, SOFT),)
_SKULL = (ring(0, 0, 0.95, 0.73, 0.11, BRIGHT), arc(0, 0, 0.9, 0.7, 130, 230, 0.3, BONE, 0.35))
_FALX = (stroke(0.08, BRIGHT, (-0.75, 0), (0.85, 0)),)
_CAVUM = (oval(0.52, 0, 0.2, 0.2, FLUID),)
_THALAMI = pair(oval, -0.08, 0.32, 0.42, 0.25, DARK)
_VENTRICLES = pair(oval, -0.08, 0.34, 0.48, 0.2, BONE)  # filled by choroid plexus, as in the second trimester
_WIDE_VENTRICLE = oval(-0.05, 0.36, 0.68, 0.3, FLUID)
_CEREBELLUM, _PUSHED_CEREBELLUM = pair(oval, -0.3, 0.28, 0.3, 0.28, BRIGHT), pair(oval, 0.05, 0.28, 0.28, 0.26, BRIGHT)
_CISTERN, _WIDE_CISTERN = (oval(-0.62, 0, 0.1, 0.4, FLUID),), (oval(-0.45, 0, 0.3, 0.56, FLUID),)

_TRUNK = (oval(0, 0, 0.95, 0.85, SOFT),)
_SKIN = ring(0, 0, 0.92, 0.82, 0.07, BRIGHT)
_SPINE = (oval(-0.85, 0, 0.24, 0.36, BONE), stroke(0.3, BONE, (-0.85, -0.3), (-0.85, 0.3), shadow=0.35))
_STOMACH = (oval(0.1, 0.42, 0.36, 0.24, FLUID),)
_UMBILICAL_VEIN = (stroke(0.17, FLUID, (0.85, -0.05), (0.3, -0.08), (0.0, -0.3)),)
_KIDNEYS = (*pair(oval, -0.32, 0.45, 0.36, 0.3, FLUID), *pair(ring, -0.32, 0.45, 0.36, 0.3, 0.08, BRIGHT))
_RIBS = tuple(arc(0, 0, 0.88, 0.78, a, a + 26, 0.17, BONE) for a in (30, 75, 120, 214, 259, 304))
_CHAMBERS = (*pair(oval, 0.36, 0.2, 0.17, 0.14, FLUID), *pair(oval, 0.0, 0.2, 0.17, 0.14, FLUID))
_HEART, _WIDE_HEART = (oval(0.2, 0, 0.46, 0.46, BRIGHT), *_CHAMBERS), (oval(0.12, 0, 0.7, 0.68, BRIGHT), *_CHAMBERS)
_AORTA = (stroke(0.26, FLUID, (0.5, 0.5), (0.5, -0.1), (0.35, -0.4), (0.05, -0.5), (-0.2, -0.35), (-0.3, 0.0), (-0.3, 0.6)),)
_WIDE_AORTA = (
    stroke(0.56, FLUID, (0.45, 0.45), (0.42, -0.1), (0.3, -0.35), (0.02, -0.4), (-0.25, -0.3), (-0.3, 0.0), (-0.3, 0.55)),
)
_FEMUR = (stroke(0.24, BONE, (-0.3, 0), (0.85, 0), shadow=0.3), oval(-0.3, 0, 0.15, 0.2, BONE), oval(0.85, 0, 0.15, 0.2, BONE))
_SHORT_FEMUR = (stroke(0.3, BONE, (0.1, 0), (0.5, 0), shadow=0.3),)

_HEAD = (
    oval(-0.5, 0.1, 0.5, 0.48, SOFT),
    ring(-0.5, 0.1, 0.46, 0.44, 0.1, BRIGHT),
    arc(-0.5, 0.1, 0.43, 0.42, 120, 240, 0.28, BONE, 0.3),
)
_LARGE_HEAD = (
    oval(-0.25, 0.1, 0.75, 0.66, SOFT),
    ring(-0.25, 0.1, 0.72, 0.63, 0.11, BRIGHT),
    arc(-0.25, 0.1, 0.66, 0.6, 130, 230, 0.3, BONE, 0.35),
)
_PRESENTING_HEAD = (arc(-0.85, 0, 0.3, 0.65, 90, 270, 0.3, BONE, 0.3),)
_NECK = (oval(0.35, 0.15, 0.7, 0.42, SOFT),)
_STRIP = (stroke(0.34, BRIGHT, (-0.2, -0.42), (0.9, -0.36)), stroke(0.16, FLUID, (-0.25, -0.42), (0.95, -0.36)))
_THICK_STRIP = (stroke(0.72, BRIGHT, (-0.2, -0.5), (0.9, -0.44)), stroke(0.54, FLUID, (-0.3, -0.5), (1.0, -0.44)))
_CHEST = (oval(0.52, 0.34, 0.46, 0.42, BRIGHT), oval(0.52, 0.34, 0.27, 0.24, FLUID))
_NASAL_BONE = (stroke(0.3, BONE, (-0.85, 0.7), (-0.2, 0.76)),)
_FINGERS = tuple(stroke(0.15, BONE, (x, 0.0), (x, 0.8)) for x in (0.12, 0.44, 0.76))
_LEGS = tuple(stroke(0.13, BONE, (x, 0.4), (x, 0.82)) for x in (0.25, 0.62))
_BODY = (oval(0.42, 0.12, 0.52, 0.34, BRIGHT),)
_SAC = (oval(0, 0, 1.05, 0.88, FLUID),)
_HERNIA = (oval(0.5, -0.42, 0.3, 0.28, SOFT), ring(0.5, -0.42, 0.3, 0.28, 0.14, BONE))
_VERTEBRAE = tuple(stroke(0.26, BONE, (x, y), (x + 0.2, y)) for x in (-0.4, 0.0, 0.4, 0.8) for y in (-0.32, 0.32))
_CORD = stroke(0.2, FLUID, (-0.5, 0), (0.95, 0))
_CERVIX, _CANAL = (oval(0.15, 0, 0.85, 0.6, FIRM),), (stroke(0.1, FLUID, (-0.5, 0), (0.8, 0)),)
_FUNNEL = (Shape(((-0.6, -0.55), (-0.6, 0.55), (0.3, 0.0)), FLUID),)
_SYMPHYSIS = (oval(0.72, -0.45, 0.34, 0.2, BONE, 35), oval(0.72, -0.45, 0.22, 0.1, SOFT, 35))
_SCALP = (arc(-0.25, 0.1, 0.9, 0.82, 0, 100, 0.36, BRIGHT),)


def _brain(
    plane: str, parameters: tuple[str, ...], structures: dict[str, Shapes], finding: str, altered: dict[str, Shapes]
) -> Anatomy:
    return Anatomy(
        view="axial",
        landmark="occiput",
        plane=plane,
        parameters=parameters,
        body=_BRAIN,
        structures={"skull": _SKULL, **structures},
        finding=finding,
        abnormal_action="neurosonography",
        altered=altered,
    )


def _nuchal(
    plane: str, parameters: tuple[str, ...], structures: dict[str, Shapes], action: str = "routine monitoring"
) -> Anatomy:
    return Anatomy(
        view="sagittal",
        landmark="head",
        plane=plane,
        parameters=parameters,
        body=_NECK,
        structures={"fetal head": _HEAD, **structures},
        finding="thick nuchal translucency",
        abnormal_action="invasive testing",
        altered={"nuchal translucency": _THICK_STRIP},
        normal_action=action,
    )


ANATOMIES: dict[str, Anatomy] = {
    "Abdomen": Anatomy(
        view="axial",
        landmark="spine",
        plane="axial abdomen",
        parameters=("AC",),
        body=(*_TRUNK, _SKIN),
        structures={"spine": _SPINE, "stomach": _STOMACH, "umbilical vein": _UMBILICAL_VEIN},
        finding="hydronephrosis",
        abnormal_action="specialist referral",
        altered={"kidney": _KIDNEYS},
    ),
    "Aorta": Anatomy(
        view="sagittal",
        landmark="spine",
        plane="sagittal aorta",
        parameters=("aortic diameter",),
        body=(oval(0, 0, 1.0, 0.8, SOFT), ring(0, 0, 0.97, 0.78, 0.07, BRIGHT)),
        structures={"spine": _SPINE, "aortic arch": _AORTA},
        finding="dilated aorta",
        abnormal_action="fetal echocardiography",
        altered={"aortic arch": _WIDE_AORTA},
    ),
    "CRL-View": Anatomy(
        view="sagittal",
        landmark="head",
        plane="sagittal CRL",
        parameters=("CRL",),
        body=_SAC,
        structures={"fetal head": _HEAD, "limbs": _LEGS, "fetal body": _BODY},
        finding="abdominal wall defect",
        abnormal_action="specialist referral",
        lesion=_HERNIA,
    ),
    "Cervical": Anatomy(  # read as the fetal cervical spine: the maternal cervix has a category of its own
        view="sagittal",
        landmark="head",
        plane="sagittal spine",
        parameters=(),
        body=(oval(0, 0, 1.0, 0.75, SOFT), _CORD),
        structures={"fetal head": _PRESENTING_HEAD, "cervical spine": _VERTEBRAE},
        finding="mass",
        abnormal_action="specialist referral",
        lesion=(oval(0.3, 0.46, 0.55, 0.36, BRIGHT),),
    ),
    "Cervix": Anatomy(
        view="sagittal",
        landmark="head",
        plane="sagittal cervix",
        parameters=("CL",),
        body=(),
        structures={"fetal head": _PRESENTING_HEAD, "cervix": _CERVIX, "cervical canal": _CANAL},
        finding="cervical funnelling",
        abnormal_action="specialist referral",
        lesion=_FUNNEL,
        normal_action="cervical length monitoring",
    ),
    "Femur": Anatomy(
        view="longitudinal",
        landmark="spine",
        plane="longitudinal femur",
        parameters=("FL",),
        body=_TRUNK,
        structures={"spine": _SPINE, "femur": _FEMUR},
        finding="short femur",
        abnormal_action="specialist referral",
        altered={"femur": _SHORT_FEMUR},
    ),
    "NT-View": _nuchal("sagittal NT", ("CRL", "NT"), {"nuchal translucency": _STRIP, "thorax": _CHEST}),
    "Non_standard_NT": _nuchal("oblique", (), {"nuchal translucency": _STRIP, "limbs": _FINGERS}, "re-measure NT"),
    "Public_Symphysis_fetal_head": Anatomy(
        view="sagittal",
        landmark="head",
        plane="transperineal sagittal",
        parameters=("AoP",),
        body=(),
        structures={"fetal head": _LARGE_HEAD, "pubic symphysis": _SYMPHYSIS},
        finding="caput succedaneum",
        abnormal_action="specialist referral",
        lesion=_SCALP,
        normal_action="delivery assessment",
    ),
    "Standard_NT": _nuchal("sagittal NT", ("NT",), {"nasal bone": _NASAL_BONE, "nuchal translucency": _STRIP}),
    "Thorax": Anatomy(
        view="axial",
        landmark="spine",
        plane="axial thorax",
        parameters=("TC", "CTR"),
        body=_TRUNK,
        structures={"spine": _SPINE, "rib": _RIBS, "heart": _HEART},
        finding="cardiomegaly",
        abnormal_action="fetal echocardiography",
        altered={"heart": _WIDE_HEART},
    ),
    "Trans-cerebellum": _brain(
        "trans-cerebellar",
        ("TCD", "CM"),
        {"cavum septi pellucidi": _CAVUM, "cerebellum": _CEREBELLUM, "cisterna magna": _CISTERN},
        "enlarged cisterna magna",
        {"cerebellum": _PUSHED_CEREBELLUM, "cisterna magna": _WIDE_CISTERN},
    ),
    "Trans-thalamic": _brain(
        "trans-thalamic",
        ("HC", "BPD"),
        {"midline falx": _FALX, "cavum septi pellucidi": _CAVUM, "thalami": _THALAMI},
        "ventriculomegaly",
        {"lateral ventricle": (_WIDE_VENTRICLE,)},
    ),
    "Trans-ventricular": _brain(
        "trans-ventricular",
        ("HC", "LV"),
        {"midline falx": _FALX, "cavum septi pellucidi": _CAVUM, "lateral ventricle": _VENTRICLES},
        "ventriculomegaly",
        {"lateral ventricle": (_VENTRICLES[0], _WIDE_VENTRICLE)},
    ),
}
