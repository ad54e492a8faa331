"""The eight clinical questions: their names, prompts and report sections. Data only, no imports from the project."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One of Q1 … Q8.

    Attributes:
        id: ``Q1`` … ``Q8``.
        title: the sheet's column title and the report's section title.
        prompts: prompt variants by name; ``default`` is what everything uses unless told otherwise.
    """

    id: str
    title: str
    prompts: dict[str, str]


#: Default prompts: the multi-task plan of an earlier project (FADA, "Unsloth VLM Fine-tuning Experiments", experiment 1).
QUESTIONS: dict[str, Question] = {
    q.id: q
    for q in (
        Question("Q1", "Anatomical Structures", {"default": "Describe the anatomical structures visible in this ultrasound."}),
        Question("Q2", "Fetal Orientation", {"default": "What is the fetal orientation in this image?"}),
        Question("Q3", "Imaging Plane", {"default": "Identify the imaging plane shown."}),
        Question("Q4", "Biometric Measurements", {"default": "What biometric measurements can be obtained?"}),
        Question("Q5", "Gestational Age", {"default": "Estimate the gestational age based on visible features."}),
        Question("Q6", "Image Quality", {"default": "Assess the image quality."}),
        Question("Q7", "Normality Assessment", {"default": "Assess the normality of this ultrasound image."}),
        Question("Q8", "Clinical Recommendations", {"default": "What clinical recommendations would you suggest?"}),
    )
}

#: ``--task report``: one answer of eight titled sections (experiment 2 of the same plan).
REPORT_ID = "report"
REPORT_PROMPTS = {"default": "Provide a complete analysis of this fetal ultrasound."}

#: What ``--task`` takes.
TASKS = ("all", REPORT_ID, *QUESTIONS)

#: One fixed system text: then every question of an image shares its whole prefix.
SYSTEM_TEXT = "You are a sonographer's research assistant. Answer from the image, briefly."

CATEGORIES = (
    "Abdomen", "Aorta", "CRL-View", "Cervical", "Cervix", "Femur", "NT-View", "Non_standard_NT",
    "Public_Symphysis_fetal_head", "Standard_NT", "Thorax", "Trans-cerebellum", "Trans-thalamic", "Trans-ventricular",
)  # fmt: skip


def report_text(answers: dict[str, str]) -> str:
    """The combined report: a ``## Title`` line and the answer for each question in Q1 … Q8 order; missing ones left out."""
    return "\n\n".join(f"## {q.title}\n{answers[q.id]}" for q in QUESTIONS.values() if answers.get(q.id))
