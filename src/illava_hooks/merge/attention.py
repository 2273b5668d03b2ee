"""Attention that tells on the way how much each token receives, for processors without a flash kernel of their own.

Shapes: ``S`` segments, ``H`` heads, ``N`` tokens, ``D`` head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_and_receive"]

#: Elements of one block of the attention map (4 MB in float32).
BLOCK_ELEMENTS = 1 << 20


def attend_and_receive(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens to all, and the mean over heads and queries of what each token receives.

    One block of the map at a time: products into one buffer, softmax in place, its column sums, its product with the
    values. The score that way costs one more pass over a block that is in the processor's cache, not a second
    look at the map. Autograd does not see through it.

    Args:
        query: ``(S, H, N, D)`` float32.
        key: the same shape.
        value: the same shape.
        scale: factor of the logits.
        bias: ``(S, N)`` float32 added to the logits of each key, or None.

    Returns:
        ``(S, H, N, D)``, laid out as ``(S, N, H, D)``; and ``(S, N)`` float32, each row sums to 1.
    """
    segments, heads, num, width = query.shape
    rows = max(1, min(num, BLOCK_ELEMENTS // num))
    mixed = query.new_empty(segments, num, heads, width)
    received = query.new_zeros(segments, 1, num)
    buffer, ones = query.new_empty(rows * num), query.new_ones(1, rows)
    # With beta 0 what is added is not even read.
    beta, added = (0, query.new_empty(segments, num)) if bias is None else (1, bias)
    for segment in range(segments):
        for head in range(heads):
            # Copies of one head: products with strided tables are slower by more than the copies cost.
            keys, values = key[segment, head].T.contiguous(), value[segment, head].contiguous()
            for first in range(0, num, rows):
                lines = slice(first, min(first + rows, num))
                count = lines.stop - first
                block = buffer[: count * num].view(count, num)
                torch.addmm(added[segment], query[segment, head, lines], keys, beta=beta, alpha=scale, out=block)
                torch.softmax(block, -1, out=block)
                received[segment].addmm_(ones[:, :count], block)
                torch.mm(block, values, out=mixed[segment, lines, head])
    return mixed.transpose(1, 2), received[:, 0] / (heads * num)
