"""``tune``, the function behind ``illava-hooks tune``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from illava_hooks.api import session_of
from illava_hooks.config import MergeConfig
from illava_hooks.config.settings import ModelLimits
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import IllavaHooksError, InputError, PatchStateError, UnsupportedModelError
from illava_hooks.methods import METHODS, Method
from illava_hooks.tools.evaluate.budgets import CONTROLS
from illava_hooks.tools.evaluate.front import default_methods
from illava_hooks.tools.evaluate.run import answering, check_questions
from illava_hooks.tools.items import Item
from illava_hooks.tools.loading import QUESTION
from illava_hooks.tools.methods import UNIFORM, find_method
from illava_hooks.tools.progress import SILENT, Bar, Progress
from illava_hooks.tools.tune.inputs import read_choice
from illava_hooks.tools.tune.judge import Judge
from illava_hooks.tools.tune.measure import Limit, Meter, Record
from illava_hooks.tools.tune.result import Tuning, conclude
from illava_hooks.tools.tune.search import planned, search
from illava_hooks.tools.tune.space import Candidate, Space

__all__ = ["tune"]

#: A cost that is no saving worth a change, and one that no search begins below.
MOST_COST, START_COST = 0.95, 0.6


def tune(
    model: Any,
    processor: Any,
    items: str | Path | Iterable[Item | Mapping[str, Any]] = "scenes",
    *,
    question: str | Sequence[str] | None = None,
    flops: float | None = None,
    loyalty: float | None = None,
    methods: str | Method | Iterable[str | Method] | None = None,
    pictures: int | None = None,
    minutes: float | None = 15,
    rounds: int = 3,
    measurements: int | None = None,
    seed: int = 0,
    rows: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 4,
    default_question: str = QUESTION,
    progress: bool | Progress = True,
) -> Tuning:
    """Searches method, layers, split and amounts for the best agreement with the unpatched model at a cost.

    No answers are needed, and none are looked at. The seed and the measurements decide what comes out; the time limit
    decides only how many of them there are.

    Args:
        model: an unpatched model; it is unpatched afterwards.
        processor: its processor.
        items: a folder of images and videos, each a prompt of its own; a file with JSON lines; "scenes", "pairs" or
            "clips" (drawn, of the validation split); or items as ``evaluate`` takes them.
        question: one or more, to every picture of a folder.
        flops: the cost: prefill FLOPs of the unpatched model's, in (0, 0.95]; by default those of the preset.
        loyalty: instead of a cost, the share of answers that must stay the same, in (0, 1], as cheaply as can be.
        methods: to choose from; by default all that can meet a budget, but for the controls.
        pictures: how many at most; by default 200 of a folder or a suite, all others.
        minutes: for all; None: as long as it takes.
        rounds: of successive halving.
        measurements: of the search at most; a tuning that ran out of time names the number that repeats it.
        seed: of all choices.
        rows: a file that keeps every measurement; given again, an interrupted run goes on with it.
        batch_size: prompts in a batch.
        max_new_tokens: length of an answer at most.
        default_question: what is asked about a folder when nothing is asked.
        progress: whether to say on standard error how far it is.

    Returns:
        What is recommended, and what it and its rivals do on pictures that the search did not see.

    Raises:
        InputError: an argument cannot be used, or ``rows`` holds measurements of another run.
        MergeConfigError: there is no such method.
        PatchStateError: the model is patched.
        UnsupportedModelError: nothing can merge in it.
    """
    teller = progress if isinstance(progress, Progress) else Bar() if progress else SILENT
    _check(flops, loyalty, minutes, rounds, measurements, seed)
    if session_of(model) is not None:
        raise PatchStateError("model is patched, and the unpatched one is measured as well; call unpatch(model) first")
    chosen = _methods(methods)
    limits, space = _space(model, chosen)
    choice = read_choice(items, question, pictures, seed, teller.note, default_question)
    check_questions(processor, choice.items)
    lengths = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    limit = Limit(minutes, measurements)
    file = None if rows is None else Path(rows)
    record = Record(
        file, lambda: Meter.fingerprint_of(model, processor, choice.items, **lengths, seed=seed), teller.note
    )
    total = len(choice.items) + choice.seen + rounds * planned(choice.seen) + Judge.reserve(choice)
    teller.begin(total)
    try:
        with answering(model):
            teller.step("unpatched")
            meter = Meter(model, processor, choice.items, chosen, (batch_size, max_new_tokens), record, limit, teller)
            judge = Judge(meter, choice, limits.presets)
            if flops is None and loyalty is None and not judge.has_preset:
                raise InputError(
                    f"flops is None, and {limits.family} has no preset for these items whose cost could be met; give "
                    "flops or loyalty"
                )
            judge.aim(flops, loyalty, MOST_COST, START_COST)
            limit.reserved = Judge.reserve(choice)
            ranked = search(space, judge, choice.seen, rounds, seed, _first(limits, space))
            for line in judge.left_out():
                teller.note(line)
            limit.reserved = 0
            if record.reused:
                teller.note(
                    f"reused from {file}: {record.reused['sample']} measurements of the search, the preset's among "
                    f"them, and {record.reused['cost']} costs, which are looked up before a candidate is measured"
                )
            return conclude(judge, ranked, _plan(rounds, seed, limit, lengths))
    finally:
        teller.end()


def _plan(rounds: int, seed: int, limit: Limit, lengths: Mapping[str, int]) -> dict[str, Any]:
    """What repeats a tuning, whatever the clock says."""
    return {"seed": seed, "rounds": rounds, "measurements": limit.done, "complete": limit.ended is None, **lengths}


def _check(
    flops: float | None,
    loyalty: float | None,
    minutes: float | None,
    rounds: int,
    measurements: int | None,
    seed: int,
) -> None:
    """Refuses what cannot be meant, before anything is loaded or run."""
    if flops is not None and loyalty is not None:
        raise InputError(f"flops is {flops} and loyalty is {loyalty}; give one of them")
    for name, value, most in (("flops", flops, MOST_COST), ("loyalty", loyalty, 1.0)):
        if value is not None and (isinstance(value, bool) or not 0 < value <= most):
            raise InputError(f"{name} is {value}; give a fraction in (0, {most:g}]")
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes}; give more than 0")
    for name, number, least in (("rounds", rounds, 1), ("measurements", measurements, 1), ("seed", seed, 0)):
        if number is not None and (isinstance(number, bool) or number < least):
            raise InputError(f"{name} is {number}; give {least} or more")


def _methods(methods: str | Method | Iterable[str | Method] | None) -> dict[str, Method]:
    """By name, always in one order; only those that a file of settings can hold.

    Raises:
        InputError: a method has functions of one's own, or two have one name.
    """
    if methods is None:
        # Whatever has a name, so that a method that is added is found as well.
        methods = [name for name in default_methods() if name not in CONTROLS]
    found: dict[str, Method] = {}
    for one in [methods] if isinstance(methods, str | Method) else methods:
        method = find_method(one)
        if found.setdefault(method.name, method) != method or METHODS.get(method.name, method) != method:
            raise InputError(f"two methods are called {method.name!r}; give Method(...) another name")
        for part in ("encoder_score", "llm_score", "merge", "llm_merge"):
            if not isinstance(getattr(method, part), str | None):
                raise InputError(
                    f"{part} of method {method.name!r} is a function of your own, which the file of settings cannot "
                    "hold; give methods of names alone, and measure yours with evaluate"
                )
    if not found:
        raise InputError("methods is empty; give one or more, or leave it out")
    return {name: found[name] for name in (*METHODS, *sorted(found)) if name in found}


def _space(model: Any, methods: Mapping[str, Method]) -> tuple[ModelLimits, Space]:
    """What the model's family lets merge, layer by layer.

    A layer counts where any method merges in it, a plain one among them: what a method itself cannot do, such as a
    layout that wants a square number of survivors, is found when a candidate's cost is.

    Raises:
        UnsupportedModelError: no layer can merge.
    """
    family = find_family(model)
    parts, limits = family.locate(model), family.limits(model)
    tried = [UNIFORM, *methods.values()]

    def allowed(vit: list[int], llm: list[int]) -> bool:
        for method in tried:
            with contextlib.suppress(IllavaHooksError):
                family.check(model, parts, MergeConfig.build(limits, vit, 0.1, llm, 0.9, method, "auto", False))
                return True
        return False

    encoder = [layer for layer in range(limits.vit_depth) if allowed([layer], [])]
    decoder = [layer for layer in range(1, limits.llm_depth) if allowed([], [layer])]
    if not encoder and not decoder:
        raise UnsupportedModelError(f"no layer of this {limits.family} model can merge; use another model")
    return limits, Space(list(methods), encoder, decoder)


def _first(limits: ModelLimits, space: Space) -> list[Candidate]:
    """The preset's layers, those of them that can merge, with every method."""

    def within(layers: Iterable[int], able: Sequence[int]) -> tuple[int, ...]:
        return tuple(layer for layer in layers if layer in able)

    schedules = [
        (within(s.vit_layers, space.vit_layers), within(s.llm_layers, space.llm_layers))
        for s in limits.presets.values()
    ]
    found = [Candidate(name, *layers, share) for layers in schedules for share in (0.5, 0.3) for name in space.methods]
    return [one for one in dict.fromkeys(found) if one.vit_layers or one.llm_layers]
