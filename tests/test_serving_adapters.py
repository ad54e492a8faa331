"""Several adapters on one base: what can share a server, and what vLLM would leave out."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from keys_and_ports import no_keys  # noqa: F401 - a fixture
from test_serving_plan import add_adapter, model_folder, value, write

from sonovqa import serving_adapters
from sonovqa.cli import UserError
from sonovqa.serving_plan import make_plan


@pytest.fixture
def runs(tmp_path) -> Path:
    """Runs ``a`` (vision too) and ``b`` (language alone) on one base."""
    base = model_folder(tmp_path / "base")
    add_adapter(tmp_path / "a", base, rank=8)
    add_adapter(tmp_path / "b", base, rank=20, layer="language_model.layers.0.mlp.up_proj")
    return tmp_path


def plan(runs: Path, *words: str):
    return make_plan(None, device="gpu", adapters=[word.replace("=", f"={runs}/") for word in words])


def test_two_runs_on_one_base(runs):
    made = plan(runs, "A=a", "B=b")
    assert made.name == "A" and made.names == ("A", "B")
    assert value(made, "--model") == str(runs / "base") and value(made, "--served-model-name") == "base"
    at = made.command.index("--lora-modules")
    assert made.command[at + 1 : at + 3] == [f"A={runs / 'a' / 'adapter'}", f"B={runs / 'b' / 'adapter'}"]
    assert (value(made, "--max-lora-rank"), value(made, "--max-loras")) == ("32", "2")
    at = made.command.index("--lora-target-modules")
    assert made.command[at + 1 : at + 3] == ["qkv", "up_proj"], "lm_head stays as it is"
    assert "--enable-tower-connector-lora" in made.command
    assert made.weights.runs == {"A": runs / "a", "B": runs / "b"} and made.log.parent == runs / "a"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["A=a", "A=b"], "the name A comes twice"),
        (["A=none"], "holds no adapter/; there is no such folder"),
        (["A=base"], "holds no adapter/; it was trained with --full"),
        (["A/B=a"], "'A/B' is no name"),
        (["base=a"], "the base has that name"),
    ],
)
def test_names_and_runs_that_cannot_be(runs, words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        plan(runs, *words)


def test_what_cannot_share_a_server(runs):
    add_adapter(runs / "c", model_folder(runs / "another"))
    add_adapter(runs / "d", runs / "base", pixels=(4096, 24576))
    add_adapter(runs / "e", runs / "base")
    (runs / "e" / "adapter" / "chat_template.jinja").write_text("{{ other }}")
    for other, what in (("c", "base"), ("d", "pixel budget"), ("e", "chat template")):
        with pytest.raises(UserError, match=f"A, X differ in their {what}.*--port of its own"):
            plan(runs, "A=a", f"X={other}")
    with pytest.raises(UserError, match="a run or --adapters; one of the two"):
        make_plan(runs / "a", device="gpu", adapters=[str(runs / "b")])


def test_what_vllm_would_leave_out_is_refused_with_the_way_out(runs):
    add_adapter(runs / "high", runs / "base", rank=600)
    add_adapter(runs / "head", runs / "base", layer="lm_head")
    for name, told in (("high", "rank 600"), ("head", "an adapted lm_head")):
        with pytest.raises(UserError, match=f"{told}.*serve its merged weights"):
            plan(runs, f"X={name}")
    write(runs / "base" / "config.json", {"model_type": "glm4v", "text_config": {}})
    with pytest.raises(UserError, match=r"A: adapted layers on the vision tower, which vLLM ignores for glm4v.*merged weights"):
        plan(runs, "A=a")
    assert "--enable-tower-connector-lora" not in plan(runs, "B=b").command, "language alone goes with any family"
    with pytest.raises(UserError, match="--no-enable-tower-connector-lora"):
        make_plan(runs / "a", lora=True, device="gpu", extra=("--no-enable-tower-connector-lora",))


def test_layers_that_the_log_names_count_if_an_adapter_changes_them(runs):
    line = "(Worker pid=7) WARNING Regarding Qwen3VL, no matching PunicaWrapper is found; visual.{} will be ignored.\n"
    log = line.format("blocks.0.attn.qkv") + line.format("merger.linear_fc1")
    adapters = serving_adapters.named([f"A={runs / 'a'}", f"B={runs / 'b'}"])
    assert serving_adapters.left_out(log, adapters) == {"A": ["visual.blocks.0.attn.qkv"]}
    assert serving_adapters.left_out("all is well", adapters) == {}


def test_families_with_adapted_towers_are_those_of_the_vllm_that_is_installed():
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    models = Path(found.submodule_search_locations[0]) / "model_executor" / "models"
    for kind in serving_adapters.TOWERS:
        assert "supports_tower_connector_lora = True" in (models / f"{kind}.py").read_text(), kind
    manager = (models.parents[1] / "lora" / "model_manager.py").read_text()
    assert re.search(r"is found; %s will be ignored", manager), "the line that left_out looks for"
    assert json.dumps(max(serving_adapters.RANKS)) in (models.parents[1] / "config" / "lora.py").read_text()
