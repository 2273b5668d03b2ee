"""The recipes of docs/clients.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from client_helpers import client

for name in ("trl", "datasets", "sentence_transformers", "colpali_engine", "optimum.quanto", "xgrammar", "nnsight"):
    client(name)

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


@pytest.mark.slow
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, as a file: nnsight reads its own source."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "clients"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"
        path.write_text(block)
        exec(compile(block, str(path), "exec"), names)
