"""What is told before a model is loaded: what is wrong with a folder, a hub id or an adapter, what does not fit the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT
from huggingface_hub import errors

import train
from sonovqa import adapters, adapting, files, memory, memory_check, models, tiny, weights
from sonovqa.cli import UserError


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy of the base model to damage."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def no_weights(folder: Path) -> None:
    (folder / weights.SINGLE).unlink()


def pickled(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def cut_off(folder: Path) -> None:
    os.truncate(folder / weights.SINGLE, (folder / weights.SINGLE).stat().st_size - 100)


def cut_in_header(folder: Path) -> None:
    os.truncate(folder / weights.SINGLE, 60)


def other_bytes(folder: Path) -> None:
    (folder / weights.SINGLE).write_bytes(b"<html>not found</html>" * 9)


def empty(folder: Path) -> None:
    (folder / weights.SINGLE).write_bytes(b"")


def missing_shard(folder: Path) -> None:
    os.rename(folder / weights.SINGLE, folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files.write_json(folder / weights.INDEX, {"weight_map": shards})


def broken_index(folder: Path) -> None:
    no_weights(folder)
    (folder / weights.INDEX).write_text("[]")


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def config_gone(folder: Path) -> None:
    (folder / "config.json").unlink()


def processor_gone(folder: Path) -> None:
    for path in folder.glob("*processor*"):
        path.unlink()


DAMAGE = {
    no_weights: "holds no weights",
    pickled: "holds pickled weights, which run code when loaded",
    cut_off: "is damaged",
    cut_in_header: "is no safetensors file; its header is cut off",
    other_bytes: "is no safetensors file",
    empty: "is no safetensors file",
    missing_shard: "lacks a part of its weights; model-00002-of-00002.safetensors of 2 files",
    broken_index: "is not an index of weights",
    config_not_json: "is not JSON",
    config_a_list: "is no configuration",
    config_gone: "has no config.json",
    processor_gone: "lacks processor files",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_folder_is_one_line_before_loading(copy, damage):
    damage(copy)
    with pytest.raises(UserError) as caught:
        models.load_for_inference(str(copy))
    assert DAMAGE[damage] in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_folder_is_read_from_its_headers(base):
    found, model = weights.of_folder(base), models.load_for_inference(str(base))[0]
    assert sum(tensor.count for tensor in found.values()) == sum(p.numel() for p in model.parameters())


def refused(kind: type, status: int):
    request = httpx.Request("GET", "https://huggingface.co/owner/model/resolve/main/config.json")
    return kind("told\nby the hub", response=httpx.Response(status, request=request))


HUB = [
    (
        refused(errors.GatedRepoError, 403),
        "owner/model is gated; no token is set; accept its terms at https://huggingface.co/owner/model",
    ),
    (refused(errors.RepositoryNotFoundError, 401), "the hub has no model owner/model, or it is private; no token is set"),
    (errors.LocalEntryNotFoundError("told\nby the hub"), "not in the cache and the hub cannot be reached"),
    (refused(errors.RemoteEntryNotFoundError, 404), "has no config.json"),
    (refused(errors.HfHubHTTPError, 500), "cannot be had from the hub; told; try again"),
]


@pytest.mark.parametrize(("fault", "told"), HUB, ids=lambda value: type(value).__name__)
def test_a_hub_id_that_cannot_be_read_is_one_line(fault, told, monkeypatch):
    def fails(*arguments, **named):
        raise fault

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError) as caught:
        models.locate("owner/model")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_are_neither_folder_nor_hub_id():
    wrong = (
        ("./gone", "no model folder at ./gone"),
        ("two words/x", "no model folder and no hub id"),
        ("a/b/c", "no model folder"),
    )
    for name, told in wrong:
        with pytest.raises(UserError, match=told):
            models.locate(name)
    with pytest.raises(UserError, match="not in the cache and the hub cannot be reached"):
        models.locate("Qwen/Qwen3-VL-8B-Instruct")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter of the small base."""
    folder = tmp_path_factory.mktemp("adapter")
    loaded = models.load_for_training(str(base), 16)
    adapting.adapt(loaded, adapting.Adapting(rank=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", ["hidden", "layers"])
def test_an_adapter_of_another_base_is_one_line(change, adapter, tokenizer, tmp_path, monkeypatch):
    smaller = {"hidden": 192} if change == "hidden" else {"layers": 1}
    monkeypatch.setitem(tiny.SIZES, "other", tiny.SIZES["small"] | smaller)
    tiny.make_model(tokenizer, "other").save_pretrained(tmp_path)
    tiny.make_processor(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="belongs to another base") as caught:
        models.load_for_inference(str(tmp_path), adapter=adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_hub_model_is_told_by_name(adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    files.write_json(config, files.read_json(config) | {"base_model_name_or_path": "Qwen/Qwen3-VL-8B-Thinking"})
    with pytest.raises(UserError, match="was trained on Qwen/Qwen3-VL-8B-Thinking; Qwen/Qwen3-VL-8B-Instruct is another base"):
        adapters.check(tmp_path / "adapter", "Qwen/Qwen3-VL-8B-Instruct")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is no adapter"):
        adapters.check(tmp_path / "adapter", "Qwen/Qwen3-VL-8B-Instruct")


def qwen3_vl_8b() -> dict[str, weights.Tensor]:
    """The shapes of Qwen3-VL-8B's weights, from its published configuration; nothing is allocated."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
              "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))
    return {name: weights.Tensor(tuple(t.shape), "BF16") for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("free", "bits", "told"),
    [
        (8e9, 16, r"needs about 18 GB in 16 bits; 8 GB are free on the GPU; --bits 4 needs about 7.\d GB"),
        (12e9, 16, r"in 16 bits; 12 GB are free on the GPU; --bits 8 needs about 11 GB"),
        (4e9, 4, r"needs about 7.\d GB in 4 bits; 4 GB are free on the GPU; use a smaller model"),
        (30e9, 16, None),
        (8e9, 4, None),
    ],
)
def test_a_model_that_does_not_fit_names_the_flag_that_would(free, bits, told, monkeypatch):
    monkeypatch.setattr(weights, "of_model", lambda name: qwen3_vl_8b())
    monkeypatch.setattr(memory, "free", lambda cuda: free)
    monkeypatch.setattr(memory, "device", lambda: (True, 2))
    if told is None:
        return memory_check.check_inference("8B", bits)
    with pytest.raises(UserError, match=told):
        memory_check.check_inference("8B", bits)


@pytest.fixture
def hub(base, monkeypatch) -> list[str]:
    """A hub that has ``owner/model`` with the sizes of Qwen3-VL-8B; gives the files that were fetched from it."""
    fetched = []

    def fetch(name, file, **named):
        fetched.append(file)
        return str(base / file)

    def metadata(name):
        stored = {key: types.SimpleNamespace(shape=t.shape, dtype=t.dtype) for key, t in qwen3_vl_8b().items()}
        return types.SimpleNamespace(files_metadata={"one": types.SimpleNamespace(tensors=stored)})

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr(memory, "free", lambda cuda: 8_000_000_000)
    return fetched


def test_a_hub_model_that_will_not_fit_is_refused_before_its_weights_are_fetched(hub, data, tmp_path):
    with pytest.raises(UserError, match=r"^owner/model needs about 35 GB in 16 bits; 8 GB of memory are free here; "):
        models.load_for_inference("owner/model", 16)
    words = ["--model", "owner/model", "--data", str(data), "--outputs", str(tmp_path), "--report-to", "none", "--bits", "4"]
    with pytest.raises(UserError, match=r"^owner/model needs about \d+ GB in 4 bits; .* use a smaller model"):
        train.main(words)
    assert set(hub) == {"config.json"}


def test_training_is_checked_before_anything_is_loaded(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda cuda: 1_000_000)
    monkeypatch.setattr(models, "load_for_training", lambda *arguments: pytest.fail("loaded"))
    words = ["--model", str(base), "--data", str(data), "--outputs", str(tmp_path), "--report-to", "none"]
    with pytest.raises(UserError, match=r"needs about \d+ MB in 16 bits; 1 MB of memory are free here; "):
        train.main([*words, "--bits", "16"])
    with pytest.raises(UserError, match=r"--full; training all weights .* leave --full out"):
        train.main([*words, "--full"])
    assert not list(tmp_path.iterdir())


def test_merging_that_will_not_fit_is_told_before_training(monkeypatch):
    monkeypatch.setattr(weights, "of_model", lambda name: qwen3_vl_8b())
    monkeypatch.setattr(weights, "config_of", lambda name: {"text_config": {"hidden_size": 4096, "num_hidden_layers": 36}})
    monkeypatch.setattr(memory, "device", lambda: (True, 2))
    monkeypatch.setattr(memory, "free", lambda cuda: 24e9 if cuda else 8e9)
    how = memory.Training(16, 2, 512 * 512, None, True)
    with pytest.raises(UserError, match=r"--merge; .* about 18 GB of main memory; 8 GB of memory are free here; use --no-merge"):
        memory.check_training("8B", 4, how)
    memory.check_training("8B", 4, memory.Training(16, 2, 512 * 512, None, True, merge=False))


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from sonovqa import memory, models, weights
name, bits = sys.argv[1], int(sys.argv[2])
def anonymous():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed while loading is not taken
    return 1024 * int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")).split()[1])
models.load_for_inference(sys.argv[3], bits)  # imports and warms up with a small model
before = anonymous()
model = models.load_for_inference(name, bits)
print(json.dumps([anonymous() - before, memory.weight_bytes(weights.of_folder(Path(name)), bits, 4)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or torch.cuda.is_available(), reason="measures main memory on Linux")
@pytest.mark.parametrize("bits", memory.BITS)
def test_the_prediction_is_what_loading_takes(bits, base, tokenizer, tmp_path, monkeypatch):
    wide = {"hidden": 1024, "layers": 6, "vision": 192}
    monkeypatch.setitem(tiny.SIZES, "wide", tiny.SIZES["small"] | wide)
    model = tiny.make_model(tokenizer, "wide").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.make_processor(tokenizer).save_pretrained(tmp_path)
    words = [sys.executable, "-c", MEASURE, str(tmp_path), str(bits), str(base)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    taken, predicted = json.loads(done.stdout.splitlines()[-1])
    print(f"{bits} bits: {taken / 1e6:.0f} MB taken, {predicted / 1e6:.0f} MB predicted")
    assert predicted == pytest.approx(taken, rel=0.15)
