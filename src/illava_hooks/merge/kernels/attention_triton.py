"""Triton kernels over attention of packed segments. Imported only where Triton is there and wanted.

One program takes one tile of rows (or columns) of one segment and head, and goes through the other side in tiles:
no map is ever held. Programs beyond a short segment's end leave at once, so one launch serves segments of any lengths.
Logits are kept in base 2, where exponentials are cheapest.

Shapes: ``P`` queries or keys of all segments, ``H`` query heads, ``G`` key heads, ``D`` head width, ``S`` segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from illava_hooks.merge.kernels.tuning import launcher, width_parts

__all__ = ["column_means", "row_lse"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _product(
    a, b, rows, columns, row_ok, column_ok, a_row, b_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``a[rows] @ b[columns].T`` in float32; a width that is no power of two goes in two parts, such as 64 + 16."""
    width = tl.arange(0, D1)
    inside = (width < D)[None]
    left = tl.load(a + rows[:, None] * a_row + width[None], mask=row_ok[:, None] & inside, other=0.0)
    right = tl.load(b + columns[:, None] * b_row + width[None], mask=column_ok[:, None] & inside, other=0.0)
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    # Not TF32: scores of float32 models are compared with each other.
    product = tl.dot(left, tl.trans(right), input_precision="ieee")
    if D2 > 0:
        rest = D1 + tl.arange(0, D2)
        inside = (rest < D)[None]
        left = tl.load(a + rows[:, None] * a_row + rest[None], mask=row_ok[:, None] & inside, other=0.0)
        right = tl.load(b + columns[:, None] * b_row + rest[None], mask=column_ok[:, None] & inside, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, tl.trans(right), acc=product, input_precision="ieee")
    return product


@triton.jit
def _row_lse(
    query, key, bias, query_borders, key_borders, out,
    scale, num_queries, query_row, query_head, key_row, key_head, longest, length_class,
    GROUP: tl.constexpr, WORD: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``out[h, i] = logsumexp_j(q_i k_j scale + bias_j)``, each row by one program."""
    tiles = tl.cdiv(longest, TILE)
    segment, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first = tl.load(query_borders + segment).to(tl.int64)
    count = (tl.load(query_borders + segment + 1) - first).to(tl.int32)
    key_first = tl.load(key_borders + segment).to(tl.int64)
    key_count = (tl.load(key_borders + segment + 1) - key_first).to(tl.int32)
    if tile * TILE < count:
        row = tile * TILE + tl.arange(0, TILE)
        queries = query + tl.multiple_of(head.to(tl.int64) * query_head, WORD) + first * query_row
        keys = key + tl.multiple_of((head // GROUP).to(tl.int64) * key_head, WORD) + key_first * key_row
        highest = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        end = key_count
        if CAUSAL:
            end = tl.minimum(end, (tile + 1) * TILE + key_count - count)
        for start in range(0, end, STEP):
            column = start + tl.arange(0, STEP)
            inside = column < key_count
            logits = _product(queries, keys, row, column, row < count, inside, query_row, key_row, D, D1, D2, WIDEN)
            logits *= scale * _LOG2_E
            if HAS_BIAS:
                logits += tl.load(bias + key_first + column, mask=inside, other=0.0).to(tl.float32)[None] * _LOG2_E
            seen = inside[None]
            if CAUSAL:
                seen = seen & (column[None] <= row[:, None] + key_count - count)
            logits = tl.where(seen, logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            # Nothing seen so far: infinity minus infinity is no number.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
            highest = higher
        base = tl.where(highest == float("-inf"), 0.0, highest)
        lse = (base + tl.log2(total)) * _LN_2
        tl.store(out + head.to(tl.int64) * num_queries + first + row, lse, mask=row < count)


@triton.jit
def _column_means(
    query, key, bias, lse, query_borders, key_borders, out,
    scale, num_queries, num_keys, query_row, query_head, key_row, key_head, longest, length_class,
    GROUP: tl.constexpr, WORD: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``out[h, j] = mean_i exp(q_i k_j scale + bias_j - lse_i)``, each column by one program."""
    tiles = tl.cdiv(longest, TILE)
    segment, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first = tl.load(query_borders + segment).to(tl.int64)
    count = (tl.load(query_borders + segment + 1) - first).to(tl.int32)
    key_first = tl.load(key_borders + segment).to(tl.int64)
    key_count = (tl.load(key_borders + segment + 1) - key_first).to(tl.int32)
    if tile * TILE < key_count:
        column = tile * TILE + tl.arange(0, TILE)
        inside = column < key_count
        queries = query + tl.multiple_of(head.to(tl.int64) * query_head, WORD) + first * query_row
        keys = key + tl.multiple_of((head // GROUP).to(tl.int64) * key_head, WORD) + key_first * key_row
        added = tl.zeros([TILE], tl.float32)
        if HAS_BIAS:
            added = tl.load(bias + key_first + column, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
        total = tl.zeros([TILE], tl.float32)
        begin = 0
        if CAUSAL:
            begin = tl.maximum(0, tile * TILE + count - key_count) // STEP * STEP
        for start in range(begin, count, STEP):
            row = start + tl.arange(0, STEP)
            logits = _product(keys, queries, column, row, inside, row < count, key_row, query_row, D, D1, D2, WIDEN)
            norm = tl.load(lse + head.to(tl.int64) * num_queries + first + row, mask=row < count, other=0.0)
            attention = tl.exp2(logits * (scale * _LOG2_E) + added[:, None] - norm[None] * _LOG2_E)
            seen = (row < count)[None]
            if CAUSAL:
                seen = seen & (column[:, None] <= row[None] + key_count - count)
            total += tl.sum(tl.where(seen, attention, 0.0), 1)
        tl.store(out + head.to(tl.int64) * num_keys + key_first + column, total / count, mask=inside)


#: Tile of the side that a program keeps, step on the side that it goes through, warps, stages.
_SIZES = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 3), (32, 64, 4, 2))
_CONFIGS = [
    ({"TILE": tile, "STEP": step}, {"num_warps": warps, "num_stages": stages}) for tile, step, warps, stages in _SIZES
]
_launch_row_lse = launcher(_row_lse, ["D", "length_class"], _CONFIGS)
_launch_column_means = launcher(_column_means, ["D", "length_class"], _CONFIGS)


def row_lse(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    longest: int,
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """``(H, P)`` float32, the logarithm of the sum of each query's exponentials; ``longest`` counts queries."""
    out = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
    query, key = _with_dense_width(query), _with_dense_width(key)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(longest, meta["TILE"]) * (len(query_borders) - 1), query.shape[1]

    _launch_row_lse(
        grid,
        longest,
        *(query, key, key if bias is None else bias, query_borders, key_borders, out),
        *(scale, len(query), query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        GROUP=query.shape[1] // key.shape[1],
        WORD=_word(query, key),
        HAS_BIAS=bias is not None,
        CAUSAL=causal,
        **width_parts(query.shape[2]),
    )
    return out


def column_means(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    longest: int,
    scale: float,
    bias: Tensor | None,
    lse: Tensor,
    causal: bool,
) -> Tensor:
    """``(H, P)`` float32, the mean over its segment's queries of the attention that a key receives.

    ``longest`` counts keys.
    """
    out = torch.empty(query.shape[1], len(key), dtype=torch.float32, device=query.device)
    query, key = _with_dense_width(query), _with_dense_width(key)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(longest, meta["TILE"]) * (len(key_borders) - 1), query.shape[1]

    _launch_column_means(
        grid,
        longest,
        *(query, key, key if bias is None else bias, lse, query_borders, key_borders, out),
        *(scale, len(query), len(key), query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        GROUP=query.shape[1] // key.shape[1],
        WORD=_word(query, key),
        HAS_BIAS=bias is not None,
        CAUSAL=causal,
        **width_parts(query.shape[2]),
    )
    return out


def _word(*tables: Tensor) -> int:
    """Of how many elements heads lie multiples apart: a width of 72 is no multiple of 16, which Triton looks for."""
    return 8 if all(table.stride(1) % 8 == 0 for table in tables) else 1


def _with_dense_width(table: Tensor) -> Tensor:
    """The same with neighbours in the last dimension side by side; rows and heads may lie anywhere."""
    return table if table.stride(-1) == 1 else table.contiguous()
