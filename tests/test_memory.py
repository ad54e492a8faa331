"""Predictions of memory: shapes of the real models against published figures and bitsandbytes, the peak against live tensors."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import real_sizes
import tiny_families
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from sonovqa import (
    bench_cases,
    bench_images,
    bench_predictions,
    cli,
    families,
    files,
    memory,
    memory_peak,
    memory_plan,
    tables,
    tiny,
    weights,
)
from sonovqa.memory_peak import Workload

MIB = 2**20


def test_the_documents_figures_of_qwen2_5_vl_7b():
    """15,820 MB in 16 bits, 5,664 MB in NF4 with bitsandbytes' defaults, which leave the LM head alone: MiB after load."""
    shapes = real_sizes.shapes("Qwen2.5-VL-7B")
    assert memory.weight_bytes(shapes, 16, 2) / MIB == pytest.approx(15_820, rel=0.01)
    assert memory.weight_bytes(shapes, 4, 2, skipped=("lm_head",)) / MIB == pytest.approx(5_664, rel=0.01)
    assert memory.weight_bytes(shapes, 4, 2) / MIB == pytest.approx(6_580, rel=0.01), "here vision stays in 16 bits"


@pytest.mark.parametrize("name", real_sizes.MODELS)
def test_what_counts_as_quantised_is_what_bitsandbytes_replaces(name):
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    kind, config = real_sizes.MODELS[name]()
    with torch.device("meta"):
        model = kind(config)
    skipped = [f".*{part}" for part in memory.NOT_QUANTISED]
    replace_with_bnb_linear(model, skipped, BitsAndBytesConfig(load_in_8bit=True))
    replaced = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    assert replaced == {n for n, tensor in real_sizes.shapes(name).items() if memory.is_quantised(n, tensor)}
    assert len(replaced) > 100


def test_tied_heads_and_weights_stored_quantised_are_counted_as_they_are_loaded():
    stored = {"model.embed_tokens.weight": weights.Tensor((10, 4), "BF16"), "lm_head.weight": weights.Tensor((10, 4), "BF16")}
    assert memory.weight_bytes(stored, 16, 2) == 160
    assert memory.weight_bytes(stored, 16, 2, {"tie_word_embeddings": True}) == 80
    assert memory.weight_bytes({"model.up_proj.weight": weights.Tensor((80, 1), "U8")}, 4, 2) == 80


def test_the_cache_is_two_numbers_a_layer_head_and_token():
    """LLaVA-1.5-7B has no grouped heads: 2 x 32 layers x 4,096 x 2 bytes a token; Llama 3.2 Vision keeps the image's besides."""
    work = Workload(images=1, rows=8, prefix=620, branch=40, new_tokens=40, patches=576, pixels=0)
    predict = lambda name: memory_peak.predict(  # noqa: E731
        real_sizes.shapes(name), real_sizes.meta_model(name).config.to_dict(), 16, 2, work
    ).parts["KV cache"]
    assert predict("LLaVA-1.5-7B") == 8 * 700 * 524_288
    assert predict("Qwen2.5-VL-7B") == 8 * 700 * 2 * 28 * 4 * 128 * 2
    assert predict("Llama-3.2-11B-Vision") == 8 * (700 * 32 + 576 * 8) * 2 * 8 * 128 * 2


RECORDS = Path(__file__).parents[1] / "outputs" / "records"


def rows_of(*names: str) -> list[dict]:
    return [row for name in names for row in files.read_json(RECORDS / f"bench-train-{name}h200.json")["rows"]]


def trained_rows() -> list:
    """Rows of the committed benchmarks of training here, and the peers' ones without recomputing, in their least words."""
    raw = rows_of("", "8b-", "8b-475-tokens-")
    ends = rows_of(*(f"end-to-end-{name}" for name in ("", "16-none-", "large-peers-", "no-checkpointing-")))
    ends += rows_of("two-gpus-", "two-gpus-no-checkpointing-")
    told = [(r["model"], 4, r["size"], r["micro_batch"], r["batching"], True, 1, r["peak_memory_bytes"]) for r in raw]
    for bits in (4, 16):
        layers = files.read_json(RECORDS / f"bench-3-layers-{bits}-bits.json")["rows"]
        told += [(r["model"].removeprefix("qwen3-vl-"), bits, r["size"], r["micro_batch"], "shared", True, 1,
                  r["peak_memory_bytes"]) for r in layers if r["layers"] == "all"]  # fmt: skip
    for r in ends:
        kept, batching = r["setting"].endswith(" none"), r.get("batching", "separate")
        if kept or batching == "shared":
            told.append((r["model"], 4, r["size"], int(r["setting"].split()[0]), batching, not kept, r.get("processes", 1),
                         r["peak_memory_bytes"]))  # fmt: skip
    return told


@pytest.mark.parametrize(("model", "bits", "size", "batch", "batching", "checkpointing", "processes", "measured"), trained_rows())
def test_training_is_estimated_within_a_quarter_of_what_was_measured(
    model, bits, size, batch, batching, checkpointing, processes, measured
):
    shapes, config = memory_plan.shapes(model)
    width, height = map(int, size.split("x"))
    questions = 8 if batching == "shared" else 1
    how = memory.Training(16, batch, width * height, "adamw_8bit", checkpointing, questions=questions, parked=processes == 1)
    asked = memory.training_bytes(shapes, config, how, 2)[bits]
    print(f"{asked / 1e9:.1f} GB estimated, {measured / 1e9:.1f} measured")
    assert asked == pytest.approx(measured, rel=0.25)


def test_a_plan_tells_what_was_measured_and_what_nobody_has_measured(tmp_path, capsys):
    """Qwen3-VL-8B at 4 bits: published parameters, training's measured peak; 32B needs about four times as much."""
    memory_plan.main(["8B", "32B", "--bits", "4", "16", "--record", str(tmp_path / "plan.json")])
    said, record = capsys.readouterr().out, files.read_json(tmp_path / "plan.json")
    eight, in_16, large, _ = record["rows"]
    measured = [r for r in files.read_json(RECORDS / "bench-train-h200.json")["rows"]
                if (r["model"], r["size"], r["micro_batch"], r["batching"]) == ("8B", "800x600", 8, "shared")]  # fmt: skip
    assert eight["parameters"] == pytest.approx(8.77e9, rel=0.01) and large["parameters"] == pytest.approx(33.4e9, rel=0.01)
    assert eight["training_bytes"] == pytest.approx(measured[0]["peak_memory_bytes"], rel=0.1)
    assert (eight["gpu_gigabytes"], in_16["gpu_gigabytes"], large["gpu_gigabytes"]) == (16, 24, 32)
    assert eight["merging_bytes"] == in_16["loaded_bytes"] and "| Qwen3-VL-32B | 33.4 B | 4 |" in tables._body(record)
    assert "Qwen3-VL-32B" in said and record["commands"][0].startswith("python -m sonovqa.memory_plan")


def test_the_least_gpu_leaves_a_tenth_free_and_there_may_be_none():
    assert memory_plan.plan("8B", 4, 32, 16, 800 * 600, 48)["gpu_gigabytes"] == 24
    assert memory_plan.plan("32B", 16, 512, 16, 800 * 600, 48)["gpu_gigabytes"] is None


def test_a_model_that_shows_no_headers_is_named(tmp_path):
    with pytest.raises(cli.UserError):
        memory_plan.main([str(tmp_path / "nothing")])


def test_without_unsloth_what_is_not_quantised_is_put_into_fp32():
    shapes, config = memory_plan.shapes("8B")
    left = sum(t.count for name, t in shapes.items() if not memory.is_quantised(name, t))
    how = memory.Training(16, 1, 512 * 384, "adamw_8bit", True, parked=False)
    with_it, without = (memory.training_bytes(shapes, config, replace(how, unsloth=one), 2) for one in (True, False))
    assert left > 1e9 and without[4] - with_it[4] == pytest.approx(2 * left) == without[8] - with_it[8]
    assert without[16] == with_it[16]


@pytest.mark.parametrize(
    ("name", "tokens", "patches"),
    [("LLaVA-1.5-7B", 576, 576), ("Llama-3.2-11B-Vision", 0, 6400), ("Qwen3-VL-8B", 600 * 800 / 1024, 600 * 800 / 256)],
)
def test_an_image_has_tokens_where_no_pixels_are_told(name, tokens, patches):
    assert memory.image_work(real_sizes.meta_model(name).config.to_dict(), None) == (tokens, patches)


@pytest.mark.parametrize("family", ["gemma3", "blip_2", "florence2"])
def test_every_family_that_resizes_to_one_size_has_image_tokens(family, tokenizer):
    made, _ = getattr(tiny_families, family)(tokenizer)
    tokens, patches = memory.image_work(made.config.to_dict(), None)
    assert tokens > 0 and patches > 0
    assert memory.activation_bytes(made.config.to_dict(), memory.Training(16, 2, None, None, False), 4) > 0


@pytest.mark.parametrize(
    ("flags", "family", "questions"),
    [("", "qwen3_vl", 8), ("--batching separate", "qwen3_vl", 1), ("", "mllama", 1), ("--task Q7", "qwen3_vl", 1),
     ("--task report", "llava", 8)],
)  # fmt: skip
def test_questions_of_a_sequence_are_those_of_the_batching(flags, family, questions):
    args = train.parse(["--data", "d", *flags.split()])
    args.rank = 16
    how = memory.of_run(args, families.FAMILIES[family], "transformers")
    assert (how.questions, how.unsloth, how.parked, how.images) == (questions, False, False, args.batch)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on and still alive, and their most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key)


@pytest.fixture(scope="module", params=[(4, 4), (8, 2)], ids=["every head its keys", "grouped heads"])
def model(request, tokenizer):
    """A small Qwen2.5-VL whose activations weigh more than its weights, and its processor with 230 image tokens."""
    heads, kv = request.param
    side = 64
    shape = {"hidden_size": side * heads, "intermediate_size": 4 * side * heads, "num_attention_heads": heads,
             "num_key_value_heads": kv, "num_hidden_layers": 4}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "TEXT", tiny_families.TEXT | shape)
        patch.setitem(tiny_families.ROPE, "mrope_section", [12, 10, 10])
        made, processor = tiny_families.qwen2_5_vl(tokenizer, out_hidden_size=side * heads)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 336}
    return made.eval(), processor


@pytest.mark.parametrize(("at_once", "share"), [(1, False), (1, True), (3, True)])
def test_the_peak_is_that_of_all_live_tensors(model, at_once, share):
    from sonovqa.generation import LocalEngine

    made, processor = model
    requests = bench_images.noise(at_once, (512, 384), 1)
    engine = LocalEngine(made, processor, at_once, share, ignore_eos=True)
    list(engine.answer(requests[:1], 2))  # what is made once is not counted
    with Live() as live:
        list(engine.answer(requests, 24))
    stored = {name: weights.Tensor(tuple(t.shape), "F32") for name, t in made.state_dict().items()}
    work = memory_peak.workload(engine.encoder, made, requests, at_once, share, 24)
    told = memory_peak.predict(stored, made.config.to_dict(), 16, 4, work)
    beside = told.peak - told.loaded
    print(f"{live.peak / 1e6:.1f} MB live, {beside / 1e6:.1f} MB predicted beside weights of {told.loaded / 1e6:.1f} MB")
    assert beside == pytest.approx(live.peak, rel=0.25)


@pytest.mark.parametrize("family", ["llava", "mllama", "gemma3", "blip_2", "florence2"])
def test_the_work_of_every_family_is_told(family, tokenizer):
    """Each writes its prompts in its own way: Llama's template, for one, refuses a system turn beside an image."""
    from sonovqa.batching import Encoder

    made, processor = getattr(tiny_families, family)(tokenizer)
    work = memory_peak.workload(Encoder(processor, made), made, bench_images.noise(1, (96, 64), 1), 1, False, 4)
    assert work.prefix > 0 and work.branch > 0 and work.pixels > 0


def case(model, **named) -> bench_cases.Case:
    told = {"label": "m", "model": str(model), "adapter": None, "bits": 4, "engine": bench_cases.SHARED, "levels": (1, 2)}
    return bench_cases.Case(**told | {"new_tokens": 8, "ignore_eos": True, "images": {}} | named)


def test_a_case_is_predicted_from_its_headers_and_processor(base):
    requests = bench_images.noise(2, (96, 64), 1)
    one, two = bench_predictions.of_case(case(base), requests)
    assert one["predicted_loaded"] == two["predicted_loaded"] < one["predicted_peak"] < two["predicted_peak"]
    assert two["parts"]["KV cache"] == 2 * one["parts"]["KV cache"] and two["work"]["rows"] == 16
    assert bench_predictions.in_words(one).startswith("predicted for m 4 shared 1: ")
    assert bench_predictions.of_case(case(base, engine=bench_cases.VLLM), requests) == []
    gone = bench_predictions.of_case(case("/no/such/model"), requests)
    assert "no model folder at /no/such/model" in gone[0]["why_not"] and "no prediction for m 4" in bench_predictions.in_words(
        gone[0]
    )


def test_a_measured_row_stands_beside_its_prediction():
    row = {"model": "m", "bits": 4, "engine": "shared", "level": 1, "memory": bench_cases.TENSORS}
    row |= {"memory_before": 100, "memory_loaded": 1100, "memory_peak": 2300}
    told = {"model": "m", "bits": 4, "engine": "shared", "level": 1, "predicted_loaded": 1250, "predicted_peak": 2000}
    made = bench_predictions.beside(row, [told | {"predicted_peak": 1}, told])
    assert (made["ratio_loaded"], made["ratio_peak"], made["predicted_peak"]) == (0.8, 1.1, 2000)
    assert "ratio_peak" not in bench_predictions.beside(row | {"memory": bench_cases.RESIDENT}, [told])
    assert bench_predictions.beside(row | {"bits": 8}, [told]) == row | {"bits": 8}


def test_an_adapter_is_counted(tmp_path: Path):
    from safetensors.torch import save_file

    files.write_json(tmp_path / "adapter_config.json", {})
    save_file({"a": torch.zeros(4, 5), "b": torch.zeros(5)}, tmp_path / "adapter_model.safetensors")
    assert memory_peak.adapter_bytes(str(tmp_path)) == 25 * 4
    assert memory_peak.adapter_bytes(None) == 0


def test_sizes_of_the_tiny_model_are_its_own(tokenizer):
    model = tiny.make_model(tokenizer, "small")
    stored = {name: weights.Tensor(tuple(t.shape), "F32") for name, t in model.named_parameters()}
    assert memory.weight_bytes(stored, 16, 4) == sum(p.numel() * 4 for p in model.parameters())
