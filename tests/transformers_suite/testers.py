"""Small models and inputs of both families in the form that transformers' common tests ask for.

A row is ``text, image, text, video, text``. There are seven rows because ``test_eager_matches_sdpa_inference`` wants
seven and fills up smaller batches with random numbers, which are no placeholders.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
)

__all__ = ["LlavaOnevisionTester", "Qwen2VLTester", "Tester"]

IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID, FIRST_TEXT_ID = 5, 6, 7, 8, 10
PLACEHOLDERS = {"image": IMAGE_ID, "video": VIDEO_ID}
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw")
TEXT = 4  # tokens of text between the visuals


class Tester:
    """What the two families share; the common tests read the attributes."""

    model_classes: tuple[type, ...]
    num_tokens: dict[str, int]  # placeholders of an image, of a video

    modalities: tuple[str, ...] = ("image", "video")
    batch_size = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    text_config: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 37,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        return len(self._row()[0])

    def get_config(self) -> PreTrainedConfig:
        """The model's configuration."""
        raise NotImplementedError

    def visual_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Pixels and what belongs to them; the first dimension counts rows."""
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """A configuration and the inputs of a forward, always the same ones."""
        generator = torch.Generator().manual_seed(20241206)
        rows = torch.tensor([self._row()[0]] * self.batch_size)
        text = torch.randint(FIRST_TEXT_ID, self.vocab_size, rows.shape, generator=generator)
        ids = torch.where(rows == 0, text, rows)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **{
                name: value
                for name, value in self.visual_inputs(generator).items()
                if "video" in self.modalities or "video" not in name
                if "image" in self.modalities or name not in IMAGE_INPUTS
            },
        }

    def _row(self) -> tuple[list[int], list[int]]:
        """Placeholders of a row, 0 where text stands, and token types: 0 text, 1 image, 2 video."""
        ids, types = [0] * TEXT, [0] * TEXT
        for kind in self.modalities:
            count = self.num_tokens[kind]
            ids += [PLACEHOLDERS[kind]] * count + [0] * TEXT
            types += [1 + list(PLACEHOLDERS).index(kind)] * count + [0] * TEXT
        return ids, types


class LlavaOnevisionTester(Tester):
    """An image is a base tile and one more of 4 x 4 patches; a video has two frames."""

    model_classes = (LlavaOnevisionModel, LlavaOnevisionForConditionalGeneration)
    num_tokens = {"image": 16 + 4 * (4 + 1), "video": 2 * 2 * 2 + 1}
    tile = 16
    vision_config: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": tile,
        "patch_size": 4,
        "vision_use_head": False,
    }

    def get_config(self) -> PreTrainedConfig:
        """SigLIP and Qwen2."""
        return LlavaOnevisionConfig(
            vision_config=dict(self.vision_config),
            text_config={"model_type": "qwen2", **self.text_config},
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=[[self.tile, self.tile]],
        )

    def visual_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles and frames."""
        shape = (self.batch_size, 2, 3, self.tile, self.tile)
        return {
            "pixel_values": torch.rand(shape, generator=generator),
            "image_sizes": torch.full((self.batch_size, 2), self.tile),
            "pixel_values_videos": torch.rand(shape, generator=generator),
        }


class Qwen2VLTester(Tester):
    """An image has 6 x 6 patches, a video two slices of 4 x 4."""

    model_classes = (Qwen2VLModel, Qwen2VLForConditionalGeneration)
    grids = {"image_grid_thw": (1, 6, 6), "video_grid_thw": (2, 4, 4)}
    patch = 4
    num_tokens = {name.removesuffix("_grid_thw"): math.prod(grid) // 4 for name, grid in grids.items()}
    vision_config: dict[str, Any] = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }

    def get_config(self) -> PreTrainedConfig:
        """Qwen2-VL."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        return Qwen2VLConfig(
            vision_config=dict(self.vision_config),
            text_config={**self.text_config, "rope_parameters": rope},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
            tie_word_embeddings=False,
        )

    def visual_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Patches ``(rows, patches, values)``, which ``packed`` flattens; grids; token types."""
        inputs = {"mm_token_type_ids": torch.tensor([self._row()[1]] * self.batch_size)}
        for name, pixels in zip(self.grids, ("pixel_values", "pixel_values_videos"), strict=True):
            shape = (self.batch_size, math.prod(self.grids[name]), 3 * 2 * self.patch**2)
            inputs[pixels] = torch.rand(shape, generator=generator)
            inputs[name] = torch.tensor([self.grids[name]] * self.batch_size)
        return inputs
