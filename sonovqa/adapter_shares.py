"""How much of each layer's adapter stands in merged 16-bit weights, and how much of it 16 bits can hold at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sonovqa import files

#: 16 bits swallow changes below half a unit in the last place: after 2 steps of training they hold 3 % of a layer's adapter,
#: after 40 steps 83 %, later all of it. Where it is less than this, users are told.
LITTLE = 0.5


def directions(adapter: Path):
    """The change of weight each layer's adapter makes, read from a saved adapter.

    Args:
        adapter: a PEFT LoRA adapter folder (safetensors).

    Yields:
        ``(name, delta)``: the layer's name in the model, and alpha / rank * B @ A, ``[out, in]`` in fp32.
        Source: LoRA, arXiv:2106.09685, section 4.1.
    """
    from safetensors import safe_open

    config = files.read_json(adapter / "adapter_config.json")
    scale = config["lora_alpha"] / config["r"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is not iterable
            if key.endswith(".lora_A.weight"):
                down, up = tensors.get_tensor(key).float(), tensors.get_tensor(key.replace("lora_A", "lora_B")).float()
                yield key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), scale * (up @ down)


@dataclass(frozen=True)
class Projection:
    """A layer of the base along the change ``D`` that its adapter makes, in fp64; ``W`` is its weight as it is stored.

    Attributes:
        base: ``<W, D>``.
        representable: ``<round(W + D) - W, D>``: what of ``D`` 16 bits can hold.
        squared_norm: ``<D, D>``.
    """

    base: float
    representable: float
    squared_norm: float


def projections(model, adapter: Path, dtype) -> dict[str, Projection]:
    """The `Projection` of every layer with an adapter, by the layer's name.

    Args:
        model: the base model, with or without adapters attached, in main memory.
        adapter: the adapter whose `directions` are taken.
        dtype: the 16-bit type that the merged weights are stored in; a base in more bits is rounded to it first.
    """
    found = {}
    for name, weight, delta in _with_deltas(model, adapter):
        stored = weight.to(dtype).double()
        held = (stored + delta).to(dtype).double() - stored
        found[name] = Projection(*((one * delta).sum().item() for one in (stored, held, delta)))
    return found


def _with_deltas(model, adapter: Path):
    """``(layer's name, its weight, its adapter's change of it)``, both ``[out, in]`` in fp64."""
    for name, delta in directions(adapter):
        layer = model.get_submodule(name)
        yield name, getattr(layer, "base_layer", layer).weight.detach().double(), delta.double()


def of_merged(before: dict[str, Projection], merged, adapter: Path) -> dict[str, float]:
    """How much of what 16 bits can hold of each layer's adapter stands in the merged weights: 1 = all of it, 0 = left out.

    Layers whose adapter is zero (never trained), or of which rounding leaves nothing, have none.

    Args:
        before: `projections` of the base.
        merged: the merged model, in main memory.
        adapter: the adapter that should be in it.
    """
    after = {name: (weight * delta).sum().item() for name, weight, delta in _with_deltas(merged, adapter)}
    return {name: (after[name] - at.base) / at.representable for name, at in before.items() if at.representable > 0}


def rounding_of(before: dict[str, Projection]) -> dict:
    """What rounding costs: the ``least`` share of a layer's adapter that 16 bits hold, and of how many ``layers`` they hold less
    than `LITTLE`."""
    held = [at.representable / at.squared_norm for at in before.values() if at.squared_norm > 0]
    return {"least": min(held, default=None), "layers": sum(share < LITTLE for share in held)}


def rounding_note(check: dict) -> str:
    """What users are told of a merge check (`merging.check_merged`) if 16 bits hold little of an adapter; empty if most of it."""
    found = check.get("rounding") or {"layers": 0}
    if not found["layers"]:
        return ""
    return (
        f"note: of {found['layers']} layers' adapters 16 bits hold less than {LITTLE:.0%}, of one {found['least']:.0%}: so "
        "small changes are rounded away, which more training mends; evaluate.py --adapter and serve.sh --lora use them whole"
    )
