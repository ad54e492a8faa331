"""Adapters behind one server: which there are, whether one base can carry them, and vLLM's flags for them.

What vLLM would leave out with no more than a line in its log (an adapter's layers on the vision tower) is either switched on
here or refused before anything is started; what it then says it left out, `left_out` reads from its log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sonovqa import cli, files, weights
from sonovqa.cli import UserError
from sonovqa.serving_memory import pixel_budget

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; source: vLLM's config/lora.py, MaxLoRARanks
#: Families whose vision tower and connector take adapters under --enable-tower-connector-lora, by ``model_type``.
#: Source: ``supports_tower_connector_lora`` of vLLM 0.32's model classes; `tests/test_serving_adapters.py` holds it to that.
TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MERGED = "serve its merged weights: leave --lora and --adapters out"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LEFT_OUT = re.compile(r"matching PunicaWrapper is found; (\S+) will be ignored")


def named(words: Sequence[str]) -> dict[str, Path]:
    """Folders of adapters by the name each is served under, from ``NAME=outputs/<run>`` or ``outputs/<run>``.

    Raises:
        UserError: for a name that is none or comes twice, or a run without an adapter.
    """
    found, problems = {}, []
    for word in words:
        name, given, run = word.rpartition("=")
        name, home = name if given else Path(run).resolve().name, Path(run)
        folder = home if (home / "adapter_config.json").exists() else home / "adapter"
        if not _NAME.fullmatch(name):
            problems.append(f"--adapters {word}; {name!r} is no name; letters, digits, . _ and - are allowed; such as A={run}")
        elif name in found:
            problems.append(f"--adapters {word}; the name {name} comes twice; each has one of its own; such as {name}-2={run}")
        elif not (folder / "adapter_config.json").exists():
            told = "it was trained with --full or not by train.py" if home.is_dir() else "there is no such folder"
            problems.append(f"--adapters {word}; {home} holds no adapter/; {told}; serve merged weights on a --port of their own")
        else:
            found[name] = folder.resolve()
    cli.check(problems)
    return found


def base_of(adapters: Mapping[str, Path]) -> str:
    """The base that adapters share: a folder or a hub id.

    Raises:
        UserError: if they were trained on different bases, with different pixel budgets, or with other chat templates.
    """
    from sonovqa import models  # imports torch, which `--help` need not wait for

    bases = {name: models.locate(config(folder)["base_model_name_or_path"]) for name, folder in adapters.items()}
    way_out = "serve them apart, each on a --port of its own"
    for what, found in (
        ("base", bases),
        ("pixel budget", {name: pixel_budget(folder) for name, folder in adapters.items()}),
        ("chat template", {name: _template(folder) for name, folder in adapters.items()}),
    ):
        if len(set(found.values())) > 1:
            shown = "" if what == "chat template" else "; " + ", ".join(f"{name}: {value}" for name, value in found.items())
            raise UserError(f"--adapters; {', '.join(found)} differ in their {what}{shown}; one server has one; {way_out}")
    return next(iter(bases.values()))


def flags(adapters: Mapping[str, Path], model: str, kind: str | None) -> list[str]:
    """vLLM's flags that put adapters on their base, on the vision tower too, with the runs' own pixel budget.

    Args:
        adapters: folders by name. model: the base. kind: its ``model_type``.

    Raises:
        UserError: for a rank above what vLLM takes, or layers of a vision tower that it would leave out.
    """
    ranks = {name: config(folder)["r"] for name, folder in adapters.items()}
    highest = max(ranks, key=ranks.get)
    fitting = [allowed for allowed in RANKS if allowed >= ranks[highest]]
    if not fitting:
        raise UserError(f"{highest} has rank {ranks[highest]}; vLLM takes at most {RANKS[-1]}; {MERGED}")
    made = ["--enable-lora", "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    made += ["--max-lora-rank", str(fitting[0])]
    made += ["--max-loras", str(len(adapters))] if len(adapters) > 1 else []  # all of them in one step, none swapped out
    adapted = {name: layers(folder) for name, folder in adapters.items()}
    # vLLM would else wrap lm_head as well, and a request for prompt_logprobs then ends the engine (CPU) or is answered wrongly
    # (GPU): https://github.com/vllm-project/vllm/issues/29955 and 51594.
    made += ["--lora-target-modules", *sorted({layer.rpartition(".")[2] for ones in adapted.values() for layer in ones})]
    if heads := [name for name, ones in adapted.items() if any(layer.endswith("lm_head") for layer in ones)]:
        raise UserError(f"{', '.join(heads)}: an adapted lm_head, of which vLLM answers prompt_logprobs wrongly; {MERGED}")
    seeing = [name for name, ones in adapted.items() if any(map(is_vision, ones))]
    if seeing and kind not in TOWERS:
        told = f"{', '.join(seeing)}: adapted layers on the vision tower, which vLLM ignores for {kind}"
        raise UserError(f"{told}; those of {', '.join(TOWERS)} it takes; {MERGED}")
    made += ["--enable-tower-connector-lora"] if seeing else []
    own = pixel_budget(next(iter(adapters.values())))
    if own and own != pixel_budget(Path(model)):  # vLLM reads the processor of the base
        size = dict(zip(("shortest_edge", "longest_edge"), own, strict=True))
        made += ["--mm-processor-kwargs", compact({"size": size})]
    return made


def config(folder: Path) -> dict:
    """An adapter's configuration."""
    return files.read_json(folder / "adapter_config.json")


def layers(folder: Path) -> set[str]:
    """Names of the layers an adapter changes, as PEFT stores them."""
    return {name.split(".lora_")[0] for name in weights.of_file(folder / "adapter_model.safetensors") if ".lora_" in name}


def is_vision(layer: str) -> bool:
    """Whether a layer belongs to the vision tower or its connector."""
    return any(part in layer for part in ("visual", "vision", "multi_modal_projector"))


def left_out(log: str, adapters: Mapping[str, Path]) -> dict[str, list[str]]:
    """Layers of each adapter that vLLM's log says it ignores; adapters of which it ignores none are left out.

    vLLM names all layers it cannot adapt, whether an adapter changes them or not.
    """
    ignored = set(_LEFT_OUT.findall(log))
    found = {name: sorted(one for one in ignored if any(layer.endswith(one) for layer in layers(folder)))
             for name, folder in adapters.items()}  # fmt: skip
    return {name: ones for name, ones in found.items() if ones}


def compact(value: dict) -> str:
    """JSON without blanks, as it stands on a command line."""
    import json

    return json.dumps(value, separators=(",", ":"))


def _template(folder: Path) -> str | None:
    stored = folder / "chat_template.jinja"
    return stored.read_text(encoding="utf-8") if stored.exists() else None
