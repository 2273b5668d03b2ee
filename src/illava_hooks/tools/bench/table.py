"""Measurements as a table, as JSON, and in one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from illava_hooks.runtime.report import MergeReport
from illava_hooks.tools.bench.measure import Measurement

__all__ = ["as_dict", "print_table", "verdict"]

_ROWS: dict[str, tuple[Callable[[Measurement], float], str, float]] = {
    "encoder": (lambda m: m.encoder_s, "ms", 1e3),
    "projector": (lambda m: m.projector_s, "ms", 1e3),
    "language model": (lambda m: m.language_s, "ms", 1e3),
    "prefill": (lambda m: m.prefill_s, "ms", 1e3),
    "prefill, CPU": (lambda m: m.cpu_s, "s", 1.0),
    "of it merging": (lambda m: m.merge_s, "ms", 1e3),
    "decoding, per token": (lambda m: m.decode_s, "ms", 1e3),
    "peak above weights": (lambda m: m.peak_bytes, "MB", 1e-6),
    "KV cache": (lambda m: m.kv_bytes, "MB", 1e-6),
}


def summarize(runs: Sequence[Measurement]) -> dict[str, tuple[float, float, float]]:
    """Median, lowest and highest of every row."""
    table = {}
    for name, (read, _, _) in _ROWS.items():
        values = [read(run) for run in runs]
        table[name] = statistics.median(values), min(values), max(values)
    return table


def as_dict(plain: Sequence[Measurement], merged: Sequence[Measurement], report: MergeReport) -> dict[str, Any]:
    """For JSON: all runs, medians, achieved ratios and the ideal one."""
    before, after = summarize(plain), summarize(merged)
    return {
        "unpatched": {"median": {k: v[0] for k, v in before.items()}, "runs": [asdict(run) for run in plain]},
        "merged": {"median": {k: v[0] for k, v in after.items()}, "runs": [asdict(run) for run in merged]},
        "ratio": {k: after[k][0] / before[k][0] for k in before if before[k][0]},
        "flops": {"merged": report.flops[0], "unpatched": report.flops[1]},
        "ideal_ratio": report.flops[0] / report.flops[1],
        "merge_share": after["of it merging"][0] / after["prefill"][0],
        "report": asdict(report),
    }


def print_table(plain: Sequence[Measurement], merged: Sequence[Measurement], report: MergeReport) -> None:
    """Medians with their spread, ratios, and beside them what the arithmetic allows."""
    from rich.console import Console
    from rich.table import Table

    before, after = summarize(plain), summarize(merged)
    ideal = {
        "encoder": report.encoder_flops,
        "projector": report.projector_flops,
        "language model": report.llm_flops,
        "prefill": report.flops,
        "prefill, CPU": report.flops,
        "KV cache": report.kv_bytes,
    }
    table = Table("median (lowest to highest)", "unpatched", "merged", "ratio", "ideal")
    for name, (_, unit, factor) in _ROWS.items():
        if not any(before[name]) and not any(after[name]):
            continue
        cells = [
            f"{middle * factor:.1f} ({low * factor:.1f} to {high * factor:.1f}) {unit}"
            for middle, low, high in (before[name], after[name])
        ]
        ratio = f"{after[name][0] / before[name][0]:.3f}" if before[name][0] else ""
        best = f"{ideal[name][0] / max(1, ideal[name][1]):.3f}" if name in ideal else ""
        table.add_row(name, *cells, ratio, best)
    Console(highlight=False).print(table)
    for line in str(report).splitlines()[: len(report.visuals) + 1]:
        print(line)
    print(f"merging takes {after['of it merging'][0] / after['prefill'][0]:.1%} of the merged prefill")


def verdict(plain: Sequence[Measurement], merged: Sequence[Measurement], new_tokens: int) -> str:
    """Whether merging pays for an answer of so many tokens, in one line."""
    before, after = summarize(plain), summarize(merged)
    saved = before["prefill"][0] - after["prefill"][0]
    slower = after["decoding, per token"][0] - before["decoding, per token"][0]
    whole = before["prefill"][0] + (new_tokens - 1) * before["decoding, per token"][0]
    gain = (saved - (new_tokens - 1) * slower) / whole
    if saved <= 0:
        return f"Worth it? No: the prefill takes {-saved * 1e3:.0f} ms longer; the prompt is too short for merging."
    if gain < 0.02:
        return f"Worth it? Hardly: {gain:.0%} of an answer of {new_tokens} tokens; most of its time is decoding."
    return f"Worth it? Yes: {gain:.0%} less time for an answer of {new_tokens} tokens."
