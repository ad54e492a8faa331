"""The family table of experiments.md: what differs by family, and for each claim the test or record that backs it.

`tests/test_families.py` holds `TESTED` to the checkpoints it runs and every record named here to a file; what stands in
neither says "not run".
"""

from __future__ import annotations

from sonovqa.families import FAMILIES, Family

_FILE = "tests/test_families.py"
#: Families of which that file has a tiny random checkpoint.
TESTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "mllama", "gemma3", "blip-2", "florence2")
_TINY_ON_GPU = ("qwen2_vl", "qwen2_5_vl", "llava", "mllama", "gemma3", "blip-2", "florence2")
#: Records under outputs/records/ of runs on a GPU, by family, and what the weights were: through Unsloth, or transformers and
#: PEFT where Unsloth is not used.
ON_GPU = {
    "qwen3_vl": ("random weights of the real size", ("h200-2b-4bit.json", "bench-train-h200.json")),
    **{kind: ("tiny random weights", (f"h200-{kind}.json",)) for kind in _TINY_ON_GPU},
}
HEAD = ["family", "model type, weights for it", "prompt", "image", "LoRA by default", "questions behind one image",
        "train, evaluate, save, reload, merge", "Unsloth on a GPU", "vLLM"]  # fmt: skip


def rows() -> list[list[str]]:
    """The table's lines, `HEAD` first."""
    return [HEAD, *(_row(kind, family) for kind, family in FAMILIES.items())]


def _row(kind: str, family: Family) -> list[str]:
    lora = family.lora
    shared = f"in one sequence, `tests/test_shared_prefix.py -k {kind}`" if kind in TESTED else "not run"
    return [
        family.name,
        f"`{kind}`, {family.hub}",
        _prompt(family),
        "within a pixel budget" if family.pixel_budget else "one fixed size",
        f"{', '.join(lora.targets) or 'all linear layers'}; r={lora.rank} alpha={lora.alpha} dropout {lora.dropout:g}; "
        f"{family.bits} bits",
        shared if family.shares_prefix else f"no: {family.why_not}",
        _trained(kind),
        _on_gpu(kind, family),
        f"no: {family.not_served}" if family.not_served else _served(kind),
    ]


def _prompt(family: Family) -> str:
    own = "its chat template"
    if family.template is not None:
        own = "`Question: … Answer:`" if "Answer:" in family.template else "the question alone"
    decoder = "; encoder-decoder" if family.encoder_decoder else ""
    return own + ("" if family.system_turn else ", system text in the question") + decoder


def _trained(kind: str) -> str:
    if kind not in TESTED:
        return "not run"
    return f"tiny random weights, `{_FILE}::test_overfits[{kind}]`, `…::test_same_answers[{kind}-merged]`"


def _on_gpu(kind: str, family: Family) -> str:
    what, names = ON_GPU.get(kind, ("not run", ()))
    links = ", ".join(f"[{name}](outputs/records/{name})" for name in names)
    run = f"{what}: {links}" if links else what
    return f"{'used where there is CUDA' if family.unsloth else 'not used, transformers and PEFT there'}; {run}"


def _served(kind: str) -> str:
    return f"on a CPU, tiny random weights: `{_FILE}::test_vllm_gives_the_same_answers`" if kind in TESTED else "not run"
