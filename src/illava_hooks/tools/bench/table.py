"""Measurements as a table, as JSON, and in one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from illava_hooks.engine.report import MergeReport
from illava_hooks.tools.bench.comparison import Comparison, flops_fit
from illava_hooks.tools.bench.measure import Measurement

__all__ = ["as_dict", "print_sweep", "print_table", "verdict"]

_ROWS: dict[str, tuple[Callable[[Measurement], float], str, float]] = {
    "encoder": (lambda m: m.encoder.wall_s, "ms", 1e3),
    "projector": (lambda m: m.projector.wall_s, "ms", 1e3),
    "language model": (lambda m: m.language.wall_s, "ms", 1e3),
    "prefill (time to first token)": (lambda m: m.prefill_s, "ms", 1e3),
    "encoder, CPU": (lambda m: m.encoder.cpu_s, "s", 1.0),
    "language model, CPU": (lambda m: m.language.cpu_s, "s", 1.0),
    "prefill, CPU": (lambda m: m.cpu_s, "s", 1.0),
    "decoding, per token": (lambda m: m.decode_s, "ms", 1e3),
    "encoder, peak above weights": (lambda m: m.encoder.peak_bytes, "MB", 1e-6),
    "language model, peak above weights": (lambda m: m.language.peak_bytes, "MB", 1e-6),
    "KV cache": (lambda m: m.kv_bytes, "MB", 1e-6),
}
#: Smaller peaks are the allocator's: no ratio is shown.
_LEAST = {"peak above weights": 16e6}
#: A shorter prefill on a CPU is mostly calls; on a device there is no CPU time.
_SHORT_S = 0.5


def summarize(runs: Sequence[Measurement]) -> dict[str, tuple[float, float, float]]:
    """Median, lowest and highest of every row."""
    table = {}
    for name, (read, _, _) in _ROWS.items():
        values = [read(run) for run in runs]
        table[name] = statistics.median(values), min(values), max(values)
    return table


def _ideal(found: Comparison) -> dict[str, float]:
    """What the arithmetic allows, by row."""
    report: MergeReport = found.report
    pairs = {
        "encoder": report.encoder_flops,
        "projector": report.projector_flops,
        "language model": report.llm_flops,
        "encoder, CPU": report.encoder_flops,
        "language model, CPU": report.llm_flops,
        "KV cache": report.kv_bytes,
    }
    rows = {name: merged / whole for name, (merged, whole) in pairs.items() if whole}
    return rows | {name: found.ideal for name in ("prefill (time to first token)", "prefill, CPU")}


def as_dict(found: Comparison) -> dict[str, Any]:
    """For JSON: all runs, medians, achieved ratios and the ideal one."""
    plain, merged, report = found.plain, found.merged, found.report
    before, after = summarize(plain), summarize(merged)
    return {
        "label": found.label,
        "unpatched": {"median": {k: v[0] for k, v in before.items()}, "runs": [asdict(run) for run in plain]},
        "merged": {"median": {k: v[0] for k, v in after.items()}, "runs": [asdict(run) for run in merged]},
        "ratio": {k: after[k][0] / before[k][0] for k in before if before[k][0]},
        "ideal": _ideal(found),
        "flops": {"merged": report.flops[0], "unpatched": report.flops[1]},
        "ideal_ratio": found.ideal,
        "merge_share": found.cost.share,
        "decoding_at_equal_kv": found.cost.decoding,
        "report": asdict(report),
    }


def print_table(found: Comparison) -> None:
    """Medians with their spread, ratios, and beside them what the arithmetic allows."""
    from rich.console import Console
    from rich.table import Table

    before, after, ideal = summarize(found.plain), summarize(found.merged), _ideal(found)
    table = Table("median (lowest to highest)", "unpatched", "merged", "ratio", "ideal")
    for name, (_, unit, factor) in _ROWS.items():
        if not any(before[name]) and not any(after[name]):
            continue
        digits = 3 if unit == "s" else 1
        cells = [
            f"{middle * factor:.{digits}f} ({low * factor:.{digits}f} to {high * factor:.{digits}f}) {unit}"
            for middle, low, high in (before[name], after[name])
        ]
        tells = before[name][0] >= _LEAST.get(name.rpartition(", ")[2], 1e-9)
        achieved = f"{after[name][0] / before[name][0]:.3f}" if tells else ""
        table.add_row(name, *cells, achieved, f"{ideal[name]:.3f}" if name in ideal else "")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a file or a pipe need not wrap
    console.print(table)
    if 0 < before["prefill, CPU"][0] < _SHORT_S:
        print(
            "note: these times are too short to say anything; measure a larger shape, or more tiles, patches or frames"
        )
    for line in str(found.report).splitlines()[: len(found.report.visuals) + 2]:
        print(line)
    print(f"merging takes {found.cost.share:.2%} of the merged prefill")
    if found.cost.decoding:
        print(f"a decode step takes {found.cost.decoding:.3f} of an unpatched one that reads as many keys")


def print_sweep(comparisons: Sequence[Comparison]) -> None:
    """One row for each workload in Markdown, and how well time follows the FLOPs."""
    print("| workload | unpatched | merged | ratio | ideal | merging | decoding, ratio | KV cache, ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for found in comparisons:
        before, after = summarize(found.plain), summarize(found.merged)
        row = "prefill, CPU" if before["prefill, CPU"][0] else "prefill (time to first token)"
        each = "decoding, per token"
        slower = f"{after[each][0] / before[each][0]:.3f}" if before[each][0] else ""
        print(
            f"| {found.label} | {before[row][0]:.2f} s | {after[row][0]:.2f} s | {after[row][0] / before[row][0]:.3f} "
            f"| {found.ideal:.3f} | {found.cost.share:.2%} | {slower} "
            f"| {after['KV cache'][0] / before['KV cache'][0]:.3f} |"
        )
    apart = " and ".join(f"{flops_fit(comparisons, merged):.0%}" for merged in (False, True))
    print(f"seconds (CPU seconds on a CPU) follow the FLOPs within {apart}, unpatched and merged")


def verdict(plain: Sequence[Measurement], merged: Sequence[Measurement], new_tokens: int) -> str:
    """Whether merging pays for an answer of so many tokens, in one line."""
    before, after = summarize(plain), summarize(merged)
    first, each = "prefill (time to first token)", "decoding, per token"
    saved = before[first][0] - after[first][0]
    slower = after[each][0] - before[each][0]
    whole = before[first][0] + (new_tokens - 1) * before[each][0]
    gain = (saved - (new_tokens - 1) * slower) / whole
    if saved <= 0:
        return f"Worth it? No: the prefill takes {-saved * 1e3:.0f} ms longer; the prompt is too short for merging."
    if gain < 0.02:
        return f"Worth it? Hardly: {gain:.0%} of an answer of {new_tokens} tokens; most of its time is decoding."
    return f"Worth it? Yes: {gain:.0%} less time for an answer of {new_tokens} tokens."
