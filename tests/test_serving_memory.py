"""What serve.sh suggests for the GPUs people have, and what it says where a model does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from sonovqa import serving_memory
from sonovqa.serving_memory import Gpu, Needs, cpu_told, needs_of, suggest, told

GIB = 2**30
T4 = Gpu("Tesla T4", 15360 * 2**20, 15256 * 2**20, (7, 5))
A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960 * 2**20, 40500 * 2**20, (8, 0))
H200 = Gpu("NVIDIA H200", 143771 * 2**20, 143156 * 2**20, (9, 0))
#: Qwen3-VL-8B and -2B by their published configurations: 36 and 28 layers of 8 key-value heads of 128.
EIGHT = Needs(17.5e9, 2 * 36 * 8 * 128 * 2, 192, 4096, 4096, 151936)
TWO = Needs(4.3e9, 2 * 28 * 8 * 128 * 2, 192, 4096, 2048, 151936)


def flags_of(found) -> dict[str, str]:
    return dict(zip(found.flags[::2], found.flags[1::2], strict=True))


@pytest.mark.parametrize(
    ("needs", "gpu", "tokens", "sequences"), [(TWO, T4, 75_000, 104), (EIGHT, A100, 135_000, 184), (EIGHT, H200, 780_000, 1024)]
)
def test_what_fits_on_one_gpu(needs, gpu, tokens, sequences):
    found = suggest(needs, gpu)
    assert found.tokens == pytest.approx(tokens, rel=0.02)
    assert found.sequences == sequences
    flags = flags_of(found)
    assert flags["--gpu-memory-utilization"] == "0.92" and "--max-model-len" not in flags
    assert flags.get("--dtype") == ("float16" if gpu is T4 else None), "a T4 has no bf16"
    used = needs.weights + found.tokens * needs.token + serving_memory.working_bytes(needs, gpu is H200)
    assert used <= 0.92 * gpu.total


def test_what_does_not_fit_is_said_with_the_way_out():
    assert not suggest(EIGHT, T4).flags
    line = told(EIGHT, [T4])
    assert "does not fit on 1; 2 of these would do" in line and "--tensor-parallel-size 2" in line
    assert "--tensor-parallel-size 2" in told(EIGHT, [T4, T4]).split("suggested")[1]
    assert "smaller model" in told(replace(EIGHT, weights=900e9), [T4] * 8)


def test_context_is_cut_to_the_cache_and_memory_of_others_is_left_alone():
    crowded = replace(A100, free=int(0.52 * A100.total))
    found = suggest(EIGHT, crowded)
    flags = flags_of(found)
    assert float(flags["--gpu-memory-utilization"]) * A100.total < crowded.free
    long = suggest(replace(EIGHT, context=262144), A100)
    assert int(flags_of(long)["--max-model-len"]) <= long.tokens < 262144


def test_cpu_suggestion_stays_within_half_of_what_is_free():
    assert "VLLM_CPU_KVCACHE_SPACE=1 " in cpu_told(replace(EIGHT, token=768, weights=3e6), 1, 16e9)
    assert "VLLM_CPU_KVCACHE_SPACE=9 " in cpu_told(EIGHT, 1, 120e9), "16 requests of 4,096 tokens"
    assert "VLLM_CPU_KVCACHE_SPACE=5 " in cpu_told(EIGHT, 1, 30e9)
    assert "1 GiB has room for 7,281 tokens: 1 requests of 4,096" in cpu_told(EIGHT, 1, 30e9)


def test_needs_come_from_headers_and_configuration(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    text = {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32, "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text | {"vocab_size": 900}}))
    save_file({"a.weight": np.zeros((10, 20), np.float16)}, tmp_path / "model.safetensors")
    save_file({"b": np.zeros((5, 5), np.float32)}, tmp_path / "adapter_model.safetensors")
    needs = needs_of(str(tmp_path), [tmp_path], 12, 4096)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert needs == Needs(10 * 20 * 2 + size, 2 * 3 * 2 * 32 * 2, 12, 4096, 128, 900)
    (tmp_path / "config.json").write_text("{}")
    assert needs_of(str(tmp_path), [], 12, 4096) is None


def says(program, *lines: str) -> None:
    """Make ``program`` an nvidia-smi that says so."""
    program.write_text(f"#!{sys.executable}\nprint({chr(10).join(lines)!r})\n")
    program.chmod(0o755)


FIRST, SECOND = "0, GPU-81aa, NVIDIA H200, 143771, 900, 9.0", "1, GPU-8bcc, NVIDIA H200, 143771, 143156, 9.0"
BUSY = replace(H200, free=900 * 2**20)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [BUSY, H200]),
        ("", []),
        ("1", [H200]),
        ("1,0", [H200, BUSY]),
        ("GPU-8b", [H200]),
        ("GPU-8bcc,GPU-81aa", [H200, BUSY]),
        ("GPU-8", []),  # either of the two
        ("1,9,0", [H200]),
        ("1,1", [H200]),
        ("9,0", []),
        ("MIG-GPU-81aa/1/0", []),
    ],
)
def test_only_gpus_that_vllm_would_see_are_planned_with(visible, expected, tmp_path, monkeypatch):
    """On a box whose first GPU trains, CUDA_VISIBLE_DEVICES=1 bash serve.sh plans with the second one's memory."""
    says(tmp_path / "nvidia-smi", FIRST, SECOND)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serving_memory.gpus() == expected


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert serving_memory.gpus() == []
    says(program, SECOND)
    assert serving_memory.gpus() == [H200]
    for other in ("No devices were found", "0, GPU-81aa, NVIDIA GB10, [N/A], [N/A], 12.1"):  # the latter shares main memory
        says(program, other)
        assert serving_memory.gpus() == []
        assert subprocess.run([program], capture_output=True).returncode == 0
