"""The Pareto front as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from illava_hooks.tools.bench.plot import axes, save
from illava_hooks.tools.tune.result import TUNED, Point, Tuning

__all__ = ["plot_front", "print_tuning", "write_front"]


def print_tuning(found: Tuning) -> None:
    """A table in Markdown, then what is to be said."""
    print("| | FLOPs | KL | 95 % interval | loyalty | 95 % interval | front | method | encoder | language model |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for point in _by_cost(found):
        low, high = point.loss_interval
        least, most = point.loyalty_interval
        print(
            f"| {point.name} | {point.cost:.3f} | {point.loss:.4f} | {low:.4f} to {high:.4f} | {point.loyalty:.1%} "
            f"| {least:.1%} to {most:.1%} | {'yes' if point.on_front else ''} | {' | '.join(_settings(point))} |"
        )
    print()
    for sentence in found.verdict:
        print(sentence)


def write_front(found: Tuning, file: Path) -> None:
    """All points and what was said, as JSON; the same for the same plan."""
    file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")


def plot_front(found: Tuning, file: Path) -> None:
    """Cost and KL of all points, the front as a line.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, plot = axes(7, 4.5)
    points = _by_cost(found)
    front = [point for point in points if point.on_front]
    plot.step([point.cost for point in front], [point.loss for point in front], where="post", color="#4477aa", lw=1)
    for point in points:
        color = "#228833" if point.name == TUNED else "#4477aa" if point.on_front else "#999999"
        below, above = point.loss - point.loss_interval[0], point.loss_interval[1] - point.loss
        plot.errorbar(point.cost, point.loss, [[max(0.0, below)], [max(0.0, above)]], fmt="o", color=color, capsize=2)
        name = point.name if not point.settings else f"{point.name}: {point.settings['method']}"
        plot.annotate(name, (point.cost, point.loss), (5, 5), textcoords="offset points", fontsize=8, color=color)
    plot.set_xlabel("prefill FLOPs of the unpatched model's")
    plot.set_ylabel("KL from the unpatched model, nats")
    plot.set_title(f"{found.questions[1]} questions that the search did not see", fontsize=10)
    plot.margins(x=0.15)
    plot.set_ylim(bottom=0)
    save(figure, file)


def _by_cost(found: Tuning) -> list[Point]:
    return sorted(found.points, key=lambda point: (point.cost, point.loss))


def _settings(point: Point) -> Iterator[str]:
    """Method, encoder and language model, each in a few words."""
    if not point.settings:
        yield from ("the preset's", "", "")
        return
    yield str(point.settings["method"])
    for layers, amount in (("vit_layers", "vit_r"), ("llm_layers", "llm_ratio")):
        listed = "-".join(map(str, point.settings[layers]))
        yield f"{listed}: {point.settings[amount]:.3f}" if listed else "none"
