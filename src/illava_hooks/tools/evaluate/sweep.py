"""Methods at equal budgets, one row for each, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from illava_hooks.api import patch, unpatch
from illava_hooks.config import MergeSchedule
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import InputError
from illava_hooks.tools.datasets import Item
from illava_hooks.tools.evaluate.budgets import budget_settings, downsampled, find_method
from illava_hooks.tools.evaluate.run import Outcome, run_items
from illava_hooks.tools.evaluate.statistics import interval, paired_interval

__all__ = ["Row", "print_rows", "read_rows", "sweep"]


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its name; "none" is the unpatched model.
        stage: "encoder", "language" or "both".
        kept: fraction of the visual tokens asked for.
        measured: fraction behind the last merging layer of the last batch; of the prompt for "downsample".
        questions: how many.
        accuracy: share of right answers.
        accuracy_interval: 95 % bootstrap.
        loyalty: share of answers equal to the unpatched model's.
        divergence: mean KL of the first word's distribution from the unpatched model's, nats.
        by_kind: accuracy by kind of question.
        right: per question, for paired comparisons.
    """

    method: str
    stage: str
    kept: float
    measured: float
    questions: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    loyalty: float
    divergence: float
    by_kind: dict[str, float]
    right: list[bool]

    def lead(self, other: Row) -> tuple[float, float]:
        """95 % interval of the difference in accuracy to another row over the same questions."""
        return paired_interval(self.right, other.right)


def sweep(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    methods: Iterable[str],
    stages: Iterable[str],
    fractions: Iterable[float],
    file: Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 4,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Runs every combination; what ``file`` holds already is not run again.

    Args:
        model: an unpatched model; it is unpatched afterwards.
        processor: its processor.
        items: images, or videos; not both.
        methods: names; "downsample" has one row per fraction, whatever the stage.
        stages: of ``budgets.STAGES``.
        fractions: of visual tokens kept; 1 is the unpatched model, which always comes first.
        file: rows as JSON lines; appended to.
        batch_size: prompts in a batch.
        max_new_tokens: length of an answer at most.
        advance: told what runs next.

    Raises:
        InputError: there is no such method or stage, or a fraction is out of range; nothing has run then.
    """
    limits = find_family(model).limits(model)
    preset = limits.presets
    planned = _planned(preset["video" if items[0].video else "image"], methods, stages, fractions)
    known = {(row.method, row.stage, row.kept): row for row in read_rows(file)}
    advance("unpatched")
    stock = run_items(model, processor, items, batch_size, max_new_tokens)
    rows = [_row("none", "both", 1.0, 1.0, items, stock, stock)]
    if ("none", "both", 1.0) not in known:
        _append(file, rows[0])
    for (method, stage, kept), settings in planned.items():
        row = known.get((method, stage, kept))
        if row is None:
            advance(f"{method}, {stage}, {kept:.3f}")
            shown = items if settings else downsampled(items, kept)
            session = patch(model, **settings) if settings else None
            try:
                outcome = run_items(model, processor, shown, batch_size, max_new_tokens)
                measured = session.report.kept_fraction if session else kept
            finally:
                if session:
                    unpatch(model)
            row = _row(method, stage, kept, measured, items, outcome, stock)
            _append(file, row)
        rows.append(row)
    return rows


def _planned(
    schedule: MergeSchedule, methods: Iterable[str], stages: Iterable[str], fractions: Iterable[float]
) -> dict[tuple[str, str, float], dict[str, Any] | None]:
    """Arguments of ``patch`` by method, stage and fraction; None where the pictures are made smaller instead.

    Everything is checked here, before a long run begins.
    """
    planned: dict[tuple[str, str, float], dict[str, Any] | None] = {}
    stages = list(stages)
    methods = {name: None if name == "downsample" else find_method(name) for name in methods}
    for kept in fractions:
        settings = {stage: budget_settings(schedule, stage, kept) for stage in stages}
        for name, method in methods.items() if kept < 1 else ():
            if method is None:
                planned[name, "both", kept] = None
            else:
                planned |= {(name, stage, kept): {**settings[stage], "method": method} for stage in stages}
    return planned


def print_rows(rows: Sequence[Row]) -> None:
    """A table in Markdown."""
    print("| method | stage | kept | measured | accuracy | 95 % interval | loyalty | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row.accuracy_interval
        print(
            f"| {row.method} | {row.stage} | {row.kept:.3f} | {row.measured:.3f} | {row.accuracy:.1%} "
            f"| {low:.1%} to {high:.1%} | {row.loyalty:.1%} | {row.divergence:.3f} |"
        )


def _row(
    method: str, stage: str, kept: float, measured: float, items: Sequence[Item], outcome: Outcome, stock: Outcome
) -> Row:
    right = [given == item.answer for item, given in zip(items, outcome.answers, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for item, hit in zip(items, right, strict=True):
        kinds.setdefault(item.kind, []).append(hit)
    same = [given == before for given, before in zip(outcome.answers, stock.answers, strict=True)]
    return Row(
        method=method,
        stage=stage,
        kept=kept,
        measured=measured,
        questions=len(items),
        accuracy=sum(right) / len(right),
        accuracy_interval=interval(right),
        loyalty=sum(same) / len(same),
        divergence=float(stock.divergence(outcome).mean()),
        by_kind={kind: sum(hits) / len(hits) for kind, hits in kinds.items()},
        right=right,
    )


def _append(file: Path | None, row: Row) -> None:
    if file is not None:
        body = {**asdict(row), "right": "".join(str(int(hit)) for hit in row.right)}
        with file.open("a") as lines:
            lines.write(json.dumps(body) + "\n")


def read_rows(file: Path | None) -> list[Row]:
    """The rows that a sweep wrote; none where there is no file.

    Raises:
        InputError: the file holds something else.
    """
    if file is None or not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            right = [hit == "1" for hit in row["right"]]
            rows.append(Row(**{**row, "accuracy_interval": tuple(row["accuracy_interval"]), "right": right}))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{file.name}, line {number} is no row of an evaluation; give a new file") from error
    return rows
