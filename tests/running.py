"""train.py run in this process or another, on the small base and data of conftest."""

from __future__ import annotations

import json
from pathlib import Path

import train
from sonovqa import files, hub

#: Six steps of four images, validated twice, of a model and data so small that each takes well under a second.
FLAGS = {
    "bits": 16, "report-to": "none", "lr": 0.01, "batch": 4, "accumulate": 1, "steps": 6, "log-every": 1, "eval-every": 3,
    "warmup": 1, "max-pixels": 12288,
}  # fmt: skip


def words(base: Path, data: Path, outputs: Path, name: str, *more: str, **changed) -> list[str]:
    """train.py's command line: `FLAGS` with ``changed`` ones (``eval_every=2``), then ``more`` as they are."""
    flags = FLAGS | {key.replace("_", "-"): value for key, value in changed.items()}
    given = {"model": base, "data": data, "outputs": outputs, "run-name": name} | flags
    return [word for key, value in given.items() for word in (f"--{key}", str(value))] + list(more)


def run(base: Path, data: Path, outputs: Path, name: str, *more: str, **changed) -> dict:
    """Run train.py here; its run.json, or nothing where it writes none."""
    train.main(words(base, data, outputs, name, *more, **changed))
    record = outputs / name / "run.json"
    return json.loads(record.read_text()) if record.exists() else {}


def losses_of(record: dict) -> list[float]:
    """The training losses of a run record, in the order they were logged."""
    return [entry["loss"] for entry in record["training"]["curve"] if "loss" in entry]


def pushed(run: Path, folder: Path, base: Path) -> Path:
    """A run's adapter as it was pushed to a hub and fetched from it, below ``folder``; its base lies in ``base``."""
    (folder / "adapter").mkdir(parents=True)
    for name, content in hub.sent(run, merged=False).items():
        (folder / "adapter" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    config = files.read_json(folder / "adapter" / hub.ADAPTER) | {"base_model_name_or_path": str(base)}
    files.write_json(folder / "adapter" / hub.ADAPTER, config)
    return folder
