"""Models with the published layer shapes and random weights, so that speed can be measured without a download.

Sizes are those of the published configurations; only the vocabulary is smaller (1,024 words), which takes a fraction
of the weights and of the last position's logits away and nothing from any layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from illava_hooks.errors import InputError

__all__ = ["IMAGE_ID", "SHAPES", "VIDEO_ID", "Shape", "build_shape"]

VOCABULARY = 1024
IMAGE_ID, VIDEO_ID = 5, 6
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN_VIT = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}


@dataclass(frozen=True, slots=True)
class Shape:
    """Text sizes of a published model, and its family.

    Attributes:
        family: ``config.model_type``.
        hidden: width.
        mlp: MLP width.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key heads.
        source: the checkpoint whose configuration it is.
    """

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    source: str


SHAPES = {
    "llava-onevision-0.5b": Shape(
        "llava_onevision", 896, 4864, 24, 14, 2, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    ),
    "llava-onevision-7b": Shape("llava_onevision", 3584, 18944, 28, 28, 4, "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "qwen2-vl-2b": Shape("qwen2_vl", 1536, 8960, 28, 12, 2, "Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 18944, 28, 28, 4, "Qwen/Qwen2-VL-7B-Instruct"),
}


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
    shape = SHAPES[name]
    text = _text(shape, narrow)
    config: Any
    if shape.family == "llava_onevision":
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        vision = {"model_type": "siglip_vision_model", **_SIGLIP}
        if narrow:
            vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_attention_heads": 2}
        text |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_ID, video_token_index=VIDEO_ID
        )
        kind: Any = LlavaOnevisionForConditionalGeneration
    else:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        vision = {**_QWEN_VIT, "hidden_size": text["hidden_size"]}
        if narrow:
            vision |= {"depth": 16, "embed_dim": 64, "num_heads": 2}
        sections = [16, 24, 24] if not narrow else [4, 6, 6]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        config = Qwen2VLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID
        )
        kind = Qwen2VLForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def _text(shape: Shape, narrow: bool) -> dict[str, Any]:
    whole = not narrow
    return {
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
