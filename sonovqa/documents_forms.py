"""Templates of clinical forms: each fills a page with made-up entries and knows what should be read off it.

Nobody is named and nothing is taken from a record: patients are numbers, entries are drawn from `documents_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sonovqa import documents_vocabulary as vocabulary
from sonovqa.documents_pages import Block, Fields, Heading, Prose, Table


@dataclass
class Form:
    """What stands on a page, and what is asked of it: lists as `extraction.QUESTIONS` describe them, empty ones not asked."""

    title: str
    blocks: list[Block]
    medications: list[dict] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    values: list[dict] = field(default_factory=list)


class Draw:
    """A random generator with the draws that forms need."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def one(self, items: Sequence):
        """One of the items."""
        return items[self.rng.integers(len(items))]

    def some(self, items: Sequence, low: int, high: int) -> list:
        """``low`` to ``high`` different items, in random order."""
        count = min(int(self.rng.integers(low, high + 1)), len(items))
        return [items[index] for index in self.rng.permutation(len(items))[:count]]

    def number(self, low: float, high: float, decimals: int) -> str:
        """A number as it is printed."""
        return f"{self.rng.uniform(low, high):.{decimals}f}"

    def patient(self) -> Fields:
        """Who the page is about: no name, a number that says that it is synthetic."""
        day = f"{self.rng.integers(2015, 2026)}-{self.rng.integers(1, 13):02}-{self.rng.integers(1, 29):02}"
        who = (("Patient", f"SYN-{self.rng.integers(100000):05}"), ("Date", day))
        return Fields((*who, ("Sex", self.one(("female", "male"))), ("Age", f"{self.rng.integers(19, 93)} years")))

    def medications(self, low: int, high: int) -> list[dict]:
        """Medications with name, dose with unit, route and frequency."""
        made = []
        for name, doses, unit, route in self.some(vocabulary.DRUGS, low, high):
            dose = f"{self.one(doses):,} {unit}"
            made.append({"name": name, "dose": dose, "route": route, "frequency": self.one(vocabulary.FREQUENCIES)})
        return made

    def measured(self, kinds: Sequence[tuple], low: int, high: int) -> list[tuple[str, str, str]]:
        """Name, printed number and unit of some of ``kinds``, rows of (name, unit, low, high, decimals)."""
        return [
            (name, self.number(least, most, decimals), unit) for name, unit, least, most, decimals in self.some(kinds, low, high)
        ]


def value(name: str, printed: str, unit: str, **more: str) -> dict:
    """One entry of ``values``; the number as JSON has it, with the decimals that are printed."""
    return {"name": name, "value": json_number(printed), "unit": unit, **more}


def json_number(printed: str) -> int | float | str:
    """A printed number as JSON has it; what is no plain number (``120/80``, ``<0.1``, ``1,200``) stays text."""
    plain = printed.replace(".", "", 1).isascii() and printed.replace(".", "", 1).isdecimal()
    return (float(printed) if "." in printed else int(printed)) if plain else printed


def values(measured: Sequence[tuple[str, str, str]]) -> list[dict]:
    """`value` of each measured row."""
    return [value(*row) for row in measured]


def told(measured: Sequence[tuple[str, str, str]], between: str = ", ") -> str:
    """Measured rows in a line: ``Heart rate 92 bpm, SpO2 97%``."""
    return between.join(f"{name} {printed}{'' if unit in ('%', '') else ' '}{unit}" for name, printed, unit in measured)


def listed(medications: Sequence[dict]) -> str:
    """Medications, a numbered line each."""
    return "\n".join(f"{n}. {m['name']} {m['dose']} {m['route']} {m['frequency']}" for n, m in enumerate(medications, 1))


def prescription(draw: Draw) -> Form:
    """A prescription: one to four medications with directions."""
    drugs, diagnoses = draw.medications(1, 4), draw.some(vocabulary.DIAGNOSES, 1, 2)
    blocks = [draw.patient(), Heading("Diagnosis"), Prose("; ".join(diagnoses)), Heading("Rx")]
    for number, drug in enumerate(drugs, 1):
        blocks.append(Prose(f"{number}.  {drug['name']}  {drug['dose']}\n      Sig: {drug['route']}, {drug['frequency']}"))
        blocks.append(Prose(f"      Dispense: {draw.one((14, 30, 60, 90))}     Refills: {draw.one((0, 1, 3, 5))}"))
    blocks.append(Prose(f"\nPrescriber: Clinician {draw.rng.integers(10, 99)}     Signature: ______________"))
    return Form("PRESCRIPTION", blocks, drugs, diagnoses)


def lab_panel(draw: Draw) -> Form:
    """A laboratory report with reference ranges and H or L beside what lies outside them."""
    rows, found, names = [], [], set()
    for name, decimals, *systems in draw.some(vocabulary.TESTS, 10, 20):
        if name in names:
            continue
        names.add(name)
        unit, low, high = draw.one(systems)
        spread = high - low
        printed = draw.number(max(0.2 * low, low - 0.6 * spread), high + 0.8 * spread, decimals)
        flag = "L" if float(printed) < low else "H" if float(printed) > high else ""
        found.append(value(name, printed, unit, **({"flag": flag} if flag else {})))
        rows.append((name, printed, flag, unit, f"{low:.{decimals}f} - {high:.{decimals}f}"))
    header = ("Test", "Result", "Flag", "Units", "Reference")
    order = draw.one(((0, 1, 2, 3, 4), (0, 1, 3, 4, 2), (0, 2, 1, 3, 4)))
    table = Table(*_ordered([header], order), _ordered(rows, order))
    blocks = [draw.patient(), Fields((("Specimen", draw.one(("serum", "plasma"))), ("Status", "final"))), table]
    return Form("LABORATORY REPORT", [*blocks, Prose("H = above the reference range, L = below it")], values=found)


def _ordered(rows: Sequence[tuple], order: Sequence[int]) -> tuple[tuple, ...]:
    return tuple(tuple(row[column] for column in order) for row in rows)


def reconciliation(draw: Draw) -> Form:
    """A medication reconciliation form: what was taken at home, and what is done with it."""
    drugs, diagnoses = draw.medications(6, 11), draw.some(vocabulary.DIAGNOSES, 2, 4)
    rows = []
    for drug in drugs:
        drug["action"] = draw.one(("Continue", "Stop", "Change", "Hold"))
        rows.append((drug["name"], drug["dose"], drug["route"], drug["frequency"], drug["action"]))
    table = Table(("Medication", "Dose", "Route", "Frequency", "Action"), tuple(rows))
    blocks = [draw.patient(), Heading("Problems"), Prose("; ".join(diagnoses)), Heading("Medications before admission"), table]
    return Form("MEDICATION RECONCILIATION", [*blocks, Prose("Reviewed by: Pharmacist ____")], drugs, diagnoses)


def flowsheet(draw: Draw) -> Form:
    """An ICU flowsheet: observations by the hour, a blood gas, infusions."""
    hour = int(draw.rng.integers(0, 18))
    times = [f"{hour + 2 * step:02}:00" for step in range(3)]
    rows, found = [], []
    for name, unit, low, high, decimals in draw.some(vocabulary.OBSERVATIONS, 5, 7):
        printed = [draw.number(low, high, decimals) for _ in times]
        rows.append((f"{name} ({unit})", *printed))
        found += [value(name, number, unit, time=time) for number, time in zip(printed, times, strict=True)]
    gas, drips = draw.measured(vocabulary.GASES, 4, 5), draw.measured(vocabulary.DRIPS, 1, 3)
    blocks = [draw.patient(), Table(("Observation", *times), tuple(rows)), Heading("Arterial blood gas")]
    blocks += [Table(("Analyte", "Result", "Unit"), tuple(gas)), Heading("Infusions")]
    blocks.append(Table(("Infusion", "Rate", "Unit"), tuple(drips)))
    return Form("ICU FLOWSHEET", blocks, values=[*found, *values(gas), *values(drips)])


def operative_note(draw: Draw) -> Form:
    """An operative note: diagnosis, procedure, findings, blood loss, orders."""
    procedure, diagnosis, seen = draw.one(vocabulary.OPERATIONS)
    seen, drugs = draw.some(seen, 1, 3), draw.medications(1, 3)
    losses = [("Estimated blood loss", draw.number(10, 600, 0), "mL"), ("IV fluids", draw.number(500, 2500, 0), "mL")]
    losses.append(("Urine output", draw.number(50, 600, 0), "mL"))
    blocks = [draw.patient(), Heading("Preoperative diagnosis"), Prose(diagnosis), Heading("Procedure"), Prose(procedure)]
    blocks += [Heading("Anesthesia"), Prose(draw.one(("General endotracheal", "Spinal"))), Heading("Findings")]
    blocks += [Prose(". ".join(seen) + "."), Heading("Intraoperative balance"), Prose(told(losses, ". ") + ".")]
    blocks += [Heading("Postoperative orders"), Prose(listed(drugs))]
    return Form("OPERATIVE NOTE", blocks, drugs, [diagnosis, procedure, *seen], values(losses))


def cardiology(draw: Draw) -> Form:
    """A cardiology consultation: vital signs, echocardiogram, impression, medications."""
    echo, vitals = draw.measured(vocabulary.ECHO, 4, 7), draw.measured(vocabulary.VITALS, 2, 4)
    pressure = ("Blood pressure", f"{draw.rng.integers(92, 186)}/{draw.rng.integers(48, 104)}", "mmHg")
    seen, drugs = draw.some(vocabulary.CARDIAC, 2, 4), draw.medications(2, 4)
    blocks = [draw.patient(), Heading("Vital signs"), Prose(told([pressure, *vitals]) + "."), Heading("Echocardiogram")]
    blocks += [Table(("Measurement", "Value", "Unit"), tuple(echo)) if draw.rng.random() < 0.5 else Prose(told(echo, "; "))]
    blocks += [Heading("Impression"), Prose("\n".join(f"- {one}" for one in seen))]
    blocks += [Heading("Recommended medications"), Prose(listed(drugs))]
    return Form("CARDIOLOGY CONSULTATION", blocks, drugs, seen, values([pressure, *vitals, *echo]))


def radiology(draw: Draw) -> Form:
    """A radiology report: technique, findings with sizes, impression."""
    study, lesions, others = draw.one(vocabulary.STUDIES)
    measured = []
    for lesion in draw.some(lesions, 1, 3):
        unit = draw.one(("mm", "cm"))
        measured.append((lesion, draw.number(4, 38, 0) if unit == "mm" else draw.number(0.4, 4.5, 1), unit))
    others = draw.some(others, 1, 3)
    lines = [f"{name}, measuring {size} {unit}." for name, size, unit in measured] + [f"{other}." for other in others]
    blocks = [draw.patient(), Heading("Examination"), Prose(study), Heading("Findings"), Prose(" ".join(lines))]
    names = [name for name, _, _ in measured]
    blocks += [Heading("Impression"), Prose("\n".join(f"{n}. {name}" for n, name in enumerate([*names, *others], 1)))]
    return Form("RADIOLOGY REPORT", blocks, findings=[*names, *others], values=values(measured))


def discharge(draw: Draw) -> Form:
    """A discharge summary: diagnoses, course, vital signs and laboratory values, medications."""
    diagnoses, drugs = draw.some(vocabulary.DIAGNOSES, 2, 4), draw.medications(3, 7)
    vitals = draw.measured(vocabulary.VITALS, 2, 4)
    tests = {}
    for name, decimals, (unit, low, high), *_ in draw.some(vocabulary.TESTS, 3, 5):
        tests.setdefault(name, (name, draw.number(max(0, 0.8 * low), 1.3 * high, decimals), unit))
    blocks = [draw.patient(), Heading("Discharge diagnoses"), Prose("\n".join(f"- {one}" for one in diagnoses))]
    blocks += [Heading("Hospital course"), Prose(f"Admitted with {diagnoses[0].lower()}, treated, and improved over "
               f"{draw.rng.integers(2, 12)} days. Tolerating diet and walking at discharge.")]  # fmt: skip
    blocks += [Heading("Vital signs at discharge"), Prose(told(vitals) + "."), Heading("Last laboratory values")]
    blocks += [Prose(told(list(tests.values()), "; ") + "."), Heading("Discharge medications"), Prose(listed(drugs))]
    return Form("DISCHARGE SUMMARY", blocks, drugs, diagnoses, values([*vitals, *tests.values()]))


#: The templates by the category that their pages have.
TEMPLATES: dict[str, Callable[[Draw], Form]] = {
    "prescription": prescription,
    "lab_panel": lab_panel,
    "medication_reconciliation": reconciliation,
    "icu_flowsheet": flowsheet,
    "operative_note": operative_note,
    "cardiology_consultation": cardiology,
    "radiology_report": radiology,
    "discharge_summary": discharge,
}
