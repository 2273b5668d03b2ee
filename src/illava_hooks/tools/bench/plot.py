"""Pictures of measurements, by matplotlib (``pip install illava-hooks[plot]``)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illava_hooks.errors import InputError
from illava_hooks.tools.bench.comparison import Comparison

__all__ = ["axes", "plot_comparisons", "save"]


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, without a screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise InputError("a plot needs matplotlib; pip install 'illava-hooks[plot]'") from error
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: Any, file: Path) -> None:
    """Writes a picture completely or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, dpi=120, format=file.suffix.lstrip(".") or "png")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def plot_comparisons(comparisons: Sequence[Comparison], file: Path) -> None:
    """Prefill seconds without and with merging, by stage; hollow: what the FLOPs allow.

    Args:
        comparisons: one, or those of a sweep.
        file: the picture to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, plot = axes(2.5 + 1.6 * len(comparisons), 4)
    for place, found in enumerate(comparisons):
        for offset, runs, shade in ((-0.2, found.plain, "unpatched"), (0.2, found.merged, "merged")):
            bottom = 0.0
            for stage, color in (("encoder", "#4477aa"), ("projector", "#ccbb44"), ("language", "#228833")):
                height = statistics.median(getattr(run, stage).wall_s for run in runs)
                name = f"{stage}" if place == 0 and shade == "unpatched" else None
                alpha = 0.55 if shade == "unpatched" else 1.0
                plot.bar(place + offset, height, 0.36, bottom, color=color, alpha=alpha, label=name)
                bottom += height
        ideal = statistics.median(run.prefill_s for run in found.plain) * found.ideal
        plot.bar(place + 0.2, ideal, 0.36, fill=False, edgecolor="black", label="FLOPs allow" if place == 0 else None)
    plot.set_xticks(range(len(comparisons)), [found.label or "prefill" for found in comparisons])
    plot.set_ylabel("seconds (left: unpatched, right: merged)")
    plot.legend(frameon=False)
    save(figure, file)
