"""Fills the tables and draws the curves of docs/RESULTS.md from what ``bench`` and ``evaluate`` wrote.

    python examples/results.py                   # the tables and curves of what is in docs/results
    python examples/results.py --measure         # runs the commands first, for all that is not there yet
    python examples/results.py --commands        # prints the commands

``evaluate`` does not repeat rows that are there; a speed is measured again once its file is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from illava_hooks.tools.bench.plot import axes, save
from illava_hooks.tools.evaluate import Row, read_rows

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
MODELS = {"tiny": "LLaVA-OneVision", "tiny-qwen2-vl": "Qwen2-VL"}

_FOUR = "--methods illava,diverse,fastv,random"
_TWO_BUDGETS = "--stages both --kept 0.3333,0.1111"
#: Arguments of ``evaluate`` by table.
TABLES = {
    "headline": f"--items scenes --questions 6000 {_TWO_BUDGETS} {_FOUR}",
    "scenes": f"--items scenes --questions 2000 {_TWO_BUDGETS} "
    "--methods illava,diverse,fastv,random,tome,nearest,illava-v2,uniform,downsample",
    "stages": f"--items scenes --questions 1000 --stages encoder,language --kept 0.5,0.3333,0.2222,0.1111 {_FOUR}",
    "pairs": f"--items pairs --questions 1000 {_TWO_BUDGETS} {_FOUR}",
    "clips": f"--items clips --questions 1000 {_TWO_BUDGETS} {_FOUR}",
    "easy-vqa": f"--items easy-vqa --questions 1000 {_TWO_BUDGETS} {_FOUR}",
    "choices": "--items scenes --questions 2000 --stages {stages} --kept {kept} --methods illava,illava-reference",
}
#: The published layout needs a square number of survivors.
_CHOICES = {
    "tiny": {"stages": "encoder", "kept": "0.5625,0.25"},
    "tiny-qwen2-vl": {"stages": "encoder,language", "kept": "0.3333,0.1111"},
}

_SHAPES = {
    "llava-onevision-0.5b": "--shape llava-onevision-0.5b --tiles 3",
    "qwen2-vl-2b": "--shape qwen2-vl-2b --patches 4096",
}
_NEUTRAL = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000"
#: Environment and options by table; peaks in one process, where code that is loaded late no longer counts.
_WAYS = {
    "neutral": (_NEUTRAL, "--fresh --rounds 2"),
    "diverse": (_NEUTRAL, "--fresh --rounds 1 --method diverse"),
    "default": ("", "--fresh --rounds 2"),
    "returning": ("MALLOC_MMAP_THRESHOLD_=262144", "--rounds 1"),
}
#: Environment and arguments of ``bench`` by table.
SPEEDS = {
    f"{shape} {name}": (setting, f"{arguments} {options} --new-tokens 17")
    for shape, arguments in _SHAPES.items()
    for name, (setting, options) in _WAYS.items()
}
SWEEP = "--shape llava-onevision-0.5b --sweep tiles --rounds 1 --new-tokens 9"
_MARKED = ("prefill, CPU", "encoder, CPU", "language model, CPU", "decoding, per token")


def evaluate_command(model: str, table: str) -> list[str]:
    """``evaluate`` behind one table."""
    asked = TABLES[table].format(**_CHOICES[model])
    return shlex.split(f"evaluate --model {model} {asked} --output docs/results/{model}-{table}.jsonl")


def rows_of(model: str, table: str) -> list[Row]:
    """What ``evaluate --output`` wrote."""
    return read_rows(RESULTS / f"{model}-{table}.jsonl")


def quality_table(model: str, table: str) -> str:
    """Accuracy with its interval, loyalty and divergence; the difference to ``illava`` question by question."""
    rows = rows_of(model, table)
    shown = shlex.join(["illava-hooks", *evaluate_command(model, table)])
    lines = [
        f"`{shown}`",
        "",
        "| stage | kept | method | accuracy | 95 % interval | to `illava`, paired | loyalty | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r.kept < 1, r.stage, -r.kept, -r.accuracy)):
        base = [r for r in rows if (r.method, r.stage, r.kept) == ("illava", row.stage, row.kept)]
        first, last = row.accuracy_interval
        lead = ""
        if base and row.method != "illava":
            low, high = row.lead(base[0])
            lead = f"{low:+.1%} to {high:+.1%}"
        lines.append(
            f"| {row.stage} | {row.kept:.3f} | {row.method} | {row.accuracy:.1%} | {first:.1%} to {last:.1%} "
            f"| {lead} | {row.loyalty:.1%} | {row.divergence:.3f} |"
        )
    return "\n".join(lines)


def draw_curves(model: str, table: str) -> None:
    """Accuracy over the kept fraction, one line per method, one panel per stage."""
    rows = rows_of(model, table)
    stock = [(1.0, row.accuracy) for row in rows if row.method == "none"]
    for stage in dict.fromkeys(row.stage for row in rows if row.method != "none"):
        figure, plot = axes(7, 4.5)
        for method in dict.fromkeys(row.method for row in rows if row.stage == stage and row.method != "none"):
            found = [(row.kept, row.accuracy) for row in rows if (row.method, row.stage) == (method, stage)]
            plot.plot(*zip(*sorted(found + stock), strict=True), marker="o", markersize=3, label=method)
        plot.set(xlabel="visual tokens kept", ylabel="accuracy", title=f"{MODELS[model]} (embedded), stage: {stage}")
        plot.legend(frameon=False, fontsize=8)
        save(figure, RESULTS / f"{model}-{table}-{stage}.png")


def speed_file(name: str) -> Path:
    """Where one bench is kept."""
    return RESULTS / f"speed-{name.replace(' ', '-')}.json"


def speed_table(name: str) -> str:
    """One bench: medians, ratio achieved, ratio of the FLOPs, peaks."""
    setting, arguments = SPEEDS[name]
    found: dict[str, Any] = json.loads(speed_file(name).read_text())
    before, after = found["unpatched"]["median"], found["merged"]["median"]
    lines = [
        f"`{f'{setting} illava-hooks bench {arguments}'.strip()}`",
        "",
        "| | unpatched | merged | ratio | ideal |",
        "|---|---|---|---|---|",
    ]
    for row in _MARKED:
        ideal = f"{found['ideal'][row]:.3f}" if row in found["ideal"] else ""
        lines.append(f"| {row} | {before[row]:.3f} s | {after[row]:.3f} s | {found['ratio'][row]:.3f} | {ideal} |")
    for row in ("encoder, peak above weights", "language model, peak above weights", "KV cache"):
        lines.append(
            f"| {row} | {before[row] / 1e6:.1f} MB | {after[row] / 1e6:.1f} MB | {after[row] / before[row]:.3f} | |"
        )
    lines += ["", f"Merging itself: {found['merge_share']:.2%} of the merged prefill."]
    return "\n".join(lines)


def sweep_table() -> str:
    """How CPU seconds grow with the tiles, beside the FLOPs: one speed for all rows would be a perfect fit."""
    lines = [
        f"`illava-hooks bench {SWEEP}`",
        "",
        "| | prefill, CPU | merged | ratio | ideal | GFLOP/s | merged | decoding, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    row = "prefill, CPU"
    for found in json.loads((RESULTS / "sweep-tiles.json").read_text()):
        before, after = (found[kind]["median"][row] for kind in ("unpatched", "merged"))
        speeds = (found["flops"][kind] / s / 1e9 for kind, s in (("unpatched", before), ("merged", after)))
        lines.append(
            f"| {found['label']} | {before:.1f} s | {after:.1f} s "
            f"| {found['ratio'][row]:.3f} | {found['ideal'][row]:.3f} "
            f"| {' | '.join(f'{speed:.1f}' for speed in speeds)} | {found['ratio']['decoding, per token']:.3f} |"
        )
    return "\n".join(lines)


def fill(page: str, name: str, table: str) -> str:
    """Puts a table between its two markers."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/RESULTS.md has no place for {name!r}; write the two markers")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)


def measure() -> None:
    """Runs what is not there yet."""
    tool = [sys.executable, "-m", "illava_hooks"]
    for name, (setting, arguments) in SPEEDS.items():
        if not speed_file(name).exists():
            extra = dict(part.split("=") for part in setting.split())
            command = [*tool, "bench", *shlex.split(arguments), "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **extra})
            speed_file(name).write_text(done.stdout)
    for model in MODELS:
        for table in TABLES:
            subprocess.run([*tool, *evaluate_command(model, table)], check=True, cwd=DOCS.parent)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the commands for what is missing")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    given = parser.parse_args()
    if given.commands:
        for setting, arguments in SPEEDS.values():
            print(f"{setting} illava-hooks bench {arguments} --json".strip())
        print(f"illava-hooks bench {SWEEP} --json")
        for model in MODELS:
            for table in TABLES:
                print(shlex.join(["illava-hooks", *evaluate_command(model, table)]))
        return
    if given.measure:
        measure()
    page = (DOCS / "RESULTS.md").read_text()
    for name in SPEEDS:
        if speed_file(name).exists():
            page = fill(page, f"speed {name}", speed_table(name))
    page = fill(page, "sweep tiles", sweep_table())
    for model in MODELS:
        for table in TABLES:
            if rows_of(model, table):
                page = fill(page, f"{model} {table}", quality_table(model, table))
        for table in ("scenes", "stages"):
            if rows_of(model, table):
                draw_curves(model, table)
    (DOCS / "RESULTS.md").write_text(page)


if __name__ == "__main__":
    main()
