"""The two stock models and their processors, untrained."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from illava_hooks.tiny.questions import vocabulary

FAMILIES = ("llava_onevision", "qwen2_vl")
WIDTH, DEPTH, TEXT_DEPTH, HEADS = 96, 8, 6, 4
TILE, PATCH = 64, 8  # LLaVA-OneVision
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)]
QWEN_PATCH, QWEN_PIXELS = 6, {"shortest_edge": 60 * 60, "longest_edge": 192 * 192}

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
QWEN_SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_IMAGE = {"llava_onevision": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
_VIDEO = {"llava_onevision": "<video>", "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>"}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'video' %}VIDEO "
    "{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


#: Where these models merge unless told otherwise: a key of their own configuration, at the paper's fractions of depth.
_QWEN_PRESET = {"vit_layers": [3, 4], "vit_r": 0.29, "llm_layers": [2, 3], "llm_ratio": 0.85}
PRESETS: dict[str, Any] = {
    "llava_onevision": {
        "image": {"vit_layers": [3, 4], "vit_r": 16, "llm_layers": [2], "llm_ratio": 0.70},
        "video": {"vit_layers": [2, 3], "vit_r": 16, "llm_layers": [1], "llm_ratio": 0.70},
    },
    "qwen2_vl": {"image": _QWEN_PRESET, "video": _QWEN_PRESET},
}


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; what it does not know is ``<unk>``."""
    special = SPECIAL if family == "llava_onevision" else SPECIAL[:4] + QWEN_SPECIAL
    words = [*special, "user", "assistant", "system", *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in special if token not in ("<unk>", "<pad>", "<|im_end|>")],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor(family: str) -> Any:
    """The stock processor, sized for the tiny model."""
    tokenizer = build_tokenizer(family)
    template = _TEMPLATE.replace("IMAGE", _IMAGE[family]).replace("VIDEO", _VIDEO[family])
    if family == "llava_onevision":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": TILE, "width": TILE}}
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **half),
            video_processor=LlavaOnevisionVideoProcessor(**half),
            tokenizer=tokenizer,
            num_image_tokens=(TILE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    sizes: dict[str, Any] = {"patch_size": QWEN_PATCH, "size": QWEN_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=template,
    )


def build_model(family: str, seed: int) -> Any:
    """The stock model with fresh weights; the vision encoder's attention starts mimetic."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(family)
    ids = tokenizer.get_vocab()
    text: dict[str, Any] = {
        "vocab_size": len(ids),
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": TEXT_DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": ids["<pad>"],
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "llava_onevision":
        vision = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
        )
        model: Any = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config=vision,
                text_config=Qwen2Config(**text, rope_parameters=rope),
                image_token_index=ids["<image>"],
                video_token_index=ids["<video>"],
                image_grid_pinpoints=PINPOINTS,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                vision_aspect_ratio="anyres_max_9",
                tie_word_embeddings=False,
            )
        )
    else:
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                vision_config={
                    "depth": DEPTH,
                    "embed_dim": WIDTH,
                    "hidden_size": WIDTH,
                    "num_heads": HEADS,
                    "mlp_ratio": 4,
                    "hidden_act": "gelu_pytorch_tanh",
                    "patch_size": QWEN_PATCH,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
                text_config={**text, "rope_parameters": rope | {"mrope_section": [4, 4, 4]}},
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
                tie_word_embeddings=False,
            )
        )
    model.config.illava_presets = PRESETS[family]
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<pad>"], do_sample=False, max_new_tokens=4
    )
    _mimetic(model)
    return model


@torch.no_grad()
def _mimetic(model: nn.Module) -> None:
    """The vision encoder's attention starts near the identity (Trockman and Kolter 2023): like looks at like."""
    module: Any
    for module in model.modules():
        if hasattr(module, "qkv"):  # Qwen2-VL
            (query, key, value), out = module.qkv.weight.chunk(3), module.proj.weight
        elif hasattr(module, "out_proj"):  # SigLIP
            query, key, value, out = (p.weight for p in (module.q_proj, module.k_proj, module.v_proj, module.out_proj))
        else:
            continue
        width, size = query.shape[0], query.shape[0] // HEADS
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            left, right = _factors(0.7 * torch.randn(width, width) / math.sqrt(width) + 0.7 * torch.eye(width), size)
            query[rows], key[rows] = left.T, right.T
        left, right = _factors(0.4 * torch.randn(width, width) / math.sqrt(width) - 0.4 * torch.eye(width), width)
        value.copy_(left.T)
        out.copy_(right)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two (width, rank) factors of about ``matrix``."""
    u, s, v = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:rank].T * root
