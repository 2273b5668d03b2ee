"""The tables and curves of docs/RESULTS.md; ``results.py`` puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illava_hooks.tools.bench.plot import axes, colour_of_method, save
from illava_hooks.tools.evaluate import Row

__all__ = ["draw_curves", "quality_table", "speed_table", "sweep_table"]


#: Methods whose lead over each other row has a column of its own, where they were measured.
LEADERS = ("novel-agnostic", "novel", "selective")


def quality_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy with its interval, loyalty and divergence; differences question by question."""
    measured = {row.method for row in rows}
    leaders = [name for name in LEADERS if name in measured]
    if LEADERS[0] in leaders and LEADERS[1] in leaders:
        leaders.remove(LEADERS[1])
    heads = ["stage", "kept", "measured", "method", "questions", "accuracy", "95 % interval", "to `illava`, paired"]
    heads += [*(f"`{name}` to it, paired" for name in leaders), "loyalty", "KL"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    budgets = {(row.method, row.stage, row.kept): row for row in rows}
    for row in sorted(rows, key=lambda r: (r.kept < 1, r.stage, -r.kept, -(r.accuracy or 0))):
        beside = [budgets.get((name, row.stage, row.kept)) for name in ("illava", *leaders)]
        leads = [lead(row, beside[0]), *(lead(one, row) for one in beside[1:])]
        first, last = row.accuracy_interval or (0, 0)
        fraction = "" if row.measured is None else f"{row.measured:.3f}"
        cells = [row.stage, f"{row.kept:.3f}", fraction, row.method, str(row.questions), f"{row.accuracy:.1%}"]
        cells += [f"{first:.1%} to {last:.1%}", *leads, f"{row.loyalty:.1%}", f"{row.divergence:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def lead(row: Row | None, other: Row | None) -> str:
    """The paired difference of two rows, if there are two."""
    if row is None or other is None or row is other:
        return ""
    low, high = row.lead(other)
    return f"{low:+.1%} to {high:+.1%}"


def draw_curves(rows: Sequence[Row], file: Path, title: str) -> None:
    """Accuracy over the kept fraction of one stage with its interval, one line per method, beside the file of rows."""
    stock = [row for row in rows if row.method == "none"]
    figure, plot = axes(7, 4.5)
    for method in dict.fromkeys(row.method for row in rows if row.method != "none"):
        drawn = sorted([row for row in rows if row.method == method] + stock, key=lambda row: row.kept)
        kept, accuracy = [row.kept for row in drawn], [row.accuracy or 0.0 for row in drawn]
        ends = [row.accuracy_interval or (row.accuracy or 0.0,) * 2 for row in drawn]
        colour = colour_of_method(method)
        plot.fill_between(kept, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.15)
        plot.plot(kept, accuracy, marker="o", markersize=3, color=colour, label=method)
    plot.set(xlabel="visual tokens kept", ylabel="accuracy", title=title)
    plot.legend(frameon=False, fontsize=8)
    save(figure, file.with_suffix(".png"))


def speed_table(found: dict[str, Any]) -> list[str]:
    """One workload: medians, ratio achieved, ratio of the FLOPs, peaks."""
    before, after = found["unpatched"]["median"], found["merged"]["median"]
    seconds = dict.fromkeys(
        ("prefill, CPU", "encoder, CPU", "language model, CPU", "decoding, per token"), (1, "s", 3)
    )
    peaks = ("encoder, peak above weights", "language model, peak above weights", "KV cache")
    lines = ["| | unpatched | merged | ratio | ideal |", "|---|---|---|---|---|"]
    for row, (factor, unit, digits) in (seconds | dict.fromkeys(peaks, (1e-6, "MB", 1))).items():
        cells = " | ".join(f"{side[row] * factor:.{digits}f} {unit}" for side in (before, after))
        ideal = f"{found['ideal'][row]:.3f}" if row in found["ideal"] else ""
        lines.append(f"| {row} | {cells} | {found['ratio'][row]:.3f} | {ideal} |")
    told = f"Merging itself: {found['merge_share']:.2%} of the merged prefill."
    if "decoding_at_equal_kv" in found:
        told += f" A decode step: {found['decoding_at_equal_kv']:.3f} of an unpatched one that reads as many keys."
    return [*lines, "", told]


def sweep_table(found: list[dict[str, Any]]) -> list[str]:
    """How CPU seconds grow, beside the FLOPs: one speed for all rows would be a perfect fit."""
    heads = ["prefill, CPU", "merged", "ratio", "ideal", "GFLOP/s", "merged", "decoding, ratio"]
    lengths = found[0]["label"].endswith(" new")
    heads += ["whole answer, ratio"] * lengths
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    row, step = "prefill, CPU", "decoding, per token"
    for one in found:
        seconds = {kind: one[kind]["median"][row] for kind in ("unpatched", "merged")}
        cells = [f"{s:.1f} s" for s in seconds.values()]
        cells += [f"{one[ratio][row]:.3f}" for ratio in ("ratio", "ideal")]
        cells += [f"{one['flops'][kind] / s / 1e9:.1f}" for kind, s in seconds.items()]
        cells.append(f"{one['ratio'][step]:.3f}" if step in one["ratio"] else "")
        if lengths:
            cells.append(f"{answer_s(one, 'merged') / answer_s(one, 'unpatched'):.3f}")
        lines.append(f"| {one['label']} | {' | '.join(cells)} |")
    return lines


def answer_s(one: dict[str, Any], kind: str) -> float:
    """Wall seconds of an answer, whose length is the label of the sweep over lengths."""
    found = one[kind]["median"]
    further = int(one["label"].split()[0]) - 1
    return float(found["prefill (time to first token)"] + further * found["decoding, per token"])
