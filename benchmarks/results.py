"""Fills docs/RESULTS.md, and what docs/methods.md says to take, from what ``bench`` and ``evaluate`` wrote.

    python benchmarks/results.py                   # the tables and curves of what is in docs/results
    python benchmarks/results.py --measure         # runs the commands first, for all that is not there yet
    python benchmarks/results.py --commands        # prints the commands

What is there is measured again once its file is deleted. An ``evaluate`` that was broken off goes on with the rows
that it left in ``build/results``.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import commands
import variants
from commands import ITEMS, MODELS, STAGES, Command, benches, evaluations, names_of, stages_of
from gpu_tables import fill, gpu_section
from illava_hooks.tools.evaluate import Row, read_header, read_rows
from illava_hooks.tools.evaluate.budgets import KEEP
from real_tower import read_tower_rows
from real_tower import table as tower_table
from result_tables import draw_curves, quality_table, speed_table, sweep_table
from which_rule import Budget, budgets, overview_table, rules_table, which_table

#: Rows of the real tower, by the sections of the page.
TOWERS = {"real tower": "real-tower.jsonl", "real tower without a class token": "real-tower-patches.jsonl"}
#: What ``which_rule.SAME`` says, in words.
SAME_WORDS = {
    "both": "",
    "encoder": "In the encoder alone `novel-agnostic` is `novel`.",
    "language": "In the language model alone `novel` is `diverse`, and `selective` is `novel-agnostic`.",
}


def rows_of(measured: Sequence[Command]) -> list[Row]:
    """What some commands wrote about the same questions and the same model.

    Raises:
        SystemExit: questions, weights, settings or the unpatched model's answers differ.
    """
    paths = [command.path for command in measured if command.path.exists()]
    rows = {path: read_rows(path) for path in paths}
    for path in paths[1:]:
        for part in ("model", "items", "settings"):
            if header_of(path)[part] != header_of(paths[0])[part]:
                raise SystemExit(f"{path} and {paths[0]} differ in {part}; measure both anew")
        if rows[path][0].answers != rows[paths[0]][0].answers:
            raise SystemExit(f"the unpatched model answers otherwise in {path} than in {paths[0]}; measure both anew")
    return list({row.key: row for path in paths[::-1] for row in rows[path]}.values())


def header_of(path: Path) -> dict[str, Any]:
    """What a file of rows says of its run.

    Raises:
        SystemExit: it says nothing.
    """
    header = read_header(path)
    if header is None:
        raise SystemExit(f"{path} says nothing of the run that it is of; measure it anew")
    return header


def compared(model: str, items: str) -> list[Budget]:
    """All budgets at which methods were compared."""
    return [budget for own in stages_of(model, items).values() for budget in budgets(model, items, rows_of(own))]


def still_missing(command: Command) -> list[str]:
    """What an ``evaluate`` that was broken off has not measured yet, in words."""
    words = shlex.split(command.arguments)
    asked = dict(zip(words, words[1:], strict=False))
    kept = [float(Fraction(part)) for part in asked.get("--kept", asked.get("--keep", "")).split(",")]
    methods = [method_name(choice) for choice in asked["--methods"].split(",")]
    known = {row.key for row in read_rows(command.path)}
    found = []
    for stage in asked.get("--stages", KEEP).split(","):
        for fraction in kept:
            names = [name for name in methods if (name, stage, fraction) not in known]
            names = [name for name in names if (name, "both", fraction) not in known or name != "downsample"]
            found += [f"{stage}, {fraction:.3f}: {', '.join(names)}"] * bool(names)
    return found


def method_name(choice: str) -> str:
    """What rows call a method that a command names."""
    _, colon, name = choice.rpartition(":")
    return getattr(variants, name).name if colon else choice


def told_of(command: Command) -> str:
    """What there is to know of an ``evaluate``'s rows."""
    if not command.path.exists():
        return "Not measured yet."
    header = header_of(command.path)
    versions, model = header["versions"], header["model"]
    packages = " and ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    told = f"Measured with {packages} on {model['device']}, {model['dtype']}."
    if missing := still_missing(command):
        told += f" The run was broken off; not measured yet: {'; '.join(missing)}."
    return told


def speed_of(command: Command) -> list[str]:
    """The table of what ``bench`` wrote."""
    if not command.path.exists():
        return ["Not measured yet."]
    found = json.loads(command.path.read_text())
    return sweep_table(found) if isinstance(found, list) else speed_table(found)


def quality_of(measured: Sequence[Command]) -> str:
    """Commands of ``evaluate``, and the one table of what they measured."""
    parts = [f"`{command}`" for command in measured]
    if rows := rows_of(measured):
        parts.append("\n".join(quality_table(rows)))
    return "\n\n".join(parts + list(dict.fromkeys(map(told_of, measured))))


def write_page(model: str, items: str) -> None:
    """The page with all rows of one model on one kind of items, with their intervals."""
    title = f"# {MODELS[model]}: {ITEMS[items]}"
    parts = [title, "What the columns are stands in [Results](../RESULTS.md#quality)."]
    for stage, measured in stages_of(model, items).items():
        parts += [f"## {STAGES[stage]}", SAME_WORDS[stage], quality_of(measured)]
    page = commands.DOCS / "results" / f"{model}-{items}.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")


def overview(model: str, found: Sequence[Budget]) -> str:
    """Accuracy of one model on all kinds of items."""
    parts = []
    for items, title in ITEMS.items():
        if own := [budget for budget in found if (budget.model, budget.items) == (model, items)]:
            stock = next(rows[0] for one in stages_of(model, items).values() if (rows := rows_of(one)))
            link = f"All rows with their intervals, and the commands: [{model}-{items}](results/{model}-{items}.md)."
            parts += [f"#### {title}", "\n".join(overview_table(own, stock)), link]
    return "\n\n".join(parts)


def filled_results(page: str, found: Sequence[Budget]) -> str:
    """docs/RESULTS.md with all its tables."""
    folder, paged = commands.DOCS / "results", set[str]()
    page = fill(page, "gpu", "\n".join(gpu_section(folder, folder / "launches.json")))
    for name, file in TOWERS.items():
        page = fill(page, name, "\n".join(tower_table(read_tower_rows(folder / file))))
    for model in MODELS:
        page = fill(page, f"{model} quality", overview(model, found))
        paged |= {name for items in ITEMS for stage in STAGES for name in names_of(model, items, stage)}
    for name, command in benches().items():
        page = fill(page, name, "\n".join([f"`{command}`", "", *speed_of(command)]))
    for name, command in evaluations().items():
        if name not in paged:
            page = fill(page, name, quality_of([command]))
    return page


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the commands for what is missing")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    given, known = parser.parse_args(), {**benches(), **evaluations()}
    if given.commands:
        print(*known.values(), sep="\n")
        return
    if given.measure:
        for command in known.values():
            command.run()
    for model in MODELS:
        for items in ITEMS:
            write_page(model, items)
        for stage, measured in stages_of(model, "scenes").items():
            if rows := rows_of(measured):
                draw_curves(rows, measured[0].path, f"{MODELS[model]}, {STAGES[stage].lower()}")
    found = [budget for model in MODELS for items in ITEMS for budget in compared(model, items)]
    results, methods = commands.DOCS / "RESULTS.md", commands.DOCS / "methods.md"
    results.write_text(filled_results(results.read_text(), found))
    text = fill(methods.read_text(), "rules", "\n".join(rules_table(found)))
    methods.write_text(fill(text, "budgets", "\n".join(which_table(found))))


if __name__ == "__main__":
    main()
