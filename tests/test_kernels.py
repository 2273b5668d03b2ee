"""Kernels and the blocks that stand in for them, against float64: in Triton's interpreter where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernel_oracles as oracle
from families import families_and_methods
from helpers import MERGING, logits, prompt
from illava_hooks import patch
from illava_hooks.engine import attention_tap
from illava_hooks.merge import rules, scores
from illava_hooks.merge.kernels import blocks
from illava_hooks.merge.kernels.devices import uses_triton
from illava_hooks.merge.kernels.ops import closest_behind, match_behind, received_attention_varlen, row_lse_varlen
from launches import launches_of
from tiny_models import tiny_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCALE = 0.3
#: Numpy's own words on what masked lanes of the interpreter compute.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="says nothing about kernels")

RAGGED = [1, 7, 130, 33]


def tables(
    lengths: list[int], heads: int = 2, groups: int = 2, width: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Query and key, laid out as projections give them: rows of all heads side by side."""
    num = sum(lengths)
    query = torch.randn(num, heads * width, dtype=dtype).view(num, heads, width)
    return query, torch.randn(num, groups * width, dtype=dtype).view(num, groups, width)


def assert_attention(
    query: Tensor, key: Tensor, lengths: list[int], bias: Tensor | None = None, **settings: Any
) -> None:
    """Received attention, with the LSE given and without, and the LSE itself."""
    borders = oracle.borders_of(lengths)
    expected = oracle.received(query, key, lengths, SCALE, bias, **settings)
    expected_lse = oracle.lse(query, key, lengths, SCALE, bias, **settings)
    lse = row_lse_varlen(query, key, borders, SCALE, bias, **settings)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5, equal_nan=True)
    for given in (None, lse):
        found = received_attention_varlen(query, key, borders, SCALE, bias, given, **settings)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4, equal_nan=True)


@not_interpreted
@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this system")
def test_the_same_holds_in_tritons_interpreter() -> None:
    """Every other test of this file again, in a process whose kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_WORKER": ""},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_who_computes() -> None:
    assert uses_triton(torch.device("cpu")) == INTERPRETED
    assert not uses_triton(torch.device("meta"))
    assert INTERPRETED or "illava_hooks.merge.kernels.attention_triton" not in sys.modules


class TestAttention:
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("lengths", [RAGGED, [5, 5, 5], [1], [200]], ids=str)
    def test_segments_of_any_lengths(self, lengths: list[int], with_bias: bool) -> None:
        query, key = tables(lengths)
        assert_attention(query, key, lengths, torch.randn(len(key)) if with_bias else None)

    @pytest.mark.parametrize("width", [8, 64, 72, 80, 128])
    def test_head_widths(self, width: int) -> None:
        assert_attention(*tables([33, 40], width=width), [33, 40])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summed_in_float32(self, dtype: torch.dtype) -> None:
        for kind in (torch.float32, dtype):  # a bias that an attention in half precision added is rounded
            assert_attention(*tables([33, 140], width=72, dtype=dtype), [33, 140], torch.randn(173).to(kind))

    def test_float64(self) -> None:
        assert_attention(*tables([3, 14], dtype=torch.float64), [3, 14])

    def test_shared_key_heads(self) -> None:
        assert_attention(*tables([33, 70], heads=4), [33, 70])

    def test_tables_of_any_layout(self) -> None:
        query, key = tables([33, 70], heads=4, groups=4)
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
        assert query.stride(0) < query.stride(1) and key.stride(2) != 1
        assert_attention(query, key, [33, 70])

    @pytest.mark.parametrize("lengths", [[5, 140], [40, 40]], ids=str)
    @pytest.mark.parametrize("past", [0, 21])
    def test_causal_behind_keys_of_a_cache(self, lengths: list[int], past: int) -> None:
        keys = [n + past for n in lengths]
        query, key = tables(lengths, heads=4)[0], tables(keys)[1]
        settings: dict[str, Any] = {"cu_seqlens_q": oracle.borders_of(lengths), "causal": True}
        borders = oracle.borders_of(keys)
        found = received_attention_varlen(query, key, borders, SCALE, **settings)
        expected = oracle.received(query, key, lengths, SCALE, keys=keys, causal=True)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
        found = row_lse_varlen(query, key, borders, SCALE, **settings)
        expected = oracle.lse(query, key, lengths, SCALE, keys=keys, causal=True)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)

    def test_the_longest_segments(self) -> None:
        assert_attention(*tables([4097, 1], 1, 1, 72), [4097, 1])

    @pytest.mark.parametrize("broken", ["query", "key"])
    def test_broken_numbers_stay_in_their_segment(self, broken: str) -> None:
        query, key = tables(RAGGED)
        (query if broken == "query" else key)[20] = torch.nan
        assert_attention(query, key, RAGGED)
        found = received_attention_varlen(query, key, oracle.borders_of(RAGGED), SCALE)
        assert found[8:138].isnan().all() and found[:8].isfinite().all() and found[138:].isfinite().all()

    def test_a_bias_of_minus_infinity_hides_a_key(self) -> None:
        query, key = tables([9, 20])
        bias = torch.randn(29)
        bias[[3, 12]] = -torch.inf
        assert_attention(query, key, [9, 20], bias)

    @pytest.mark.parametrize("mutation", ["scale", "bias", "lse", "borders"])
    def test_the_oracle_sees_mistakes(self, mutation: str) -> None:
        query, key = tables([9, 20])
        bias = torch.randn(29)
        borders = oracle.borders_of([10, 19] if mutation == "borders" else [9, 20])
        lse = row_lse_varlen(query, key, borders, SCALE, bias)
        lse = lse.roll(1, 1) if mutation == "lse" else lse
        found = received_attention_varlen(
            query, key, borders, SCALE * (1.1 if mutation == "scale" else 1), None if mutation == "bias" else bias, lse
        )
        expected = oracle.received(query, key, [9, 20], SCALE, bias)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)

    def test_tables_that_do_not_belong_together_are_refused(self) -> None:
        query, key = tables([9], heads=3)
        with pytest.raises(ValueError, match="H a multiple of G"):
            received_attention_varlen(query, key, oracle.borders_of([9]), SCALE)
        with pytest.raises(ValueError, match="one dtype"):
            row_lse_varlen(query[:, :2], key.half(), oracle.borders_of([9]), SCALE)


def random_order(lengths: list[int]) -> Tensor:
    return torch.cat([torch.randperm(n) for n in lengths])


def padded(packed: Tensor, lengths: list[int], fill: Any) -> Tensor:
    """``(S, L)`` of what lies packed; padding counts on from ``fill``, or is ``fill``."""
    out = torch.full((len(lengths), max(lengths)), fill if fill is not None else 0, dtype=packed.dtype)
    for row, part in zip(out, packed.split(lengths), strict=True):
        row[: len(part)] = part
        if fill is None:  # a permutation of all places
            row[len(part) :] = torch.arange(len(part), len(row))
    return out


def search_tables(order: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the tokens, their order and the lengths, as the searches take them."""
    return padded(torch.arange(sum(lengths)), lengths, 0), padded(order, lengths, None), torch.tensor(lengths)


class TestSearch:
    @pytest.mark.parametrize("lengths", [RAGGED, [40, 40], [1], [300]], ids=str)
    @pytest.mark.parametrize("with_splits", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_finds_the_most_similar(self, lengths: list[int], with_splits: bool, dtype: torch.dtype) -> None:
        features, order = torch.randn(sum(lengths), 40).to(dtype), random_order(lengths)
        splits = [n * 2 // 3 for n in lengths] if with_splits else None
        self.check(features, order, lengths, splits)

    def check(self, features: Tensor, order: Tensor, lengths: list[int], splits: list[int] | None) -> None:
        tables, starts = search_tables(order, lengths), torch.tensor([0, *lengths]).cumsum(0)
        expected, who = oracle.closest(features, order, lengths, splits)
        if splits is None:
            best = closest_behind(features, *tables, torch.zeros(tables[0].shape))
            for row, n, mine, places in zip(best, lengths, expected.split(lengths), order.split(lengths), strict=True):
                torch.testing.assert_close(row[places].double(), mine, atol=1e-6, rtol=1e-5, equal_nan=True)
                assert (row[n:] == -torch.inf).all()
            return
        (own, match), best = match_behind(features, *tables, torch.tensor(splits))
        for s, n in enumerate(lengths):
            mine, asking = expected[starts[s] : starts[s] + n], splits[s]
            torch.testing.assert_close(best[s, :asking].double(), mine[:asking], atol=1e-6, rtol=1e-5, equal_nan=True)
            assert (best[s, asking:] == -torch.inf).all()
            part = slice(int(starts[s]), int(starts[s]) + n)
            assert torch.equal(own[s, :n], order[part] + starts[s])
            assert torch.equal(match[s, :n], who[part] + starts[s])

    def test_of_equals_the_first(self) -> None:
        features = torch.randn(3, 8)[torch.randint(3, (50,))]
        self.check(features, random_order([30, 20]), [30, 20], [10, 10])

    @pytest.mark.parametrize("splits", [None, [4, 12]])
    def test_broken_and_empty_tokens(self, splits: list[int] | None) -> None:
        features = torch.randn(30, 8)
        features[3], features[25] = torch.nan, 0.0
        self.check(features, random_order([10, 20]), [10, 20], splits)

    def test_tokens_lie_in_any_rows(self) -> None:
        features, order, place = torch.randn(40, 8), random_order([10, 20]), torch.randperm(40)[:30]
        rows, places, lengths = search_tables(order, [10, 20])
        lent = padded(place, [10, 20], 0)
        zeros = torch.zeros(rows.shape)
        assert torch.equal(
            closest_behind(features, lent, places, lengths, zeros),
            closest_behind(features[place], rows, places, lengths, zeros),
        )
        splits = torch.tensor([3, 9])
        there, best = match_behind(features, lent, places, lengths, splits)
        here, same = match_behind(features[place], rows, places, lengths, splits)
        assert torch.equal(best, same)
        assert torch.equal(there[:, 0, :10], place[here[:, 0, :10]]) and torch.equal(there[:, 1], place[here[:, 1]])

    def test_who_is_protected_is_close_to_nobody(self) -> None:
        features, tables = torch.randn(30, 8), search_tables(random_order([10, 20]), [10, 20])
        scores = torch.zeros(2, 20)
        before = closest_behind(features, *tables, scores)
        scores[0, 4] = scores[1, 17] = torch.inf
        after = closest_behind(features, *tables, scores)
        assert (after[scores == torch.inf] == -torch.inf).all()
        assert torch.equal(after[scores == 0], before[scores == 0])

    def test_the_oracle_sees_mistakes(self) -> None:
        features, order = torch.randn(30, 8), random_order([30])
        rows, places, lengths = search_tables(order, [30])
        wrong = closest_behind(features, rows, places.flip(1), lengths, torch.zeros(1, 30))[0, order]
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong.double(), oracle.closest(features, order, [30], None)[0])


class TestInAModel:
    """What other devices compute is what a CPU computes, through both stages; here in blocks or in the interpreter."""

    @pytest.mark.parametrize(
        ("family", "method"), families_and_methods(["illava", "nearest", "diverse", "tome", "illava-reference"])
    )
    def test_gives_the_same(self, family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(family)
        inputs = prompt(model, "ragged")
        session = patch(model, **MERGING, method=method, track=True)
        found, seen, plain = [], [], attention_tap._is_plain
        # In blocks; by kernels with an LSE of their own; with that of the attention that ran.
        for answer, lends in ((False, False), (True, False), (True, True)):
            for module in (scores, rules, attention_tap):
                monkeypatch.setattr(module, "takes", lambda device, answer=answer: seen.append(answer) or answer)
            monkeypatch.setattr(attention_tap, "_is_plain", plain if lends else lambda *_, **__: False)
            found.append((logits(model, inputs), session.provenance.merges))
        assert True in seen and False in seen
        for way in found[1:]:
            torch.testing.assert_close(found[0][0], way[0], atol=2e-5, rtol=1e-5)
            for step, merged in found[0][1].items():
                for one, other in zip(merged.images, way[1][step].images, strict=True):
                    assert torch.equal(one.seats, other.seats)
                    torch.testing.assert_close(one.weights.to_dense(), other.weights.to_dense())


@not_interpreted
class TestOperators:
    def arguments(self) -> list[tuple[Any, tuple[Any, ...]]]:
        query, key = tables([5, 9])
        borders, bias = oracle.borders_of([5, 9]), torch.randn(14)
        lse = row_lse_varlen(query, key, borders, SCALE, bias)
        features, found = torch.randn(14, 6), search_tables(random_order([5, 9]), [5, 9])
        ours, lengths = torch.ops.illava, [5, 9]
        return [
            (ours.row_lse.default, (query, key, borders, borders, lengths, lengths, SCALE, bias, False)),
            (ours.column_means.default, (query, key, borders, borders, [], [], SCALE, None, None, True)),
            (ours.column_means.default, (query, key, borders, borders, lengths, lengths, SCALE, bias, lse, False)),
            (ours.closest_behind.default, (features, *found, torch.rand(2, 9))),
            (ours.match_behind.default, (features, *found, torch.tensor([2, 4]))),
        ]

    def test_are_well_formed(self) -> None:
        for operator, given in self.arguments():
            torch.library.opcheck(operator, given)

    def test_fake_tensors_see_them(self) -> None:
        for operator, given in self.arguments():
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(g) if isinstance(g, Tensor) else g for g in given]
                faked = operator(*fakes)
            real = operator(*given)
            for fake, found in zip(
                *((out if isinstance(out, tuple) else (out,)) for out in (faked, real)), strict=True
            ):
                assert fake.shape == found.shape and fake.dtype == found.dtype and fake.device == found.device

    def test_compile_sees_them(self) -> None:
        query, key = tables([5, 9])
        borders = oracle.borders_of([5, 9])

        def score(query: Tensor) -> Tensor:
            return received_attention_varlen(query * 2, key, borders, SCALE, lengths=[5, 9]) + 1

        compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query), score(query))


@not_interpreted
class TestBlocks:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", [[256], [16384], [729] * 37, [4096, 100, 7] * 4, list(range(1, 65))])
    def test_are_few_and_never_the_map(self, lengths: list[int], causal: bool) -> None:
        num, heads = sum(lengths), 16
        query = torch.empty(num, heads, 80, dtype=torch.bfloat16, device="meta")
        whole, bias = heads * sum(n * n for n in lengths), query.new_empty(num, dtype=torch.float32)
        for call, rest in ((blocks.row_lse, ()), (blocks.column_means, (None,))):
            given = (query, query, lengths, lengths, SCALE, bias, *rest, causal)
            counter = launches_of("meta", call, *given)
            assert counter.total <= blocks.MOST_LAUNCHES, counter.launches
            assert counter.largest <= max(whole // 2, 2 * blocks.BLOCK_ELEMENTS), counter.largest

    @pytest.mark.parametrize("num", [64, 4096])
    @pytest.mark.parametrize("search", [blocks.closest_behind, blocks.match_behind])
    def test_of_the_search_are_few(self, num: int, search: Any) -> None:
        features, table = (
            torch.empty(2 * num, 64, device="meta"),
            torch.empty(2, num, dtype=torch.int64, device="meta"),
        )
        given = table[:, 0] if search is blocks.match_behind else torch.empty(2, num, device="meta")
        counter = launches_of("meta", search, features, table, table, table[:, 0], given)
        assert counter.total <= blocks.MOST_LAUNCHES, counter.launches
        assert counter.largest <= max(2 * num * num // 2, features.numel())

    @pytest.mark.parametrize("elements", [1, 300])
    def test_small_blocks_give_the_same(self, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        for lengths in (RAGGED, [20, 20]):
            assert_attention(*tables(lengths, heads=4), lengths, torch.randn(sum(lengths)))
