"""The harnesses have the classes and entries whose names the families give: read in their code."""

from __future__ import annotations

import ast
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from harness_names import LMMS_EVAL, OTHER_ENGINE, VLMEVALKIT

LMMS_PYTHON, KIT_PYTHON = (os.environ.get(f"ILLAVA_{name}_PYTHON", "") for name in ("LMMS", "VLMEVAL"))
HOW = "set ILLAVA_LMMS_PYTHON and ILLAVA_VLMEVAL_PYTHON: `make test-integrations` makes both environments"
pytestmark = pytest.mark.skipif(not (LMMS_PYTHON and KIT_PYTHON), reason=HOW)


@cache
def folder_of(python: str, package: str) -> Path:
    """Where an environment has a package."""
    code = f"from importlib.util import find_spec; print(find_spec({package!r}).submodule_search_locations[0])"
    return Path(subprocess.run([python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.strip())


@pytest.mark.parametrize(
    ("module", "name"), sorted({(module, name) for models in LMMS_EVAL.values() for module, name in models.items()})
)
def test_lmms_eval_has_the_class(module: str, name: str) -> None:
    """Also in its registry, under the name of the module."""
    models = folder_of(LMMS_PYTHON, "lmms_eval") / "models"
    kind, _, file = module.partition(".")
    tree = ast.parse((models / kind / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    registry = ast.parse((models / "__init__.py").read_text())
    table = {"simple": "AVAILABLE_SIMPLE_MODELS", "chat": "AVAILABLE_CHAT_TEMPLATE_MODELS"}[kind]
    (known,) = (
        ast.literal_eval(node.value)
        for node in registry.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table
    )
    assert known[file] == name


@cache
def kit_entries() -> dict[str, dict[str, ast.expr]]:
    """Keyword arguments of every entry of VLMEvalKit that is a `partial`."""
    tree = ast.parse((folder_of(KIT_PYTHON, "vlmeval") / "config.py").read_text())
    return {
        str(key.value): {word.arg: word.value for word in value.keywords if word.arg}
        for table in ast.walk(tree)
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Call)
    }


@pytest.mark.parametrize("name", [name for names in VLMEVALKIT.values() for name in names])
def test_the_kit_has_the_entry(name: str) -> None:
    """With a model's path, and with another engine only where we say so."""
    arguments = kit_entries()[name]
    assert "model_path" in arguments
    engines = [word for word in ("use_vllm", "use_lmdeploy") if word in arguments]
    assert bool(engines) == (name in OTHER_ENGINE)
