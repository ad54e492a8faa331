"""Every block of commands of README.md and docs/privacy.md is run, in a folder like a fresh checkout with a clinic's sheet in it.

docs/serving.md and experiments.md have tests of their own; commands within sentences, and those that nothing here can run, are in
test_inline_commands.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clinic import clinic, picture
from conftest import ROOT
from stand_in import StandIn

from sonovqa import readme, tables

PAGES = ("README.md", "docs/privacy.md")
TINY = "--model tiny --steps 6 --warmup 1 --lr 1e-2 --batch 4 --accumulate 1 --eval-every 6 --report-to none"
#: What is run in place of what is written: nothing else is changed. The 8B becomes the tiny model, trained for six steps;
#: servers are planned rather than started; set-up and the demo, which CI and other tests run, are only unrolled by make.
SUBSTITUTIONS = (
    (r"^make (demo|test|install)\b", r"make --dry-run \1"),
    (r" && \. \.venv/bin/activate", ""),
    (r"(train\.py --data data/clinic --run clinic)(?! --resume)", rf"\1 {TINY}"),
    (r"(train\.py .*--run clinic --resume)", rf"\1 {TINY}"),
    (r"(train\.py .*--run try --dry-run)", rf"\1 {TINY}"),
    (r"(evaluate\.py .*--data data/clinic)", r"\1 --max-images 2 --resamples 10"),
    (r"(bash serve\.sh outputs/clinic(?: --host 0\.0\.0\.0)?)(?! --)", r"\1 --dry-run"),
    (r"http://127\.0\.0\.1:8000/v1", "$STAND_IN"),
)  # fmt: skip


def blocks(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def as_run(line: str) -> tuple[str, set[int]]:
    """A line as it is run, and which substitutions changed it."""
    command, used = re.sub(r"\s+#.*", "", line), set()
    for number, (written, run) in enumerate(SUBSTITUTIONS):
        changed = re.sub(written, run, command)
        if changed != command:
            command, used = changed, used | {number}
    return command, used


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The repository's own files by symbolic links, and what a clinic would bring."""
    home = tmp_path_factory.mktemp("checkout")
    for path in (
        *ROOT.glob("*.py"),
        *ROOT.glob("requirements*.txt"),
        *(ROOT / name for name in ("sonovqa", "Makefile", "serve.sh")),
    ):
        (home / path.name).symlink_to(path)
    clinic(home, patients=12)
    picture(home / "scan.png", 99)
    (home / "bin").mkdir()
    (home / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "bin" / "python").chmod(0o755)
    return home


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page, checkout):
    dropped = ("VLLM_API_KEY", "HF_TOKEN", "MAKEFLAGS", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in dropped and not k.lower().endswith("_proxy")}
    env |= {"PATH": f"{checkout / 'bin'}:{env['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    assert blocks(page)
    with StandIn(lambda prompt, attempt: "normal", models=("clinic",)) as server:
        for block in blocks(page):
            lines = [as_run(line)[0] for line in block.splitlines() if line.strip()]
            script = "\n".join(["set -euo pipefail", *(f"echo {n}: >&2\n{line}" for n, line in enumerate(lines))])
            done = subprocess.run(["bash", "-c", script], cwd=checkout, env=env | {"STAND_IN": server.url}, text=True,
                                  stdin=subprocess.DEVNULL, capture_output=True, timeout=1200)  # fmt: skip
            assert done.returncode == 0, (
                f"{page}, of\n{block}\nrun as\n" + "\n".join(lines) + done.stdout[-2000:] + done.stderr[-3000:]
            )


def test_every_substitution_is_needed_and_no_command_is_emptied():
    used = set()
    for page in PAGES:
        for line in "".join(blocks(page)).splitlines():
            command, numbers = as_run(line)
            assert not line.strip() or len(command) > 4, line
            used |= numbers
    assert used == set(range(len(SUBSTITUTIONS)))


def test_every_page_is_run_by_a_test():
    """Here, or by a test of its own, which then names it."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert [
        path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in tests and path.name not in tests
    ] == []


def test_readme_is_short_and_its_tables_are_what_the_records_say():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert readme.rewritten(text, tables.RECORDS) == text, "run: python -m sonovqa.readme"
    assert {name for _, name, _, _ in readme._MARKED.findall(text)} == {"shared", "memory"}


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        named = re.findall(r"`((?:sonovqa|tests|docs)/[\w./]+\.\w+|[\w]+\.(?:py|sh|md))`", (ROOT / page).read_text())
        assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_records_that_pages_link_to_are_there():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    linked = {name for page in pages for name in re.findall(r"\]\((outputs/records/[^)#]+)\)", page.read_text())}
    assert len(linked) > 100 and [name for name in sorted(linked) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("name", "page"),
    [("", "README.md"), ("", "experiments.md"), ("-no-checkpointing", "experiments.md"), ("-cut-blocks", "experiments.md")],
)
def test_what_prose_says_of_two_gpus_is_what_their_records_say(name, page):
    one, two = tables.files.read_json(tables.RECORDS / f"bench-train-two-gpus{name}-h200.json")["rows"]
    times = f"{two['pairs_per_second'] / one['pairs_per_second']:.2f} times"
    told = [line for line in (ROOT / page).read_text().splitlines() if not line.startswith("|")]
    assert two["processes"] == 2 and "processes" not in one and any(times in line for line in told), times


def test_tables_are_made_from_rows_of_gpu_records(tmp_path):
    row = {"kind": "raw", "model": "8B", "size": "800x600", "pairs": 64, "batching": "shared", "image_tokens": 475,
           "micro_batch": 8, "backend": "unsloth", "pairs_per_second": 80.0, "peak_memory_bytes": 1.01e10}  # fmt: skip
    rows = [row, row | {"batching": "separate", "micro_batch": 64, "pairs_per_second": 16.0, "peak_memory_bytes": 2.2e10},
            row | {"pairs": 128, "micro_batch": 16, "peak_memory_bytes": 1.2e10},
            row | {"model": "2B", "backend": "transformers"}]  # fmt: skip
    record = {"benchmark": "train", "settings": {"bits": 4}, "device": {"name": "GPU"}, "rows": rows}
    tables.files.write_json(tmp_path / "bench-x.json", record)
    marked = "".join(f"<!-- records: {name} -->\nold\n<!-- end of records -->\n" for name in ("shared", "memory"))
    made = readme.rewritten(marked, tmp_path)
    assert "| Qwen3-VL-8B, 4 bits, 800x600, 64 | shared image | 80.0 | 10.1 GB | **5.0** |" in made
    assert "| Qwen3-VL-8B | 4 | 800x600 (475 tokens) | 10.1 GB | 12.0 GB |" in made
    assert "old" not in made and "2B" not in made
    with pytest.raises(tables.UserError, match="markers"):
        readme.rewritten("<!-- records: nothing -->\n<!-- end of records -->", tmp_path)


def test_raw_steps_are_compared_at_the_pairs_of_whole_trainings_in_the_latest_run(tmp_path):
    """Memory is the most of all runs."""
    row = {"kind": "raw", "model": "8B", "size": "800x600", "backend": "unsloth", "image_tokens": 475, "micro_batch": 16}
    for name, day, most, gain in (("a", 22, 1.2e10, 2.0), ("b", 23, 1.1e10, 3.0), ("c", 21, 1e10, 4.0)):
        rows = [row | {"pairs": pairs, "batching": batching, "pairs_per_second": speed * pairs, "peak_memory_bytes": most}
                for pairs in (64, 256, 128) for batching, speed in (("shared", gain), ("separate", 1.0))]  # fmt: skip
        record = {"benchmark": "train", "settings": {"bits": 4}, "device": {"name": "GPU"}, "rows": rows}
        record["started"] = f"2026-11-{day}T08:00:00+00:00"
        tables.files.write_json(tmp_path / f"bench-{name}.json", record)
    found = list(readme.rows_of(tmp_path))
    assert readme.shared(found)[1] == ["Qwen3-VL-8B, 4 bits, 800x600, 128", "shared image", "384.0", "11.0 GB", "**3.0**"]
    assert readme.memory(found)[1] == ["Qwen3-VL-8B", "4", "800x600 (475 tokens)", "12.0 GB"]


def test_end_to_end_the_fastest_peer_counts_and_only_within_its_own_run(tmp_path):
    """Two runs of the same on two days: ratios are not taken across them, and the better peer's is told. What is dealt otherwise
    has lines of its own, small models first."""
    row = {"kind": "end to end", "model": "8B", "size": "800x600", "pairs": 128, "backend": "unsloth", "peak_memory_bytes": 1e10}
    ours = {"way": "train.py, shared", "batching": "shared", "median_seconds": 1.5, "spread_seconds": [1.4, 16.6]}
    for name, setting, speed, peers in (
        ("a", "16 x 1", 90.0, {"8 none": 10.0}),
        ("b", "16 x 1", 80.0, {"16 none": 16.0, "8 gc": 8.0}),
        ("c", "8 x 2 none", 120.0, {"16 none": 20.0}),
    ):
        rows = [row | ours | {"setting": setting, "pairs_per_second": speed}]
        rows += [row | {"way": "Unsloth + TRL", "setting": how, "pairs_per_second": found} for how, found in peers.items()]
        rows += [row | ours | {"model": "2B", "setting": setting, "pairs_per_second": 200.0}] if name == "c" else []
        record = {"benchmark": "train", "settings": {"bits": 4}, "device": {"name": "GPU"}, "rows": rows}
        tables.files.write_json(tmp_path / f"bench-{name}.json", record)
    made = readme.rewritten("<!-- records: shared -->\n<!-- end of records -->", tmp_path)
    slow = " (one step of 16.6 s)"
    assert [line.split(" | ")[1:] for line in made.splitlines()[3:-1]] == [
        ["train.py, shared image, no checkpointing", f"200.0{slow}", "10.0 GB", " |"],
        ["train.py, shared image, checkpointing", f"80.0{slow}", "10.0 GB", "**5.0** |"],
        ["Unsloth + TRL, 16 samples at a time, no checkpointing", "16.0", "10.0 GB", " |"],
        ["Unsloth + TRL, 8 samples at a time, checkpointing", "8.0", "10.0 GB", " |"],
        ["train.py, shared image, no checkpointing", f"120.0{slow}", "10.0 GB", "**6.0** |"],
        ["Unsloth + TRL, 16 samples at a time, no checkpointing", "20.0", "10.0 GB", " |"],
    ]
