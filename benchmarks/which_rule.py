"""Which merge rule to take: read off the rows of ``evaluate``, with paired intervals.

A method is *behind* another at one budget if the other answers more questions, beyond the 95 % interval, and was left
no more tokens. Of so many comparisons some say so by chance, so they are also counted with that taken into account.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from scipy.stats import binomtest, false_discovery_control

from illava_hooks.tools.evaluate import Row
from variants import selective_without_sizes, without_sizes

__all__ = ["SAME", "Budget", "budgets", "is_ahead", "overview_table", "rules_table", "which_table"]

#: Methods that a recommended one must not be behind.
RIVALS = ("fastv", "illava", "nearest", "tome", "random")
#: Methods that are another one where one stage merges alone, so that they are measured once.
SAME = {
    "encoder": {"novel-agnostic": "novel"},
    "language": {
        "novel": "diverse",
        "selective": "novel-agnostic",
        without_sizes.name: "novel-agnostic",
        selective_without_sizes.name: "novel-agnostic",
    },
}
#: Rows of what is no method: the unpatched model, and controls that look at nothing.
NO_METHODS = ("none", "uniform", "downsample")
#: Standard errors of a mean difference between which its 95 % interval could end on either side of 0.
DOUBT = 1.5, 2.5
#: Fractions whose tokens count as equally many.
EQUAL = 0.02
#: The share of wrong ones among what is found with many comparisons taken into account.
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True)
class Budget:
    """What was measured of one model on one kind of items, in one stage, at one fraction.

    Attributes:
        model: its name.
        items: their name.
        stage: of the merges.
        kept: fraction asked for.
        rows: by method.
    """

    model: str
    items: str
    stage: str
    kept: float
    rows: Mapping[str, Row]

    def keeps_more(self, name: str) -> bool:
        """Whether a method was left more tokens than the others."""
        left = {method: row.measured or 0 for method, row in self.rows.items()}
        return left.get(name, 0) > min(left.values()) + EQUAL

    def leads(self, name: str, other: str) -> bool:
        """Whether a method is ahead of another beyond the interval, with no more tokens."""
        return self.is_fair(name, other) and is_ahead(self.rows[name], self.rows[other])

    def is_fair(self, name: str, other: str) -> bool:
        """Whether a method was left no more tokens than another."""
        mine, its = self.rows[name].measured, self.rows[other].measured
        return mine is None or its is None or mine <= its + EQUAL

    def rivals_of(self, name: str) -> list[str]:
        """The rivals that a method can be compared with."""
        return [rival for rival in RIVALS if rival in self.rows and rival != name]

    def ahead_of(self, name: str) -> list[str]:
        """The rivals that a method is behind, best first."""
        found = [rival for rival in self.rivals_of(name) if self.leads(rival, name)]
        return sorted(found, key=lambda rival: -(self.rows[rival].accuracy or 0))

    @cached_property
    def unbeaten(self) -> list[str]:
        """Methods that no other one leads, best first."""
        names = sorted(self.rows, key=lambda name: -(self.rows[name].accuracy or 0))
        return [name for name in names if not any(self.leads(other, name) for other in names if other != name)]


def is_ahead(mine: Row, its: Row) -> bool:
    """Whether the paired 95 % interval of a difference lies above 0; resampled only where that could be doubted."""
    gains = np.array(mine.gains(its))
    error = float(gains.std()) / len(gains) ** 0.5
    errors = float(gains.mean()) / error if error else 0.0
    return errors > DOUBT[0] and (errors > DOUBT[1] or mine.lead(its)[0] > 0)


def chance(mine: Row, its: Row) -> float:
    """How probable so large a lead is, or a larger one, if neither is better (McNemar's exact test, one-sided)."""
    gains = np.array(mine.gains(its))
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    return float(binomtest(won, won + lost, alternative="greater").pvalue) if won + lost else 1.0


def surely_behind(found: Sequence[Budget], name: str) -> int:
    """To how many rivals, each at each budget, a method is behind with all comparisons taken into account.

    At most 5 % of such findings are wrong on average (Benjamini and Hochberg 1995).
    """
    chances = [
        chance(budget.rows[rival], budget.rows[name])
        for budget in found
        if name in budget.rows
        for rival in budget.rivals_of(name)
        if budget.is_fair(rival, name)
    ]
    return int((false_discovery_control(chances) < FALSE_DISCOVERIES).sum()) if chances else 0


def budgets(model: str, items: str, rows: Sequence[Row]) -> Iterator[Budget]:
    """The budgets of some rows, in the order of stages and then of what is left; none where no rival is measured."""
    merged = [row for row in rows if row.method not in NO_METHODS and row.accuracy is not None]
    keys = dict.fromkeys((row.stage, row.kept) for row in merged)
    for stage, kept in sorted(keys, key=lambda key: (key[0], -key[1])):
        found = {row.method: row for row in merged if (row.stage, row.kept) == (stage, kept)}
        if not found.keys() & {*RIVALS}:
            continue
        for name, other in SAME.get(stage, {}).items():
            if other in found:
                found[name] = replace(found[other], method=name)
        yield Budget(model, items, stage, kept, found)


def overview_table(found: Sequence[Budget], stock: Row) -> list[str]:
    """Markdown: accuracy of each method at each budget, bold where no other one is ahead.

    Args:
        found: the budgets of one model on one kind of items.
        stock: the unpatched model's row.
    """
    heads = ["method", *(f"{budget.stage}, {Fraction(budget.kept).limit_denominator(20)}" for budget in found)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines.append(f"| unpatched {'|'.join([''] + [f' {100 * (stock.accuracy or 0):.1f} '] * len(found))}|")
    for name in by_merit(found):
        cells = []
        for budget in found:
            row = budget.rows.get(name)
            cell = "" if row is None else f"{100 * (row.accuracy or 0):.1f}"
            cell = f"**{cell}**" if name in budget.unbeaten else cell
            cells.append(cell + "+" * budget.keeps_more(name))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def which_table(found: Sequence[Budget]) -> list[str]:
    """Markdown: at how many budgets no other method is ahead of each, by stage."""
    heads = ("model", "items", "stage", "budgets", "none is ahead of, at how many of them")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for place in dict.fromkeys((budget.model, budget.items, budget.stage) for budget in found):
        own = [budget for budget in found if (budget.model, budget.items, budget.stage) == place]
        counts = {name: sum(name in budget.unbeaten for budget in own) for name in by_merit(own)}
        best = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
        told = ", ".join(f"`{name}` {counts[name]}" for name in best)
        lines.append(f"| {' | '.join(place)} | {len(own)} | {told} |")
    return lines


def by_merit(found: Sequence[Budget]) -> list[str]:
    """All methods, those first that lack least to the best at the budgets at which they were measured."""
    names = dict.fromkeys(name for budget in found for name in budget.rows)
    return sorted(names, key=lambda name: mean_gap(found, name))


def mean_gap(found: Sequence[Budget], name: str) -> float:
    """What a method lacks to the best one, on average over the budgets at which it was measured."""
    own = [_gap(budget, name) for budget in found if name in budget.rows]
    return sum(own) / len(own)


def rules_table(found: Sequence[Budget]) -> list[str]:
    """Markdown: how often each method is behind, over all budgets where it was measured."""
    heads = ["method", "budgets", "behind any in", "behind a rival in", "which rival, where"]
    heads += ["rivals, many comparisons considered", "points below the best"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    names = dict.fromkeys(name for budget in found for name in budget.rows)
    measured = {name: [budget for budget in found if name in budget.rows] for name in names}
    lost = {name: [budget for budget in own if budget.ahead_of(name)] for name, own in measured.items()}
    beaten = {name: sum(name not in budget.unbeaten for budget in own) for name, own in measured.items()}
    gaps = {name: mean_gap(found, name) for name in names}
    for name in sorted(names, key=lambda name: (beaten[name] / len(measured[name]), gaps[name])):
        where = "; ".join(
            f"{budget.model} {budget.items}, {budget.stage}, {budget.kept:.3f}: {', '.join(budget.ahead_of(name))}"
            for budget in lost[name][:4]
        )
        where += f"; {len(lost[name]) - 4} more" * (len(lost[name]) > 4)
        counts = [str(count) for count in (len(measured[name]), beaten[name], len(lost[name]))]
        cells = [f"`{name}`", *counts, where, str(surely_behind(found, name)), f"{100 * gaps[name]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gap(budget: Budget, name: str) -> float:
    """How much accuracy a method lacks to the best one with no more tokens."""
    fair = [row for other, row in budget.rows.items() if budget.is_fair(other, name)]
    return max(row.accuracy or 0 for row in fair) - (budget.rows[name].accuracy or 0)
