"""GLM-4V: packed patches in groups of 2 x 2 that a convolution joins; half of each head rotates.

What the stock model wants, learned by running it: packed patches and grids as Qwen2-VL does, and `mm_token_type_ids`.
It looks for images and videos by the same placeholder, and refuses prompts with both: here it gets images, and
`tests/families_only/test_glm4v.py` gives it videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Glm4vForConditionalGeneration, Glm4vMoeForConditionalGeneration

from families import Family, Suite
from families.qwen2_vl import FRAMES_PER_SLICE, MERGE, PATCH, WITHOUT_IDS, Qwen2VL
from tiny_models import (
    IMAGE_ID,
    ROPE,
    TEXT_CONFIG,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
)

VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "image_size": 24,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES_PER_SLICE,
    "out_hidden_size": 48,
}
TEXT: dict[str, Any] = {
    **TEXT_CONFIG,
    "hidden_size": 64,
    "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
}
#: Blocks as wide as the decoder.
WIDE: dict[str, Any] = {"hidden_size": 64}
#: What makes its decoder a mixture of experts.
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "attention_bias": True,
}


class Glm4V(Qwen2VL):
    """GLM-4V."""

    title = "GLM-4V"
    model_class = Glm4vForConditionalGeneration
    vision_config = VISION
    text_config = TEXT
    top_config = {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "image_start_token_id": VISION_START_ID,
        "image_end_token_id": VISION_END_ID,
    }
    modalities = ("image",)
    published = False
    encoder_mlp = "gate_proj"
    silenced = ("attn.proj", "down_proj", "o_proj")
    retrievers = ()
    embedded = None
    embedded_settings = {}
    embedded_floor = 0.0
    paper_kept = None
    beams_mix_images = ">=5.18"
    places_in_default_dtype = True
    offloads = False
    takes_frames = True
    suites = {
        "Glm4V": Suite(vision=WIDE, image=(24, 24), rows_are_visuals=False, unpatched=WITHOUT_IDS),
        "Glm4VMoe": Suite(
            Glm4vMoeForConditionalGeneration,
            WIDE,
            EXPERTS,
            image=(24, 24),
            rows_are_visuals=False,
            unpatched=WITHOUT_IDS,
        ),
    }
    shapes = {"glm-4.1v-9b": 9.4}
    stock_modules: ClassVar[tuple[str, ...]] = ("glm4v.modeling_glm4v", "glm4v_moe.modeling_glm4v_moe")
    lmms_eval = None
    vlmevalkit = None
    golden_cases = ()
    golden_prompt = Family.golden_prompt
    spots = Family.spots
    reference_visuals = Family.reference_visuals

    @property
    def model_types(self) -> tuple[str, ...]:
        """The mixture of experts too."""
        return ("glm4v", "glm4v_moe")

    def config(
        self,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        model_class: Any = None,
        **overrides: Any,
    ) -> Any:
        """Features are as wide as the decoder."""
        width = {**TEXT, **(text or {})}["hidden_size"]
        return super().config({"out_hidden_size": width, **(vision or {})}, text, model_class, **overrides)

    def encoder_sizes(self, model: Any) -> tuple[int, int]:
        """`hidden_size` is the encoder's own."""
        config = model.config.vision_config
        return config.num_heads, config.hidden_size

    def projectors(self, model: Any) -> list[nn.Module]:
        """The convolution and the merger."""
        return [model.model.visual.downsample, model.model.visual.merger]

    def projector(self, model: Any) -> nn.Module:
        """Behind the convolution."""
        module: nn.Module = model.model.visual.merger
        return module

    def make_projector_linear(self, model: Any) -> None:
        """It cannot be made so: gates multiply."""

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """See there."""
        return None


FAMILY = Glm4V()
