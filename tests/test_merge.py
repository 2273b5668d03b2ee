"""Merge rules, plans and segments against the slow reference, on ragged segments of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference as ref
from illava_hooks.merge import rules
from illava_hooks.merge.plan import MergePlan, apply_merge, build_plan, take_kept
from illava_hooks.merge.rules import RULES, RuleInputs
from illava_hooks.merge.segments import Segments, aligned_rows, buckets, right_align, scatter_back

LENGTHS = (7, 12, 1, 12)
WIDTH = 6


def make_plan(
    rule: str, lengths: tuple[int, ...], removed: tuple[int, ...], tokens: Tensor, visible: Tensor | None = None
) -> tuple[MergePlan, list[ref.Merge]]:
    """One packed row of segments: the library's plan, and the reference's decision for each segment."""
    total = sum(lengths)
    keys, scores, sizes = torch.randn(total, 4), torch.rand(total), torch.randint(1, 5, (total,)).float()
    segments = Segments.packed(lengths, torch.device("cpu"))
    seen = None if visible is None else (lambda: visible)
    inputs = RuleInputs.of(segments, removed, scores, lambda: tokens, lambda: keys, sizes, seen)
    exists = torch.ones(1, total, dtype=torch.bool)
    plan = build_plan(RULES[rule](inputs), segments, exists, total - sum(removed), sizes[None])
    expected, start = [], 0
    for length, count in zip(lengths, removed, strict=True):
        part = slice(start, start + length)
        expected.append(
            ref.decide(
                rule,
                scores[part].tolist(),
                count,
                tokens[part],
                keys[part],
                sizes[part].tolist(),
                None if visible is None else visible[part].tolist(),
            )
        )
        start += length
    return plan, expected


def removed_counts(rule: str, fraction: float) -> tuple[int, ...]:
    most = [n // 2 if rule == "bipartite" else n - 1 for n in LENGTHS]
    return tuple(int(n * fraction) for n in most)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_the_reference(rule: str, fraction: float) -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    plan, expected = make_plan(rule, LENGTHS, removed_counts(rule, fraction), tokens)
    start = 0
    kept, holder, merged = [], [], []
    for length, merge in zip(LENGTHS, expected, strict=True):
        kept += [start + token for token in merge.kept]
        holder += [start + token for token in merge.holder_or_nearest()]
        merged += merge.apply(list(tokens[start : start + length]))
        start += length
    assert plan.keep_indices[0].tolist() == kept
    assert plan.survivor_of[0].tolist() == holder
    torch.testing.assert_close(apply_merge(tokens[None], plan)[0], torch.stack(merged), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_short_segment_in_front_of_a_long_one(rule: str) -> None:
    """Tables are as wide as the long one needs: behind the short one lies nobody, also where its first token goes."""
    gone = 0
    for _ in range(8):
        tokens = torch.randn(52, WIDTH)
        plan, expected = make_plan(rule, (2, 50), (1, 1), tokens)
        alone = [
            merge.apply(list(tokens[part])) for merge, part in zip(expected, (slice(2), slice(2, 52)), strict=True)
        ]
        merged = torch.stack([row for rows in alone for row in rows])
        torch.testing.assert_close(apply_merge(tokens[None], plan)[0], merged, atol=1e-6, rtol=0)
        gone += not plan.keep_mask[0, 0]
    assert gone


@pytest.mark.parametrize("rule", RULES)
def test_nothing_removed_is_bitwise_nothing(rule: str) -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    plan, _ = make_plan(rule, LENGTHS, (0,) * len(LENGTHS), tokens)
    assert torch.equal(apply_merge(tokens[None], plan)[0], tokens)


@pytest.mark.parametrize("rule", ["recycle", "nearest", "diverse", "selective", "bipartite"])
def test_weights_of_each_survivor_sum_to_one(rule: str) -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    plan, _ = make_plan(rule, LENGTHS, removed_counts(rule, 0.6), tokens)
    ones = torch.ones(1, sum(LENGTHS), 1)
    torch.testing.assert_close(apply_merge(ones, plan), torch.ones(1, plan.keep_indices.shape[1], 1))


def test_recycle_by_hand() -> None:
    """Scores 4 1 3 2, two removed: members 1, 3, 2 with weights 3/6, 2/6, 1/6 in the seat of token 2."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    segments = Segments.packed((4,), torch.device("cpu"))
    tokens = torch.tensor([[[10.0], [6.0], [60.0], [600.0]]])
    inputs = RuleInputs(scores, (4,), (2,), lambda: tokens, lambda: tokens, lambda: torch.ones(1, 4))
    plan = build_plan(RULES["recycle"](inputs), segments, torch.ones(1, 4, dtype=torch.bool), 2)
    assert plan.keep_indices.tolist() == [[0, 2]]
    torch.testing.assert_close(apply_merge(tokens, plan), torch.tensor([[[10.0], [3.0 + 200.0 + 10.0]]]))


def test_recycle_sits_where_the_layout_shows_it() -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    visible = torch.rand(sum(LENGTHS)) > 0.6
    plan, expected = make_plan("recycle", LENGTHS, removed_counts("recycle", 0.5), tokens, visible)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    kept = [int(start) + token for start, merge in zip(starts, expected, strict=False) for token in merge.kept]
    assert plan.keep_indices[0].tolist() == kept


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_go_by_position(rule: str) -> None:
    segments = Segments.packed((6,), torch.device("cpu"))
    same = torch.ones(1, 6, 3)
    inputs = RuleInputs(torch.zeros(1, 6), (6,), (2,), lambda: same, lambda: same, lambda: torch.ones(1, 6))
    plan = build_plan(RULES[rule](inputs), segments, torch.ones(1, 6, dtype=torch.bool), 4)
    first = {"recycle": [2, 3, 4, 5], "bipartite": [1, 3, 4, 5]}.get(rule, [2, 3, 4, 5])
    assert plan.keep_indices[0].tolist() == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_are_kept_and_sums_are_wide(dtype: torch.dtype) -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH, dtype=dtype)
    plan, expected = make_plan("recycle", LENGTHS, removed_counts("recycle", 0.7), tokens)
    merged = apply_merge(tokens[None], plan)[0]
    assert merged.dtype == dtype
    start, exact = 0, []
    for length, merge in zip(LENGTHS, expected, strict=True):
        exact += merge.apply(list(tokens[start : start + length].double()))
        start += length
    # Rounded once, from sums that are at least float32.
    torch.testing.assert_close(merged.double(), torch.stack(exact), atol=0, rtol=torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_written_and_gradients_flow(rule: str) -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    plan, _ = make_plan(rule, LENGTHS, removed_counts(rule, 0.5), tokens)
    before = tokens.clone()
    leaf = tokens[None].clone().requires_grad_()
    apply_merge(leaf, plan).sum().backward()
    assert torch.equal(tokens, before)
    assert leaf.grad is not None
    column_sums = apply_merge(torch.eye(sum(LENGTHS))[None], plan)[0].sum(0)
    torch.testing.assert_close(leaf.grad[0, :, 0], column_sums)


def test_positions_are_selected_and_owners_follow() -> None:
    tokens = torch.randn(sum(LENGTHS), WIDTH)
    plan, _ = make_plan("nearest", LENGTHS, removed_counts("nearest", 0.5), tokens)
    positions = torch.arange(sum(LENGTHS))[None]
    assert torch.equal(take_kept(positions, plan), plan.keep_indices)
    owner = plan.follow(positions)
    shown = scatter_back(take_kept(positions, plan), owner)
    assert torch.equal(shown, plan.survivor_of)


def test_right_align() -> None:
    keep = torch.tensor([[True, False, True, True], [False, False, True, False]])
    columns = right_align(keep, 3)
    assert columns[0].tolist() == [0, 2, 3]
    assert columns[1, -1] == 2 and not keep[1, columns[1, :2]].any()


def test_segments_gather_and_write_back() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    segments = Segments.from_lengths((2, 3), order)
    flat = torch.arange(5) * 10
    assert segments.take(flat)[0, :2].tolist() == [40, 20]
    assert segments.take(flat)[1].tolist() == [0, 10, 30]
    written = segments.put(flat, -segments.take(flat))
    assert written.tolist() == [0, -10, -20, -30, -40]
    assert flat.tolist() == [0, 10, 20, 30, 40]
    assert buckets((3, 5, 3)) == {3: [0, 2], 5: [1]}


@pytest.mark.parametrize("rule", ["nearest", "diverse"])
def test_blocks_of_similarities_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(sum(LENGTHS), 8)
    torch.manual_seed(1)
    whole, _ = make_plan(rule, LENGTHS, removed_counts(rule, 0.6), tokens)
    monkeypatch.setattr(rules, "BLOCK_ELEMENTS", 1)
    torch.manual_seed(1)
    rows, _ = make_plan(rule, LENGTHS, removed_counts(rule, 0.6), tokens)
    assert torch.equal(whole.keep_mask, rows.keep_mask) and torch.equal(whole.anchors, rows.anchors)


@pytest.mark.parametrize("kept", [[0, 1, 2], [4]])
def test_a_rule_that_keeps_another_number_stays_inside_the_rows(kept: list[int]) -> None:
    """Rows of survivors are indices: one beyond the end would end a GPU's whole process."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, kept] = True
    slots = mask.cumsum(-1) - 1 + torch.tensor([[0], [2]])
    found = aligned_rows(mask, 2, slots)
    assert found.shape == (2, 2) and 0 <= int(found.min()) and int(found.max()) < 10
