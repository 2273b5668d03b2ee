"""The GPU section of docs/RESULTS.md: what `make gpu` measured, else what is known without a GPU."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["fill", "fill_gpu", "gpu_section"]

#: What merging is held to on a GPU: the largest value that is good, by what is compared.
RATIO, SHARE, STEP = 1.05, 0.02, 1.01
_PREFILL = "prefill (time to first token)"
_PEAKS = ("encoder, peak above weights", "language model, peak above weights")


def fill(page: str, name: str, body: str) -> str:
    """Puts a text between its two markers."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no place for {name!r}; write the two markers")
    return pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", page)


def fill_gpu(docs: Path) -> None:
    """Puts what was measured into the section on GPUs of docs/RESULTS.md."""
    page, results = docs / "RESULTS.md", docs / "results"
    body = "\n".join(gpu_section(results, results / "launches.json"))
    page.write_text(fill(page.read_text(encoding="utf-8"), "gpu", body), encoding="utf-8")


def gpu_section(results: Path, launches: Path) -> list[str]:
    """The body of the section.

    Args:
        results: the folder with gpu-*.json.
        launches: what ``launch_counts.py`` wrote, for the time in which there is no such file.
    """
    found = {file.stem.removeprefix("gpu-"): _read(file) for file in sorted(results.glob("gpu-*.json"))}
    if not found:
        return ["**No GPU has been measured.** What is known without one:", "", *count_tables(_read(launches))]
    lines = []
    for name, piece in found.items():
        lines += [f"**{name}** ({piece['device']}, torch {piece['torch']}, transformers {piece['transformers']})", ""]
        if "skipped" in piece:
            lines += [f"Left out: {piece['skipped']}.", ""]
            continue
        lines += [*_table(name, piece), ""]
        if not piece.get("complete"):
            lines += ["Not complete; `make gpu` goes on with it.", ""]
    return lines[:-1]


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _table(name: str, piece: dict[str, Any]) -> list[str]:
    if name == "check":
        return [piece["output"][-1].strip("= ") if piece["output"] else "no output"]
    if name == "kernels":
        return kernel_table(piece["rows"])
    if name == "fresh":
        told = "qwen2-vl-7b, sdpa, keep 0.333, method novel-agnostic; medians over images of different sizes."
        return [told, "", *fresh_table(piece["rows"])]
    if name == "frames":
        return [
            f"- {kind}: {row['frames']} frames went through"
            + (", twice as many ran out of memory" if row["ran out"] else "")
            for kind, row in piece["rows"].items()
        ]
    given = ", ".join(
        f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in piece["settings"].items()
    )
    told = f"{piece['shape']}, {piece['attention']}, {given}; medians of runs in turn."
    return [told, "", *speed_table(piece["rows"])]


def kernel_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Milliseconds of each kernel."""
    if not rows:
        return ["Nothing measured yet."]
    kinds = list(rows[0]["seconds"])
    lines = [f"| tokens | heads x width | {' | '.join(f'{kind}, ms' for kind in kinds)} |"]
    lines.append("|---" * (2 + len(kinds)) + "|")
    for row in rows:
        cells = " | ".join(f"{row['seconds'][kind] * 1e3:.3f}" for kind in kinds)
        lines.append(f"| {row['tokens']} | {row['heads']} x {row['width']} | {cells} |")
    return lines


def fresh_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Medians over sizes of images of the first answer to one and of the second."""
    lines = ["| | images | prefill, first time at a size | again | decode step, first time at a length | again |"]
    lines.append("|---" * 6 + "|")
    for kind in ("unpatched", "merged"):
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            cells = [
                f"{statistics.median(row[when][part] for row in mine) * 1e3:.0f} ms"
                for part in (0, 1)
                for when in ("first", "again")
            ]
            lines.append(f"| {kind} | {len(mine)} | {' | '.join(cells)} |")
    return lines


def speed_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each workload beside what its FLOPs allow, and whether it meets what merging is held to."""
    heads = ["", "encoder", "language model", "prefill", "merged", "ratio", "FLOPs", "merging", "step at equal keys"]
    heads += ["decode step, ratio", "peaks, ratio", "held"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row.get("out of memory"):
            lines.append(f"| {row['label']} | out of memory |" + " |" * (len(heads) - 2))
            continue
        before, after, ratio = row["unpatched"]["median"], row["merged"]["median"], row["ratio"]
        stages = [f"{before[s] * 1e3:.1f} -> {after[s] * 1e3:.1f} ms" for s in ("encoder", "language model")]
        peaks = [ratio[peak] for peak in _PEAKS if peak in ratio]
        cells = [
            row["label"],
            *stages,
            *(f"{side[_PREFILL] * 1e3:.1f} ms" for side in (before, after)),
            f"{ratio[_PREFILL]:.3f}",
            f"{row['ideal_ratio']:.3f}",
            f"{row['merge_share']:.2%}",
            f"{row['decoding_at_equal_kv']:.3f}",
            f"{ratio['decoding, per token']:.3f}",
            " and ".join(f"{peak:.3f}" for peak in peaks),
            ", ".join(missed(row, peaks)) or "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def missed(row: dict[str, Any], peaks: Sequence[float]) -> list[str]:
    """Which goals a workload misses."""
    goals = {
        "ratio": row["ratio"][_PREFILL] <= RATIO * row["ideal_ratio"],
        "merging": row["merge_share"] <= SHARE,
        "step": row["decoding_at_equal_kv"] <= STEP,
        "peak": all(round(peak, 3) <= 1.0 for peak in peaks),
    }
    return [f"not {name}" for name, good in goals.items() if not good]


def count_tables(found: dict[str, Any]) -> list[str]:
    """Launches and bytes."""
    lines = ["| | method | encoder layer | decoder layer | layer in front | whole prefill, stock | merged |"]
    lines.append("|---" * 7 + "|")
    for row in found["launches"]:
        layers = " | ".join(str(row[key]) for key in ("encoder", "decoder", "ranking"))
        lines.append(f"| {row['family']} | {row['method']} | {layers} | {row['stock']} | {row['merged']} |")
    lines += [
        "",
        "Launches that a merging layer adds, the most of any number and lengths of images, and of a whole prefill of",
        "one image at the published depths with the presets. Indices that follow from shapes are made once and not",
        "counted.",
        "",
        "| | tokens | the layer itself | score | merge with `illava` | merge with `diverse` |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["bytes"]:
        parts = " | ".join(f"{row[key] / 1e6:.1f} MB" for key in ("layer", "score", "illava", "diverse"))
        lines.append(f"| {row['shape']} | {row['tokens']:,} | {parts} |")
    lines += [
        "",
        "Bytes that an encoder layer in bfloat16 reads and writes at least, weights included, and that merging adds:",
        "each table counted once for every kernel that reads or writes it.",
    ]
    return lines
