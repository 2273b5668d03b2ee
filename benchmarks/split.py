"""How encoder and language model should share the cut of ``keep``: validation questions, several splits, paired.

The encoder leaves ``keep ** exponent`` of an image's tokens, the language model the rest down to ``keep``: 0 is the
language model alone, 1/2 the square root, 1 the encoder alone. At one ``keep`` a later cut answers better and costs
more. ``--equal-flops`` compares what costs the same: each split gets the ``keep`` at which a published 7B model's
prefill has as many FLOPs as with the square root at the ``keep`` of the row. No test question is looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ceiling
from illava_hooks import PRESETS, MergeSchedule, MergeSession, patch, tiny, unpatch
from illava_hooks.tools.datasets import Item, clip_items, pair_items, scene_items
from illava_hooks.tools.evaluate import paired_interval, run_items
from illava_hooks.tools.loading import load_model, quiet

#: Validation questions by name.
ITEMS: dict[str, Callable[[int], list[Item]]] = {
    "scenes": lambda count: scene_items(count, "validation"),
    "pairs": lambda count: pair_items(count, "validation"),
    "clips": lambda count: clip_items(count, "validation"),
}
SQUARE_ROOT = 0.5


@dataclass(frozen=True, slots=True)
class Split:
    """One split of one row.

    Attributes:
        row: ``keep`` of the square root that it is compared with.
        exponent: the encoder leaves ``keep ** exponent``.
        keep: fraction of visual tokens left; that of the row, or as cheap.
        measured: fraction left, over all questions.
        flops: prefill's, of the unpatched model's, over all questions.
        published: the same of a published 7B model, by arithmetic.
        right: whether each question is answered right.
        same: whether each answer is the unpatched model's.
    """

    row: float
    exponent: float
    keep: float
    measured: float
    flops: float
    published: float
    right: list[bool]
    same: list[bool]


def shared(schedule: MergeSchedule, keep: float, exponent: float) -> MergeSchedule:
    """The layers of a schedule with one number and a split."""
    encoder = max(keep, keep**exponent)
    return MergeSchedule(schedule.vit_layers, 0, schedule.llm_layers, 1.0, keep, encoder)


def published_flops(family: str, keep: float, exponent: float) -> float:
    """Prefill FLOPs of a published 7B model with its preset's layers, of the unpatched model's.

    Raises:
        ValueError: there is no arithmetic for the family.
    """
    schedule = shared(PRESETS[family]["image"], keep, exponent)
    if family == "llava_onevision":
        return 1 / ceiling.ratios(ceiling.llava(4, schedule))[0]
    if family == "qwen2_vl":
        return 1 / ceiling.ratios(ceiling.qwen("", 1, 5120, schedule))[0]
    raise ValueError(f"family is {family!r}; benchmarks/ceiling.py knows llava_onevision and qwen2_vl")


def as_cheap(family: str, keep: float, exponent: float) -> float | None:
    """The ``keep`` of a split that costs what the square root costs; None: nothing is as cheap."""
    wanted, low, high = published_flops(family, keep, SQUARE_ROOT), 0.001, 1.0
    if published_flops(family, low, exponent) > wanted:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if published_flops(family, middle, exponent) > wanted else (middle, high)
    return low


def patch_split(model: Any, keep: float, exponent: float, method: str) -> MergeSession:
    """Patches a model with a split of one's own, by way of a file of settings."""
    plain = patch(model, keep=keep, method=method).config
    config = replace(plain, image=shared(plain.image, keep, exponent), video=shared(plain.video, keep, exponent))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "split.json"
        config.save(file)
        return patch(model, preset=file)


def measure_splits(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    rows: Sequence[float],
    exponents: Sequence[float],
    method: str,
    equal_flops: bool,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Split]:
    """Every split in every row, on the same questions.

    Args:
        model: an unpatched model; unpatched afterwards.
        processor: its processor.
        items: what to ask.
        rows: ``keep`` of the square root.
        exponents: of the splits.
        method: a name in ``METHODS``.
        equal_flops: whether splits get the ``keep`` at which they are as cheap.
        advance: told what runs next.
    """
    family = model.config.model_type
    stock = run_items(model, processor, items).answers
    found = []
    for row in rows:
        for exponent in exponents:
            keep = as_cheap(family, row, exponent) if equal_flops else row
            if keep is None:
                continue
            advance(f"row {row:.3f}, exponent {exponent}, keep {keep:.3f}")
            patch_split(model, keep, exponent, method)
            merged = run_items(model, processor, items)
            answers = merged.answers
            unpatch(model)
            right = [given == item.answer for given, item in zip(answers, items, strict=True)]
            same = [given == before for given, before in zip(answers, stock, strict=True)]
            published = published_flops(family, keep, exponent)
            shares = merged.left / merged.whole, merged.flops[0] / merged.flops[1], published
            found.append(Split(row, exponent, keep, *shares, right, same))
    return found


def print_splits(found: Sequence[Split]) -> None:
    """A table in Markdown: each split, and the 95 % interval of its lead over the square root."""
    print("| keep | encoder leaves | measured | FLOPs | 7B | accuracy | lead | loyalty | lead |")
    print("|---|---|---|---|---|---|---|---|---|")
    roots = {split.row: split for split in found if split.exponent == SQUARE_ROOT}
    for split in found:
        root, cells = roots[split.row], []
        for mine, its in ((split.right, root.right), (split.same, root.same)):
            low, high = paired_interval(mine, its)
            cells += [f"{sum(mine) / len(mine):.1%}", "" if split is root else f"{low:+.1%} to {high:+.1%}"]
        print(
            f"| {split.keep:.3f} | keep^{split.exponent:g} = {split.keep**split.exponent:.3f} | {split.measured:.3f} "
            f"| {split.flops:.3f} | {split.published:.3f} | {' | '.join(cells)} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help=f"one of {', '.join(tiny.ALIASES)}")
    parser.add_argument("--items", default="scenes", choices=list(ITEMS))
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--keep", default="0.5,0.3333,0.2222,0.1111", help="fractions of visual tokens left")
    parser.add_argument("--exponents", default="0,0.25,0.5,0.75,1", help="with 0.5 among them")
    parser.add_argument("--method", default="illava")
    parser.add_argument("--equal-flops", action="store_true", help="compare what costs the same at 7B")
    parser.add_argument("--output", type=Path, help="rows as JSON lines")
    given = parser.parse_args(arguments)
    exponents = [float(part) for part in given.exponents.split(",")]
    if SQUARE_ROOT not in exponents:
        parser.error(f"--exponents is {given.exponents!r}; 0.5, which all are compared with, must be among them")
    quiet()
    model, processor = load_model(given.model)
    items, rows = ITEMS[given.items](given.questions), [float(part) for part in given.keep.split(",")]

    def tell(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    found = measure_splits(model, processor, items, rows, exponents, given.method, given.equal_flops, tell)
    if given.output is not None:
        given.output.write_text("".join(json.dumps(asdict(split)) + "\n" for split in found), encoding="utf-8")
    print_splits(found)


if __name__ == "__main__":
    main()
