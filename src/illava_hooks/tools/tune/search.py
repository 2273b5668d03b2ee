"""Successive halving in rounds, and the amount that meets a cost: pure logic around an oracle that measures.

What is measured follows from the seed and the results alone, never from the clock. A time limit can only end the
search earlier, between two measurements, and how many there were says where: so many again give the same outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from illava_hooks.tools.tune.space import Candidate, Space

__all__ = ["Oracle", "OverError", "planned", "rungs", "search", "solve_keep"]

#: Candidates of a round's first rung; every further rung has a third of them, on three times the questions.
WIDTH, FACTOR, NUM_RUNGS = 36, 3, 3
#: Questions of a rung at least: on fewer a rank is chance.
LEAST_QUESTIONS = 12
#: Whose neighbours the next round looks at.
ELITE = 3
LEAST_KEEP, MOST_KEEP = 0.02, 0.999


class OverError(Exception):
    """There is no time, or no measurement, left."""


class Oracle(Protocol):
    """Measures candidates at the cost that is wanted."""

    def loss(self, candidate: Candidate, questions: int) -> float | None:
        """Mean loss over the first ``questions``; None where the cost cannot be met.

        Raises:
            OverError: before it is measured.
        """

    def settle(self, ranked: Sequence[Candidate]) -> bool:
        """Hears the best after each round; True if it wants another cost from now on."""

    def tell(self, what: str) -> None:
        """Hears what is measured next."""


def rungs(questions: int) -> list[tuple[int, int]]:
    """How many candidates are measured on how many questions, in a round."""
    found: dict[int, int] = {}
    for rung in range(NUM_RUNGS):
        count = min(questions, max(LEAST_QUESTIONS, questions // FACTOR ** (NUM_RUNGS - 1 - rung)))
        found.setdefault(count, WIDTH // FACTOR**rung)  # with few questions rungs fall together
    return [(width, count) for count, width in found.items()]


def planned(questions: int) -> int:
    """Answers of a round; a higher rung only adds what the lower one had not asked."""
    steps = rungs(questions)
    before = [0, *(count for _, count in steps)]
    return sum(width * (count - old) for (width, count), old in zip(steps, before, strict=False))


def search(
    space: Space, oracle: Oracle, questions: int, rounds: int, seed: int, first: Sequence[Candidate] = ()
) -> list[Candidate]:
    """The best candidates that were measured on the most questions, best first.

    Args:
        space: what there is.
        oracle: measures.
        questions: that there are.
        rounds: of successive halving; from the second on most candidates are neighbours of the best so far.
        seed: of all choices.
        first: candidates of the first round that are no matter of chance.
    """
    seen: dict[Candidate, tuple[int, float]] = {}
    try:
        for number in range(rounds):
            rng = np.random.default_rng([seed, number])
            pool = _pool(space, rng, _ranked(seen)[:ELITE] if number else first)
            for width, count in rungs(questions):
                pool = pool[:width]
                oracle.tell(f"round {number + 1} of {rounds}: {len(pool)} candidates on {count} questions")
                losses = {candidate: _measure(oracle, seen, candidate, count) for candidate in pool}
                pool = sorted((one for one in pool if losses[one] is not None), key=lambda one: losses[one] or 0.0)
            ranked = _ranked(seen)
            if oracle.settle(ranked):
                seen.clear()  # at another cost
                for candidate in ranked[:ELITE]:
                    _measure(oracle, seen, candidate, questions)
    except OverError:
        pass
    return _ranked(seen)


def _measure(
    oracle: Oracle, seen: dict[Candidate, tuple[int, float]], candidate: Candidate, count: int
) -> float | None:
    """Measures, and notes it where it is on more questions than before."""
    loss = oracle.loss(candidate, count)
    if loss is not None and seen.get(candidate, (0, 0.0))[0] <= count:
        seen[candidate] = count, loss
    return loss


def _ranked(seen: dict[Candidate, tuple[int, float]]) -> list[Candidate]:
    """Those of the highest rung that was reached; ties go to the one that was seen first."""
    most = max((count for count, _ in seen.values()), default=0)
    return sorted((one for one, (count, _) in seen.items() if count == most), key=lambda one: seen[one][1])


def _pool(space: Space, rng: np.random.Generator, known: Sequence[Candidate]) -> list[Candidate]:
    """Different candidates: those that are known, neighbours of them, and a third by chance."""
    pool = dict.fromkeys(known)
    for tries in range(20 * WIDTH):  # a small space may not hold as many
        if len(pool) >= WIDTH:
            break
        if known and tries % 3:
            pool.setdefault(space.change(known[int(rng.integers(len(known)))], rng))
        else:
            pool.setdefault(space.draw(rng))
    return list(pool)[:WIDTH]


def solve_keep(
    cost_at: Callable[[float], float], target: float, guess: float | None = None, tries: int = 7
) -> float | None:
    """The largest fraction to keep, with four digits, whose cost is not above a target.

    Args:
        cost_at: the cost at a fraction; more tokens never cost less, and all of them cost 1.
        target: the cost, in (0, 1).
        guess: where to begin.
        tries: costs that are asked for at most.

    Returns:
        Within a percent of the target, or as near as the tries get; None where even the least is too dear.
    """
    low: tuple[float, float] | None = None
    high, guess = (1.0, 1.0), target if guess is None else guess
    for number in range(tries):
        guess = round(float(np.clip(guess, LEAST_KEEP, MOST_KEEP)), 4)
        cost = cost_at(guess)
        if cost > target:
            high = guess, cost
            if guess <= LEAST_KEEP:
                return None
        elif low is None or guess > low[0]:
            low = guess, cost
        if low is not None and (low[1] >= 0.99 * target or high[0] - low[0] <= 2e-4):
            break
        if low is None:
            # Nothing is cheap enough yet: along the line, and to the end when that does not help.
            guess = LEAST_KEEP if number % 2 else guess - 1.5 * (cost - target)
        else:
            along = (0.998 * target - low[1]) / max(high[1] - low[1], 1e-9)
            # Whole tokens make steps: where the line leads nowhere, halves do.
            along = along if number % 3 else 0.5
            guess = low[0] + float(np.clip(along, 0.05, 0.95)) * (high[0] - low[0])
    return None if low is None else low[0]
