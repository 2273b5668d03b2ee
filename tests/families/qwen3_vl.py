"""Qwen3-VL: packed patches in groups of 2 x 2, DeepStack, a text of time in front of each slice of a video.

What the stock model wants, learned by running it: packed patches and grids as Qwen2-VL does, and `mm_token_type_ids`,
without which it raises. A video is as many groups of placeholders as it has slices, each between brackets and behind
its time; `get_rope_index` counts a grid for each.

The tiny encoder gives DeepStack features in front of, between and behind the merges of `settings`; heads of the
decoder have a width of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from families import Family
from families.qwen2_vl import FRAMES_PER_SLICE, KINDS, MERGE, PATCH, Qwen2VL, grid_of, patches_of
from tiny_models import (
    FIRST_TEXT_ID,
    IMAGE_ID,
    ROPE,
    TEXT_CONFIG,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Inputs,
    Sample,
    Side,
    build,
    padded,
    prompt_ids,
)

VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES_PER_SLICE,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1, 2],
}
TEXT: dict[str, Any] = {
    **TEXT_CONFIG,
    "head_dim": 16,
    "rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "bos_token_id": None,
    "eos_token_id": None,
}
TOP: dict[str, Any] = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START_ID,
    "vision_end_token_id": VISION_END_ID,
    "tie_word_embeddings": False,
}


class Qwen3VL(Qwen2VL):
    """Qwen3-VL."""

    title = "Qwen3-VL"
    published = False
    videos_follow_the_config = True
    encoder_mlp = "linear_fc1"
    silenced = ("attn.proj", "linear_fc2", "o_proj", "down_proj")
    retrievers = ()
    embedded = None
    embedded_settings = {}
    embedded_floor = 0.0
    paper_kept = None
    shapes = {"qwen3-vl-2b": 1.82, "qwen3-vl-4b": 4.05, "qwen3-vl-8b": 7.53, "qwen3-vl-30b-a3b": 30.45}
    stock_modules = ("qwen3_vl.modeling_qwen3_vl", "qwen3_vl_moe.modeling_qwen3_vl_moe")
    lmms_eval = None
    vlmevalkit = None
    golden_cases = ()
    golden_prompt = Family.golden_prompt
    spots = Family.spots

    @property
    def model_types(self) -> tuple[str, ...]:
        """The mixture of experts too."""
        return ("qwen3_vl", "qwen3_vl_moe")

    def build(
        self,
        attn_implementation: str = "sdpa",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Any:
        """An encoder of 4 blocks with 4 x 4 patches in 2 x 2 groups, text of 4 layers."""
        settings = TOP | overrides
        config = Qwen3VLConfig(vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), **settings)
        return build(Qwen3VLForConditionalGeneration, config, attn_implementation, seed, dtype)

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """As Qwen2-VL's, but for videos in the prompt."""
        rows: list[list[int]] = []
        patches: dict[str, list[Tensor]] = {"i": [], "v": []}
        grids: dict[str, list[list[int]]] = {"i": [], "v": []}
        for sample in samples:
            own = {
                "i": [grid_of(1, size) for size in sample.images],
                "v": [grid_of(math.ceil(n / FRAMES_PER_SLICE), sample.video_size) for n in sample.videos],
            }
            rows.append(prompt_ids(sample, {kind: iter([_piece(kind, grid) for grid in own[kind]]) for kind in "iv"}))
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

    def encoder_sizes(self, model: Any) -> tuple[int, int]:
        """`hidden_size` is the encoder's own."""
        config = model.config.vision_config
        return config.num_heads, config.hidden_size

    def projectors(self, model: Any) -> list[nn.Module]:
        """The patch merger, and those of DeepStack."""
        return [model.model.visual.merger, *model.model.visual.deepstack_merger_list]

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Slice by slice, with DeepStack."""
        from families import _qwen3_vl_reference as reference

        return reference.visuals(model, inputs, settings)

    def suite(self) -> tuple[Any, type]:
        """One grid for an image, one slice for a video."""
        from families import _qwen3_vl_suite as suite

        return suite.Qwen3VLTester, suite.Qwen3VLTests

    def behind_layer(
        self, layer: int, hidden: Tensor, row: int, columns: list[int], given: Mapping[str, Any]
    ) -> Tensor:
        """DeepStack: the features of a block are added to the visual tokens, in the order of the prompt."""
        mask, stacked = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
        if mask is None or stacked is None or layer >= len(stacked):
            return hidden
        hidden = hidden.clone()
        number = int(mask[:row].sum())
        at = {column: number + i for i, column in enumerate(mask[row].nonzero().flatten().tolist())}
        for place, column in enumerate(columns):
            if column in at:
                hidden[0, place] += stacked[layer][at[column]]
        return hidden


def _piece(kind: str, grid: list[int]) -> list[int]:
    """An image in brackets, or a video's slices with their times."""
    slices, rows, columns = grid
    token = IMAGE_ID if kind == "i" else VIDEO_ID
    visual = [VISION_START_ID, *[token] * (rows * columns // MERGE**2), VISION_END_ID]
    if kind == "i":
        return visual
    return [one for time in range(slices) for one in (FIRST_TEXT_ID + time, FIRST_TEXT_ID + 20 + time, *visual)]


FAMILY = Qwen3VL()
