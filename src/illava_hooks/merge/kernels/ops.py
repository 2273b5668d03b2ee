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
from illava_hooks.merge.segments import unit_means

__all__ = ["closest_behind", "match_behind", "received_attention_varlen", "row_lse_varlen"]

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
    unit: int = 1,
    rows: int = 1,
    prefix: int = 0,
) -> Tensor:
    """Mean over heads and queries of the attention that each token receives inside its segment: ``(P / unit,)``.

    ``sum_i exp(q_i k_j scale + bias_j - lse_i)``, divided by heads and queries. Two launches and a sum.

    Args:
        query: ``(P, H, D)``.
        key: ``(P, G, D)``.
        cu_seqlens: ``(S + 1,)``, the borders of the segments: 0, ..., P.
        scale: factor of the logits.
        bias: ``(P,)`` of any type, added to the logits of each key in float32; or None.
        lse: ``(H, P)`` float32, ``row_lse_varlen`` of the same, where the attention that ran gives it; None: computed.
        lengths: ``cu_seqlens`` as lengths on the host, so that the device need not be asked for them.
        cu_seqlens_q: borders of the queries where keys of a cache stand in front; None: as the keys.
        lengths_q: the same as lengths on the host.
        causal: whether a query sees only keys up to its own; the last query and the last key of a segment meet.
        unit: neighbours whose mean is asked for.
        rows: equal rows that the tokens lie in.
        prefix: tokens in front of each row, which are left out of what is returned.
    """
    query_borders = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    counts = lengths if cu_seqlens_q is None else lengths_q
    _check(query, key, query_borders)
    means = _column_means if _is_plain(query) else _column_means_op
    per_head: Tensor = means(query, key, query_borders, cu_seqlens, counts, lengths, scale, bias, lse, causal)
    return unit_means(per_head, unit, rows, prefix)


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
    row_lse = _row_lse if _is_plain(query) else _row_lse_op
    found: Tensor = row_lse(query, key, query_borders, cu_seqlens, counts, lengths, scale, bias, causal)
    return found


def closest_behind(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """The largest cosine of each token to one that stands behind it in its segment's order.

    Args:
        features: ``(P, C)``, as they are: their lengths are divided by here.
        rows: ``(S, L)`` int64, the row of each token of the padded segments.
        order: ``(S, L)`` int64, for each segment a permutation of its tokens' numbers, padding at the end.
        lengths: ``(S,)`` int64, tokens of each segment.
        scores: ``(S, L)`` float32; who has the score infinity is protected, and closest to nobody.

    Returns:
        ``(S, L)`` float32, by token; minus infinity where nobody is behind.
    """
    closest = _closest if _is_plain(features) else _closest_op
    found: Tensor = closest(features, rows, order, lengths, scores)
    return found


def match_behind(
    features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, splits: Tensor
) -> tuple[Tensor, Tensor]:
    """For the first so many tokens of each segment's order the most similar of the segment's others.

    Args:
        features: as ``closest_behind``.
        rows: as ``closest_behind``.
        order: as ``closest_behind``.
        lengths: as ``closest_behind``.
        splits: ``(S,)`` int64, how many look for a match.

    Returns:
        ``(2, S, L)`` int64: the row of the token in each place of the order, and the row of its match, of equals the
        one with the lowest number; who does not look matches itself. And ``(S, L)`` float32, the cosine of both; minus
        infinity on who does not look.
    """
    match = _match if _is_plain(features) else _match_op
    found: tuple[Tensor, Tensor] = match(features, rows, order, lengths, splits)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether nobody looks at operators here: the way through PyTorch's dispatcher costs as much as a launch."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    return not (torch._C._len_torch_dispatch_stack() or tensor.requires_grad)


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


_row_lse_op = torch.library.custom_op("illava::row_lse", _row_lse, mutates_args=())


@_row_lse_op.register_fake
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


_column_means_op = torch.library.custom_op("illava::column_means", _column_means, mutates_args=())


@_column_means_op.register_fake
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


def _closest(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    if uses_triton(features.device) and features.dtype in _TRITON_TYPES:
        from illava_hooks.merge.kernels import search_triton

        return search_triton.closest_behind(features, rows, order, lengths, scores)
    return blocks.closest_behind(features, rows, order, lengths, scores)


_closest_op = torch.library.custom_op("illava::closest_behind", _closest, mutates_args=())


@_closest_op.register_fake
def _(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    return torch.empty(order.shape, dtype=torch.float32, device=order.device)


def _match(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, splits: Tensor) -> tuple[Tensor, Tensor]:
    if uses_triton(features.device) and features.dtype in _TRITON_TYPES:
        from illava_hooks.merge.kernels import search_triton

        return search_triton.match_behind(features, rows, order, lengths, splits)
    return blocks.match_behind(features, rows, order, lengths, splits)


_match_op = torch.library.custom_op("illava::match_behind", _match, mutates_args=())


@_match_op.register_fake
def _(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, splits: Tensor) -> tuple[Tensor, Tensor]:
    match = torch.empty(2, *order.shape, dtype=torch.int64, device=order.device)
    return match, torch.empty(order.shape, dtype=torch.float32, device=order.device)
