"""How encoder and language model should share the cut of ``keep``: validation questions, several splits, paired.

The encoder leaves ``keep ** exponent`` of an image's tokens, the language model the rest down to ``keep``: 0 is the
language model alone, 1/2 the square root that ``keep`` uses, 1 the encoder alone. No test question is looked at.
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

from illava_hooks import MergeConfig, MergeSchedule, MergeSession, patch, tiny, unpatch
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
    """One split at one ``keep``.

    Attributes:
        keep: fraction of visual tokens left.
        exponent: the encoder leaves ``keep ** exponent``.
        measured: fraction left, over all questions.
        flops: prefill's, of the unpatched model's, over all questions.
        right: whether each question is answered right.
        same: whether each answer is the unpatched model's.
    """

    keep: float
    exponent: float
    measured: float
    flops: float
    right: list[bool]
    same: list[bool]


def split_session(model: Any, keep: float, exponent: float, method: str) -> MergeSession:
    """Patches a model with another split than that of ``keep`` alone, by way of a file of settings."""
    plain = patch(model, keep=keep, method=method).config

    def shared(schedule: MergeSchedule) -> MergeSchedule:
        return replace(schedule, keep_encoder=max(keep, keep**exponent))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "split.json"
        MergeConfig(shared(plain.image), shared(plain.video), plain.method).save(file)
        return patch(model, preset=file)


def measure_splits(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keeps: Sequence[float],
    exponents: Sequence[float],
    method: str,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Split]:
    """Every split at every ``keep``, on the same questions.

    Args:
        model: an unpatched model; unpatched afterwards.
        processor: its processor.
        items: what to ask.
        keeps: fractions left.
        exponents: of the splits.
        method: a name in ``METHODS``.
        advance: told what runs next.
    """
    stock = run_items(model, processor, items).answers
    found = []
    for keep in keeps:
        for exponent in exponents:
            advance(f"keep {keep:.3f}, exponent {exponent}")
            session = split_session(model, keep, exponent, method)
            sums = [0, 0, 0, 0]

            def count(done: int, session: MergeSession = session, sums: list[int] = sums) -> None:
                report = session.report
                whole = sum(visual.prompt_tokens for visual in report.visuals)
                now = (sum(visual.left for visual in report.visuals), whole, *report.flops)
                sums[:] = [before + more for before, more in zip(sums, now, strict=True)]

            answers = run_items(model, processor, items, advance=count).answers
            unpatch(model)
            right = [given == item.answer for given, item in zip(answers, items, strict=True)]
            same = [given == before for given, before in zip(answers, stock, strict=True)]
            found.append(Split(keep, exponent, sums[0] / sums[1], sums[2] / sums[3], right, same))
    return found


def print_splits(found: Sequence[Split]) -> None:
    """A table in Markdown: each split, and the 95 % interval of its lead over the square root."""
    print("| keep | encoder leaves | measured | prefill FLOPs | accuracy | difference | loyalty | difference |")
    print("|---|---|---|---|---|---|---|---|")
    roots = {split.keep: split for split in found if split.exponent == SQUARE_ROOT}
    for split in found:
        cells = []
        for mine, its in ((split.right, roots[split.keep].right), (split.same, roots[split.keep].same)):
            low, high = paired_interval(mine, its)
            cells += [f"{sum(mine) / len(mine):.1%}", f"{low:+.1%} to {high:+.1%}" if split.exponent != 0.5 else ""]
        print(
            f"| {split.keep:.3f} | keep^{split.exponent:g} = {split.keep**split.exponent:.3f} | {split.measured:.3f} "
            f"| {split.flops:.3f} | {' | '.join(cells)} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help=f"{', '.join(tiny.ALIASES)}, a folder, or a hub name")
    parser.add_argument("--items", default="scenes", choices=list(ITEMS))
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--keep", default="0.5,0.3333,0.2222,0.1111", help="fractions of visual tokens left")
    parser.add_argument("--exponents", default="0,0.25,0.5,0.75,1", help="with 0.5 among them")
    parser.add_argument("--method", default="illava")
    parser.add_argument("--output", type=Path, help="rows as JSON lines")
    given = parser.parse_args(arguments)
    exponents = [float(part) for part in given.exponents.split(",")]
    if SQUARE_ROOT not in exponents:
        parser.error(f"--exponents is {given.exponents!r}; 0.5, which all are compared with, must be among them")
    quiet()
    model, processor = load_model(given.model)
    items = ITEMS[given.items](given.questions)
    keeps = [float(part) for part in given.keep.split(",")]

    def tell(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    found = measure_splits(model, processor, items, keeps, exponents, given.method, tell)
    if given.output is not None:
        given.output.write_text("".join(json.dumps(asdict(split)) + "\n" for split in found), encoding="utf-8")
    print_splits(found)


if __name__ == "__main__":
    main()
