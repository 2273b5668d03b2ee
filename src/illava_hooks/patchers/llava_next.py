"""LLaVA-NeXT (1.6): CLIP tiles with a class token, packed with newlines; any decoder with full attention."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, PublishedShape
from illava_hooks.patchers._anyres import AnyresFamily, AnyresFeatures
from illava_hooks.patchers._towers import CLIP_CONFIG, NARROW_CLIP_CONFIG

__all__ = ["FAMILY", "LlavaNext"]

# Not yet measured on trained weights.
_PRESET = MergeSchedule((5, 6, 7, 8), 72, (8,), 0.70)


class LlavaNext(AnyresFamily):
    """LLaVA-NeXT's family: patches merge inside of their tile."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    model_types = ("llava_next",)
    modalities = ("image",)
    presets = MappingProxyType({"image": _PRESET})
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "llava-next-7b": PublishedShape(4096, 11008, 32, 32, 32, "llava-hf/llava-v1.6-vicuna-7b-hf"),
            "llava-next-mistral-7b": PublishedShape(4096, 14336, 32, 32, 8, "llava-hf/llava-v1.6-mistral-7b-hf"),
        }
    )
    lmms_eval = LmmsEval("simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf", names_device=True)
    vlmevalkit = ("llava_next_vicuna_7b", "llava_next_mistral_7b")

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Changes the tower, wraps the feature method and the packing."""
        self.change_tower(parts, session)
        methods = AnyresFeatures(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "pack_image_features", methods.pack)

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """CLIP and a Llama, which Mistral without a window is as well."""
        from transformers import LlavaNextConfig

        return LlavaNextConfig(
            vision_config=CLIP_CONFIG | NARROW_CLIP_CONFIG if narrow else CLIP_CONFIG,
            text_config={**text, "model_type": "llama"},
            image_token_index=placeholders["image"],
        )


FAMILY = LlavaNext()
