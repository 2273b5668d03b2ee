"""Inputs of small models in the form that transformers' common tests ask for; the models are the families'.

A row is ``text, image, text, video, text``. There are seven rows because ``test_eager_matches_sdpa_inference`` wants
seven and fills up smaller batches with random numbers, which are no placeholders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

__all__ = ["FIRST_TEXT_ID", "IMAGE_ID", "VIDEO_ID", "VISION_END_ID", "VISION_START_ID", "Tester"]

IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID, FIRST_TEXT_ID = 5, 6, 7, 8, 10
PLACEHOLDERS = {"image": IMAGE_ID, "video": VIDEO_ID}
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw")
TEXT = 4  # tokens of text between the visuals


class Tester:
    """What the families share; the common tests read the attributes."""

    model_classes: tuple[type, ...]
    num_tokens: dict[str, int]  # placeholders of an image, of a video
    vit_r: int | float = 0.25  # what a merging layer of the encoder removes

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
