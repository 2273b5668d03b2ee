"""The rule that averages what is alike and drops the rest, and a merge rule of its own for the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import RICHEST
from helpers import assert_differ, assert_says
from illava_hooks import METHODS, MergeConfigError, Method, patch, unpatch
from illava_hooks.merge.plan import MergePlan, apply_merge, build_plan
from illava_hooks.merge.rules import RULES, RuleInputs
from illava_hooks.merge.segments import Segments
from tiny_models import FAMILIES, inputs_for, tiny_model


def plan_of(rule: str, tokens: Tensor, removed: int, sizes: Tensor | None = None) -> MergePlan:
    """One segment whose first tokens score best."""
    count = len(tokens)
    sizes = torch.ones(count) if sizes is None else sizes
    segments, scores = Segments.packed((count,), torch.device("cpu")), -torch.arange(count).float()
    inputs = RuleInputs.of(segments, (removed,), scores, lambda: tokens, lambda: tokens, sizes)
    exists = torch.ones(1, count, dtype=torch.bool)
    return build_plan(RULES[rule](inputs), segments, exists, count - removed, sizes[None])


#: Two pairs, one token that is a little like the second, and one that is like nobody.
TOKENS = torch.tensor([[9.0, 0], [0, 8], [7, 1], [1, 9], [-9, 5], [-6, -6]])


def test_by_hand() -> None:
    """From the mean, (0.33, 2.83), tokens 2 and 3 lie where 0 and 1 do; 4 is at a cosine of 0.29 to 1."""
    sizes = torch.tensor([1.0, 1, 3, 1, 2, 4])
    plan = plan_of("selective", TOKENS, 3, sizes)
    assert plan.keep_indices.tolist() == [[0, 1, 5]]
    merged = apply_merge(TOKENS[None], plan)[0]
    torch.testing.assert_close(
        merged, torch.stack([(TOKENS[0] + 3 * TOKENS[2]) / 4, TOKENS[[1, 3]].mean(0), TOKENS[5]])
    )
    assert plan.grow(sizes[None]).tolist() == [[4.0, 2.0, 4.0]], "who is lost counts nowhere"
    assert plan.survivor_of.tolist() == [[0, 1, 0, 1, 1, 5]], "but is shown by the most similar one"


@pytest.mark.parametrize("common", [0.0, 100.0])
def test_a_direction_that_all_share_changes_nothing(common: float) -> None:
    """Hidden states resemble each other by plain cosine, whatever they show."""
    tokens = TOKENS + common * torch.tensor([1.0, 1.0])
    plan = plan_of("selective", tokens, 3)
    gone = [token for token in range(6) if token not in plan.keep_indices[0].tolist()]
    joined = {int(token) for token, weight in zip(plan.absorbed, plan.weights, strict=True) if weight > 0}
    middle = tokens - tokens.mean(0)
    assert 0 < len(joined) < len(gone)
    for token in gone:
        alike = torch.cosine_similarity(middle[token], middle[plan.survivor_of[0, token]], dim=0)
        assert (token in joined) == bool(alike >= 0.5)
    if common:
        assert torch.cosine_similarity(tokens[4], tokens[plan.survivor_of[0, 4]], dim=0) > 0.99


def test_between_averaging_and_dropping() -> None:
    """The same survivors as `diverse` has; what is alike is averaged as there, what is not is dropped."""
    pairs = torch.randn(5, 8).repeat(2, 1)
    ours, diverse = (plan_of(rule, pairs, 5) for rule in ("selective", "diverse"))
    assert torch.equal(apply_merge(pairs[None], ours), apply_merge(pairs[None], diverse))
    assert torch.equal(ours.grow(torch.ones(1, 10)), diverse.grow(torch.ones(1, 10)))
    strangers = torch.eye(8)
    ours, diverse = (plan_of(rule, strangers, 5) for rule in ("selective", "diverse"))
    assert torch.equal(ours.keep_indices, diverse.keep_indices)
    assert torch.equal(apply_merge(strangers[None], ours)[0], strangers[ours.keep_indices[0]])
    assert ours.grow(torch.ones(1, 8)).tolist() == [[1.0, 1.0, 1.0]]


STAGES: dict[str, Any] = {
    "encoder": {"vit_layers": [1, 2], "vit_r": 0.3, "llm_layers": [], "llm_ratio": 1.0},
    "language": {"vit_layers": [], "vit_r": 0, "llm_layers": [1, 2], "llm_ratio": 0.6},
}
BOTH = {**STAGES["encoder"], "llm_layers": [1, 2], "llm_ratio": 0.6}


@torch.no_grad()
def logits(family: str, method: Method, settings: dict[str, Any]) -> Tensor:
    model = tiny_model(family)
    patch(model, **settings, method=method)
    found: Tensor = model(**inputs_for(model, [RICHEST[family]])).logits
    unpatch(model)
    return found


@pytest.mark.parametrize(("first", "second"), [("drop", "nearest"), ("diverse", "recycle")])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_merges_by_its_own_rule(family: str, first: str, second: str) -> None:
    two = Method("two rules", merge=first, llm_merge=second)
    for stage, rule, other in (("encoder", first, second), ("language", second, first)):
        found, expected, wrong = (
            logits(family, method, STAGES[stage])
            for method in (two, Method("one", merge=rule), Method("1", merge=other))
        )
        assert torch.equal(found, expected)
        assert_differ(found, wrong)
    one, another = (logits(family, Method("one", merge=rule), BOTH) for rule in (first, second))
    found = logits(family, two, BOTH)
    assert_differ(found, one)
    assert_differ(found, another)


def test_limits_are_those_of_the_stage() -> None:
    """Bipartite matching leaves half of the tokens in each layer, and where it does not merge it limits nothing."""
    first, second = Method("1", merge="bipartite", llm_merge="drop"), Method("2", merge="drop", llm_merge="bipartite")
    assert first.least_kept(1) == second.in_llm.least_kept(1) == 0.5
    assert first.in_llm.least_kept(1) == second.least_kept(1) == 0.0
    model = tiny_model(FAMILIES[0])
    for method in (first, second):
        session = patch(model, [1], llm_layers=[1], keep=0.2, method=method)
        with torch.no_grad():
            model(**inputs_for(model, [RICHEST[FAMILIES[0]]]))
        assert session.report.kept_fraction == pytest.approx(0.2, abs=0.05)
        unpatch(model)


def test_what_listens_is_asked_by_stage() -> None:
    method = Method("mine", "uniform", "uniform", merge="drop", llm_merge="nearest")
    assert not method.listens_in_encoder and method.listens_in_llm
    assert not METHODS["selective"].listens_in_encoder and not METHODS["selective"].listens_in_llm
    assert METHODS["selective"].in_llm.rule is RULES["diverse"]


def test_a_rule_that_is_not_known_is_refused() -> None:
    with pytest.raises(MergeConfigError) as told:
        Method("mine", llm_merge="melt")
    assert_says(told.value, "^llm_merge is 'melt'", "choose one of", "give a function")
