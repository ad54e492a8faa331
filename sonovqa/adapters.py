"""Saved LoRA adapters: is it one, does it belong to this base, put it on."""

from __future__ import annotations

from pathlib import Path

from sonovqa import files, torchvision_ops, weights
from sonovqa.cli import UserError


def check(adapter: Path, base: str) -> None:
    """Raise `UserError` if a saved adapter is none, or was trained on another hub model than ``base``."""
    config = Path(adapter) / "adapter_config.json"
    if not config.exists() or not (Path(adapter) / "adapter_model.safetensors").exists():
        raise UserError(f"{adapter} is no adapter; adapter_config.json and adapter_model.safetensors are needed; "
                        "name outputs/<run>/adapter")  # fmt: skip
    trained_on = files.read_json(config).get("base_model_name_or_path")
    hub = [name for name in (trained_on, base) if name and not Path(name).exists() and name.count("/") == 1]
    if len(hub) == 2 and hub[0] != hub[1]:
        raise UserError(f"the adapter {adapter} was trained on {hub[0]}; {hub[1]} is another base; use {hub[0]}")


def attach(model, adapter: Path):
    """Attach a saved adapter.

    Raises:
        UserError: if it does not fit this base layer by layer. PEFT alone passes over layers that it cannot place.
    """
    torchvision_ops.declare()
    from peft import PeftModel

    stored = weights.of_file(Path(adapter) / "adapter_model.safetensors")
    for name, tensor in stored.items():
        layer_name, part, _ = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not part:
            continue
        try:
            layer = model.get_submodule(layer_name)
        except AttributeError:
            raise UserError(f"the adapter {adapter} belongs to another base; this one has no layer {layer_name}; "
                            "use the base that its adapter_config.json names") from None  # fmt: skip
        wanted, given = (layer.in_features, tensor.shape[1]) if ".lora_A." in name else (layer.out_features, tensor.shape[0])
        if wanted != given:
            raise UserError(f"the adapter {adapter} belongs to another base; {layer_name} has a side of {wanted} here "
                            f"and {given} there; use the base that its adapter_config.json names")  # fmt: skip
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, OSError) as fault:
        first = str(fault).strip().splitlines()[0][:200]
        raise UserError(
            f"the adapter {adapter} does not fit its base: {first}; use the base that its adapter_config.json names"
        ) from fault
