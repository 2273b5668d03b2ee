"""Pictures of measurements, by matplotlib (``pip install illava-hooks[plot]``)."""

from __future__ import annotations

import colorsys
import os
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illava_hooks.errors import InputError
from illava_hooks.tools.bench.comparison import Comparison

__all__ = ["PLOT_CURE", "axes", "colour_of_method", "plot_comparisons", "save"]

#: How to get matplotlib, from a checkout and from an index.
PLOT_CURE = "pip install '.[plot]' in a checkout, or pip install 'illava-hooks[plot]'"

#: Told apart by the colour-blind, on white and on black; one for each method in every plot.
_COLOURS = {
    "none": "#888888",
    "illava": "#4477aa",
    "diverse": "#ee6677",
    "fastv": "#ccbb44",
    "nearest": "#228833",
    "tome": "#66ccee",
    "illava-v2": "#aa3377",
    "illava-reference": "#223366",
    "random": "#777755",
    "novel": "#bb5566",
    "novel-agnostic": "#ddaa99",
    "selective": "#996633",
    "uniform": "#bb9977",
    "downsample": "#ee8833",
}


def colour_of_method(name: str) -> str:
    """The colour of a method in every plot; a method of one's own has one that follows from its name."""
    if name in _COLOURS:
        return _COLOURS[name]
    hue = zlib.crc32(name.encode()) % 360 / 360
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, 0.7))
    return f"#{red:02x}{green:02x}{blue:02x}"


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, without a screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise InputError(f"a plot needs matplotlib; {PLOT_CURE}") from error
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
