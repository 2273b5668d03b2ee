"""Attention that tells more than its output: what each token receives, or the LSE of each row.

A score that is made of it needs no second look at the map. Shapes: ``S`` segments, ``H`` heads, ``N`` tokens, ``D``
head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from illava_hooks.merge.segments import in_words

__all__ = ["SizeBias", "as_mask", "attend_and_receive", "attend_with_lse"]

#: Elements of one block of the attention map (4 MB in float32).
BLOCK_ELEMENTS = 1 << 20


def attend_and_receive(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens to all, and the mean over heads and queries of what each token receives.

    One block of the map at a time: products into one buffer, softmax in place, its column sums, its product with the
    values. The score that way costs one more pass over a block that is in the processor's cache, not a second
    look at the map. All of it in float32, whatever the tables are: heads are copied anyway. Autograd does not see
    through it.

    Args:
        query: ``(S, H, N, D)``.
        key: the same shape.
        value: the same shape.
        scale: factor of the logits.
        bias: ``(S, N)`` added to the logits of each key, or None.

    Returns:
        ``(S, H, N, D)`` in the type of the query, laid out as ``(S, N, H, D)``; and ``(S, N)`` float32, each row sums
        to 1.
    """
    segments, heads, num, width = query.shape
    rows = max(1, min(num, BLOCK_ELEMENTS // num))
    mixed = query.new_empty(segments, num, heads, width)
    received = query.new_zeros(segments, 1, num, dtype=torch.float32)
    buffer, ones = received.new_empty(rows * num), received.new_ones(1, rows)
    out = None if query.dtype == torch.float32 else received.new_empty(rows, width)
    # With beta 0 what is added is not even read.
    beta, added = (0, received.new_empty(segments, num)) if bias is None else (1, bias.float())
    for segment in range(segments):
        for head in range(heads):
            # Copies of one head: products with strided tables are slower by more than the copies cost.
            keys, values = key[segment, head].float().T.contiguous(), value[segment, head].float().contiguous()
            queries = query[segment, head].float()
            for first in range(0, num, rows):
                lines = slice(first, min(first + rows, num))
                count = lines.stop - first
                block = buffer[: count * num].view(count, num)
                torch.addmm(added[segment], queries[lines], keys, beta=beta, alpha=scale, out=block)
                torch.softmax(block, -1, out=block)
                received[segment].addmm_(ones[:, :count], block)
                if out is None:
                    torch.mm(block, values, out=mixed[segment, lines, head])
                else:
                    mixed[segment, lines, head] = torch.mm(block, values, out=out[:count])
    return mixed.transpose(1, 2), received[:, 0] / (heads * num)


def attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """What SDPA gives, by the operator that SDPA would take, and the row LSE that this operator has anyway.

    Args:
        query: ``(S, H, N, D)``.
        key: the same shape.
        value: the same shape.
        scale: factor of the logits.
        bias: ``(S, N)`` in the type of the tables, added to the logits of each key, or None.

    Returns:
        ``(S, H, N, D)``, bitwise what ``scaled_dot_product_attention`` returns; and ``(S, H, N)`` float32, the natural
        logarithm of the sum over the keys of ``exp(q k scale + bias)``. None where SDPA would take an operator without
        an LSE (plain products), pad the heads, or cast the tables.
    """
    mask = None if bias is None else as_mask(bias)
    kind = query.device.type
    chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, False, scale=scale)
    operator = _WITH_LSE.get((kind, chosen))
    if operator is None or torch.is_autocast_enabled(kind) or (kind == "cuda" and query.shape[-1] % 8):
        return None
    mixed, lse, *_ = operator(query, key, value, mask, scale)
    # The memory-efficient operator fills rows up to a multiple of 32; cuDNN's has a last dimension of 1.
    return mixed, lse.reshape(*query.shape[:2], -1)[..., : query.shape[2]].float()


def as_mask(bias: Tensor) -> Tensor:
    """``(S, N)`` as ``(S, 1, 1, N)``, whose strides are those of the rows: SDPA copies what seems to lie askew."""
    return bias.as_strided((len(bias), 1, 1, bias.shape[1]), (*[bias.stride(0)] * 3, bias.stride(1)))


class SizeBias:
    """Logarithms of sizes in the forms in which attentions add them to the logits of each key.

    Each is made once for all layers that are given the same sizes.

    Attributes:
        log_sizes: ``(P,)`` float32, of the tokens of all segments.
        lengths: tokens of each segment.
    """

    def __init__(self, log_sizes: Tensor, lengths: Sequence[int]) -> None:
        """Makes nothing yet."""
        self.log_sizes, self.lengths = log_sizes, lengths
        self._flat: Tensor | None = None
        self._rows: Tensor | None = None

    def flat(self, key: Tensor) -> Tensor:
        """``(P,)`` in the type of the keys and where they are: in half precision rounded."""
        if self._flat is None or (self._flat.dtype, self._flat.device) != (key.dtype, key.device):
            self._flat, self._rows = self.log_sizes.to(key), None
        return self._flat

    def rows(self, key: Tensor) -> Tensor:
        """The same as ``(S, L)``, where kernels can read it.

        Those of CUDA refuse a bias that starts between two 16-byte words, and SDPA copies one that ends there.
        """
        flat = self.flat(key)
        if self._rows is None:
            self._rows = in_words(flat, self.lengths)
        return self._rows


_Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Any]


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Any:
    """Chosen only where nothing is added to the logits."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Any:
    if mask is not None:
        # As in SDPA: rows start at multiples of 16 elements, and every head and query is given the same ones.
        num = key.shape[2]
        if mask.stride(0) % 16:
            mask = torch.nn.functional.pad(mask, (0, -num % 16))[..., :num]
        mask = mask.expand(*query.shape[:3], num)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scale)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, mask, True, scale=scale)


#: What gives an LSE, by device and by SDPA's number of the back-end.
_WITH_LSE: dict[tuple[str, int], _Operator] = {
    ("cpu", int(SDPBackend.FLASH_ATTENTION.value)): _flash_on_cpu,
    ("cuda", int(SDPBackend.FLASH_ATTENTION.value)): _flash,
    ("cuda", int(SDPBackend.EFFICIENT_ATTENTION.value)): _efficient,
    ("cuda", int(SDPBackend.CUDNN_ATTENTION.value)): _cudnn,
}
