"""Whether the scores of a model's language stage are the attention that its layers really pay.

A wrong score is silent: identity, batches and generation are all right with it. So ``patch`` asks the layers
themselves, before it changes anything, on a few random tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from illava_hooks.engine.attention_tap import Attention, AttentionTap, TappedConfig
from illava_hooks.engine.cache import causal_mask
from illava_hooks.errors import PatchStateError, UnsupportedModelError
from illava_hooks.merge.scores import ScoreInputs, last_query_attention

__all__ = ["check_scores"]

NUM_TOKENS = 6
#: Queries are scaled so that the largest logit is this: a flat attention would hide a soft cap, a sharp one anything.
LARGEST_LOGIT = 8.0
#: How far a score may be from the attention row: rounding, also of float32 products in bfloat16, which some settings
#: of torch allow. Another formula is off by more.
TOLERANCE, TOLERANCE_HALF = 1e-2, 5e-2


def check_scores(text_model: Any, layers: Iterable[int]) -> None:
    """Compares the score of one row with the attention of each layer that will rank.

    Args:
        text_model: the decoder.
        layers: 0-based layers that rank: those in front of merging ones.

    Raises:
        UnsupportedModelError: a layer pays another attention than its queries and keys say, or cannot be heard.
    """
    for layer_idx in layers:
        attention = text_model.layers[layer_idx].self_attn
        if not _can_run(attention):
            continue
        try:
            score, row, dtype = _one_row(text_model, attention)
        except PatchStateError as unheard:
            raise UnsupportedModelError(
                f"decoder layer {layer_idx} ({type(attention).__name__}) does not call transformers' attention "
                "interface, so its tokens cannot be ranked; use llm_layers=[]"
            ) from unheard
        difference = float((score - row).abs().max())
        if not difference <= (TOLERANCE if dtype.itemsize >= 4 else TOLERANCE_HALF):
            raise UnsupportedModelError(
                f"decoder layer {layer_idx} ({type(attention).__name__}) pays an attention that its queries and keys "
                f"do not explain (off by {difference:.1e}): a soft cap, sinks or a window; use llm_layers=[]"
            )


def _can_run(attention: nn.Module) -> bool:
    """Whether the layer can run by itself: not if its weights are sharded, or nowhere at all."""
    parameters = list(attention.parameters())
    whole = all(type(p.data) is Tensor and p.numel() and p.device.type != "meta" for p in parameters)
    flat = any(isinstance(m, nn.Linear) and m.weight.dim() < 2 for m in attention.modules())  # FSDP's first version
    return bool(parameters) and whole and not flat


def _one_row(text_model: Any, attention: Any) -> tuple[Tensor, Tensor, torch.dtype]:
    """The score of one token's row of random tokens and that row itself, ``(1, NUM_TOKENS)`` each; what ran."""
    # All weights of an attention may be eight-bit integers: the norms beside it have the dtype that runs.
    weights = (*attention.parameters(), *text_model.parameters())
    config, device = attention.config, weights[0].device
    dtype = next(p.dtype for p in weights if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)  # nobody's random numbers change by patching
    width = text_model.config.hidden_size
    hidden = torch.randn(1, NUM_TOKENS, width, generator=generator).to(device, dtype)
    positions = torch.arange(NUM_TOKENS, device=hidden.device)[None]
    if (getattr(text_model.config, "rope_parameters", None) or {}).get("mrope_section"):
        positions = positions.expand(3, 1, -1)  # time, row and column, as for text
    probe = _Probe()
    vars(attention)["config"] = TappedConfig(config)
    try:
        with torch.no_grad(), AttentionTap(probe):
            type(attention).forward(  # past what others put on the instance: nobody counts this call
                attention,
                hidden_states=hidden,
                position_embeddings=text_model.rotary_emb(hidden, positions),
                attention_mask=causal_mask(text_model.config, hidden, 0, NUM_TOKENS, None),
            )
    finally:
        vars(attention)["config"] = config
    return probe.score, probe.row, probe.dtype


class _Probe:
    """Gives the back-end one-hot values: what it puts out is the attention itself."""

    score: Tensor
    row: Tensor
    dtype: torch.dtype

    def attend(
        self,
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As stock, and notes the row of the last token."""
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        largest = (query.flatten(1, 2) @ key.flatten(1, 2).transpose(1, 2)).abs().max() * scale
        query = query * (LARGEST_LOGIT / largest)
        inputs = ScoreInputs(
            key=key,
            query=lambda: query,
            last_query=lambda: query[:, :, -1],
            positions=torch.arange(query.shape[2], device=query.device)[None],
            key_valid=None,
            scale=scale,
            layer_idx=1,
            causal=True,
        )
        num = min(query.shape[2], value.shape[-1])
        one_hot = torch.eye(query.shape[2], value.shape[-1], device=value.device, dtype=value.dtype).expand_as(value)
        paid, _ = attention(module, query, key, one_hot.contiguous(), *args, **{**kwargs, "dropout": 0.0})
        self.row = paid[:, -1, :, :num].float().mean(1)
        self.score, self.dtype = last_query_attention(inputs)[:, :num], query.dtype
        return attention(module, query, key, value, *args, **kwargs)
