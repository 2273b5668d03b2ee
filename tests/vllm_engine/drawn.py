"""Checkpoints of families without an embedded model: stock classes with weights drawn from a seed, in float32.

The tokenizer, the chat format and the processors' settings are those of the embedded Qwen2-VL.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from illava_hooks import tiny

PATCH, MERGE = 6, 2
SPECIAL = 8  # the first ids of the tokenizer, which are never to be said

TEXT: dict[str, Any] = {
    "vocab_size": 78,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
}
IDS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _experts(count: int) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


#: By name: the configuration, and the processors' classes.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    # Windows of 3 x 3 groups in front of, between and behind the blocks that see everything.
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}},
            "vision_config": {
                **VISION,
                "window_size": 3 * MERGE * PATCH,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2,
            },
        },
        {"processor_class": "Qwen2_5_VLProcessor", "video_processor_type": "Qwen2VLVideoProcessor"},
    ),
    # DeepStack in front of, in, between and behind the layers that merge.
    "qwen3_vl": (
        {
            "text_config": {
                **TEXT,
                "head_dim": 32,
                "architectures": ["Qwen3ForCausalLM"],  # without it stock vLLM 0.29 does not start on a CPU
                "rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
            },
            "vision_config": {**VISION, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 4]},
        },
        {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"},
    ),
}


def drawn(name: str, folder: Path) -> Path:
    """The checkpoint of a family, with its processor.

    Args:
        name: one of ``FAMILIES``.
        folder: where it is written.
    """
    given, classes = FAMILIES[name]
    config = AutoConfig.for_model(name, **given, **IDS, tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _redraw(model)
    model.save_pretrained(folder)
    source = tiny.folder("qwen2_vl")
    for file in ("chat_template.jinja", "tokenizer.json"):
        shutil.copy(source / file, folder)
    for file in ("tokenizer_config.json", "processor_config.json"):
        entry = json.loads((source / file).read_text())
        entry["processor_class"] = classes["processor_class"]
        if "video_processor" in entry:
            entry["video_processor"]["video_processor_type"] = classes["video_processor_type"]
            entry["video_processor"]["size"] = {"shortest_edge": 3600, "longest_edge": 16 * 36864}
        (folder / file).write_text(json.dumps(entry, indent=1))
    return folder


@torch.no_grad()
def _redraw(model: Any) -> None:
    """Wide enough that attention is far from uniform and that scores are well apart."""
    generator = torch.Generator().manual_seed(11)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and id(parameter) not in embeddings:
            noise *= 1.2 / math.sqrt(parameter[0].numel())
        elif parameter.dim() == 1:
            noise = 1.0 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
        parameter.copy_(noise)
    model.lm_head.weight[:SPECIAL] = 0
