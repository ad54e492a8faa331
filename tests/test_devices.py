"""Which GPU a process takes, and how several share a machine."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from sonovqa import adapting, devices


def test_hidden_states_stay_on_the_gpu_where_several_processes_share_the_way_off_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert devices.recomputing(True) == "unsloth" and devices.recomputing(False) is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices.recomputing(True) is True and devices.recomputing(False) is False


class Tower(torch.nn.Module):
    """A vision tower as Unsloth 2026.10.7 leaves it: its hook wants the keyword arguments and was registered again without."""

    def __init__(self):
        super().__init__()
        self.hook = self.register_forward_pre_hook(lambda module, args, kwargs: None)

    def forward(self, *, pixels: int) -> int:
        return pixels

    def enable_input_require_grads(self) -> None:
        """As Unsloth's: its old hook goes, the new one gets them."""
        self.hook.remove()
        self.hook = self.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)


def test_unsloths_hook_on_the_vision_tower_is_mended_where_several_processes_train(monkeypatch):
    """It ended `torchrun --nproc_per_node=2 train.py --no-checkpointing` in its first step on two H200s. This is an
    imitation of it: the real one needs a GPU."""
    unsloth = SimpleNamespace(FastVisionModel=SimpleNamespace(get_peft_model=lambda model, **_: model))
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setenv("WORLD_SIZE", "2")
    how = adapting.Adapting(checkpointing=False)
    model = adapting.adapt(SimpleNamespace(model=Tower(), backend="unsloth"), how)
    assert model(pixels=3) == 3


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    devices.take_gpu()
    monkeypatch.setenv("LOCAL_RANK", "3")
    devices.take_gpu()
    assert taken == [0, 3]


def test_gpus_that_no_process_uses_are_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    devices.tell_idle()
    assert "3 of 4 GPUs stay idle" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    devices.tell_idle()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    devices.tell_idle()
    assert capsys.readouterr().out == ""


def test_a_process_trains_on_one_gpu():
    class Config:
        """As transformers' ``TrainingArguments`` tells the GPUs it sees."""

        _n_gpu = 4
        n_gpu = property(lambda self: self._n_gpu)

    assert devices.one_gpu(Config()).n_gpu == 1


@pytest.mark.parametrize(
    ("named", "visible", "first"),
    [
        (None, None, "0"),
        ("", [], None),
        ("-1", [], None),
        ("1", ["1"], "1"),
        ("3, 1", ["3", "1"], "3"),
        ("2,-1,3", ["2"], "2"),
        ("GPU-8932f937-d72c", ["GPU-8932f937-d72c"], "GPU-8932f937-d72c"),
    ],
)
def test_the_gpus_that_the_environment_leaves(named, visible, first, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert (devices.visible(), devices.first_visible()) == (visible, first)
