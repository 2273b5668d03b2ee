"""The tables that say which merge rule to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from illava_hooks.tools.evaluate import Row
from which_rule import (
    Budget,
    budgets,
    chance,
    is_ahead,
    overview_table,
    rules_table,
    surely_behind,
    which_table,
)

RNG = np.random.default_rng(0)
#: Of 1,000 questions the same ones are hard for everybody.
HARD = RNG.random(1000)


def row(method: str, accuracy: float, measured: float = 0.33, stage: str = "both", kept: float = 0.3333) -> Row:
    """One whose right answers are those below a bar."""
    right: Sequence[bool | None] = [bool(hard < accuracy) for hard in HARD]
    share = sum(map(bool, right)) / len(right)
    return Row(
        *(method, stage, kept, measured, 1000, 1000, share, None, 1.0, None, 0.0, {}),
        right=list(right),
        answers=[],
    )


def found(*rows: Row) -> list[Budget]:
    return list(budgets("tiny", "scenes", [row("none", 0.99, 1.0, kept=1.0), *rows]))


def test_a_method_is_behind_what_leads_beyond_the_interval_with_no_more_tokens() -> None:
    rows = row("novel", 0.9), row("fastv", 0.8), row("random", 0.8), row("tome", 0.95, 0.5)
    (budget,) = found(*rows)
    assert budget.ahead_of("novel") == [], "tome was left more tokens"
    assert budget.ahead_of("fastv") == [], "novel is no rival, and random is its equal"
    assert budget.unbeaten == ["tome", "novel"]
    (budget,) = found(*rows[:3], row("tome", 0.95, 0.34))
    assert budget.ahead_of("novel") == ["tome"] and budget.unbeaten == ["tome"]


def test_a_difference_within_the_interval_is_none() -> None:
    """One question of a thousand."""
    (budget,) = found(row("novel", 0.9), row("fastv", np.sort(HARD)[900] + 1e-9))
    assert budget.rows["fastv"].accuracy != budget.rows["novel"].accuracy
    assert set(budget.unbeaten) == {"novel", "fastv"} and not budget.ahead_of("novel")


def test_tables() -> None:
    rows = [
        row("illava", 0.7),
        row("novel", 0.9),
        row("illava", 0.9, stage="encoder"),
        row("novel", 0.8, stage="encoder"),
    ]
    both = found(*rows)
    assert [line.split("|")[3].strip() for line in which_table(both)[2:]] == ["both", "encoder"]
    assert which_table(both)[2].endswith("| 1 | `novel` 1 |") and "`illava` 1, " not in which_table(both)[3]
    assert which_table(both)[3].endswith("| 1 | `illava` 1 |"), "behind it novel and novel-agnostic, which is the same"
    first, second, third = rules_table(both)[2:]
    assert first.startswith("| `novel` | 2 | 1 | 1 | tiny scenes, encoder, 0.333: illava | ")
    assert third.startswith("| `novel-agnostic` | 1 | 1 | 1 | tiny scenes, encoder, 0.333: illava | ")
    assert second.startswith("| `illava` | 2 | 1 | 0 |  | "), "behind novel, which is no rival"


def test_methods_that_are_the_same_in_one_stage_share_a_row() -> None:
    rows = [row(name, 0.8, stage="language") for name in ("novel-agnostic", "diverse", "tome")]
    both, language = found(*rows, row("fastv", 0.7))
    assert set(both.rows) == {"fastv"}
    assert language.rows["selective"].right == language.rows["novel-agnostic"].right
    assert language.rows["novel"].right == language.rows["diverse"].right


def test_a_budget_without_a_rival_says_nothing() -> None:
    assert found(row("selective", 0.9), row("novel", 0.8)) == []


def test_an_overview_marks_what_none_is_ahead_of_and_who_kept_more() -> None:
    rows = row("novel", 0.9), row("fastv", 0.8), row("tome", 0.95, 0.5)
    lines = overview_table(found(*rows), row("none", 0.99, 1.0, kept=1.0))
    assert lines[0] == "| method | both, 1/3 |"
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[2:]}
    assert cells["unpatched"][0].isdigit() and cells["`novel`"].startswith("**9")
    assert cells["`tome`"].endswith("**+") and not cells["`fastv`"].startswith("**")


@pytest.mark.parametrize("gain", [0.0, 0.004, 0.008, 0.012, 0.016, 0.02, 0.03, 0.1])
def test_what_is_ahead_is_what_the_interval_says(gain: float) -> None:
    mine, its = row("novel", 0.8 + gain), row("fastv", 0.8)
    flips = RNG.random(1000) < 0.05
    mine.right[:] = [bool(hit != flip) for hit, flip in zip(mine.right, flips, strict=True)]
    assert is_ahead(mine, its) == (mine.lead(its)[0] > 0) and not is_ahead(its, its)


def differing(won: int, lost: int) -> tuple[Row, Row]:
    """Two rows over the same questions, of which the first alone is right at some and the second alone at others."""
    mine, its = [True] * won + [False] * lost, [False] * won + [True] * lost
    alike: list[bool | None] = [True] * (1000 - won - lost)
    first, second = row("fastv", 0.5), row("selective", 0.5)
    return replace(first, right=[*mine, *alike]), replace(second, right=[*its, *alike])


@pytest.mark.parametrize(("won", "lost"), [(19, 5), (5, 19), (1, 0), (0, 0), (30, 30)])
def test_chance_is_that_of_as_many_coins(won: int, lost: int) -> None:
    mine, its = differing(won, lost)
    coins = won + lost
    assert chance(mine, its) == pytest.approx(sum(comb(coins, heads) for heads in range(won, coins + 1)) / 2**coins)


def test_a_lead_that_chance_explains_among_many_comparisons_is_none() -> None:
    lucky, even, sure = (
        Budget("tiny", "scenes", "both", 0.5, {one.method: one for one in differing(*counts)})
        for counts in ((19, 5), (30, 30), (60, 5))
    )
    assert lucky.ahead_of("selective") == ["fastv"]
    assert surely_behind([lucky], "selective") == 1, "alone it is no chance"
    assert surely_behind([lucky, *[even] * 40], "selective") == 0
    assert surely_behind([lucky, sure, *[even] * 40], "selective") == 1
    assert surely_behind([lucky], "fastv") == surely_behind([lucky], "nearest") == 0, "compared with no rival"


def test_a_rival_with_more_tokens_is_not_compared() -> None:
    mine, its = differing(60, 5)
    budget = Budget("tiny", "scenes", "both", 0.5, {"fastv": replace(mine, measured=0.5), "selective": its})
    assert surely_behind([budget], "selective") == 0
