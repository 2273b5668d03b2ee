"""Models with the published layer shapes and random weights, so that speed can be measured without a download.

Sizes are those of the published configurations; only the vocabulary is smaller (1,024 words), which takes a fraction
of the weights and of the last position's logits away and nothing from any layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from illava_hooks.config import Modality
from illava_hooks.engine.finding import FromFamilies, families
from illava_hooks.engine.tooling import PublishedShape
from illava_hooks.errors import InputError

__all__ = ["SHAPES", "build_shape"]

VOCABULARY = 1024
_PLACEHOLDERS: Mapping[Modality, int] = MappingProxyType({"image": 5, "video": 6})

#: All that the families know.
SHAPES: Mapping[str, PublishedShape] = FromFamilies(lambda family: family.shapes)


def build_shape(
    name: str, device: str = "cpu", dtype: Any = torch.float32, attention: str = "sdpa", narrow: bool = False
) -> Any:
    """A stock model of a published shape with random weights.

    Args:
        name: a key of ``SHAPES``.
        device: where it lives.
        dtype: of its weights.
        attention: attention back-end.
        narrow: few and narrow layers instead of the published ones, for smoke tests.

    Raises:
        InputError: there is no such shape.
    """
    if name not in SHAPES:
        raise InputError(f"shape is {name!r}; choose one of {list(SHAPES)}")
    from transformers import AutoModelForImageTextToText

    family = next(family for family in families() if name in family.shapes)
    config = family.published_config(_text(family.shapes[name], narrow), _PLACEHOLDERS, narrow)
    torch.manual_seed(0)
    with torch.device(device):
        auto: Any = AutoModelForImageTextToText
        model = auto.from_config(config, attn_implementation=attention, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def _text(shape: PublishedShape, narrow: bool) -> dict[str, Any]:
    whole = not narrow
    experts = {
        "num_experts": shape.experts if whole else 4,
        "num_experts_per_tok": shape.chosen if whole else 2,
        "moe_intermediate_size": shape.expert_mlp if whole else 32,
    }
    return {
        **(experts if shape.experts else {}),
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden if whole else 64,
        "intermediate_size": shape.mlp if whole else 128,
        "num_hidden_layers": shape.layers if whole else 10,
        "num_attention_heads": shape.heads if whole else 2,
        "num_key_value_heads": shape.kv_heads if whole else 1,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
