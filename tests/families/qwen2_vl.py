"""Qwen2-VL: packed patches in groups of 2 x 2, rotary positions over time, height and width.

What the stock model wants, learned by running it: packed patches `pixel_values` and `pixel_values_videos`
(patches, 96) with their grids, and `mm_token_type_ids` (0 text, 1 image, 2 video), without which positions cannot be
computed. Positions come from `get_rope_index`, which reads `attention_mask`, so padded rows have the positions of the
single sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from families import Family, LmmsEval, Modality, Suite, VlmEvalKit
from tiny_models import (
    IMAGE_ID,
    ROPE,
    TEXT_CONFIG,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Inputs,
    Sample,
    Side,
    padded,
    pixels,
    prompt_ids,
)

PATCH = 4
MERGE = 2
FRAMES_PER_SLICE = 2
KINDS = (("i", "pixel_values", "image_grid_thw"), ("v", "pixel_values_videos", "video_grid_thw"))


#: One of transformers' own tests.
WITHOUT_IDS = {
    "test_inputs_embeds_matches_input_ids": "older releases give visual tokens places in pictures only beside ids"
}


class Qwen2VL(Family):
    """Qwen2-VL."""

    title = "Qwen2-VL"
    model_class = Qwen2VLForConditionalGeneration
    vision_config = {
        "depth": 4,
        "embed_dim": 32,
        "hidden_size": 48,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES_PER_SLICE,
    }
    text_config = {
        **TEXT_CONFIG,
        "rope_parameters": ROPE | {"mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    top_config = {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": VISION_START_ID,
        "vision_end_token_id": VISION_END_ID,
    }
    published = True
    image_inputs = ("pixel_values", "image_grid_thw")
    video_inputs = ("pixel_values_videos", "video_grid_thw")
    token_inputs = ("input_ids", "attention_mask", "mm_token_type_ids")
    markers_behind = 1  # <|vision_end|>
    patches_per_token = MERGE**2
    axes = 3
    keeps_positions = True
    takes_holes_in_images = False  # its positions are counted over the mask
    takes_empty_rows = False
    beams_mix_images = "==5.18.*"
    generates_from_embeddings = False
    takes_guidance = False
    tower_name = "visual"
    adapter_targets = ("qkv", "q_proj", "k_proj")
    silenced: ClassVar[tuple[str, ...]] = ("attn.proj", "fc2", "o_proj", "down_proj")
    depth_name = "depth"
    suites = {"Qwen2VL": Suite(vision={"embed_dim": 48}, image=(24, 24), frames=4, unpatched=WITHOUT_IDS)}
    retrievers: ClassVar[tuple[str, ...]] = ("colqwen2",)
    embedded = "tiny-qwen2-vl"
    embedded_settings = {"vit_layers": [3, 4], "vit_r": 0.29, "llm_layers": [2, 3], "llm_ratio": 0.6}
    largest_aspect_ratio = 200
    embedded_floor = 0.76
    paper_kept = 0.84**4 * 0.9**3  # four layers of the encoder, three of the decoder
    shapes = {"qwen2-vl-2b": 1.98, "qwen2-vl-7b": 7.2}
    stock_modules: ClassVar[tuple[str, ...]] = ("qwen2_vl.modeling_qwen2_vl",)
    lmms_eval = LmmsEval(
        models={"simple.qwen2_vl": "Qwen2_VL"},
        ours=("Qwen2VLIllava",),
        stock="qwen2_vl",
        batch_size=4,
        jpeg_blocks=28,
    )
    vlmevalkit = VlmEvalKit(
        model_class="Qwen2VLChat",
        entries=("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct"),
        hub="Qwen",
        others=("Qwen2-VL-72B-Instruct",),
        arguments={"min_pixels": 1003520, "max_pixels": 12845056},
        plain={"min_pixels": None, "max_pixels": None},
        blocks=28,
        least=1280,
    )

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Packed patches and grids; the tiny model's patch sizes are fixed."""
        rows: list[list[int]] = []
        patches: dict[str, list[Tensor]] = {"i": [], "v": []}
        grids: dict[str, list[list[int]]] = {"i": [], "v": []}
        for sample in samples:
            own = {
                "i": [grid_of(1, size) for size in sample.images],
                "v": [grid_of(math.ceil(n / FRAMES_PER_SLICE), sample.video_size) for n in sample.videos],
            }
            pieces = {kind: iter([self.piece(kind, grid) for grid in own[kind]]) for kind in "iv"}
            rows.append(prompt_ids(sample, pieces))
            for kind in "iv":
                grids[kind] += own[kind]
                patches[kind] += [patches_of(sample, kind, i, grid) for i, grid in enumerate(own[kind])]
        inputs = padded(rows, side)
        inputs |= self.token_types(model, inputs["input_ids"])
        for kind, pixel_name, grid_name in KINDS:
            if patches[kind]:
                inputs[pixel_name] = torch.cat(patches[kind])
                inputs[grid_name] = torch.tensor(grids[kind])
        return inputs

    def piece(self, kind: str, grid: list[int]) -> list[int]:
        """The tokens of an image or video: placeholders in brackets."""
        placeholders = [IMAGE_ID if kind == "i" else VIDEO_ID] * (math.prod(grid) // MERGE**2)
        return [VISION_START_ID, *placeholders, VISION_END_ID]

    def token_types(self, model: Any, ids: Tensor) -> Inputs:
        """1 for images, 2 for videos."""
        config = model.config
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return {"mm_token_type_ids": types}

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Patches are what they are made of."""
        del patch
        return pixels.view(len(pixels), 3, -1)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """One segment for each slice of two frames."""
        del model
        grids = [grid_of(1, size) for s in samples for size in s.images]
        slices = [(math.ceil(frames / FRAMES_PER_SLICE), s.video_size) for s in samples for frames in s.videos]
        grids += [grid_of(count, size) for count, size in slices]
        return [[rows * columns] * time for time, rows, columns in grids]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """Grids of patches."""
        inputs = self.inputs(samples, "left", model)
        names: dict[Modality, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}
        return {kind: [tuple(grid) for grid in inputs[n].tolist()] for kind, n in names.items() if n in inputs}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """The products of the grids."""
        del model
        return [count for _, _, name in KINDS if name in inputs for count in inputs[name].prod(-1).tolist()]

    def pixel_rows(self, inputs: Inputs, image: int) -> slice:
        """Patches of all images are packed into one row."""
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        return slice(sum(sizes[:image]), sum(sizes[: image + 1]))

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Packed patches and their grids."""
        return inputs["pixel_values"], {"grid_thw": inputs["image_grid_thw"]}

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """The blocks."""
        blocks: Sequence[nn.Module] = model.model.visual.blocks
        return blocks

    def encoder_attention(self, layer: Any) -> nn.Module:
        """One projection for queries, keys and values."""
        module: nn.Module = layer.attn
        return module

    def encoder_sizes(self, model: Any) -> tuple[int, int]:
        """`hidden_size` is the language model's width."""
        config = model.config.vision_config
        return config.num_heads, config.embed_dim

    def projector(self, model: Any) -> nn.Module:
        """The patch merger."""
        module: nn.Module = model.model.visual.merger
        return module

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for all images, one for all videos, each packed into one row."""
        grids = [inputs[name].prod(-1).tolist() for _, _, name in KINDS if name in inputs]
        return [part for states, sizes in zip(hidden, grids, strict=True) for part in states.split(sizes)]

    def positions(self, model: Any, inputs: Inputs) -> Tensor:
        """Time, height and width, (3, B, L)."""
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        given = {name: inputs[name] for name in names if name in inputs}
        positions, _ = model.model.get_rope_index(inputs["input_ids"], **given)
        return positions

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Slice by slice."""
        from families import _qwen2_vl_reference as reference

        return reference.visuals(model, inputs, settings)

    @property
    def golden_cases(self) -> tuple[str, ...]:
        """One image, and two that follow each other."""
        return ("D1", "D2p")

    def golden_prompt(self, case: str) -> tuple[Any, Any]:
        """The published ids in a small vocabulary, and ready-made features."""
        from families import _qwen2_vl_golden as golden

        return golden.prompt(case)

    def spots(self) -> dict[str, Callable[[str], Any]]:
        """Groups of 12 pixels."""
        from families import _qwen2_vl_spots as spots

        return spots.SPOTS

    def shown_frames(self, video: Any) -> list[Any]:
        """The first of each two."""
        return list(video[::FRAMES_PER_SLICE])


FAMILY = Qwen2VL()


def grid_of(slices: int, size: tuple[int, int]) -> list[int]:
    """Grid of patches; sides are rounded to whole groups as the stock smart resize does."""
    group = PATCH * MERGE
    return [slices, *(max(1, round(side / group)) * MERGE for side in size)]


def patches_of(sample: Sample, kind: str, index: int, grid: list[int]) -> Tensor:
    """Flattened patches (channel, frame, row, column); an image's frame is doubled, as the processor does."""
    frames = 1 if kind == "i" else FRAMES_PER_SLICE
    drawn = pixels(sample, kind, index, (math.prod(grid), 3, frames, PATCH, PATCH))
    return drawn.expand(-1, -1, FRAMES_PER_SLICE, -1, -1).flatten(1)
