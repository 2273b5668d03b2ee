"""What the search asks: candidates at the wanted cost, which a wanted loyalty may move between the rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import MergeConfigError, UnsupportedModelError
from illava_hooks.tools.tune.inputs import Choice
from illava_hooks.tools.tune.measure import Meter, Sample
from illava_hooks.tools.tune.search import rungs, solve_keep
from illava_hooks.tools.tune.space import Candidate, settings_of

__all__ = ["LEVELS", "Judge"]

#: Costs of the front, beside the one that is wanted.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: How many of the best are tried at each of them.
FINALISTS = 2
#: Halvings of the range of costs where a loyalty is wanted.
_HALVINGS = 5
_LEAST_COST = 0.05


class Judge:
    """Measures candidates at one cost, by the questions of the search.

    Attributes:
        target: prefill FLOPs of the unpatched model's; None: no cost keeps the wanted loyalty.
        least: the smallest cost that any candidate was found to have; infinity: none can run.
    """

    def __init__(self, meter: Meter, choice: Choice, presets: Mapping[Modality, MergeSchedule]) -> None:
        """Measures the preset, which tells how far the cost of few questions is from that of all.

        Args:
            meter: measures.
            choice: the questions.
            presets: of the model, by modality.
        """
        self.meter, self.choice, self.presets = meter, choice, presets
        self.kinds = {"video" if item.video else "image" for item in choice.items}
        self.has_preset = bool(self.kinds <= presets.keys() and any(not s.is_identity for s in presets.values()))
        self.counts_language = "language" in find_family(meter.model).stages
        self.preset_cost: float | None = None
        self.wanted: dict[str, float | str] = {}
        self.loyalty: float | None = None
        self.target, self.most, self.least = 1.0, 1.0, math.inf
        self._bias = 1.0
        self._refused: dict[Candidate, str] = {}
        self._solved: dict[tuple[Candidate, float], dict[str, Any] | None] = {}
        self._hints: dict[tuple[Any, ...], float] = {}
        if self.has_preset:
            self.preset_cost = meter.sample({}, 0, choice.seen).cost
            self._bias = self.preset_cost / meter.cost({}, choice.seen)

    @staticmethod
    def reserve(choice: Choice) -> int:
        """Answers that are asked for behind the search."""
        held = len(choice.items) - choice.seen
        return FINALISTS * len(LEVELS) * (choice.seen // 3) + choice.seen + (len(LEVELS) + 3) * held

    def aim(self, flops: float | None, loyalty: float | None, most: float, start: float) -> None:
        """Says what is wanted.

        Args:
            flops: the cost; None: the preset's.
            loyalty: instead of it.
            most: a cost that is no saving.
            start: where the search for a loyalty begins.
        """
        self.most, self.loyalty = most, loyalty
        if loyalty is not None:
            self.wanted = {"loyalty": loyalty}
            self.target = start
        else:
            self.target = flops if flops is not None else self.preset_cost or most
            self.wanted = {"flops": self.target} if flops is not None else {"flops": self.target, "as": "preset"}

    # ------------------------------------------------------------------ what the search asks

    def loss(self, candidate: Candidate, questions: int) -> float | None:
        """Mean KL over the first questions, at the target; None where that cannot be."""
        settings = self.settings(candidate, self.target)
        if settings is None:
            return None
        self._ask(settings, questions)
        return self.sample(settings, questions).loss

    def _ask(self, settings: dict[str, Any], questions: int) -> None:
        """Whether there is time for what is not known yet."""
        parts = self._parts(questions)
        self.meter.limit.ask(sum(stop - start for start, stop in parts if not self.meter.knows(settings, start, stop)))

    def settle(self, ranked: Sequence[Candidate]) -> bool:
        """After a round: the cheapest cost at which the best one keeps the wanted loyalty."""
        if self.loyalty is None or not ranked:
            return False
        before, self.target = self.target, self.cheapest(ranked[0], self._ask) or self.most
        return self.target != before

    def tell(self, what: str) -> None:
        """What is measured next."""
        self.meter.progress.step(what)

    def left_out(self) -> Iterator[str]:
        """After the search: a line on each method whose candidates cannot all run, or none of which meets the cost."""
        for name in self.meter.methods:
            tried = {one for one, _ in self._solved if one.method == name}
            refused = [one for one in self._refused if one.method == name]
            remains = any(found for (one, _), found in self._solved.items() if one.method == name)
            reasons = []
            if tried and not remains and len(refused) < len(tried):
                cure = "give a larger --flops, or name" if self.loyalty is None else "name"
                dear = len(tried) - len(refused)
                reasons.append(f"{dear} cost more than {self.target:.3f} of the FLOPs ({cure} other --methods)")
            if refused:
                vit, llm = list(refused[0].vit_layers), list(refused[0].llm_layers)
                reasons.append(f"{len(refused)} cannot run, the first, with encoder layers {vit} and decoder layers "
                               f"{llm}, for this: {self._refused[refused[0]]}")  # fmt: skip
            if reasons:
                what = "a part is left out" if remains else "nothing remains"
                yield f"{what} of method {name!r}: of {len(tried)} candidates that were tried, {' and '.join(reasons)}"

    # ------------------------------------------------------------------ what the end asks as well

    def _parts(self, questions: int) -> list[tuple[int, int]]:
        """The first questions in parts, so that a higher rung asks only what a lower one had not."""
        stops = [*(count for _, count in rungs(self.choice.seen) if count < questions), questions]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def settings(self, candidate: Candidate, target: float) -> dict[str, Any] | None:
        """Arguments of ``patch`` that meet a cost; None where the candidate cannot."""
        if candidate in self._refused:
            return None
        if (candidate, target) not in self._solved:
            self._solved[candidate, target] = self._solve(candidate, target)
        return self._solved[candidate, target]

    def _solve(self, candidate: Candidate, target: float) -> dict[str, Any] | None:
        # Another method with the same layers costs nearly the same.
        shape = candidate.vit_layers, candidate.llm_layers, candidate.share, target

        def cost_at(keep: float) -> float:
            cost = self._bias * self.meter.cost(self._arguments(candidate, keep), self.choice.seen)
            self.least = min(self.least, cost)
            return cost

        try:
            keep = solve_keep(cost_at, target, self._hints.get(shape))
        except (MergeConfigError, UnsupportedModelError) as error:
            self._refused[candidate] = str(error)
            return None
        if keep is None:
            return None
        self._hints.setdefault(shape, keep)
        return self._arguments(candidate, keep)

    def sample(self, settings: dict[str, Any], questions: int) -> Sample:
        """Settings on the first questions of the search."""
        first, *others = [self.meter.sample(settings, *part) for part in self._parts(questions)]
        return sum(others, first)

    def held_out(self, settings: dict[str, Any]) -> Sample:
        """Settings on the questions that nothing was chosen by."""
        return self.meter.sample(settings, self.choice.seen, len(self.choice.items))

    def exact(self, candidate: Candidate, target: float) -> dict[str, Any] | None:
        """Arguments whose cost over all questions of the search is not above the target."""
        aimed, found = target, None
        for _ in range(4):
            settings = self.settings(candidate, aimed)
            if settings is None:
                return found
            cost = self.sample(settings, self.choice.seen).cost
            if cost <= target:
                found = settings
                if cost >= 0.99 * target:
                    break
            aimed *= 0.999 * target / cost
        return found

    def cheapest(
        self, candidate: Candidate, ask: Callable[[dict[str, Any], int], None] = lambda settings, questions: None
    ) -> float | None:
        """The least cost at which a candidate keeps the wanted loyalty over all questions of the search; or None.

        Args:
            candidate: where, and how it is shared.
            ask: hears what will be measured, and may end it.
        """
        low, high, found = _LEAST_COST, self.most, None
        for number in range(_HALVINGS + 1):
            target = round(high if not number else (low + high) / 2, 4)
            settings = self.settings(candidate, target)
            if settings is not None:
                ask(settings, self.choice.seen)
            kept = settings is not None and self.sample(settings, self.choice.seen).loyalty >= (self.loyalty or 0)
            if kept:
                high = found = target
            elif not number:
                return None
            else:
                low = target
        return found

    def _arguments(self, candidate: Candidate, keep: float) -> dict[str, Any]:
        """Amounts that the method can remove: what it leaves is what they say."""
        method, settings = self.meter.methods[candidate.method], settings_of(candidate, keep)
        settings["vit_r"] = min(settings["vit_r"], 1 - method.least_kept(1))
        settings["llm_ratio"] = max(settings["llm_ratio"], method.in_llm.least_kept(1))
        return {**settings, "method": candidate.method}
