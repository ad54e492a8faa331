"""torchvision beside CPU torch: in processes of their own, since an import happens once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build: nothing is declared")
def test_qwen_image_processor_works_after_declare():
    told = python(
        "from sonovqa import torchvision_ops\n"
        "first, second = torchvision_ops.declare(), torchvision_ops.declare()\n"
        "from PIL import Image\n"
        "from transformers import Qwen2VLImageProcessor\n"
        "size = {'shortest_edge': 64 * 64, 'longest_edge': 128 * 96}\n"
        "made = Qwen2VLImageProcessor(patch_size=16, size=size)(Image.new('RGB', (800, 600)), return_tensors='pt')\n"
        "print(first == second, made['image_grid_thw'].tolist(), tuple(made['pixel_values'].shape))"
    )
    assert told == "True [[1, 6, 8]] (48, 1536)\n"


def test_nothing_is_declared_beside_a_gpu_or_a_matching_build():
    told = python(
        "import torch\n"
        "from sonovqa import torchvision_ops\n"
        "cuda, torch.version.cuda = torch.version.cuda, '13.0'\n"
        "print(torchvision_ops.declare())\n"
        "torch.version.cuda = None\n"
        "torchvision_ops._operators_load = lambda: True\n"
        "print(torchvision_ops.declare(), hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert told == "False\nFalse False\n"


def test_a_package_that_does_not_load_looks_uninstalled(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (tmp_path / "sound.py").write_text("")
    told = python(
        f"import sys, importlib.util, torch\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "torch.version.cuda = None\n"
        "from sonovqa import torchvision_ops\n"
        "for name in ('broken', 'sound', 'absent'):\n"
        "    torchvision_ops.hide_unloadable(name)\n"
        "    print(name, importlib.util.find_spec(name) is not None)\n"
    )
    assert told == "broken False\nsound True\nabsent False\n"
