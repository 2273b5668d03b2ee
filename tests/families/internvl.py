"""InternVL: tiles of 64 patches with a class token, shuffled into 16 tokens each, in front of a Qwen2.

What the stock model wants, learned by running it: `pixel_values` (tiles, 3, 32, 32), and 16 placeholders for each
tile; it never learns which tiles are one image. `downsample_ratio` 0.5 joins 2 x 2 patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from families import Family, Modality, Suite
from tiny_models import IMAGE_ID, ROPE, TEXT_CONFIG, Inputs, Sample, Side, padded, pixels, prompt_ids

TILE = 32
PATCH = 4
SIDE = TILE // PATCH
TOKENS = SIDE * SIDE // 4


def _blocks(side: int) -> list[int]:
    """The patches of each token in turn, as rows and columns of the picture."""
    return [
        (2 * top + row) * side + 2 * left + column
        for top in range(side // 2)
        for left in range(side // 2)
        for row in range(2)
        for column in range(2)
    ]


class InternVL(Family):
    """InternVL."""

    title = "InternVL"
    model_class = InternVLForConditionalGeneration
    modalities = ("image",)
    vision_config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "use_qk_norm": True,
    }
    text_config = {**TEXT_CONFIG, "model_type": "qwen2", "rope_parameters": ROPE}
    top_config = {"image_token_id": IMAGE_ID, "image_seq_length": TOKENS}
    patches_per_token = 4
    tile_patches = SIDE * SIDE
    prefix = 1
    back_ends = ("eager", "sdpa", "flex_attention")
    forward_counts_padding = True
    records_hidden_states = True
    tiles_are_visuals = True
    encoder_mlp = "fc1"
    silenced = ("projection_layer", "fc2", "o_proj", "down_proj")
    suites = {"InternVL": Suite(vision={"patch_size": [8, 8]}, top={"image_seq_length": 4})}
    shapes = {"internvl3-1b": 0.67, "internvl3-8b": 6.86}
    stock_modules = ("internvl.modeling_internvl", "qwen2.modeling_qwen2")

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """The tower's."""
        layers: Sequence[nn.Module] = model.model.vision_tower.encoder.layer
        return layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        """By its own name."""
        module: nn.Module = layer.attention
        return module

    def projector(self, model: Any) -> nn.Module:
        """Works token by token."""
        module: nn.Module = model.model.multi_modal_projector
        return module

    def patches(self, hidden: Tensor) -> Tensor:
        """Without the class tokens."""
        return hidden[:, 1:].flatten(0, 1)

    def make_projector_linear(self, model: Any) -> None:
        """Without its activation, its norm and its biases."""
        projector = model.model.multi_modal_projector
        projector.act = projector.layer_norm = nn.Identity()
        for linear in (projector.linear_1, projector.linear_2):
            nn.init.zeros_(linear.bias)

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """One tile for each image."""
        size, patch = model.config.vision_config.image_size[0], model.config.vision_config.patch_size[0]
        count = (size // patch) ** 2 // 4
        rows = [prompt_ids(s, {"i": iter([[IMAGE_ID] * count] * len(s.images)), "v": iter([])}) for s in samples]
        inputs = padded(rows, side)
        images = [pixels(s, "i", index, (3, size, size)) for s in samples for index in range(len(s.images))]
        if images:
            inputs["pixel_values"] = torch.stack(images)
        return inputs

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Tiles, cut into patches."""
        tiles = pixels.unfold(2, patch, patch).unfold(3, patch, patch)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """64 patches in each tile."""
        return [[SIDE * SIDE] for sample in samples for _ in sample.images]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """All are equal."""
        return {"image": [size for sample in samples for size in sample.images], "video": []}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """One tile for each image."""
        vision = model.config.vision_config
        return [(vision.image_size[0] // vision.patch_size[0]) ** 2] * len(inputs.get("pixel_values", ()))

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Tiles."""
        return inputs["pixel_values"], {}

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for all images."""
        (states,) = hidden
        return [self.patches(part) for part in states.chunk(len(inputs["pixel_values"]))]

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Every token joins four patches, side by side: their weights say which, not in which order."""
        return None


FAMILY = InternVL()
