"""What a tuning found: the recommended settings, their rivals, and what is to be said about them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from illava_hooks.config import MergeConfig
from illava_hooks.errors import InputError
from illava_hooks.methods import DEFAULT_METHOD
from illava_hooks.tools.evaluate.statistics import interval, paired_interval
from illava_hooks.tools.tune.judge import FINALISTS, LEVELS, Judge
from illava_hooks.tools.tune.measure import Sample
from illava_hooks.tools.tune.search import ELITE
from illava_hooks.tools.tune.space import Candidate

__all__ = ["Point", "Tuning", "conclude", "pareto"]

Interval = tuple[float, float]
TUNED, PRESET, RIVAL, OTHER = "tuned", "preset", "preset's layers", "front"
#: How far above the wanted cost the held-out questions may be without a word.
COST_WITHIN = 0.02
#: Fewer held-out questions tell little.
FEW = 10


@dataclass(frozen=True, slots=True)
class Point:
    """Settings, measured on questions that they were not chosen by.

    Attributes:
        name: "tuned" is what is recommended, "preset" the model's own, "preset's layers" those with the default
            method at the cost of "tuned", "front" the best that was found at another cost.
        settings: arguments of ``patch``; empty: its presets.
        cost: prefill FLOPs of the unpatched model's.
        loss: mean KL of the first word from the unpatched model's, nats.
        loss_interval: 95 % bootstrap.
        loyalty: share of answers equal to the unpatched model's.
        loyalty_interval: 95 % bootstrap.
        on_front: whether no other point is as cheap and as good.
    """

    name: str
    settings: dict[str, Any]
    cost: float
    loss: float
    loss_interval: Interval
    loyalty: float
    loyalty_interval: Interval
    on_front: bool = False


@dataclass(frozen=True, slots=True)
class Tuning:
    """The outcome.

    Attributes:
        config: what is recommended; None: merging does not pay as wanted, and ``verdict`` says why.
        points: the recommended one first, then its rivals, then others by cost.
        verdict: what a reader must know, in sentences.
        wanted: "flops" or "loyalty", and how much.
        questions: of the search, and held out.
        pictures: likewise.
        plan: what repeats it; "complete": whether the search ended by itself.
        lead: 95 % interval of the rival's KL minus that of "tuned" on the held-out questions: above 0 it is better.
    """

    config: MergeConfig | None
    points: tuple[Point, ...]
    verdict: tuple[str, ...]
    wanted: dict[str, float | str]
    questions: tuple[int, int]
    pictures: tuple[int, int]
    plan: dict[str, Any]
    lead: Interval | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is recommended to the file that ``patch(model, preset=path)`` takes.

        Raises:
            InputError: nothing is.
            MergeConfigError: the file cannot be written.
        """
        if self.config is None:
            raise InputError(f"there is nothing to save: {self.verdict[0]}")
        self.config.save(path)

    def as_dict(self) -> dict[str, Any]:
        """All but the settings' own file, as JSON takes it."""
        body = {name: getattr(self, name) for name in ("wanted", "plan", "questions", "pictures", "lead", "verdict")}
        return {**body, "points": [asdict(point) for point in self.points]}


def conclude(judge: Judge, ranked: Sequence[Candidate], plan: dict[str, Any]) -> Tuning:
    """Measures the best of a search on held-out questions, with its rivals and at other costs.

    Args:
        judge: measures.
        ranked: what the search found, best first.
        plan: what repeats it.
    """
    judge.tell("held-out questions")
    best, target = _best(judge, ranked)
    settings = None if best is None else judge.exact(best, target)
    wanted: list[tuple[str, dict[str, Any]]] = [] if settings is None else [(TUNED, settings)]
    if judge.has_preset:
        wanted.append((PRESET, {}))
    rival = None if settings is None or "as" in judge.wanted else _rival(judge, target)
    wanted += [] if rival is None else [(RIVAL, rival)]
    levels = [level for level in LEVELS if settings is None or abs(level - target) > 0.03]
    wanted += [(OTHER, one) for level in levels if (one := _at(judge, ranked[:FINALISTS], level))]
    samples = [judge.held_out(one) for _, one in wanted]
    points = pareto([_point(*one, sample) for one, sample in zip(wanted, samples, strict=True)])
    held = {name: sample for (name, _), sample in zip(wanted, samples, strict=True) if name != OTHER}
    other = held.get(RIVAL, held.get(PRESET) if "as" in judge.wanted else None)
    tells = other is not None and TUNED in held and len(held[TUNED].losses) > 1  # of one question alone nothing does
    lead = paired_interval(other.losses, held[TUNED].losses) if other is not None and tells else None
    config = None
    if settings is not None:
        with judge.meter.patched(settings) as session:
            config = session.config
    questions = judge.choice.seen, len(judge.choice.items) - judge.choice.seen
    found = Tuning(config, tuple(points), (), judge.wanted, questions, judge.choice.pictures, plan, lead)
    return replace(found, verdict=tuple(_verdict(found, judge, ranked, held)))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points, with those marked that no other one beats in cost or loss without being worse in the other."""

    def beaten(one: Point) -> bool:
        return any(
            other.cost <= one.cost and other.loss <= one.loss and (other.cost, other.loss) != (one.cost, one.loss)
            for other in points
        )

    return [replace(point, on_front=not beaten(point)) for point in points]


def _best(judge: Judge, ranked: Sequence[Candidate]) -> tuple[Candidate | None, float]:
    """The winner, and its cost."""
    if judge.loyalty is None:
        return (ranked[0] if ranked else None), judge.target
    costs = [(cost, place) for place, one in enumerate(ranked[:ELITE]) if (cost := judge.cheapest(one)) is not None]
    if not costs:
        return None, judge.most
    cost, place = min(costs)
    return ranked[place], cost


def _rival(judge: Judge, target: float) -> dict[str, Any] | None:
    """What one would take without tuning: the preset's layers and the default method, at the same cost."""
    schedule = next((schedule for kind, schedule in judge.presets.items() if kind in judge.kinds), None)
    if schedule is None or DEFAULT_METHOD not in judge.meter.methods:
        return None
    return judge.settings(Candidate(str(DEFAULT_METHOD), schedule.vit_layers, schedule.llm_layers, 0.5), target)


def _at(judge: Judge, finalists: Sequence[Candidate], level: float) -> dict[str, Any] | None:
    """The better one of the finalists at another cost, by some of the questions of the search."""
    found = [settings for one in finalists if (settings := judge.settings(one, level)) is not None]
    questions = max(1, judge.choice.seen // 3)
    return min(found, key=lambda settings: judge.sample(settings, questions).loss, default=None)


def _point(name: str, settings: dict[str, Any], sample: Sample) -> Point:
    return Point(
        name,
        settings,
        sample.cost,
        sample.loss,
        interval(sample.losses) if np.isfinite(sample.losses).all() else (sample.loss, sample.loss),
        sample.loyalty,
        interval(sample.same),
    )


def _verdict(found: Tuning, judge: Judge, ranked: Sequence[Candidate], held: Mapping[str, Sample]) -> list[str]:
    said = []
    if found.config is None:
        said.append(_why_not(judge, ranked))
    else:
        tuned = held[TUNED]
        said.append(
            f"on {found.questions[1]} questions about {found.pictures[1]} pictures that the search did not see: "
            f"{tuned.cost:.3f} of the FLOPs, loyalty {tuned.loyalty:.1%}, KL {tuned.loss:.4f}"
        )
        if judge.loyalty is None and tuned.cost > float(found.wanted["flops"]) + COST_WITHIN:
            said.append(
                f"that is more than the {found.wanted['flops']:.3f} that was wanted, which the pictures of the search "
                "keep to: these have other sizes; give a smaller --flops, or more pictures"
            )
        if found.questions[1] < FEW:
            said.append(f"so few held-out questions, {found.questions[1]}, tell little: give more pictures")
        if found.lead is not None:
            low, high = found.lead
            word = "better" if low > 0 else "worse" if high < 0 else "no different, as far as these questions tell,"
            rival = RIVAL if RIVAL in held else PRESET
            said.append(f"it is {word} in KL than the {rival} at the same cost (95 % interval of the gain: {low:.4f} "
                        f"to {high:.4f})")  # fmt: skip
        if judge.loyalty is not None and tuned.loyalty < judge.loyalty:
            said.append(f"the loyalty that was wanted, {judge.loyalty:.1%}, is not reached on the held-out questions; "
                        "give more pictures, or a larger --loyalty")  # fmt: skip
    if not found.plan["complete"]:
        number = found.plan["measurements"]
        said.append(f"the search ended at its limit, after {number} measurements: the same comes out again with "
                    f"--measurements {number}, and perhaps more with more of them, or more minutes")  # fmt: skip
    if not judge.counts_language:
        said.append("the language model is left alone in this family: FLOPs are those of encoder and projector")
    if found.config is not None and len(judge.kinds) == 1:
        other = "videos" if judge.kinds == {"image"} else "images"
        said.append(f"no {other} were among the items: the settings hold for them too, unmeasured")
    return said


def _why_not(judge: Judge, ranked: Sequence[Candidate]) -> str:
    if not ranked and judge.meter.limit.ended is not None:
        return "nothing was measured before the limit; give more minutes or measurements"
    if math.isinf(judge.least):
        return "merging does not pay: no candidate that was tried can run; name other --methods"
    if not ranked:
        reachable = math.ceil(100 * judge.least) / 100
        instead = "" if judge.loyalty is None else " instead of --loyalty"
        cure = "name" if reachable > judge.most else f"give --flops {reachable} or more{instead}, or name"
        return (
            f"merging does not pay: no candidate that was tried comes down to {judge.target:.3f} of the FLOPs, and "
            f"the cheapest costs {judge.least:.3f}; {cure} other --methods"
        )
    if judge.loyalty is None:
        return (
            f"merging does not pay: nothing stays at {judge.target:.3f} of the FLOPs over all questions; give a "
            "larger --flops"
        )
    settings = judge.settings(ranked[0], judge.most)
    reached = "" if settings is None else f"; the best one has {judge.sample(settings, judge.choice.seen).loyalty:.1%}"
    return (
        f"merging does not pay: no candidate that saves {1 - judge.most:.0%} of the FLOPs or more keeps a loyalty of "
        f"{judge.loyalty:.1%}{reached}; give a smaller --loyalty"
    )
