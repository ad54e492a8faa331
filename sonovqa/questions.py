"""The eight clinical questions: their names, prompts and report sections. Data only, no imports from the project."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Form:
    """The form in which a prompt asks to be answered.

    Attributes:
        asks: the form in words, for tables.
        pattern: a regular expression that an answer in that form matches whole (``re.DOTALL``, white space around it cut).
        verdict: whether the first word alone is the answer and what follows its reasoning; training answers are then
            written so (`sonovqa.prompt_variants.answer_for`).
    """

    asks: str
    pattern: str
    verdict: bool = False


@dataclass(frozen=True)
class Question:
    """One of Q1 … Q8.

    Attributes:
        id: ``Q1`` … ``Q8``.
        title: the sheet's column title and the report's section title.
        prompts: prompt variants by name; ``default`` is what everything uses unless told otherwise.
        forms: of those variants that ask for a form of their answers, which.
        says: of those variants to which "yes", "no" or "none" is an answer, what each says, as the default would be answered.
    """

    id: str
    title: str
    prompts: dict[str, str]
    forms: dict[str, Form] = field(default_factory=dict)
    says: dict[str, dict[str, str]] = field(default_factory=dict)


_ITEM = r"[^\s,;:]+(?: [^\s,;:]+){0,3}"  # up to four words: a sentence is no item
LIST = Form("items between commas", rf"{_ITEM}(?:, ?{_ITEM})*")
FEW_WORDS = Form("at most eight words", r"\S+(?: \S+){0,7}")
WEEKS = Form("a range of weeks", r"\d{1,2}(?:\.\d+)? ?(?:(?:-|–|to) ?\d{1,2}(?:\.\d+)?|\+) ?(?:[Ww]eeks?|[Ww]ks?)\.?")
QUALITY = Form("good, medium or low", r"(?i:good|medium|low)\.?")
NORMALITY = Form("normal, abnormal or unclear first", r"(?i:normal|abnormal|unclear)\b.*")
YES_NO = Form("yes or no, or the verdict, first", r"(?i:yes|no|normal|abnormal)\b.*")
#: The reasoning is not asked for by the pattern: the sheets hold none for normal images, so no training could teach it.
VERDICT = Form("NORMAL, ABNORMAL or UNCLEAR first", r"[*_]*(?:NORMAL|ABNORMAL|UNCLEAR)\b.*", verdict=True)

#: Defaults, and Q7's simple, detailed, clinical and structured, come from an earlier project's plan (FADA, "Unsloth VLM
#: Fine-tuning Experiments", experiments 1 and 5); the rest are worded here. ``paraphrase`` asks for the same and no more.
QUESTIONS: dict[str, Question] = {
    q.id: q
    for q in (
        Question("Q1", "Anatomical Structures", {
            "default": "Describe the anatomical structures visible in this ultrasound.",
            "paraphrase": "Which anatomical structures can be seen in this ultrasound image?",
            "short": "List the visible anatomical structures, separated by commas.",
            "clinical": "As a sonographer, report the fetal anatomy that this image shows.",
        }, {"short": LIST}),
        Question("Q2", "Fetal Orientation", {
            "default": "What is the fetal orientation in this image?",
            "paraphrase": "How is the fetus oriented in this image?",
            "short": "State the fetal orientation in a few words.",
            "clinical": "As a sonographer, state the presentation, section and side of the fetus.",
        }, {"short": FEW_WORDS}),
        Question("Q3", "Imaging Plane", {
            "default": "Identify the imaging plane shown.",
            "paraphrase": "Which imaging plane is this?",
            "short": "Name the imaging plane in a few words.",
            "clinical": "As a sonographer, state which standard plane this image shows, if any.",
        }, {"short": FEW_WORDS}),
        Question("Q4", "Biometric Measurements", {
            "default": "What biometric measurements can be obtained?",
            "paraphrase": "Which biometric parameters can be measured in this image?",
            "short": "List the biometric measurements of this image, separated by commas.",
            "clinical": "As a sonographer, state the fetal biometry that this image allows.",
        }, {"short": LIST}),
        Question("Q5", "Gestational Age", {
            "default": "Estimate the gestational age based on visible features.",
            "paraphrase": "Judging by what is visible, what is the gestational age?",
            "short": "Give the gestational age as a range of weeks.",
            "clinical": "As a sonographer, date this pregnancy from the image, in weeks.",
        }, {"short": WEEKS}),
        Question("Q6", "Image Quality", {
            "default": "Assess the image quality.",
            "paraphrase": "How good is the quality of this image?",
            "short": "Image quality in one word: good, medium or low?",
            "clinical": "As a sonographer, rate the technical quality of this image.",
        }, {"short": QUALITY}),
        Question("Q7", "Normality Assessment", {
            "default": "Assess the normality of this ultrasound image.",
            "paraphrase": "Judge whether what this ultrasound image shows is normal.",
            "short": "Normal, abnormal or unclear?",
            "simple": "Is this ultrasound normal?",
            "detailed": "Assess the normality of this fetal ultrasound image. Describe whether the visible structures appear "
                        "normal or if there are any abnormalities.",
            "clinical": "As a radiologist, evaluate this fetal ultrasound for any abnormal findings.",
            "structured": "Evaluate this image and respond with one of: NORMAL, ABNORMAL, UNCLEAR. Then provide your reasoning.",
        }, {"short": NORMALITY, "simple": YES_NO, "structured": VERDICT}, {
            "simple": {"yes": "normal", "no": "abnormal"},
            "clinical": {"none": "normal", "no": "normal", "yes": "abnormal"},
        }),
        Question("Q8", "Clinical Recommendations", {
            "default": "What clinical recommendations would you suggest?",
            "paraphrase": "Which clinical steps would you recommend?",
            "short": "List the recommended next steps, separated by commas.",
            "clinical": "As a sonographer, state how this patient should be followed up.",
        }, {"short": LIST}),
    )
}  # fmt: skip

#: ``--task report``: one answer of eight titled sections (experiment 2 of the same plan).
REPORT_ID = "report"
_TITLES = [q.title for q in QUESTIONS.values()]
REPORT_PROMPTS = {
    "default": "Provide a complete analysis of this fetal ultrasound.",
    "paraphrase": "Report everything that this fetal ultrasound shows.",
    "structured": f"Report on this fetal ultrasound in sections titled {', '.join(_TITLES)}.",
}
REPORT_FORMS = {"structured": Form("all eight titles, in order", f".*{'.*'.join(_TITLES)}.*")}

#: Question id and answer type of a text's label (`csv_text`): a name, never read for a meaning.
TEXT_LABEL = "label"

#: What ``--task`` takes.
YES_NO_TASK = "yes-no"  # the yes-or-no questions of a set such as VQA-RAD
TASKS = ("all", REPORT_ID, YES_NO_TASK, *QUESTIONS)

#: One fixed system text: then every question of an image shares its whole prefix.
SYSTEM_TEXT = "You are a sonographer's research assistant. Answer from the image, briefly."

CATEGORIES = (
    "Abdomen", "Aorta", "CRL-View", "Cervical", "Cervix", "Femur", "NT-View", "Non_standard_NT",
    "Public_Symphysis_fetal_head", "Standard_NT", "Thorax", "Trans-cerebellum", "Trans-thalamic", "Trans-ventricular",
)  # fmt: skip


def report_text(answers: dict[str, str]) -> str:
    """The combined report: a ``## Title`` line and the answer for each question in Q1 … Q8 order; missing ones left out."""
    return "\n\n".join(f"## {q.title}\n{answers[q.id]}" for q in QUESTIONS.values() if answers.get(q.id))
