"""Items that come from files reach a model as drawn ones do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families import families
from illava_hooks import tiny
from illava_hooks.tools.datasets import load_items, scene_items
from illava_hooks.tools.evaluate import predict


@pytest.mark.parametrize("family", families(embedded=True))
def test_a_file_gives_the_same_answers_without_a_warning(family: str, tmp_path: Path) -> None:
    drawn = scene_items(5)
    lines = []
    for index, item in enumerate(drawn):
        Image.fromarray(item.pictures[0]).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": item.question, "answer": item.answer}))
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    read = load_items(str(tmp_path / "items.jsonl"), 5)
    assert all(np.array_equal(a.pictures[0], b.pictures[0]) for a, b in zip(read, drawn, strict=True))
    model, processor = tiny.load(family)
    assert predict(model, processor, read) == predict(model, processor, drawn)


@pytest.mark.parametrize("family", families(embedded=True))
def test_easy_vqa_gives_no_warning(family: str) -> None:
    pytest.importorskip("easy_vqa", reason="pip install easy-vqa")
    model, processor = tiny.load(family)
    assert len(predict(model, processor, load_items("easy-vqa", 2))) == 2
