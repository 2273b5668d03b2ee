"""What `visualize` draws, against pictures that somebody looked at."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parent / "data"


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_pictures", DATA / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(maker().CASES))
def test_strip(name: str, tmp_path: Path) -> None:
    """On another processor a near tie may go the other way: one or two patches of a strip may differ."""
    with Image.open(maker().draw(name, tmp_path)) as file:
        drawn = np.asarray(file.convert("RGB")).astype(int)
    with Image.open(DATA / "pictures" / f"{name}.png") as file:
        golden = np.asarray(file.convert("RGB")).astype(int)
    assert drawn.shape == golden.shape
    apart = np.abs(drawn - golden).max(-1)
    assert (apart > 12).mean() < 0.02, f"{(apart > 12).mean():.1%} of the pixels differ"
