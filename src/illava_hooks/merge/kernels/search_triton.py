"""Triton kernel of the search for the most similar token, packed over segments. Imported only where it is wanted.

One program takes one tile of tokens of a segment and goes through those that they may match, in tiles: no table of
all pairs. Products are taken of the features as they are, and divided by their lengths afterwards, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from illava_hooks.merge.kernels.tuning import launcher

__all__ = ["closest_behind", "match_behind"]


@triton.jit
def _search(
    features, rows, order, lengths, given, best, match,
    feature_row, width, places, longest, length_class,
    HAS_SPLIT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """For each place of an order the largest cosine to one behind it, and with splits who of those behind it that is.

    ``given`` are the scores of the tokens, or the splits of the segments; ``best`` is written by token, or with splits
    by place, and ``match`` with splits only.
    """
    tiles = tl.cdiv(longest, TILE)
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = segment.to(tl.int64) * longest
    count = tl.load(lengths + segment).to(tl.int32)
    asking = count
    if HAS_SPLIT:
        asking = tl.load(given + segment).to(tl.int32)
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < longest
    number = tl.load(order + begin + place, mask=inside, other=0)
    row = tl.load(rows + begin + number, mask=inside, other=0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    found = number
    start = tile * TILE
    if HAS_SPLIT:
        start = asking
    if tile * TILE >= asking:
        start = count  # nobody asks here
    for other in range(start, count, STEP):
        behind = other + tl.arange(0, STEP)
        partner = tl.load(order + begin + behind, mask=behind < count, other=0)
        partner_row = tl.load(rows + begin + partner, mask=behind < count, other=0)
        product = tl.zeros([TILE, STEP], tl.float32)
        # Summed up once behind the loop: a sum over threads costs more than a product.
        own, theirs = tl.zeros([TILE, PART], tl.float32), tl.zeros([STEP, PART], tl.float32)
        for channel in range(0, width, PART):
            part = channel + tl.arange(0, PART)
            known = (part < width)[None]
            left = tl.load(
                features + row[:, None] * feature_row + part[None], mask=(place < asking)[:, None] & known, other=0.0
            )
            right = tl.load(
                features + partner_row[:, None] * feature_row + part[None],
                mask=(behind < count)[:, None] & known,
                other=0.0,
            )
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, tl.trans(right), acc=product, input_precision="ieee")
            wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
            own += wide_left * wide_left
            theirs += wide_right * wide_right
        # As in `normalize`: a token of zeros resembles nobody.
        own_norm, their_norm = tl.sqrt(tl.sum(own, 1)), tl.sqrt(tl.sum(theirs, 1))
        norms = tl.maximum(own_norm, 1e-12)[:, None] * tl.maximum(their_norm, 1e-12)[None]
        cosine = product / norms
        # No number, which broken pixels give, comes out on top, and out of here as it is.
        cosine = tl.where(cosine == cosine, cosine, float("inf"))
        allowed = (behind < count)[None]
        if not HAS_SPLIT:
            allowed = allowed & (behind[None] > place[:, None])
        cosine = tl.where(allowed, cosine, float("-inf"))
        highest = tl.max(cosine, 1)
        # Of equals the first: an order by score must not decide between copies.
        first = tl.min(tl.where((cosine == highest[:, None]) & allowed, partner[None], 9223372036854775807), 1)
        better = (highest > top) | ((highest == top) & (first < found) & (highest > float("-inf")))
        top, found = tl.where(better, highest, top), tl.where(better, first, found)
    asks = place < asking
    top = tl.where(top == float("inf"), float("nan"), top)
    if HAS_SPLIT:
        tl.store(best + begin + place, tl.where(asks, top, float("-inf")), mask=inside)
        tl.store(match + begin + place, row, mask=inside)
        whose = tl.load(rows + begin + tl.where(asks, found, number), mask=inside, other=0)
        tl.store(match + places + begin + place, whose, mask=inside)
    else:
        score = tl.load(given + begin + number, mask=inside, other=0.0)
        tl.store(best + begin + number, tl.where(asks & (score < float("inf")), top, float("-inf")), mask=inside)


#: Tile, step, part of the width, warps, stages.
_SIZES = ((64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 128, 32, 8, 3))
_CONFIGS = [
    ({"TILE": tile, "STEP": step, "PART": part}, {"num_warps": warps, "num_stages": stages})
    for tile, step, part, warps, stages in _SIZES
]
_launch_search = launcher(_search, ["width", "length_class", "HAS_SPLIT"], _CONFIGS)


def closest_behind(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """As ``ops.closest_behind``."""
    best = torch.empty_like(order, dtype=torch.float32, memory_format=torch.contiguous_format)
    _run(features, rows, order, lengths, scores.contiguous(), best, order, has_split=False)
    return best


def match_behind(
    features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, splits: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``ops.match_behind``."""
    match = torch.empty(2, *order.shape, dtype=torch.int64, device=order.device)
    best = torch.empty(order.shape, dtype=torch.float32, device=order.device)
    _run(features, rows, order, lengths, splits, best, match, has_split=True)
    return match, best


def _run(
    features: Tensor,
    rows: Tensor,
    order: Tensor,
    lengths: Tensor,
    given: Tensor,
    best: Tensor,
    match: Tensor,
    *,
    has_split: bool,
) -> None:
    segments, longest = order.shape
    features = features if features.stride(-1) == 1 else features.contiguous()

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(longest, meta["TILE"]) * segments,)

    _launch_search(
        grid,
        longest,
        *(features, rows.contiguous(), order.contiguous(), lengths, given, best, match),
        *(features.stride(0), features.shape[1], order.numel()),
        HAS_SPLIT=has_split,
    )
