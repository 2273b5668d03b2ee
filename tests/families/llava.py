"""LLaVA-1.5: CLIP with a class token, one tile per image, in front of a Llama.

What the stock model wants, learned by running it: `pixel_values` (images, 3, 32, 32), whatever sizes the images had;
every image is 64 placeholders. Features are those of the layer before the last, without the class token.

Left padding: `forward` counts positions over the padding, `generate` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from families import Family, Modality, Suite
from tiny_models import IMAGE_ID, ROPE, TEXT_CONFIG, Inputs, Sample, Side, padded, pixels, prompt_ids

TILE = 32
PATCH = 4
PATCHES = (TILE // PATCH) ** 2
#: The decoder of the models with a CLIP tower; its ids for the ends of sequences are no tokens of the tiny vocabulary.
LLAMA: dict[str, Any] = {
    **TEXT_CONFIG,
    "model_type": "llama",
    "rope_parameters": ROPE,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: 5 layers, of which the last is not looked at.
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
    "projection_dim": 32,
}
#: Towers for transformers' own tests, which take no more than two layers: 4 x 4 patches, features of the last layer.
FEW_PATCHES: dict[str, Any] = {"patch_size": 8, "num_hidden_layers": 2}
LAST_LAYER: dict[str, Any] = {"vision_feature_layer": -1}


class ClipFamily(Family):
    """What models with a CLIP tower share."""

    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    vision_config = CLIP
    text_config = LLAMA
    top_config = {
        "image_token_index": IMAGE_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    tile_patches = PATCHES
    prefix = 1
    layers_behind = 1
    back_ends = ("eager", "sdpa", "flex_attention")
    forward_counts_padding = True
    records_hidden_states = True

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """CLIP's."""
        tower = model.model.vision_tower
        layers: Sequence[nn.Module] = getattr(tower, "vision_model", tower).encoder.layers
        return layers

    def projector(self, model: Any) -> nn.Module:
        """Works token by token."""
        module: nn.Module = model.model.multi_modal_projector
        return module

    def patches(self, hidden: Tensor) -> Tensor:
        """Without the class tokens."""
        return hidden[:, 1:].flatten(0, 1)

    def make_projector_linear(self, model: Any) -> None:
        """Without its activation and its biases."""
        projector = model.model.multi_modal_projector
        projector.act = nn.Identity()
        for linear in (projector.linear_1, projector.linear_2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class Llava(ClipFamily):
    """LLaVA-1.5."""

    title = "LLaVA-1.5"
    model_class = LlavaForConditionalGeneration
    top_config = {**ClipFamily.top_config, "image_seq_length": PATCHES}
    suites = {"Llava": Suite(vision=FEW_PATCHES, top={**LAST_LAYER, "image_seq_length": 16}, all_weights_train=False)}
    shapes = {"llava-1.5-7b": 6.9, "llava-1.5-13b": 13.2}
    stock_modules = ("llava.modeling_llava", "clip.modeling_clip", "llama.modeling_llama")

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """One tile for each image."""
        vision = model.config.vision_config
        size, count = vision.image_size, (vision.image_size // vision.patch_size) ** 2
        rows = [prompt_ids(s, {"i": iter([[IMAGE_ID] * count] * len(s.images)), "v": iter([])}) for s in samples]
        inputs = padded(rows, side)
        images = [pixels(s, "i", index, (3, size, size)) for s in samples for index in range(len(s.images))]
        if images:
            inputs["pixel_values"] = torch.stack(images)
        return inputs

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Tiles, cut into patches."""
        tiles = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, 8, 8, patch, patch)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """64 patches in each image."""
        return [[PATCHES] for sample in samples for _ in sample.images]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """All are equal."""
        return {"image": [size for sample in samples for size in sample.images], "video": []}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """One tile for each image."""
        vision = model.config.vision_config
        return [(vision.image_size // vision.patch_size) ** 2] * len(inputs.get("pixel_values", ()))

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Tiles."""
        return inputs["pixel_values"], {}

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for all images."""
        (states,) = hidden
        return [self.patches(part) for part in states.chunk(len(inputs["pixel_values"]))]

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Image by image."""
        from families import _clip_reference as reference

        return reference.images(model, inputs, settings)

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Every token comes from patches."""
        projected: Tensor = self.projector(model)(weights @ patches)
        return projected


FAMILY = Llava()
