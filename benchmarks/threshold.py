"""How alike two tokens must be to be averaged, else the one that goes is dropped: validation questions, paired.

    python benchmarks/threshold.py --model tiny-qwen2-vl --items clips

``novel`` averages everything, the last row nothing; in between lies the rule ``selective``. No test question is
looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from illava_hooks import METHODS, Method, evaluate
from illava_hooks.merge.rules import selective
from illava_hooks.tools.evaluate import Row
from illava_hooks.tools.loading import load_model, quiet
from split import ITEMS

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 2.0)


def averaging_from(threshold: float) -> Method:
    """``novel-agnostic`` which averages tokens whose centred cosine is at least that; from 2.0 on none has."""
    name = f"from {threshold}" if threshold <= 1 else "drops all"
    return replace(METHODS["novel-agnostic"], name=name, merge=partial(selective, alike=threshold))


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; differences to the first method of a budget, 95 %, paired."""
    lines = ["| stage | kept | measured | method | accuracy | 95 % of the gain | KL |", "|---" * 7 + "|"]
    for row in rows:
        first = next(other for other in rows if (other.stage, other.kept) == (row.stage, row.kept))
        low, high = row.lead(first)
        gain = "" if row is first else f"{100 * low:+.1f} to {100 * high:+.1f}"
        cells = [row.stage, f"{row.kept:.3f}", f"{row.measured:.3f}", row.method, f"{row.accuracy:.1%}", gain]
        lines.append(f"| {' | '.join(cells)} | {row.divergence:.3f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks and prints."""
    parser = argparse.ArgumentParser(description="Average or drop: from which likeness on?")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", choices=ITEMS, default="scenes")
    parser.add_argument("--stage", default="encoder", help="encoder, language or both")
    parser.add_argument("--kept", default="0.1111", help="fractions of visual tokens left")
    parser.add_argument("--questions", type=int, default=600)
    given = parser.parse_args(arguments)
    quiet()
    model, processor = load_model(given.model)
    methods = [METHODS["novel-agnostic"], *map(averaging_from, THRESHOLDS), METHODS["fastv"]]
    kept = [float(part) for part in given.kept.split(",")]
    items = ITEMS[given.items](given.questions)
    print("\n".join(table(evaluate(model, processor, items, methods, stages=given.stage, kept=kept))))


if __name__ == "__main__":
    main()
