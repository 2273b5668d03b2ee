"""Methods at equal budgets, one row for each, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from illava_hooks.api import patch, session_of, unpatch
from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import InputError, MergeConfigError, PatchStateError
from illava_hooks.methods import METHODS, Method
from illava_hooks.tools.evaluate.budgets import budget_settings, downsampled
from illava_hooks.tools.evaluate.fingerprint import fingerprint
from illava_hooks.tools.evaluate.identity import identity
from illava_hooks.tools.evaluate.matching import Match, find_match, is_right
from illava_hooks.tools.evaluate.rows import Key, Row, RowFile
from illava_hooks.tools.evaluate.run import Outcome, Prompts, answering, check_questions, run_items
from illava_hooks.tools.evaluate.statistics import interval
from illava_hooks.tools.items import Item
from illava_hooks.tools.methods import find_method
from illava_hooks.tools.progress import Progress

__all__ = ["sweep"]

STOCK: Key = ("none", "both", 1.0)
DOWNSAMPLE = "downsample"


@dataclass(frozen=True, slots=True)
class _Plan:
    """One row to be measured.

    Attributes:
        identity: what its method is.
        settings: arguments of ``patch`` by modality; None where the pictures are made smaller instead.
    """

    identity: str | None
    settings: Mapping[Modality, dict[str, Any]] | None


def sweep(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    methods: Iterable[str | Method],
    stages: Iterable[str],
    fractions: Iterable[float],
    file: Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 4,
    match: str = "exact",
    progress: Progress | None = None,
    lenient: bool = False,
) -> list[Row]:
    """Runs every combination; what ``file`` holds already of the same run is not run again.

    Args:
        model: an unpatched model; it is unpatched afterwards.
        processor: its processor.
        items: images and videos; each uses the layers of its own preset.
        methods: as ``find_method`` takes them; "downsample" has one row per fraction, whatever the stage.
        stages: of ``budgets.STAGES``.
        fractions: of visual tokens kept; 1 is the unpatched model, which always comes first.
        file: rows as JSON lines under the fingerprint of their run; appended to.
        batch_size: prompts in a batch.
        max_new_tokens: length of an answer at most.
        match: how answers are compared, a key of ``MATCHES``.
        progress: hears what runs, and which rows are reused.
        lenient: whether a method that cannot keep as little is left out, and said, where it would be an error.

    Raises:
        InputError: there are no items, a question cannot be asked, no such stage or comparison, a fraction is out of
            range, two methods have one name, or ``file`` holds rows of another run; nothing has run then.
        MergeConfigError: there is no such method, or one cannot keep as little; nothing has run then.
        PatchStateError: the model is patched.
        UnsupportedModelError: the model cannot merge like that; nothing has run then.
    """
    progress = progress or Progress()
    if session_of(model) is not None:
        raise PatchStateError("model is patched, and the unpatched one is measured as well; call unpatch(model) first")
    if not items:
        raise InputError("items is empty; give one or more")
    compare = find_match(match)
    check_questions(processor, items)
    planned = _planned(_schedules(model, items), methods, stages, fractions)
    if lenient:
        planned = _within_reach(model, planned, progress)
    record = None
    if file is not None:
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "match": match}
        record = RowFile(file, fingerprint(model, processor, items, **settings), progress.note)
    whats = {STOCK: _Plan(STOCK[0], {}), **planned}
    known = {key: row for key, plan in whats.items() if record and (row := record.find(key, plan.identity))}
    if known:
        progress.note(f"reused from {file}: {'; '.join(_label(key) for key in known)}")
    missing = [key for key in planned if key not in known]
    _check(model, [planned[key] for key in missing])
    if missing or STOCK not in known:
        unlabelled = sum(not item.accepted for item in items)
        if unlabelled:
            progress.note(
                f"{unlabelled} of {len(items)} questions have no answer: they count for loyalty and KL alone"
            )
        progress.begin(len(items) * (1 + len(missing)))
        try:
            with answering(model):
                run = _Run(model, processor, items, batch_size, max_new_tokens, compare, progress)
                for row in run.rows({key: planned[key] for key in missing}, known.get(STOCK)):
                    if record and row.key not in known:
                        record.add(row)
                    known.setdefault(row.key, row)
        finally:
            progress.end()
    return [known[key] for key in whats]


def _schedules(model: Any, items: Sequence[Item]) -> dict[Modality, MergeSchedule]:
    """The presets of what the items hold.

    Raises:
        InputError: there is none.
    """
    limits = find_family(model).limits(model)
    held: dict[Modality, None] = {"video" if item.video else "image": None for item in items}
    for modality in held:
        if modality not in limits.presets:
            raise InputError(
                f"items hold {modality}s, for which {limits.family} has no preset, so no layers are known; give others"
            )
    return {modality: limits.presets[modality] for modality in held}


def _planned(
    schedules: Mapping[Modality, MergeSchedule],
    methods: Iterable[str | Method],
    stages: Iterable[str],
    fractions: Iterable[float],
) -> dict[Key, _Plan]:
    """What each row needs. Everything is checked here, before a long run begins."""
    planned: dict[Key, _Plan] = {}
    stages, named = list(stages), _by_name(methods)
    for kept in fractions:
        budgets = {
            stage: {kind: budget_settings(schedule, stage, kept) for kind, schedule in schedules.items()}
            for stage in stages
        }
        for name, method in named.items() if kept < 1 else ():
            if method is None:
                planned[name, "both", kept] = _Plan(name, None)
                continue
            what = identity(method)
            for stage, by_kind in budgets.items():
                settings = {kind: {**numbers, "method": method} for kind, numbers in by_kind.items()}
                planned[name, stage, kept] = _Plan(what, settings)
    return planned


def _check(model: Any, plans: Iterable[_Plan]) -> None:
    """Whether the model takes all settings, before a long run begins.

    Raises:
        MergeConfigError: a method cannot keep as little in these layers.
        UnsupportedModelError: the model cannot merge like that.
    """
    for plan in plans:
        for settings in (plan.settings or {}).values():
            patch(model, **settings)
            unpatch(model)


def _within_reach(model: Any, planned: Mapping[Key, _Plan], progress: Progress) -> dict[Key, _Plan]:
    """The rows whose methods can keep as little; the others are told."""
    found = {}
    for key, plan in planned.items():
        try:
            _check(model, [plan])
        except MergeConfigError as error:
            progress.note(f"left out: {_label(key)} ({error})")
        else:
            found[key] = plan
    return found


def _by_name(methods: Iterable[str | Method]) -> dict[str, Method | None]:
    """Methods by the names of their rows; None for "downsample".

    Raises:
        InputError: a name stands for two.
    """
    found: dict[str, Method | None] = {}
    for choice in methods:
        method = None if choice == DOWNSAMPLE else find_method(choice)
        name = DOWNSAMPLE if method is None else method.name
        other = found.get(name, METHODS.get(name, method))
        if (method is not None and name in (STOCK[0], DOWNSAMPLE)) or other != method:
            raise InputError(f"two methods are called {name!r}; give Method(...) another name")
        found[name] = method
    return found


class _Run:
    """Measures rows of one model on the same items."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        batch_size: int,
        max_new_tokens: int,
        match: Match,
        progress: Progress,
    ) -> None:
        self.model, self.processor, self.items = model, processor, items
        self.lengths = batch_size, max_new_tokens
        self.match, self.progress = match, progress
        self.prompts = Prompts(processor)

    def rows(self, planned: Mapping[Key, _Plan], before: Row | None) -> Iterator[Row]:
        """The unpatched model, then what is planned.

        Args:
            planned: what each row needs.
            before: what the unpatched model said earlier.
        """
        self.progress.step("unpatched")
        stock = self._outcome(self.items)
        if before is not None and before.answers != stock.answers:
            changed = sum(a != b for a, b in zip(before.answers, stock.answers, strict=True))
            self.progress.note(f"the unpatched model now gives {changed} other answers than in its row")
        yield self._row(STOCK, STOCK[0], stock, stock, 1.0)
        for key, plan in planned.items():
            self.progress.step(_label(key))
            if plan.settings is None:
                outcome = self._outcome(downsampled(self.items, key[2]))
                measured = outcome.whole / stock.whole if stock.whole else None
            else:
                outcome = self._merged(plan.settings)
                measured = outcome.left / outcome.whole
            yield self._row(key, plan.identity, outcome, stock, measured)

    def _outcome(self, items: Sequence[Item]) -> Outcome:
        return run_items(self.model, self.processor, items, *self.lengths, self.progress.advance, self.prompts)

    def _merged(self, settings: Mapping[Modality, dict[str, Any]]) -> Outcome:
        """Images and videos one after the other, each with its own settings; answers in the order of the items."""
        order: list[int] = []
        parts: list[Outcome] = []
        for modality, arguments in settings.items():
            chosen = [index for index, item in enumerate(self.items) if item.video == (modality == "video")]
            patch(self.model, **arguments)
            try:
                parts.append(self._outcome([self.items[index] for index in chosen]))
            finally:
                unpatch(self.model)
            order += chosen
        back = np.argsort(order)
        said = [answer for part in parts for answer in part.answers]
        return Outcome(
            [said[index] for index in back],
            np.concatenate([part.log_probs for part in parts])[back],
            sum(part.left for part in parts),
            sum(part.whole for part in parts),
            (sum(part.flops[0] for part in parts), sum(part.flops[1] for part in parts)),
        )

    def _row(self, key: Key, what: str | None, outcome: Outcome, stock: Outcome, measured: float | None) -> Row:
        said = zip(self.items, outcome.answers, strict=True)
        right = [is_right(answer, item.accepted, self.match) for item, answer in said]
        hits = [hit for hit in right if hit is not None]
        kinds: dict[str, list[bool]] = {}
        for item, hit in zip(self.items, right, strict=True):
            if hit is not None:
                kinds.setdefault(item.kind, []).append(hit)
        same = [given == before for given, before in zip(outcome.answers, stock.answers, strict=True)]
        return Row(
            *key,
            measured=measured,
            questions=len(right),
            labelled=len(hits),
            accuracy=sum(hits) / len(hits) if hits else None,
            accuracy_interval=interval(hits) if hits else None,
            loyalty=sum(same) / len(same),
            loyalty_interval=interval(same),
            divergence=float(stock.divergence(outcome).mean()),
            by_kind={kind: sum(found) / len(found) for kind, found in kinds.items()},
            right=right,
            answers=outcome.answers,
            identity=what,
        )


def _label(key: Key) -> str:
    return "unpatched" if key == STOCK else f"{key[0]}, {key[1]}, {key[2]:.3f}"
