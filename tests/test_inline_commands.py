"""Commands that stand within a sentence, or where nothing here can run them: each is parsed, or named below with the reason.

What stands in blocks is run by test_docs.py, test_serving_docs.py, test_serve_vllm.py, test_newcomer.py and test_experiments.py.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT
from doc_blocks import blocks, commands, inline

from sonovqa import cli

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
#: Commands of which a part is left out in the sentence, with that part.
WHOLE = {
    "torchrun --nproc_per_node=2 train.py … --run-name clinic": "torchrun --nproc_per_node=2 train.py --data d --run-name clinic",
    "evaluate.py --endpoint URL --model NAME --data …": "evaluate.py --endpoint http://h/v1 --model NAME --data d --yes",
    "train.py --head choice": "train.py --data d --run r --head choice",
    "train.py --report-to wandb": "train.py --data d --run r --report-to wandb",
    "inference.py --question all --json": "inference.py --run r --image i --question all --json",
    "inference.py --folder": "inference.py --run r --folder f",
    "python -m sonovqa.structured analyze … --schema FILE": "python -m sonovqa.structured analyze --endpoint http://h/v1 "
    "--model m --image i --prompt p --schema FILE",
    "python -m sonovqa.marks_book … --again": "python -m sonovqa.marks_book marks.xlsx --again",
}  # fmt: skip
#: What is neither run nor parsed by any test, and why.
NOT_RUN = {
    "pip install ray": "a package of another project, for two machines",
    "curl http://127.0.0.1:8000/v1/models": "tests/test_serve_vllm.py asks its server for that path",
    "ray start --head --port 6379": "there is no Ray and no second machine here",
    "ray start --address first-machine:6379": "there is no Ray and no second machine here",
}
TOOLS = ("make", "torchrun", "curl", "pip", "ray", "docker", "bash", "git")
SCRIPTS = ("prepare_dataset", "train", "evaluate", "inference")
IS_COMMAND = re.compile(rf"(?:python3? |(?:{'|'.join(TOOLS)}) \S|(?:{'|'.join(SCRIPTS)})\.py \S)")
FOUND = sorted({command for page in PAGES for command in inline(ROOT / page) if IS_COMMAND.match(command)})


class Parsed(Exception):
    """Raised instead of going on with what a command line says."""


def alternatives(command: str) -> list[str]:
    """``script a|b --flag`` as a command for each."""
    word = next((word for word in command.split() if "|" in word), None)
    return [command.replace(word, one) for one in word.split("|")] if word else [command]


def parse(words: list[str], monkeypatch) -> None:
    """Have the program that a command line names read it. What it does not know ends the test with its error."""
    if words[0] == "torchrun":
        run = importlib.import_module("torch.distributed.run")
        left = run.get_args_parser().parse_args(words[1:])
        words = [left.training_script, *left.training_script_args]
    words = words[1:] if words[0] == "python" else words
    name, given = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    real = cli.Parser.parse_args

    def parsed(self, *given, **named):
        real(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(cli.Parser, "parse_args", parsed)
    with pytest.raises(Parsed):
        importlib.import_module(name).main(given)


@pytest.mark.parametrize("command", [command for command in FOUND if command not in NOT_RUN])
def test_a_command_within_a_sentence_is_one(command, monkeypatch):
    if command.startswith("make "):
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    if module := re.fullmatch(r"python -m sonovqa\.(\w+)", command):  # a program's name
        assert (ROOT / "sonovqa" / f"{module[1]}.py").exists()
        return
    for one in alternatives(WHOLE.get(command, command)):
        parse(shlex.split(one), monkeypatch)


def test_nothing_is_left_out_and_no_excuse_is_left_over():
    unmarked = [line for page in PAGES[1:] for block in blocks(ROOT / page) if not block.mark for line in commands(block.code)]
    from_blocks = [line for line in unmarked if line.startswith("ray ")]
    assert set(NOT_RUN) | set(WHOLE) == {one for one in (*FOUND, *from_blocks) if one in NOT_RUN or one in WHOLE}
    assert {line for block in blocks(ROOT / "docs/serving.md") if not block.mark for line in commands(block.code)} <= set(NOT_RUN)
    assert all(" --out " in one for one in FOUND if "prepare_dataset.py sheet" in one), "without it data/sheet is replaced"
    assert len(FOUND) > 12 and not [command for command in FOUND if "…" in command and command not in WHOLE]


def test_what_a_flag_of_ray_asks_of_vllm_is_in_a_block_that_is_parsed():
    told = [line for block in blocks(ROOT / "docs/serving.md") if block.mark == "dry-run" for line in commands(block.code)]
    assert sum(" ray" in line for line in told) == 2


def test_docker_commands_name_what_there_is():
    """Docker is not here; its commands are held to the files they name."""
    head = (ROOT / "deploy" / "Dockerfile").read_text().split("FROM ")[0]
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^#   (.*)$", head, re.MULTILINE)]
    docker = [words for words in lines if words[0] == "docker"]
    others = [words for words in lines if words[0] != "docker"]
    assert [words[0] for words in others] == ["(umask", "export"], "run by test_deploy.py, set by hand"
    made = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    build, *composed = docker
    assert build[:2] == ["docker", "build"] and (ROOT / build[build.index("-f") + 1]).exists() and build[-1] == "."
    assert {service["image"] for service in made["services"].values()} == {build[build.index("-t") + 1]}
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert all(f"${{{name}" in text for name in ("RUN_AS", "MODEL")) and others[1][1].startswith("RUN_AS=")
    assert len(composed) == 3
    for words in composed:
        assert words[1:3] == ["compose", "-f"] and (ROOT / words[3]).samefile(ROOT / "deploy" / "compose.yaml")
        rest = words[4:]
        if rest[0] == "--profile":
            assert rest[1] in made["services"]["page"]["profiles"]
            rest = rest[2:]
        assert rest[0] in ("up", "cp")
        if rest[0] == "cp":
            service, _, folder = rest[1].partition(":")
            assert f"--marks {folder}" in made["services"][service]["command"][0] and rest[2] == "outputs/marks"
