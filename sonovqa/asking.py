"""What an evaluation asks: a split's questions, the same questions about a grey image, and the rows it writes down."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from sonovqa import chat, cli, files, images, predictions, records
from sonovqa.endpoint_faults import REFUSED, UNREACHED
from sonovqa.engines import Engine, ImageRequest, Reply
from sonovqa.memory_peak import Batch
from sonovqa.predictions import Key
from sonovqa.questions import QUESTIONS, REPORT_ID

Size = tuple[int, int]
MOST_UNREACHED = 20  # requests in a row


@dataclass(frozen=True)
class Item:
    """One question about one image of a split, with what is needed to ask, score and slice it."""

    row: int
    image_id: str
    group: str
    category: str
    context: str | None
    question_id: str
    question: str
    answer_type: str
    prompt: str
    reference: str

    @property
    def key(self) -> Key:
        return self.image_id, self.question_id


def items_of(split, task: str = "all", variant: str = "default") -> list[Item]:
    """All questions of a split under ``--task``, without touching an image.

    Args:
        split: a `datasets.Dataset` in the stored form.
        task: ``all``, ``report`` or one question id.
        variant: a line of `prompt_variants.variants`. References are the stored answers under every variant, so that
            evaluations under several can be compared.
    """
    columns = [c for c in ("image_id", "group", "category", "context", "questions") if c in split.column_names]
    items = []
    for index, row in enumerate(split.select_columns(columns)):
        asked = {q["question_id"]: q for q in row["questions"]}
        for t in chat.tasks_of(row, task, variant):
            q = asked.get(t["question_id"], {"question": "", "answer_type": "", "answer": t["answer"]})
            where = {"row": index, "image_id": row["image_id"], "group": row["group"], "category": row["category"]}
            what = {"question_id": t["question_id"], "question": q["question"], "answer_type": q["answer_type"]}
            items.append(Item(**where, **what, context=row.get("context") or None, prompt=t["prompt"], reference=q["answer"]))
    return items


def image_bytes(raw_split, row: int) -> bytes | None:
    """The bytes of one image file, ``None`` for a row that is a text; ``raw_split`` is not decoded (`dataset.load_undecoded`).

    Raises:
        OSError: if the row names a file outside the data set and that is gone.
    """
    cell = raw_split[row]["image"]
    if cell is None:
        return None
    if cell["bytes"] is not None:
        return cell["bytes"]
    with open(cell["path"], "rb") as stream:
        return stream.read()


def image_sizes(raw_split, rows: Iterable[int]) -> dict[int, Size | None]:
    """Width and height of images in pixels as they are shown (EXIF rotation applied), by the files' heads; ``None``: a text."""
    return {row: images.size_of(image_bytes(raw_split, row)) if raw_split[row]["image"] else None for row in rows}


def batch_of(items: Sequence[Item], sizes: Mapping[int, Size | None], images: int, max_new_tokens: int,
             blind: bool = False, head: bool = False) -> Batch:  # fmt: skip
    """The most that a local engine has in work at one time, as the check of memory before loading wants it.

    Args:
        items: the questions. sizes: of their images, see `image_sizes`.
        images: answered together.
        max_new_tokens: as `ask_all` takes it.
        blind: whether every distinct prompt is asked about a grey image of each size too.
        head: whether a choice head answers.
    """
    asked = Counter(item.row for item in items)
    if blind:
        asked |= Counter(image for image, _ in blind_items((i for i in items if sizes.get(i.row)), sizes))
    return Batch(
        images=images,
        questions=max(asked.values(), default=1),
        new_tokens=0 if head else _limit(items, max_new_tokens),
        pixels=max((width * height for width, height in filter(None, sizes.values())), default=None),
        letters=max((len(item.prompt) for item in items), default=0),
    )


def mean_grey(raw_split, sample: int = 64) -> int:
    """The mean grey level (0 to 255) of up to ``sample`` images, spread evenly over the split."""
    rows = np.unique(np.linspace(0, len(raw_split) - 1, min(sample, len(raw_split))).astype(int))
    levels = [np.asarray(chat.open_image(image_bytes(raw_split, int(r))).convert("L")).mean() for r in rows]
    return round(float(np.mean(levels)))


def requests(raw_split, items: Iterable[Item]) -> Iterator[ImageRequest]:
    """One request an image with all its items, images read when they are asked for; ``items`` must be in row order."""
    waiting: list[Item] = []

    def request() -> ImageRequest:
        prompts = tuple((i.question_id, i.prompt) for i in waiting)
        return ImageRequest(waiting[0].image_id, image_bytes(raw_split, waiting[0].row), waiting[0].context, prompts)

    for item in items:
        if waiting and waiting[0].row != item.row:
            yield request()
            waiting = []
        waiting.append(item)
    if waiting:
        yield request()


def blind_key(size: Iterable[int], context: str | None, prompt: str) -> Key:
    """What a blind answer hangs on, as an image id and a question id: size, context and prompt, and nothing else."""
    suffix = f"/{files.sha256(context)[:8]}" if context else ""
    return "grey/" + "x".join(map(str, size)) + suffix, files.sha256(prompt)[:16]


def blind_items(items: Iterable[Item], sizes: Mapping[int, Size]) -> dict[Key, tuple[Item, Size]]:
    """The distinct blind questions of the items, by `blind_key`, each with one item that asks it and the image's size."""
    asked: dict[Key, tuple[Item, Size]] = {}
    for item in items:
        asked.setdefault(blind_key(sizes[item.row], item.context, item.prompt), (item, sizes[item.row]))
    return asked


def blind_requests(asked: Mapping[Key, tuple[Item, Size]], grey: int) -> Iterator[ImageRequest]:
    """One request a size and context: an even grey PNG and every distinct prompt asked of it."""
    from PIL import Image

    by_image: dict[str, list[tuple[str, Item, Size]]] = {}
    for (image_id, prompt_id), (item, size) in asked.items():
        by_image.setdefault(image_id, []).append((prompt_id, item, size))
    for image_id, prompts in by_image.items():
        stream = io.BytesIO()
        Image.new("RGB", prompts[0][2], (grey, grey, grey)).save(stream, "PNG")
        yield ImageRequest(image_id, stream.getvalue(), prompts[0][1].context, tuple((p, i.prompt) for p, i, _ in prompts))


def row_of(item: Item, reply: Reply, size: Size | None = None, blind: bool = False) -> dict:
    """A line of predictions.jsonl (or blind.jsonl, where ids are those of `blind_key`)."""
    return {
        "image_id": reply.image_id,
        "group": None if blind else item.group,
        "category": None if blind else item.category,
        "question_id": reply.question_id,
        "question": item.question,
        "answer_type": item.answer_type,
        "prompt": item.prompt,
        "context": item.context,
        "reference": None if blind else item.reference,
        "prediction": None if reply.error is not None else reply.text,
        "error": reply.error,
        "finish_reason": reply.finish_reason,
        "new_tokens": reply.new_tokens,
        "seconds": round(reply.seconds, 4),
        "prompt_sha": files.sha256(item.prompt)[:16],
        "size": None if size is None else list(size),
        "blind": blind,
        **({} if reply.probabilities is None else {"probabilities": dict(reply.probabilities)}),
    }


class Patience:
    """Gives an engine up once it was not reached, or refused all, for `MOST_UNREACHED` requests in a row, with all their retries.

    What was answered is kept and the same command goes on, so nobody waits for thousands of requests to fail one by one.
    """

    def __init__(self, name: str):
        self.name, self.unreached = name, 0

    def heard(self, error: str | None) -> None:
        """Count a reply's error. Raises `cli.UserError` when there is no hope."""
        self.unreached = self.unreached + 1 if error is not None and error.startswith((*UNREACHED, *REFUSED)) else 0
        if self.unreached >= MOST_UNREACHED:
            refused = error.startswith(REFUSED)
            way_out = "mend VLLM_API_KEY or --endpoint-model" if refused else "start the server again"
            raise cli.UserError(
                f"the endpoint {'refuses all that is asked' if refused else 'has gone away'}; {self.name}: {error}, "
                f"{self.unreached} requests in a row; what was answered is kept; {way_out}, then the same command goes on"
            )


def timed(function: Callable, *arguments) -> tuple:
    """What the function gives, and how many seconds it took."""
    started = time.perf_counter()
    return function(*arguments), time.perf_counter() - started


def ask(engine: Engine, questions: Iterable[ImageRequest], asked: Mapping[Key, tuple[Item, Size]], path: Path,
        max_new_tokens: int, blind: bool = False, load_seconds: float = 0.0) -> None:  # fmt: skip
    """Put questions to an engine and write every reply down as it comes, with a progress bar; then a line on its speed.

    Args:
        questions: what to ask, read as needed.
        asked: by the reply's ``(image_id, question_id)``, the item and its image's size. One that the engine passes over
            is written down as failed.
        path: the predictions file, appended to; ``sessions.jsonl`` lies beside it.
        load_seconds: how long the engine took to load, for the record.
    """
    waiting = dict(asked)
    session = {"file": path.name, "engine": engine.name, "load_seconds": round(load_seconds, 3), "asked": len(asked)}
    session |= {"answered": 0, "failed": 0, "new_tokens": 0}
    started, patience = time.perf_counter(), Patience(engine.name)
    with predictions.Log(path) as log, progress() as bar:
        task = bar.add_task("blind answers" if blind else "answers", total=len(asked), failed="")
        try:
            for reply in engine.answer(questions, max_new_tokens):
                item, size = waiting.pop((reply.image_id, reply.question_id))
                log.append(row_of(item, reply, size, blind))
                session["answered" if reply.error is None else "failed"] += 1
                session["new_tokens"] += reply.new_tokens
                bar.update(task, advance=1, failed=f"[red]{session['failed']} failed[/]" if session["failed"] else "")
                patience.heard(reply.error)
            for (image_id, question_id), (item, size) in waiting.items():  # none, unless the engine passed some over
                log.append(row_of(item, Reply(image_id, question_id, "", "the engine gave no reply"), size, blind))
        finally:  # Ctrl-C too: what was answered was answered at some speed
            session |= {"wall_seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": _peak_memory(engine)}
            with predictions.Log(path.with_name("sessions.jsonl")) as sessions:
                sessions.append(session)


def _peak_memory(engine: Engine) -> int | None:
    return records.peak_memory() if engine.name.startswith("local") else None  # an endpoint's memory is not this process's


def progress() -> Progress:
    """The bar of a long run of questions; its tasks have a field ``failed``."""
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), "{task.fields[failed]}")  # fmt: skip
    return Progress(*columns, console=cli.stderr, transient=True)


def ask_all(raw, items: Sequence[Item], out: Path, engine: Callable[[], tuple[Engine, float]], blind: bool,
            max_new_tokens: int, sizes: Mapping[int, Size | None] | None = None,
            ) -> tuple[dict[Key, dict], dict[Key, dict] | None]:  # fmt: skip
    """Ask what has no answer yet, the images' questions and then the grey ones.

    Args:
        raw: the split, images not decoded. items: its questions, in row order.
        out: the folder of ``predictions.jsonl`` and ``blind.jsonl``.
        engine: gives the engine and the seconds it took to load; called only if something is left to ask.
        blind: whether the grey images are asked too.
        max_new_tokens: an answer's limit; a report holds eight answers and has eight times it.
        sizes: of the images; ``None``: `image_sizes` reads them.

    Returns:
        The items' rows by key, and the blind ones by `blind_key` or ``None``.
    """
    sizes = image_sizes(raw, sorted({item.row for item in items})) if sizes is None else sizes
    plans = [("predictions.jsonl", {item.key: (item, sizes[item.row]) for item in items}, False)]
    if blind:
        plans.append(("blind.jsonl", blind_items(items, sizes), True))
    limit = _limit(items, max_new_tokens)
    for name, asked, grey in plans:
        done = predictions.latest(predictions.read(out / name))
        todo = {key: value for key, value in asked.items() if key not in done or done[key]["error"] is not None}
        if todo:
            put = blind_requests(todo, mean_grey(raw)) if grey else requests(raw, [item for item, _ in todo.values()])
            ask(engine()[0], put, todo, out / name, limit, grey, engine()[1])
    rows = {name: predictions.latest(predictions.read(out / name)) for name, _, _ in plans}
    return {key: rows["predictions.jsonl"][key] for key in plans[0][1]}, rows.get("blind.jsonl")


def _limit(items: Iterable[Item], max_new_tokens: int) -> int:
    return max_new_tokens * (len(QUESTIONS) if any(item.question_id == REPORT_ID for item in items) else 1)


def speed(folder: Path) -> dict | None:
    """How fast the answers of ``folder/predictions.jsonl`` came, over all sessions that wrote to it; blind ones not counted.

    Returns:
        ``engine``, ``answers_per_second``, ``tokens_per_second``, ``median_seconds`` and ``p95_seconds`` of an answer,
        ``load_seconds`` and ``peak_memory_bytes`` (the most of all sessions); ``None`` where nothing was timed.
    """
    sessions = [s for s in predictions.read(folder / "sessions.jsonl") if s["file"] == "predictions.jsonl"]
    wall = sum(s["wall_seconds"] for s in sessions)
    seconds = [r["seconds"] for r in predictions.read(folder / "predictions.jsonl") if r["error"] is None]
    if not wall or not seconds:
        return None
    return {
        "engine": sessions[-1]["engine"],
        "answers_per_second": round(sum(s["answered"] for s in sessions) / wall, 3),
        "tokens_per_second": round(sum(s["new_tokens"] for s in sessions) / wall, 3),
        "median_seconds": round(float(np.median(seconds)), 4),
        "p95_seconds": round(float(np.quantile(seconds, 0.95)), 4),
        "wall_seconds": round(wall, 3),
        "load_seconds": sessions[-1]["load_seconds"],
        "peak_memory_bytes": max((s["peak_memory_bytes"] or 0 for s in sessions), default=0) or None,
    }
