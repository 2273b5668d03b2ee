"""Qwen3.5: Qwen3-VL's inputs and tower without DeepStack; a decoder in which some layers carry a state along.

What the stock model wants is what Qwen3-VL wants. Any layer of the tiny decoder may merge, for the suite's sake: the
last one is a gated delta net, and those in front of it pay attention. `tests/families_only/test_qwen3_5.py` has them
in the published order, and alternating.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from families import Family, Suite
from families.qwen3_vl import VISION, Qwen3VL
from tiny_models import ROPE, TEXT_CONFIG, Inputs

#: Twice as many value heads as key heads; a quarter of a head turns, in three sections.
TEXT: dict[str, Any] = {
    **TEXT_CONFIG,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    "bos_token_id": None,
    "eos_token_id": None,
}
#: One of transformers' own tests.
NO_MAPS = {"test_attention_outputs": "asks for maps of every layer; those that carry a state along have none"}
#: Blocks as wide as the decoder.
WIDE: dict[str, Any] = {"hidden_size": 48}
#: What makes its decoder a mixture of experts, and one that all tokens share.
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
}


def settle(model: Any) -> Any:
    """Norms of the decoder add one to their weights, and states are to fade slowly enough that they matter."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight -= 1
            if type(module).__name__.endswith("GatedDeltaNet"):
                module.A_log.copy_(torch.linspace(-3, 0.5, len(module.A_log)))
                module.dt_bias.copy_(torch.linspace(-1, 1, len(module.dt_bias)))
    return model


class Qwen35(Qwen3VL):
    """Qwen3.5."""

    title = "Qwen3.5"
    model_class = Qwen3_5ForConditionalGeneration
    vision_config = {name: value for name, value in VISION.items() if name != "deepstack_visual_indexes"}
    text_config = TEXT
    suites = {
        "Qwen35": Suite(vision=WIDE, image=(24, 24), unpatched=NO_MAPS),
        "Qwen35Moe": Suite(Qwen3_5MoeForConditionalGeneration, WIDE, EXPERTS, image=(24, 24), unpatched=NO_MAPS),
    }
    silenced = (*Qwen3VL.silenced, "out_proj")
    shapes = {"qwen3.5-0.8b": 0.60, "qwen3.5-9b": 7.38}
    rounding = 10
    carries_state = True
    beams_mix_images = ">=5.18,<5.21"
    closest = 1e-5  # stock's delta rule works in float32, on chunks that begin where a row's padding does
    stock_modules = ("qwen3_5.modeling_qwen3_5", "qwen3_5_moe.modeling_qwen3_5_moe")

    @property
    def model_types(self) -> tuple[str, ...]:
        """The mixture of experts too."""
        return ("qwen3_5", "qwen3_5_moe")

    def config(
        self,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        model_class: Any = None,
        **overrides: Any,
    ) -> Any:
        """Only the last layer of the decoder is a gated delta net where nothing is said."""
        depth = {**self.text_config, **(text or {})}["num_hidden_layers"]
        kinds = {"layer_types": ["full_attention"] * (depth - 1) + ["linear_attention"]}
        return super().config(vision, {**kinds, **(text or {})}, model_class, **overrides)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """With weights in the range of trained ones."""
        return settle(super().build(*args, **kwargs))

    def attending(self, model: Any) -> list[int]:
        """Those that are no gated delta nets."""
        kinds = model.config.get_text_config().layer_types
        return [index for index, kind in enumerate(kinds) if kind == "full_attention"]

    def new_cache(self, model: Any) -> Any:
        """The config tells which layers hold keys."""
        return DynamicCache(config=model.config.get_text_config())

    def projectors(self, model: Any) -> list[nn.Module]:
        """The patch merger."""
        return [model.model.visual.merger]

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Slice by slice, as of Qwen3-VL."""
        from families import _qwen3_vl_reference as reference

        return reference.visuals(model, inputs, settings)

    def behind_layer(
        self, layer: int, hidden: Tensor, row: int, columns: list[int], given: Mapping[str, Any]
    ) -> Tensor:
        """Nothing is added."""
        return Family.behind_layer(self, layer, hidden, row, columns, given)


FAMILY = Qwen35()
