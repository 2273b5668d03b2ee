"""Qwen3-VL: packed patches in groups of 2 x 2, DeepStack, a text of time in front of each slice of a video.

What the stock model wants, learned by running it: packed patches and grids as Qwen2-VL does, and `mm_token_type_ids`,
without which it raises. A video is as many groups of placeholders as it has slices, each between brackets and behind
its time; `get_rope_index` counts a grid for each.

The tiny encoder gives DeepStack features in front of, between and behind the merges of `settings`; heads of the
decoder have a width of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from families import Family, Suite
from families.qwen2_vl import FRAMES_PER_SLICE, MERGE, PATCH, WITHOUT_IDS, Qwen2VL
from tiny_models import (
    FIRST_TEXT_ID,
    ROPE,
    TEXT_CONFIG,
    Inputs,
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
#: What makes its decoder a mixture of experts.
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
#: One of transformers' own tests.
ONLY_LAYOUT = {
    **WITHOUT_IDS,
    "test_reverse_loading_mapping": "asks that saved weights change their names; of these only the layout changes",
}
#: Two blocks, as wide as the decoder.
FEW_BLOCKS: dict[str, Any] = {"hidden_size": 48, "deepstack_visual_indexes": [0, 1]}


class Qwen3VL(Qwen2VL):
    """Qwen3-VL."""

    title = "Qwen3-VL"
    model_class = Qwen3VLForConditionalGeneration
    vision_config = VISION
    text_config = TEXT
    published = False
    videos_follow_the_config = True
    encoder_mlp = "linear_fc1"
    silenced: ClassVar[tuple[str, ...]] = ("attn.proj", "linear_fc2", "o_proj", "down_proj")
    retrievers = ()
    embedded = None
    embedded_settings = {}
    embedded_floor = 0.0
    paper_kept = None
    suites = {
        "Qwen3VL": Suite(vision=FEW_BLOCKS, image=(24, 24), unpatched=WITHOUT_IDS),
        "Qwen3VLMoe": Suite(
            Qwen3VLMoeForConditionalGeneration, FEW_BLOCKS, EXPERTS, image=(24, 24), unpatched=ONLY_LAYOUT
        ),
    }
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

    def piece(self, kind: str, grid: list[int]) -> list[int]:
        """An image in brackets, or a video's slices with their times."""
        if kind == "i":
            return super().piece(kind, grid)
        tokens = super().piece(kind, [1, *grid[1:]])
        times = [[FIRST_TEXT_ID + time, FIRST_TEXT_ID + 20 + time] for time in range(grid[0])]
        return [token for time in times for token in (*time, *tokens)]

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


FAMILY = Qwen3VL()
