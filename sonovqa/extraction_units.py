"""Units and frequencies as clinical pages write them, and what means the same. Data only."""

from __future__ import annotations

#: One spelling and its synonyms, without case; "per" is "/". Units of different size or meaning are never joined: mEq is not
#: mmol, and no number is converted; mIU/L is uIU/mL, as both parts are a thousandth.
#: Source of the spellings: UCUM (Unified Code for Units of Measure) and common lab reports.
_SYNONYMS = {
    "": ("ratio", "units:none", "none", "n/a"),
    "mg": ("milligram", "milligrams", "mgs"), "g": ("gram", "grams", "gm", "gms"), "kg": ("kilogram", "kilograms", "kgs"),
    "mcg": ("ug", "microgram", "micrograms"), "ng": ("nanogram",), "lb": ("lbs", "pound", "pounds"),
    "ml": ("milliliter", "milliliters", "millilitre", "cc", "mls"), "l": ("liter", "liters", "litre", "litres"),
    "dl": ("deciliter", "deciliters"),
    "units": ("unit", "u"), "iu": ("internationalunits",), "puffs": ("puff",), "tablets": ("tablet", "tab", "tabs"),
    "drops": ("drop", "gtt", "gtts"), "capsules": ("capsule", "cap", "caps"),
    "mg/dl": ("mg%", "mgs/dl"), "g/dl": ("gm/dl", "g%"), "g/l": (), "mg/l": (), "mcg/dl": ("ug/dl",), "mcg/l": ("ug/l",),
    "ng/ml": (), "ng/dl": (), "pg/ml": (), "pg": (), "fl": (), "ng/l": (), "mg/g": (), "ml/min": ("cc/min",),
    "mmol/l": ("mm/l", "millimol/l"), "mcmol/l": ("umol/l", "micromol/l"), "nmol/l": (), "pmol/l": (), "mmol": (),
    "meq": (), "meq/l": (), "u/l": ("units/l",), "iu/l": (), "miu/l": ("mu/l", "uiu/ml", "mciu/ml", "uu/ml"), "mosm/kg": (),
    "10^9/l": ("x10^9/l", "10*9/l", "10e9/l", "k/ul", "k/mcl", "10^3/ul", "x10^3/ul", "10*3/ul", "thou/ul", "10⁹/l", "x10⁹/l",
               "k/mm3", "10^3/mm3", "x10^3/mm3"),
    "10^12/l": ("x10^12/l", "10*12/l", "m/ul", "10^6/ul", "x10^6/ul", "10*6/ul", "mill/ul", "10¹²/l"),
    "mmhg": ("mm hg", "mm of hg", "torr"), "cmh2o": ("cm h2o", "cmh₂o", "cm of h2o", "cm of water"), "kpa": (),
    "bpm": ("beats/min", "beats/minute"), "/min": ("breaths/min", "breaths/minute"),
    "/ul": ("/mcl", "/mm3", "/mm³", "/mm^3", "/cu mm", "/cubic mm", "cells/ul", "cells/mcl", "cells/mm3", "cells/mm³",
            "cells/mm^3", "cells/cu mm", "cells/cubic mm"),
    "%": ("percent", "pct"), "°c": ("c", "deg c", "degrees c", "ºc", "celsius", "degrees celsius"),
    "°f": ("f", "deg f", "degrees f", "ºf", "fahrenheit", "degrees fahrenheit"),
    "mm": ("millimeter", "millimeters"), "cm": ("centimeter", "centimeters", "cms"), "m": ("meters",),
    "inches": ("inch", "in"), "feet": ("foot", "ft"), "oz": ("ounce", "ounces"), "cm2": ("cm²", "cm^2"),
    "m/s": ("m/sec",), "cm/s": ("cm/sec",), "kg/m2": ("kg/m²", "kg/m^2"), "l/min": ("lpm",), "l/min/m2": ("l/min/m²",),
    "l/day": ("l/24h",), "mg/m2": ("mg/m²", "mg/m^2"), "g/m2": ("g/m²", "g/m^2"), "ml/m2": ("ml/m²", "ml/m^2"),
    "j": ("joule", "joules"), "gy": ("gray",), "cgy": ("centigray",), "gauge": ("ga",),
    "mm/hr": ("mm/h",), "ml/hr": ("ml/h", "cc/hr", "ml/hour"), "mg/hr": ("mg/h",), "units/hr": ("u/hr", "units/h", "u/h"),
    "mcg/min": ("ug/min",), "mcg/hr": ("ug/hr", "mcg/h"), "mcg/kg/min": ("ug/kg/min",), "mcg/kg/hr": ("ug/kg/hr", "mcg/kg/h"),
    "units/min": ("u/min",), "mg/kg": (), "mcg/kg": ("ug/kg",), "mg/kg/hr": (), "units/kg/hr": ("u/kg/hr",),
    "mg/kg/day": ("mg/kg/d",), "ml/kg/day": ("ml/kg/d",), "mcg/kg/day": ("ug/kg/day",), "mg/day": ("mg/d", "mg/24h"),
    "g/day": ("g/d", "g/24h"), "mcg/day": ("ug/day",),
    "ml/day": ("ml/d",), "units/day": ("u/day",), "ml/kg": (), "ml/min/1.73m2": ("ml/min/1.73m²", "ml/min/1.73m^2"),
    "s": ("sec", "secs", "second", "seconds"), "ms": ("msec",), "min": ("minute", "minutes", "mins"),
    "h": ("hr", "hrs", "hour", "hours"), "days": ("day", "d"), "weeks": ("week", "wks", "wk"), "months": ("month",),
    "years": ("year", "yr", "yrs"), "mg/ml": (), "mcg/ml": ("ug/ml",),
}  # fmt: skip

#: Spelling in lower case -> the one spelling.
SPELLINGS = {other: name for name, others in _SYNONYMS.items() for other in (name, *others)}
#: The same without spaces.
UNITS = {other.replace(" ", ""): name for other, name in SPELLINGS.items()}

#: The few whose letters' case tells them from others: mM is no millimetre, and the G of a needle no gram.
WITH_CASE = {"mM": "mmol/l", "uM": "mcmol/l", "nM": "nmol/l", "pM": "pmol/l", "G": "gauge"}

#: What prose is not asked for: ages and durations, counts of what is swallowed, gauges, and numbers without a unit.
NOT_MEASURED = {"s", "ms", "min", "h", "days", "weeks", "months", "years", "tablets", "capsules", "drops", "puffs", "gauge", ""}
#: Spellings that are more often words of the prose.
WORDS = {"in", "gray"}
#: Units of one letter as prose writes them, patterns with case. A "J wire" is bent, not a shock.
LETTERS = ("C", "F", "L", "U", "g", r"J(?![ -](?:wire|tip|tube|stent|pouch))")

#: How often a medication is taken -> one wording. "qod" (every other day) and "od" (once daily) stay apart, and so do "bid"
#: (twice in waking hours) and "q12h" (by the clock): whoever gives an antibiotic has to know which of the two was ordered.
FREQUENCIES = {
    other: name
    for name, others in {
        "once daily": ("daily", "qd", "od", "every day", "1x/day", "once a day", "q day", "one time a day"),
        "twice daily": ("bid", "2x/day", "twice a day", "two times a day", "two times daily"),
        "three times daily": ("tid", "3x/day", "three times a day"),
        "four times daily": ("qid", "4x/day", "four times a day"),
        "at bedtime": ("qhs", "hs", "nightly", "every night", "every night at bedtime"),
        "as needed": ("prn", "when needed", "if needed"),
        "every morning": ("qam", "in the morning"),
        "every other day": ("qod", "alternate days"),
        "once weekly": ("weekly", "every week", "once a week", "qwk"),
    }.items()
    for other in (name, *others)
}
