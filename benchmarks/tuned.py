"""A file of settings against the preset: test questions, accuracy, loyalty and KL, paired."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from illava_hooks import patch, unpatch
from illava_hooks.tools.datasets import Item, scene_items
from illava_hooks.tools.evaluate import Outcome, interval, paired_interval, run_items
from illava_hooks.tools.loading import load_model, quiet

#: What is compared: higher is better.
FIGURES = ("accuracy", "loyalty", "minus KL")


@dataclass(frozen=True, slots=True)
class Run:
    """One model with one kind of settings.

    Attributes:
        name: "preset", or the file.
        flops: prefill's, of the unpatched model's, over all questions.
        values: per question, by name of ``FIGURES``.
    """

    name: str
    flops: float
    values: dict[str, Sequence[float]]


def measure(model: Any, processor: Any, items: Sequence[Item], stock: Outcome, preset: str) -> Run:
    """Patches, asks, unpatches.

    Args:
        model: an unpatched model.
        processor: its processor.
        items: what to ask.
        stock: what the unpatched model says.
        preset: as ``patch`` takes it.
    """
    session = patch(model, preset=preset)
    flops = [0, 0]

    def count(done: int) -> None:
        flops[:] = [before + more for before, more in zip(flops, session.report.flops, strict=True)]

    try:
        outcome = run_items(model, processor, items, advance=count)
    finally:
        unpatch(model)
    right = [float(said == item.answer) for said, item in zip(outcome.answers, items, strict=True)]
    same = [float(said == before) for said, before in zip(outcome.answers, stock.answers, strict=True)]
    values = dict(zip(FIGURES, (right, same, list(-stock.divergence(outcome))), strict=True))
    return Run("preset" if preset == "auto" else preset, flops[0] / flops[1], values)


def compare(model: Any, processor: Any, items: Sequence[Item], files: Sequence[str]) -> list[Run]:
    """The preset, then each file, on the same questions."""
    stock = run_items(model, processor, items)
    return [measure(model, processor, items, stock, preset) for preset in ("auto", *files)]


def print_runs(runs: Sequence[Run]) -> None:
    """A table in Markdown; the interval is that of the difference to the first run."""
    print("| settings | FLOPs | " + " | ".join(f"{name} | 95 % of the gain" for name in FIGURES) + " |")
    print("|---|---|" + "---|---|" * len(FIGURES))
    for run in runs:
        cells = []
        for name, values in run.values.items():
            form = "{:.4f}" if "KL" in name else "{:.1%}"
            low, high = paired_interval(values, runs[0].values[name]) if run is not runs[0] else interval(values)
            gain = f"{form.format(low)} to {form.format(high)}" if run is not runs[0] else ""
            cells += [form.format(float(np.mean(values))), gain]
        print(f"| {Path(run.name).name} | {run.flops:.3f} | {' | '.join(cells)} |")


def main() -> None:
    """Asks held-out questions of the test split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="files of settings, as tune writes them")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=int, default=2000)
    given = parser.parse_args()
    quiet()
    print_runs(compare(*load_model(given.model), scene_items(given.questions, "test"), given.files))


if __name__ == "__main__":
    main()
