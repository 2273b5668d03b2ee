"""SmolVLM: tiles of 64 patches, shuffled into 16 tokens each, in front of a Llama.

What the stock model wants, learned by running it: `pixel_values` (samples, tiles, 3, 32, 32), where samples with fewer
tiles are filled up with tiles of zeros, and 16 placeholders for each tile; it never learns which tiles are one image.
`scale_factor` 2 joins 2 x 2 patches. Idefics3 is the same with classes of its own (`families_only/test_idefics3.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration, SmolVLMModel

from families import Family, Modality, Suite
from tiny_models import IMAGE_ID, PAD_ID, ROPE, TEXT_CONFIG, Inputs, Sample, Side, padded, pixels, prompt_ids

TILE = 32
PATCH = 4
SIDE = TILE // PATCH
TOKENS = SIDE * SIDE // 4

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    **TEXT_CONFIG,
    "model_type": "llama",
    "rope_parameters": dict(ROPE),
    "bos_token_id": None,
    "eos_token_id": None,
}
TOP: dict[str, Any] = {
    "image_token_id": IMAGE_ID,
    "scale_factor": 2,
    "pad_token_id": PAD_ID,
}


#: 16 patches, four tokens.
FEW_PATCHES: dict[str, Any] = {"patch_size": 8}


class SmolVLM(Family):
    """SmolVLM."""

    title = "SmolVLM"
    model_class = SmolVLMForConditionalGeneration
    vision_config = VISION
    text_config = TEXT
    top_config = TOP
    modalities = ("image",)
    image_inputs = ("pixel_values", "pixel_attention_mask")
    patches_per_token = 4
    tile_patches = SIDE * SIDE
    tiles_are_visuals = True
    back_ends = ("eager", "sdpa", "flex_attention")
    forward_counts_padding = True
    beams_mix_images = "==5.18.*"
    seam = "inputs_merger" if hasattr(SmolVLMModel, "inputs_merger") else "get_placeholder_mask"
    tower_name = "vision_model"
    language_name = "text_model"
    suites = {
        "SmolVLM": Suite(vision=FEW_PATCHES),
        "Idefics3": Suite(Idefics3ForConditionalGeneration, FEW_PATCHES, title="Idefics3"),
    }
    shapes = {"smolvlm-256m": 0.20, "smolvlm-500m": 0.41, "smolvlm-2.2b": 2.03, "idefics3-8b": 7.4}
    stock_modules = ("smolvlm.modeling_smolvlm", "idefics3.modeling_idefics3", "llama.modeling_llama")

    @property
    def model_types(self) -> tuple[str, ...]:
        """Idefics3 too."""
        return ("smolvlm", "idefics3")

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """The tower's."""
        layers: Sequence[nn.Module] = model.model.vision_model.encoder.layers
        return layers

    def projector(self, model: Any) -> nn.Module:
        """Works tile by tile."""
        module: nn.Module = model.model.connector
        return module

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """One tile for each image; zeros behind those of a sample."""
        vision = model.config.vision_config
        size, unit = vision.image_size, model.config.scale_factor**2
        count = (size // vision.patch_size) ** 2 // unit
        rows = [prompt_ids(s, {"i": iter([[IMAGE_ID] * count] * len(s.images)), "v": iter([])}) for s in samples]
        inputs = padded(rows, side)
        most = max(len(sample.images) for sample in samples)
        if most:
            tiles = torch.zeros(len(samples), most, 3, size, size)
            for row, sample in enumerate(samples):
                for index in range(len(sample.images)):
                    tiles[row, index] = pixels(sample, "i", index, (3, size, size))
            inputs["pixel_values"] = tiles
            inputs["pixel_attention_mask"] = (tiles != 0).any(2).long()
        return inputs

    def visual_features(self, output: Any) -> list[Tensor]:
        """Of every tile; newer releases put those of a sample together."""
        return [tile for features in output.pooler_output for tile in features.reshape(-1, TOKENS, features.shape[-1])]

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Tiles, cut into patches."""
        tiles = pixels.flatten(0, 1).unfold(2, patch, patch).unfold(3, patch, patch)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """64 patches in each tile."""
        return [[SIDE * SIDE] for sample in samples for _ in sample.images]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """All are equal."""
        return {"image": [size for sample in samples for size in sample.images], "video": []}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """One tile for each image."""
        return [SIDE * SIDE] * sum(pixels.shape[1] for pixels in [inputs.get("pixel_values")] if pixels is not None)

    def pixel_rows(self, inputs: Inputs, image: int) -> Any:
        """Sample and place in it: zeros are no images."""
        return tuple((inputs["pixel_values"] != 0).flatten(2).any(2).nonzero()[image].tolist())

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Tiles."""
        return inputs["pixel_values"].flatten(0, 1), {}

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for all images."""
        (states,) = hidden
        return [self.patches(part) for part in states.chunk(len(states))]

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Every token joins four patches, side by side: their weights say which, not in which order."""
        return None


FAMILY = SmolVLM()
