"""``evaluate``, the function behind ``illava-hooks evaluate``, and the table that it prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any

from illava_hooks.errors import InputError
from illava_hooks.methods import METHODS, Method
from illava_hooks.tools.datasets import load_items
from illava_hooks.tools.evaluate.budgets import CONTROLS
from illava_hooks.tools.evaluate.rows import Interval, Row
from illava_hooks.tools.evaluate.sweep import sweep
from illava_hooks.tools.items import Item, make_item
from illava_hooks.tools.progress import Bar, Progress

__all__ = ["FRACTIONS", "default_methods", "evaluate", "print_rows"]

#: What is kept where nothing else is asked for.
FRACTIONS = (0.5, 0.3333, 0.2222, 0.1111)


def evaluate(
    model: Any,
    processor: Any,
    items: str | Path | Iterable[Item | Mapping[str, Any]] = "scenes",
    methods: str | Method | Iterable[str | Method] | None = None,
    *,
    stages: str | Iterable[str] = "both",
    kept: float | Iterable[float] = FRACTIONS,
    questions: int | None = None,
    match: str = "exact",
    output: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 4,
    progress: bool | Progress = True,
) -> list[Row]:
    """Measures what merging costs: accuracy, loyalty and divergence of methods at equal budgets.

    Args:
        model: an unpatched model of a family that has presets; it is unpatched afterwards.
        processor: its processor.
        items: "scenes", "small-scenes", "pairs", "clips", "easy-vqa", a file with JSON lines, or items: each a
            mapping with ``image`` or ``video``, ``question`` and, if you like, ``answer`` and ``kind``.
        methods: names in ``METHODS``, "uniform", "downsample", ``file.py:NAME``, or ``Method`` objects; by default
            all that can meet a budget; what cannot is left out, and said.
        stages: of "encoder", "language" and "both"; or "keep", which is ``patch(model, keep=...)``.
        kept: fractions of visual tokens left behind the last merging layer, each in (0, 1].
        questions: how many at most; by default 2,000 of a suite and all others.
        match: how answers are compared: "exact", "relaxed" (numbers within 5 %) or "contains".
        output: a file that keeps rows and answers, and goes on where an interrupted run of the same kind stopped.
        batch_size: prompts in a batch.
        max_new_tokens: length of an answer at most.
        progress: whether to say on standard error how far it is.

    Returns:
        One ``Row`` for each method, stage and fraction; the unpatched model's comes first. ``print_rows`` of
        ``illava_hooks.tools.evaluate`` prints them.

    Raises:
        InputError: an argument cannot be used, hooks of your own change the model, or ``output`` holds rows of
            another run.
        MergeConfigError: there is no such method, or one cannot keep as little; nothing was measured then.
        PatchStateError: the model is patched.
    """
    teller = progress if isinstance(progress, Progress) else Bar() if progress else Progress()
    counts: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    counts |= {} if questions is None else {"questions": questions}
    for name, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise InputError(f"{name} is {number!r}; give a whole number from 1 on")
    asked = _items(items, questions)
    if questions is not None and len(asked) < questions:
        teller.note(f"{questions} questions were asked for, and there are {len(asked)}")
    return sweep(
        model,
        processor,
        asked,
        default_methods() if methods is None else _listed("methods", methods, str | Method),
        _listed("stages", stages, str),
        [float(fraction) for fraction in _listed("kept", kept, Real)],
        None if output is None else Path(output),
        int(batch_size),
        int(max_new_tokens),
        match,
        teller,
        lenient=methods is None,
    )


def default_methods() -> list[str]:
    """All that can meet a budget: the published layout needs a square number of survivors, which few budgets leave."""
    return [*dict.fromkeys([*(name for name, method in METHODS.items() if method.layout == "aligned"), *CONTROLS])]


def _listed(name: str, given: Any, kind: type | UnionType) -> list[Any]:
    """One or several as a list.

    Raises:
        InputError: there are none, or others.
    """
    try:
        found = [given] if isinstance(given, kind | str) else list(given)
    except TypeError:
        found = [given]
    if not found:
        raise InputError(f"{name} is empty; give one or more, or leave it out")
    for one in found:
        if not isinstance(one, kind) or isinstance(one, bool):
            wanted = "numbers" if name == "kept" else "names or Method objects" if name == "methods" else "names"
            raise InputError(f"{name} has {one!r}; give {wanted}")
    return found


def _items(items: str | Path | Iterable[Item | Mapping[str, Any]], questions: int | None) -> list[Item]:
    if isinstance(items, str | Path):
        return load_items(str(items), questions)
    if not isinstance(items, Iterable):
        raise InputError(f"items is {items!r}; give the name of a suite, a file, or items")
    given = [
        item if isinstance(item, Item) else make_item(item, f"item {number}", kind="items")
        for number, item in enumerate(items)
    ]
    return given[:questions]


def print_rows(rows: Sequence[Row]) -> None:
    """A table in Markdown."""
    print("| method | stage | kept | measured | questions | accuracy | 95 % interval | loyalty | 95 % interval | KL |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        measured = "" if row.measured is None else f"{row.measured:.3f}"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%}"
        count = (
            str(row.questions) if row.labelled == row.questions else f"{row.questions} ({row.labelled} with answer)"
        )
        print(
            f"| {row.method} | {row.stage} | {row.kept:.3f} | {measured} | {count} | {accuracy} "
            f"| {_span(row.accuracy_interval)} | {row.loyalty:.1%} | {_span(row.loyalty_interval)} "
            f"| {row.divergence:.3f} |"
        )


def _span(found: Interval | None) -> str:
    return "" if found is None else f"{found[0]:.1%} to {found[1]:.1%}"
