"""The notebook `examples/tour.ipynb` from its first cell to its last, as somebody would run it."""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell's last expression is shown, as a notebook shows it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        began = time.perf_counter()
        assert cell["outputs"] == [], "outputs are made when it runs"
        *body, final = ast.parse("".join(cell["source"])).body
        if not isinstance(final, ast.Expr):
            body, final = [*body, final], None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if final is not None:
            value = eval(compile(ast.Expression(final.value), f"cell {number}", "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
        print(f"cell {number}: {time.perf_counter() - began:.1f} s")
    pages = [text for text in shown if "<img alt=" in text or "<table>" in text]
    assert len(pages) == 3, "the report, and two pictures"
    assert names["plain"] == names["merged"] == "2"
    assert names["found"].points
