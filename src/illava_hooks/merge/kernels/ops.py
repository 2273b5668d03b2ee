"""What stands in front of the kernels: one operator each, which ``torch.compile`` and fake tensors see.

Whether an operator runs its Triton kernel or blocks of PyTorch is decided in each call, by where its tensors lie:
Triton on CUDA devices, and on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``); else blocks.

Shapes: ``P`` tokens of all segments, one segment after the other, ``H`` query heads, ``G`` key heads (``H`` is a
multiple), ``D`` head width, ``S`` segments, ``C`` width of features. Results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from illava_hooks.merge.kernels import blocks
from illava_hooks.merge.kernels.devices import uses_triton

__all__ = ["most_similar", "received_attention_varlen", "row_lse_varlen"]

_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def received_attention_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    lengths: Sequence[int] = (),
    cu_seqlens_q: Tensor | None = None,
    lengths_q: Sequence[int] = (),
    causal: bool = False,
) -> Tensor:
    """Mean over heads and queries of the attention that each token receives inside its segment: ``(P,)``.

    ``sum_i exp(q_i k_j scale + bias_j - lse_i)``, divided by heads and queries. Two launches and a sum.

    Args:
        query: ``(P, H, D)``.
        key: ``(P, G, D)``.
        cu_seqlens: ``(S + 1,)``, the borders of the segments: 0, ..., P.
        scale: factor of the logits.
        bias: ``(P,)`` float32 added to the logits of each key, or None.
        lse: ``(H, P)`` float32, ``row_lse_varlen`` of the same, where the attention that ran gives it; None: computed.
        lengths: ``cu_seqlens`` as lengths on the host, so that the device need not be asked for them.
        cu_seqlens_q: borders of the queries where keys of a cache stand in front; None: as the keys.
        lengths_q: the same as lengths on the host.
        causal: whether a query sees only keys up to its own; the last query and the last key of a segment meet.
    """
    query_borders = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    counts = lengths if cu_seqlens_q is None else lengths_q
    _check(query, key, query_borders)
    per_head: Tensor = _column_means(query, key, query_borders, cu_seqlens, counts, lengths, scale, bias, lse, causal)
    return per_head.mean(0)


def row_lse_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    lengths: Sequence[int] = (),
    cu_seqlens_q: Tensor | None = None,
    lengths_q: Sequence[int] = (),
    causal: bool = False,
) -> Tensor:
    """``logsumexp_j(q_i k_j scale + bias_j)`` over the keys of each query's segment: ``(H, P)``; as above."""
    query_borders = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    counts = lengths if cu_seqlens_q is None else lengths_q
    _check(query, key, query_borders)
    found: Tensor = _row_lse(query, key, query_borders, cu_seqlens, counts, lengths, scale, bias, causal)
    return found


def most_similar(
    features: Tensor, order: Tensor, begins: Tensor, ends: Tensor, longest: int, splits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each place of an order of tokens, the largest cosine to a token further behind in its segment.

    Args:
        features: ``(P, C)``, as they are: their lengths are divided by here.
        order: ``(P,)`` int64, the order of the tokens inside each segment: their numbers from its first one on.
        begins: ``(S,)`` int64, the row where each segment begins, ascending from 0.
        ends: ``(S,)`` int64, where it ends; what lies between two segments is nobody.
        longest: rows of the longest segment, what lies behind it included.
        splits: ``(S,)`` int64 or None: the first so many places of a segment look for the most similar of its other
            places; None: each place looks for the most similar behind it.

    Returns:
        ``(P,)`` float32, the cosine; minus infinity where nobody is to be found, or asks. And ``(P,)`` int64, the
        number of who was found, of equals the first, else the token's own; meaningful with ``splits`` only.
    """
    found: tuple[Tensor, Tensor] = _search(features, order, begins, splits, ends, longest)
    return found


def _check(query: Tensor, key: Tensor, borders: Tensor) -> None:
    """Raises ``ValueError`` for tables that do not belong together: a kernel would read beyond their ends."""
    if query.dim() != 3 or key.dim() != 3 or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}; give (P, H, D), (P, G, D), H a multiple of G"
        )
    if query.dtype != key.dtype or borders.dim() != 1:
        raise ValueError(
            f"query is {query.dtype}, key {key.dtype}, cu_seqlens of {borders.dim()} dimensions; give one dtype and 1"
        )


def _lengths(known: Sequence[int], borders: Tensor) -> list[int]:
    """Lengths on the host; the device is asked for those that the caller did not give."""
    return list(known) or [stop - start for start, stop in pairwise(borders.tolist())]


@torch.library.custom_op("illava::row_lse", mutates_args=())
def _row_lse(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    counts = _lengths(query_lengths, query_borders)
    if uses_triton(query.device) and query.dtype in _TRITON_TYPES:
        from illava_hooks.merge.kernels import attention_triton

        return attention_triton.row_lse(query, key, query_borders, key_borders, max(counts), scale, bias, causal)
    return blocks.row_lse(query, key, counts, _lengths(key_lengths, key_borders), scale, bias, causal)


@_row_lse.register_fake
def _(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("illava::column_means", mutates_args=())
def _column_means(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    lse: Tensor | None,
    causal: bool,
) -> Tensor:
    counts, sizes = _lengths(query_lengths, query_borders), _lengths(key_lengths, key_borders)
    if uses_triton(query.device) and query.dtype in _TRITON_TYPES:
        from illava_hooks.merge.kernels import attention_triton

        given = (query, key, query_borders, key_borders)
        if lse is None:
            lse = attention_triton.row_lse(*given, max(counts), scale, bias, causal)
        return attention_triton.column_means(*given, max(sizes), scale, bias, lse, causal)
    return blocks.column_means(query, key, counts, sizes, scale, bias, lse, causal)


@_column_means.register_fake
def _(
    query: Tensor,
    key: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    lse: Tensor | None,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape[1], key.shape[0], dtype=torch.float32)


@torch.library.custom_op("illava::most_similar", mutates_args=())
def _search(
    features: Tensor, order: Tensor, begins: Tensor, splits: Tensor | None, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    if uses_triton(features.device) and features.dtype in _TRITON_TYPES:
        from illava_hooks.merge.kernels import search_triton

        return search_triton.search(features, order, begins, splits, ends, longest)
    return blocks.search(features, order, begins, splits, ends, longest)


@_search.register_fake
def _(
    features: Tensor, order: Tensor, begins: Tensor, splits: Tensor | None, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(order, dtype=torch.float32), torch.empty_like(order)
