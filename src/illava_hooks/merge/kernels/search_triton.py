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

__all__ = ["search"]


@triton.jit
def _search(
    features, order, begins, splits, ends, best, match,
    feature_row, width, segments, places, longest, length_class,
    HAS_SPLIT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """For each place of an order the largest cosine to one behind it, or with a split to one behind that."""
    tiles = tl.cdiv(longest, TILE)
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = tl.load(begins + segment).to(tl.int64)
    count = (tl.load(ends + segment) - begin).to(tl.int32)
    # Up to the next segment: the room between is written as well.
    room = (tl.load(begins + segment + 1, mask=segment + 1 < segments, other=places) - begin).to(tl.int32)
    asking = count
    if HAS_SPLIT:
        asking = tl.load(splits + segment).to(tl.int32)
    if tile * TILE < room:
        place = tile * TILE + tl.arange(0, TILE)
        number = tl.load(order + begin + place, mask=place < room, other=0)
        rows = features + (begin + number)[:, None] * feature_row
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
            partners = features + (begin + partner)[:, None] * feature_row
            product = tl.zeros([TILE, STEP], tl.float32)
            own, theirs = tl.zeros([TILE], tl.float32), tl.zeros([STEP], tl.float32)
            for channel in range(0, width, PART):
                part = channel + tl.arange(0, PART)
                inside = (part < width)[None]
                left = tl.load(rows + part[None], mask=(place < asking)[:, None] & inside, other=0.0)
                right = tl.load(partners + part[None], mask=(behind < count)[:, None] & inside, other=0.0)
                if WIDEN:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                product = tl.dot(left, tl.trans(right), acc=product, input_precision="ieee")
                wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
                own += tl.sum(wide_left * wide_left, 1)
                theirs += tl.sum(wide_right * wide_right, 1)
            # As in `normalize`: a token of zeros resembles nobody.
            lengths = tl.maximum(tl.sqrt(own), 1e-12)[:, None] * tl.maximum(tl.sqrt(theirs), 1e-12)[None]
            cosine = product / lengths
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
        tl.store(best + begin + place, tl.where(asks, top, float("-inf")), mask=place < room)
        tl.store(match + begin + place, tl.where(asks, found, number), mask=place < room)


_launch_search = launcher(_search, ["width", "length_class"], PART=32)


def search(
    features: Tensor, order: Tensor, begins: Tensor, splits: Tensor | None, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """As ``ops.most_similar``."""
    best, match = torch.empty_like(order, dtype=torch.float32), torch.empty_like(order)
    features = features if features.stride(-1) == 1 else features.contiguous()

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(longest, meta["TILE"]) * len(begins),)

    _launch_search(
        grid,
        longest,
        *(features, order, begins, begins if splits is None else splits, ends, best, match),
        *(features.stride(0), features.shape[1], len(begins), len(order)),
        HAS_SPLIT=splits is not None,
    )
    return best, match
