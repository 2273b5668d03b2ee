"""What happens to the stock attention's own calls inside an encoder layer.

Shapes: ``S`` segments, ``H`` heads, ``N`` tokens, ``D`` head width; ``P`` tokens of all segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

from illava_hooks.errors import MergeConfigError
from illava_hooks.merge.attention import attend_and_receive

__all__ = ["Eavesdropper"]


class Eavesdropper(TorchFunctionMode):
    """Weighs tokens by size, and takes the scores of ``received_attention`` out of the attention itself.

    Scores: on a CPU, without gradients and masks, a call of SDPA is answered with the same attention in blocks, which
    sums the columns on the way. Any other call goes through, and the scores are taken from the projections afterwards.

    Attributes:
        log_sizes: ``(P,)`` float32, what is added to the logits of each key, or None.
        received: for each answered call, ``(S, N)`` float32.
        attend: what answers.
    """

    attend = staticmethod(attend_and_receive)

    def __init__(self, wanted: bool, log_sizes: Tensor | None = None) -> None:
        """Takes scores only if ``wanted``; weighs tokens only if they have sizes."""
        super().__init__()
        self.wanted, self.log_sizes = wanted, log_sizes
        self.received: list[Tensor] = []
        self._seen = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every call of torch inside the context."""
        kwargs = kwargs or {}
        if func is softmax and self.log_sizes is not None:  # of eager attention
            logits = args[0]
            return func(
                logits + self._bias(self.log_sizes, len(logits), logits.shape[-1])[:, None, None].to(logits),
                *args[1:],
                **kwargs,
            )
        if func is not scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs)
        query, key, value = args
        bias = None if self.log_sizes is None else self._bias(self.log_sizes, len(key), key.shape[2])
        if self.wanted and _is_plain(*args, **kwargs):
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            mixed, received = self.attend(query, key, value, scale, bias)
            self.received.append(received)
            return mixed
        if bias is not None:
            kwargs = {**kwargs, "attn_mask": bias[:, None, None].to(query)}
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        """Raises ``MergeConfigError`` where no call came that tokens could be weighed in."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and self.log_sizes is not None and self._seen != len(self.log_sizes):
            raise MergeConfigError(
                "method is proportional, and this attention back-end has no logits to add sizes to; use "
                'model.set_attn_implementation("sdpa") or a method with proportional=False'
            )

    def _bias(self, sizes: Tensor, segments: int, length: int) -> Tensor:
        """``(S, N)``: the next tokens' logarithms of sizes; calls come in the order of the segments."""
        first, self._seen = self._seen, self._seen + segments * length
        return sizes[first : self._seen].view(segments, length)


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether a call of SDPA is one that the blocks can answer."""
    tables = (query, key, value)
    return (
        attn_mask is None
        and not (dropout_p or is_causal or enable_gqa)
        and all(table.shape == query.shape and table.dtype == torch.float32 for table in tables)
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(table.requires_grad for table in tables))
    )
