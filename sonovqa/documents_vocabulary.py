"""What the synthetic clinical forms are made of: medications, laboratory tests, measurements, diagnoses. Data only."""

from __future__ import annotations

#: Name, doses, unit, route.
DRUGS = (
    ("Metformin", (500, 850, 1000), "mg", "oral"), ("Lisinopril", (5, 10, 20, 40), "mg", "oral"),
    ("Amlodipine", (2.5, 5, 10), "mg", "oral"), ("Atorvastatin", (10, 20, 40, 80), "mg", "oral"),
    ("Levothyroxine", (25, 50, 75, 88, 112), "mcg", "oral"), ("Digoxin", (62.5, 125, 250), "mcg", "oral"),
    ("Furosemide", (20, 40, 80), "mg", "oral"), ("Metoprolol succinate", (25, 50, 100), "mg", "oral"),
    ("Carvedilol", (3.125, 6.25, 12.5, 25), "mg", "oral"), ("Apixaban", (2.5, 5), "mg", "oral"),
    ("Warfarin", (1, 2.5, 5), "mg", "oral"), ("Aspirin", (81, 325), "mg", "oral"),
    ("Clopidogrel", (75,), "mg", "oral"), ("Pantoprazole", (20, 40), "mg", "oral"),
    ("Gabapentin", (100, 300, 600), "mg", "oral"), ("Sertraline", (25, 50, 100), "mg", "oral"),
    ("Prednisone", (5, 10, 20, 40), "mg", "oral"), ("Amoxicillin", (250, 500, 875), "mg", "oral"),
    ("Ceftriaxone", (1, 2), "g", "IV"), ("Vancomycin", (1, 1.25, 1.5), "g", "IV"),
    ("Insulin glargine", (10, 14, 22, 30), "units", "subcutaneous"), ("Insulin lispro", (4, 6, 8), "units", "subcutaneous"),
    ("Enoxaparin", (40, 60, 80), "mg", "subcutaneous"), ("Heparin", (5000,), "units", "subcutaneous"),
    ("Potassium chloride", (10, 20, 40), "mEq", "oral"), ("Cholecalciferol", (1000, 2000), "IU", "oral"),
    ("Albuterol", (90, 180), "mcg", "inhaled"), ("Tiotropium", (18,), "mcg", "inhaled"),
    ("Acetaminophen", (500, 650, 1000), "mg", "oral"), ("Lactulose", (15, 30), "mL", "oral"),
    ("Spironolactone", (12.5, 25, 50), "mg", "oral"), ("Losartan", (25, 50, 100), "mg", "oral"),
)  # fmt: skip
FREQUENCIES = ("once daily", "twice daily", "BID", "TID", "daily", "q8h", "at bedtime", "every morning", "q12h", "QHS")

#: Name, decimals, then (unit, low, high) of each system in which a laboratory may report it.
TESTS = (
    ("Sodium", 0, ("mmol/L", 135, 145), ("mEq/L", 135, 145)), ("Potassium", 1, ("mmol/L", 3.5, 5.1), ("mEq/L", 3.5, 5.1)),
    ("Chloride", 0, ("mmol/L", 98, 107)), ("Bicarbonate", 0, ("mmol/L", 22, 29)),
    ("Urea nitrogen", 1, ("mg/dL", 7.0, 20.0), ("mmol/L", 2.5, 7.1)),
    ("Creatinine", 2, ("mg/dL", 0.60, 1.30)), ("Creatinine", 0, ("umol/L", 53, 115)),
    ("Glucose", 0, ("mg/dL", 70, 99)), ("Glucose", 1, ("mmol/L", 3.9, 5.5)),
    ("Calcium", 1, ("mg/dL", 8.6, 10.3)), ("Magnesium", 1, ("mg/dL", 1.7, 2.4)),
    ("Albumin", 1, ("g/dL", 3.5, 5.0)), ("Total bilirubin", 1, ("mg/dL", 0.2, 1.2)),
    ("ALT", 0, ("U/L", 7, 56)), ("AST", 0, ("U/L", 10, 40)), ("ALP", 0, ("U/L", 44, 147)),
    ("Lactate", 1, ("mmol/L", 0.5, 2.0)), ("C-reactive protein", 1, ("mg/L", 0.0, 5.0)),
    ("Troponin I", 0, ("ng/L", 0, 34)), ("NT-proBNP", 0, ("pg/mL", 0, 125)),
    ("Hemoglobin", 1, ("g/dL", 12.0, 17.5)), ("Hemoglobin", 0, ("g/L", 120, 175)),
    ("White cells", 1, ("10^9/L", 4.0, 11.0), ("K/uL", 4.0, 11.0)), ("Platelets", 0, ("10^9/L", 150, 400), ("K/uL", 150, 400)),
    ("Hematocrit", 1, ("%", 36.0, 50.0)), ("HbA1c", 1, ("%", 4.0, 5.6)), ("TSH", 2, ("mIU/L", 0.40, 4.00)),
    ("Ferritin", 0, ("ng/mL", 24, 336)), ("INR", 1, ("", 0.8, 1.2)), ("LDL cholesterol", 0, ("mg/dL", 50, 100)),
)  # fmt: skip

#: Of an ICU flowsheet: name, unit, low, high, decimals.
OBSERVATIONS = (
    ("Heart rate", "bpm", 58, 128, 0), ("MAP", "mmHg", 52, 98, 0), ("SpO2", "%", 86, 100, 0),
    ("Respiratory rate", "/min", 10, 32, 0), ("Temperature", "°C", 35.8, 39.4, 1), ("FiO2", "%", 30, 80, 0),
    ("PEEP", "cmH2O", 5, 14, 0), ("Tidal volume", "mL", 320, 520, 0), ("Urine output", "mL/hr", 10, 120, 0),
    ("CVP", "mmHg", 4, 16, 0),
)  # fmt: skip
GASES = (
    ("pH", "", 7.18, 7.52, 2), ("PaCO2", "mmHg", 28, 66, 0), ("PaO2", "mmHg", 54, 130, 0), ("HCO3", "mmol/L", 16, 32, 0),
    ("Lactate", "mmol/L", 0.7, 6.5, 1),
)  # fmt: skip
DRIPS = (
    ("Norepinephrine", "mcg/kg/min", 0.02, 0.4, 2), ("Vasopressin", "units/min", 0.01, 0.04, 2),
    ("Propofol", "mcg/kg/min", 5, 50, 0), ("Fentanyl", "mcg/hr", 25, 150, 0), ("Insulin", "units/hr", 1, 8, 1),
)  # fmt: skip
ECHO = (
    ("LVEF", "%", 20, 68, 0), ("LV end-diastolic diameter", "mm", 42, 70, 0), ("Septal thickness", "mm", 7, 16, 0),
    ("Aortic valve area", "cm2", 0.6, 2.4, 1), ("Aortic peak velocity", "m/s", 1.0, 4.8, 1),
    ("Mean aortic gradient", "mmHg", 6, 58, 0), ("RV systolic pressure", "mmHg", 22, 68, 0), ("TAPSE", "mm", 11, 26, 0),
)  # fmt: skip
VITALS = (
    ("Heart rate", "bpm", 54, 118, 0), ("Temperature", "°F", 97.0, 101.8, 1), ("SpO2", "%", 90, 100, 0),
    ("Respiratory rate", "/min", 12, 26, 0), ("Weight", "kg", 48, 118, 1),
)  # fmt: skip

DIAGNOSES = (
    "Type 2 diabetes mellitus", "Essential hypertension", "Chronic kidney disease stage 3", "Atrial fibrillation",
    "Community-acquired pneumonia", "Acute decompensated heart failure", "Hypothyroidism", "Hyperlipidemia",
    "Coronary artery disease", "COPD exacerbation", "Iron deficiency anemia", "Acute kidney injury", "Sepsis", "Cellulitis",
    "Deep vein thrombosis", "Ischemic stroke", "Gastroesophageal reflux disease", "Osteoarthritis", "Urinary tract infection",
)  # fmt: skip
CARDIAC = (
    "Severe aortic stenosis", "Moderate mitral regurgitation", "Left ventricular hypertrophy", "Atrial fibrillation",
    "Reduced left ventricular systolic function", "Left atrial enlargement", "Pulmonary hypertension",
    "Inferior wall hypokinesis", "Trace pericardial effusion",
)  # fmt: skip
#: Procedure, its pre-operative diagnosis and what may be found.
OPERATIONS = (
    ("Laparoscopic cholecystectomy", "Acute cholecystitis", ("Distended gallbladder", "Gallstones", "Pericholecystic fluid")),
    ("Laparoscopic appendectomy", "Acute appendicitis", ("Inflamed appendix", "Periappendiceal fluid", "Fecalith")),
    ("Total knee arthroplasty", "Osteoarthritis of the knee", ("Cartilage loss", "Medial osteophytes", "Synovitis")),
    ("Open inguinal hernia repair", "Inguinal hernia", ("Indirect hernia sac", "Lipoma of the cord")),
    ("Cesarean delivery", "Breech presentation", ("Clear amniotic fluid", "Normal uterus and adnexa", "Viable neonate")),
    ("Hip hemiarthroplasty", "Femoral neck fracture", ("Displaced femoral neck", "Osteoporotic bone")),
)  # fmt: skip
#: Examination, lesions that have a size, other findings.
STUDIES = (
    ("CT of the chest", ("Right upper lobe nodule", "Left lower lobe nodule", "Mediastinal lymph node"),
     ("Small pleural effusion", "Emphysema", "Coronary calcification", "Bibasilar atelectasis")),
    ("CT of the abdomen and pelvis", ("Liver cyst", "Left renal stone", "Adrenal nodule", "Infrarenal aortic aneurysm"),
     ("Sigmoid diverticulosis", "Hepatic steatosis", "Trace ascites")),
    ("MRI of the brain", ("Left frontal meningioma", "Pituitary lesion", "Right cerebellar lesion"),
     ("Chronic microvascular change", "Mild cerebral atrophy", "Maxillary sinus mucosal thickening")),
    ("Ultrasound of the thyroid", ("Right lobe nodule", "Left lobe nodule", "Isthmus nodule"),
     ("Heterogeneous echotexture", "Increased vascularity")),
    ("Ultrasound of the pelvis", ("Intramural fibroid", "Right ovarian cyst", "Endometrium"),
     ("Small free fluid", "Nabothian cysts")),
)  # fmt: skip
