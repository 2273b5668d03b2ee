"""Which merge rule to take: read off the rows of ``evaluate``, with paired intervals.

A method is *behind* another at one budget if the other answers more questions, beyond the 95 % interval, and was left
no more tokens. Of so many comparisons some say so by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from illava_hooks.tools.evaluate import Row

__all__ = ["Budget", "budgets", "rules_table", "which_table"]

#: Methods that a recommended one must not be behind.
RIVALS = ("fastv", "illava", "nearest", "tome", "random")
#: Fractions whose tokens count as equally many.
EQUAL = 0.02


@dataclass(frozen=True, slots=True)
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

    def leads(self, name: str, other: str) -> bool:
        """Whether a method is ahead of another beyond the interval, with no more tokens."""
        mine, its = self.rows[name], self.rows[other]
        dearer = mine.measured is not None and its.measured is not None and mine.measured > its.measured + EQUAL
        return not dearer and mine.lead(its)[0] > 0

    def ahead_of(self, name: str) -> list[str]:
        """The rivals that a method is behind, best first."""
        found = [rival for rival in RIVALS if rival in self.rows and rival != name and self.leads(rival, name)]
        return sorted(found, key=lambda rival: -(self.rows[rival].accuracy or 0))

    def unbeaten(self) -> list[str]:
        """Methods that no other one leads, best first."""
        names = sorted(self.rows, key=lambda name: -(self.rows[name].accuracy or 0))
        return [name for name in names if not any(self.leads(other, name) for other in names if other != name)]


def budgets(model: str, items: str, rows: Sequence[Row]) -> Iterator[Budget]:
    """The budgets of a file of rows, in the order of stages and then of what is left."""
    merged = [row for row in rows if row.method != "none" and row.accuracy is not None]
    keys = dict.fromkeys((row.stage, row.kept) for row in merged)
    for stage, kept in sorted(keys, key=lambda key: (key[0], -key[1])):
        found = {row.method: row for row in merged if (row.stage, row.kept) == (stage, kept)}
        yield Budget(model, items, stage, kept, found)


def which_table(found: Sequence[Budget]) -> list[str]:
    """Markdown: at each budget the methods that none is ahead of."""
    heads = ("model", "items", "stage", "kept", "none is ahead of, best first", "`illava`", "`random`")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for budget in found:
        best = ", ".join(f"`{name}` {budget.rows[name].accuracy:.1%}" for name in budget.unbeaten())
        others = [f"{budget.rows[name].accuracy:.1%}" if name in budget.rows else "" for name in ("illava", "random")]
        cells = [budget.model, budget.items, budget.stage, f"{budget.kept:.3f}", best, *others]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rules_table(found: Sequence[Budget]) -> list[str]:
    """Markdown: how often each method is behind, over all budgets where it was measured."""
    heads = ("method", "budgets", "behind any in", "behind a rival in", "which rival, where", "points below the best")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    names = dict.fromkeys(name for budget in found for name in budget.rows)
    measured = {name: [budget for budget in found if name in budget.rows] for name in names}
    lost = {name: [budget for budget in own if budget.ahead_of(name)] for name, own in measured.items()}
    beaten = {name: sum(name not in budget.unbeaten() for budget in own) for name, own in measured.items()}
    gaps = {name: sum(_gap(budget, name) for budget in own) / len(own) for name, own in measured.items()}
    for name in sorted(names, key=lambda name: (beaten[name] / len(measured[name]), gaps[name])):
        where = "; ".join(
            f"{budget.model} {budget.items}, {budget.stage}, {budget.kept:.3f}: {', '.join(budget.ahead_of(name))}"
            for budget in lost[name][:4]
        )
        where += f"; {len(lost[name]) - 4} more" * (len(lost[name]) > 4)
        counts = [str(count) for count in (len(measured[name]), beaten[name], len(lost[name]))]
        cells = [f"`{name}`", *counts, where, f"{100 * gaps[name]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gap(budget: Budget, name: str) -> float:
    """How much accuracy a method lacks to the best one with no more tokens."""
    mine = budget.rows[name]
    fair = [row for row in budget.rows.values() if (row.measured or 0) <= (mine.measured or 0) + EQUAL]
    return max(row.accuracy or 0 for row in fair) - (mine.accuracy or 0)
