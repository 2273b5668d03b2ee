"""Fills the tables and draws the curves of docs/RESULTS.md from what ``bench`` and ``evaluate`` wrote.

    python examples/results.py            # the tables and curves of what is in docs/results
    python examples/results.py --measure  # runs evaluate first, for all that is not there yet

The commands are those that stand above each table on the page; ``evaluate`` does not repeat rows that are there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from illava_hooks.tools.bench.plot import axes, save
from illava_hooks.tools.evaluate import Row, read_rows

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
SUITES = {"scenes": 2000}
MODELS = {"tiny": "LLaVA-OneVision", "tiny-qwen2-vl": "Qwen2-VL"}


def evaluate_commands() -> list[list[str]]:
    """Arguments of every ``illava-hooks evaluate`` behind the page."""
    commands = []
    for model in MODELS:
        for suite, count in SUITES.items():
            file = f"docs/results/{model}-{suite}.jsonl"
            command = f"evaluate --model {model} --items {suite} --questions {count} --stages both"
            methods = "illava,diverse,fastv,random,tome,nearest,illava-v2,uniform,downsample"
            options = ["--kept", "0.3333,0.1111", "--methods", methods, "--output", file]
            commands.append([*command.split(), *options])
    return commands


def rows_of(model: str, suite: str) -> list[Row]:
    """What ``evaluate --output`` wrote, the unpatched model first."""
    return read_rows(RESULTS / f"{model}-{suite}.jsonl")


def quality_table(model: str, suite: str) -> str:
    """Accuracy with its interval, loyalty and divergence; the difference to ``illava`` question by question."""
    rows = rows_of(model, suite)
    lines = [
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


def draw_curves(model: str, suite: str) -> None:
    """Accuracy over the kept fraction, both stages, one line per method."""
    rows = [row for row in rows_of(model, suite) if row.stage == "both"]
    if not rows:
        return
    figure, plot = axes(7, 4.5)
    stock = next((row for row in rows if row.method == "none"), None)
    for method in dict.fromkeys(row.method for row in rows if row.method != "none"):
        found = sorted((row.kept, row.accuracy) for row in rows if row.method == method)
        if stock:
            found.append((1.0, stock.accuracy))
        plot.plot(*zip(*found, strict=True), marker="o", markersize=3, label=method)
    plot.set(xlabel="visual tokens kept", ylabel="accuracy", title=f"{MODELS[model]} (embedded), {suite}")
    plot.legend(frameon=False, fontsize=8)
    save(figure, RESULTS / f"{model}-{suite}.png")


def fill(page: str, name: str, table: str) -> str:
    """Puts a table between its two markers."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/RESULTS.md has no place for {name!r}; write the two markers")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run evaluate for what is missing")
    if parser.parse_args().measure:
        for command in evaluate_commands():
            subprocess.run([sys.executable, "-m", "illava_hooks", *command], check=True, cwd=DOCS.parent)
    page = (DOCS / "RESULTS.md").read_text()
    for model in MODELS:
        for suite in SUITES:
            if rows_of(model, suite):
                page = fill(page, f"{model} {suite}", quality_table(model, suite))
                draw_curves(model, suite)
    (DOCS / "RESULTS.md").write_text(page)


if __name__ == "__main__":
    main()
