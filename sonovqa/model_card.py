"""The model card of a run, from its run.json and scores.json: figures and settings, never an image, an answer or a name.

Of a choice run it names the labels: they are what its weights can say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import sonovqa
from sonovqa import choice, files, measures, records, scoretable
from sonovqa.cli import RESEARCH_NOTICE
from sonovqa.questions import QUESTIONS, TEXT_LABEL

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
IMAGES, TEXTS = "visual-question-answering", "text-classification"  # the hub's names of tasks
ULTRASOUND = ("sheet", "phantoms", "hc18")  # kinds of data sets that ask the eight questions about fetal ultrasound
#: What a run was tuned to do, by the kind of its data set.
PURPOSES = {
    "csv-text": "put labels on texts",
    "documents": "read pages of clinical documents and extract what stands there",
    "vqa-rad": "answer questions about radiology images",
    "path-vqa": "answer questions about pathology images",
}
TINY = "tiny (1.5 million parameters, shipped with SonoVQA; it knows phantoms only)"
#: Where an adapter looks for a base that has no name for others: no hub id has this form, so nothing is fetched in its place.
LOCAL_BASE = "./base"
FOLDERS = ("outputs/", "data/", "models/", "checkpoints/", "runs/", "/")  # what is no owner's name on the hub
UNKNOWN_LICENCE = "No licence is named: that of the base model holds."


def make(run: Mapping, scores: Mapping | None, data: Mapping, repo: str, merged: bool, licence: str | None = None):
    """The card as a `huggingface_hub.ModelCard`; ``str`` of it is README.md.

    Source of its parts: Mitchell et al. 2019, Model Cards for Model Reporting, arXiv:1810.03993; the metadata is the hub's.

    Args:
        run: run.json.
        scores: scores.json of an evaluation of these weights, or ``None``.
        data: dataset.json of the training set, or ``{}`` where it is gone.
        repo: ``owner/name``.
        merged: whole weights rather than an adapter.
        licence: the hub's identifier, such as ``apache-2.0``, or ``None``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kind, name, task = kind_of(data), repo.rpartition("/")[2], task_of(run)
    shown = ModelCardData(
        model_name=name,
        base_model=hub_base(run),
        base_model_relation=("finetune" if merged else "adapter") if hub_base(run) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=TEXTS if task == TEXTS else "image-text-to-text",
        license=licence,
        language="en",
        tags=["medical", *(("ultrasound", "fetal-ultrasound") if kind in ULTRASOUND else ()), task, "not-a-medical-device"],
        eval_results=results(scores, kind, run["data"], task) if scores else None,
    )
    return ModelCard.from_template(
        shown, str(TEMPLATE), name=name, notice=RESEARCH_NOTICE, kind=kind, pixels=run.get("pixels"), commit=run.get("commit"),
        what="Merged weights" if merged else "A LoRA adapter", base=base_name(run),
        purpose=purpose(run, kind), ultrasound=kind in ULTRASOUND, texts=task == TEXTS, training=training(run, data),
        tokens=list(head.tokens) if (head := choice.of_run(run)) else None,
        scores=told(scores) if scores else None, use=use(run, repo, merged), licence=licence_text(licence),
        version=sonovqa.__version__, year=run["finished"][:4],
    )  # fmt: skip


def hub_base(run: Mapping) -> str | None:
    """The hub id of the base a run was trained on; ``None`` where it was a folder, whose name nobody else needs to know.

    Which of the two it was is in run.json. Older ones do not say: then by its name, a folder's wherever it might be one's.
    """
    model = run["arguments"]["model"]
    if "base_is_local" in run:
        return None if run["base_is_local"] else model
    known = model.count("/") == 1 and not model.startswith((".", "~", *FOLDERS)) and not Path(model).exists()
    return model if known and all(model.split("/")) else None


def base_for_others(run: Mapping) -> str:
    """What others give for the base: its hub id or ``tiny``, else `LOCAL_BASE`."""
    model = run["arguments"]["model"]
    return hub_base(run) or (model if is_tiny(model) else LOCAL_BASE)


def is_tiny(model: str) -> bool:
    """Whether ``--model`` named a model that SonoVQA builds itself."""
    return model == "tiny" or model.startswith("tiny-")


def base_name(run: Mapping) -> str:
    """The base in words, without a name of this machine's folders: such a name may be a clinic's."""
    return hub_base(run) or (TINY if is_tiny(run["arguments"]["model"]) else "a local model")


def kind_of(data: Mapping) -> str:
    """What kind of data set it was: ``sheet``, ``phantoms``, ``vqa-rad``, …; "unknown" where dataset.json is gone."""
    return str(data.get("source", {}).get("kind") or "unknown")


def task_of(run: Mapping) -> str:
    """The hub's name of what a run does. Only texts have labels of the kind `TEXT_LABEL`, and they have no others."""
    head = choice.of_run(run)
    return TEXTS if head and TEXT_LABEL in head.sets else IMAGES


def purpose(run: Mapping, kind: str) -> str:
    """What a run was tuned to do, in words that follow "to": of fetal ultrasound with the titles of its questions."""
    if task_of(run) == TEXTS:
        return PURPOSES["csv-text"]
    if kind not in ULTRASOUND:
        return PURPOSES.get(kind, "answer questions about medical images")
    head, task = choice.of_run(run), run["arguments"]["task"]
    asked = head.sets if head else [task] if task in QUESTIONS else QUESTIONS
    titles = [QUESTIONS[name].title for name in asked if name in QUESTIONS]
    counted = {0: "questions", 1: "one clinical question", 8: "eight clinical questions"}
    named = f" ({'; '.join(titles)})" if titles else ""
    return f"answer {counted.get(len(titles), f'{len(titles)} clinical questions')} about a fetal ultrasound image{named}"


def training(run: Mapping, data: Mapping) -> list[tuple[str, str]]:
    """Rows of the card's table on training. The data set goes by kind and fingerprint: a folder's name may name a clinic."""
    given, made = run["arguments"], run["training"]
    lora = f"LoRA r={given['rank']}, alpha={given['alpha']} on a {given['bits']}-bit base"
    train = data.get("splits", {}).get("train", {})
    what = "texts" if task_of(run) == TEXTS else "images"
    counted = f": {train['images']} {what} of {train['groups']} patients or groups" if "images" in train else ""
    best = made.get("best_validation_loss") or float("nan")
    rows = [
        ("data", f"{kind_of(data)}, fingerprint `{run['data'][:12]}`{counted}"),
        ("asked", f"--task {given['task']}, prompts {run['prompt_variant']}"),
        ("method", "all weights" if given["full"] else lora),
        ("steps", f"{made['steps']} ({made['epochs']:.2g} epochs), seed {given['seed']}, learning rate {given['lr']:g}"),
        ("loss", f"{made['loss']:.4f} (mean of training), {best:.4f} (best validation)"),
        ("hardware", f"{run['processes']} x {run['device']['name']}, {records.duration(made['seconds'])}, "
                     f"peak {records.gigabytes(made['peak_memory_bytes'])}"),
        ("finished", run["finished"]),
    ]  # fmt: skip
    if head := choice.of_run(run):
        rows.append(("head", head.describe().replace("|", "\\|")))
    if check := run.get("merge_check"):
        same = f"{check['top_agreement']:.2%} of {check['positions']} answer positions, mean KL {check['mean_kl']:.1e} nats"
        rows.append(("merged against base + adapter", same))
    return rows


def told(scores: Mapping) -> dict:
    """What the card says of an evaluation. Findings are named by kind: their texts quote answers."""
    rows = []
    for kind in sorted(scores["questions"], key=measures.order_of):
        about = scores["questions"][kind]
        for name in dict.fromkeys((about["headline"], "accuracy")):
            if figure := about["metrics"].get(name):
                beside = [scoretable.baseline(figure, other) for other in ("majority", "blind", "base")]
                value = scoretable.value(figure).replace("\\[", "[")
                rows.append([kind, f"{name} {scoretable.arrow(figure)}", value, *beside, str(figure["n"]), str(about["unread"])])
    by_kind = defaultdict(list)
    for finding in scores["findings"]:
        by_kind[finding["kind"]].append(finding["question"] or "all")
    given = scores["arguments"]
    who = "The endpoint's model" if given.get("endpoint") else "Base and adapter" if given.get("adapter") else "Merged weights"
    return {
        "asked": f"{who} on the {scores['data']['split']} split of data set `{scores['data']['fingerprint'][:12]}`",
        "images": scores["data"]["images"],
        "groups": scores["intervals"]["groups"],
        "verdict": scores["verdict"],
        "rows": rows,
        "remarks": [f"{kind}: {', '.join(dict.fromkeys(found))}" for kind, found in by_kind.items()],
    }


def results(scores: Mapping, kind: str, fingerprint: str, task: str) -> list:
    """Each question's main score as a `huggingface_hub.EvalResult`, which the hub shows beside the model."""
    from huggingface_hub import EvalResult

    made = []
    for question in sorted(scores["questions"], key=measures.order_of):
        about = scores["questions"][question]
        figure = about["metrics"][about["headline"]]
        if figure["value"] is None:
            continue
        span = figure.get("interval")
        title = QUESTIONS[question].title if question in QUESTIONS else question
        named = f"{about['headline']}" + (f", 95 % interval {span[0]:.3f} to {span[1]:.3f}" if span else "")
        made.append(EvalResult(
            task_type=task, task_name=f"{question} {title}", dataset_type=kind, dataset_name=f"{kind} {fingerprint[:12]}",
            dataset_split=scores["data"]["split"], metric_type=about["headline"].lower().replace(" ", "_"),
            metric_name=f"{named}, n = {figure['n']}", metric_value=round(figure["value"], 4),
        ))  # fmt: skip
    return made


def use(run: Mapping, repo: str, merged: bool) -> str:
    """The commands that fetch and serve the weights, with SonoVQA's own scripts."""
    folder = f"outputs/{repo.rpartition('/')[2]}"
    if merged:
        return f"hf download {repo} --local-dir {folder}\nbash serve.sh {folder}"
    head = choice.of_run(run)
    what = '--question "the text"' if head and TEXT_LABEL in head.sets else "--image scan.png"
    ask = f"python inference.py --run {folder} --adapter {what}"
    return f"hf download {repo} --local-dir {folder}/adapter\n{ask}  # needs {base_for_others(run)}"


def licence_text(licence: str | None) -> str:
    """The licence in a sentence."""
    return f"`{licence}`, as the base model's." if licence else UNKNOWN_LICENCE


def scores_of(folder: Path, merged: bool) -> dict | None:
    """The scores of a run's evaluation on the test split: of the weights that are pushed if there are, else of the others."""
    names = ("eval-test", "eval-test-adapter") if merged else ("eval-test-adapter", "eval-test")
    task = files.read_json(folder / "run.json")["arguments"]["task"]
    more = "" if task == "all" else f"-{task}"
    paths = [folder / name.replace("eval-test", f"eval-test{more}") / "scores.json" for name in names]
    return next((files.read_json(path) for path in paths if path.exists()), None)
