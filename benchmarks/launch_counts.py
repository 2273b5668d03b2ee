"""What merging tells a device to do and to move, counted without one.

    PYTHONPATH=tests python benchmarks/launch_counts.py

Launches are counted on a CPU whose tensors go the way of other devices, with the counter of the tests; they depend on
neither widths nor numbers of tokens. Bytes follow from the published shapes by arithmetic.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from families import family_of
from helpers import MERGING
from illava_hooks import patch
from test_launches import MANY, METHODS, ONE, added, counted, go_as_on_a_device
from tiny_models import Sample, inputs_for, tiny_model

FILE = Path(__file__).parents[1] / "docs" / "results" / "launches.json"
#: The depths of the published models.
DEEP: dict[str, dict[str, Any]] = {
    "llava_onevision": {"vision": {"num_hidden_layers": 26}, "text": {"num_hidden_layers": 28}},
    "qwen2_vl": {"vision": {"depth": 32}, "text": {"num_hidden_layers": 28}},
}
#: Width, MLP width and tokens of published encoders.
ENCODERS = {
    "LLaVA-OneVision-7B, 10 tiles": (1152, 4304, 7290),
    "Qwen2-VL-7B, 4,096 patches": (1280, 5120, 4096),
    "Qwen2-VL-7B, 16,384 patches": (1280, 5120, 16384),
}
#: Share that a merging layer removes.
REMOVED = 0.25
BF16, FP32, INT64 = 2, 4, 8


def launches(family: str, method: str) -> dict[str, Any]:
    """The most that layers add, and a whole prefill."""
    most = {"encoder": 0, "decoder": 0, "ranking": 0}
    model = tiny_model(family)
    patch(model, **MERGING, method=method)
    for images in MANY.values():
        for (stage, index), more in added(*counted(model, inputs_for(model, [Sample(1, images=images)]))).items():
            ranks = stage == "decoder" and index not in MERGING["llm_layers"]
            stage = "ranking" if ranks else stage
            most[stage] = max(most[stage], more)
    deep = tiny_model(family, **DEEP[family])
    fraction: dict[str, Any] = {"vit_r": 2} if family == "llava_onevision" else {}
    patch(deep, method=method, **fraction)
    ours, stock = counted(deep, inputs_for(deep, [Sample(1, images=ONE)]))
    return {"family": family_of(deep).name, "method": method, **most, "stock": stock.total, "merged": ours.total}


def moved(width: int, mlp: int, tokens: int) -> dict[str, int]:
    """Bytes of one layer."""
    weights = (4 * width * width + 2 * width * mlp) * BF16
    # Two norms, queries, keys and values, attention, projection, two residuals, and the MLP: each read and written.
    layer = weights + tokens * (2 * (2 + 3 + 4 + 2 + 4) * width + 2 * 2 * mlp) * BF16
    score = 2 * 2 * tokens * width * BF16 + 4 * tokens * FP32
    kept, gone = round(tokens * (1 - REMOVED)), round(tokens * REMOVED)
    # Survivors and what they absorb: read once, written in float32, added up and cast back.
    merge = (kept + gone) * width * (BF16 + FP32) + (kept + gone) * width * FP32 + kept * width * (FP32 + BF16)
    tables = 12 * tokens * INT64 + 6 * tokens * FP32
    search = 2 * tokens * width * BF16 + 4 * tokens * INT64
    return {"layer": layer, "score": score, "illava": merge + tables, "diverse": merge + tables + 2 * search}


def counts() -> dict[str, Any]:
    """Everything, as it goes to docs/results."""
    with pytest.MonkeyPatch.context() as patched:
        go_as_on_a_device(patched)
        found = [launches(family, method) for family in DEEP for method in (*METHODS, "novel-agnostic")]
    moves = [{"shape": name, "tokens": sizes[2], **moved(*sizes)} for name, sizes in ENCODERS.items()]
    return {"launches": found, "bytes": moves}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    FILE.write_text(json.dumps(counts(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
