"""Padded checkpoints, and stock transformers on them; run by `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM reads it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
from asking import Reference
from checkpoints import padded
from drawn import FAMILIES, drawn
from engines import SHORT


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The padded checkpoint of an embedded model, or one with drawn weights."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = (drawn if name in FAMILIES else padded)(name, tmp_path_factory.mktemp(name))
        return made[name]

    return find


@pytest.fixture(scope="session")
def reference(folder: Callable[[str], Path]) -> Callable[[str], Reference]:
    """Stock transformers on the same weights."""
    made: dict[str, Reference] = {}

    def find(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(folder(name))
        return made[name]

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The short form runs in one process."""
    for item in items:
        if SHORT and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="not in the short form"))
