"""Which tensors move under each configuration of experiment 3: the four toggles of train.py."""

from __future__ import annotations

import pytest
import running

from sonovqa import weights

VISION, LANGUAGE = "visual", "language_model"
ATTENTION = {"qkv", "proj", "q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"linear_fc1", "linear_fc2", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def moved(base, data, tmp_path_factory):
    """Gives the layers whose LoRA matrix B, zero at first, is not zero after a step of train.py with the given toggle."""
    from safetensors.torch import load_file

    outputs = tmp_path_factory.mktemp("layers")

    def of(*toggle: str) -> set[str]:
        name = "run" + "".join(toggle)
        running.run(base, data, outputs, name, "--no-merge", *toggle, steps=1, warmup=0, batch=2, rank=2)
        found = load_file(outputs / name / "adapter" / "adapter_model.safetensors")
        matrices = [key.removeprefix("base_model.model.") for key, tensor in found.items() if "lora_B" in key and tensor.any()]
        return {key.removesuffix(".lora_B.weight") for key in matrices}

    return of


def parts(layers: set[str]) -> set[tuple[str, str]]:
    """Tower and part of each layer, by its name in the checkpoint."""
    towers = {name: VISION if f".{VISION}." in name else LANGUAGE for name in layers}
    return {(tower, "attention" if name.rpartition(".")[2] in ATTENTION else "MLP") for name, tower in towers.items()}


def test_each_configuration_moves_its_own_layers_and_no_others(moved, base):
    """E moves every linear layer of both towers, A to D what their toggle leaves of it."""
    everything = moved()
    stored = {name.removesuffix(".weight") for name, tensor in weights.of_folder(base).items() if len(tensor.shape) == 2}
    every_one = {name for name in stored if name.rpartition(".")[2] in ATTENTION | MLP}
    assert everything == every_one
    assert parts(everything) == {(tower, part) for tower in (VISION, LANGUAGE) for part in ("attention", "MLP")}
    configurations = {
        "--no-language": {name for name in everything if f".{VISION}." in name},
        "--no-vision": {name for name in everything if f".{LANGUAGE}." in name},
        "--no-mlp": {name for name in everything if name.rpartition(".")[2] in ATTENTION},
        "--no-attention": {name for name in everything if name.rpartition(".")[2] in MLP},
    }
    for toggle, layers in configurations.items():
        assert len(parts(layers)) == 2 and moved(toggle) == layers, toggle
