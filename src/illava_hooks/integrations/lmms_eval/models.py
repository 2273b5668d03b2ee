"""The harness's own model classes, whose loaded model merges."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from lmms_eval.models.chat.llava_hf import LlavaHf as ChatLlava  # type: ignore[import-not-found, unused-ignore]
from lmms_eval.models.simple.llava_hf import LlavaHf as SimpleLlava  # type: ignore[import-not-found, unused-ignore]
from lmms_eval.models.simple.qwen2_vl import Qwen2_VL  # type: ignore[import-not-found, unused-ignore]
from loguru import logger  # type: ignore[import-not-found, unused-ignore]

from illava_hooks.api import patch
from illava_hooks.integrations.arguments import split_arguments

__all__ = ["LlavaOnevisionIllava", "LlavaOnevisionIllavaSimple", "Qwen2VLIllava"]


class _Merging:
    """Takes the merge settings out of a harness class's arguments, and patches the model that it loads."""

    model: Any

    def __init__(self, **arguments: Any) -> None:
        settings, others = split_arguments(arguments)
        super().__init__(**others)
        # The harness's `model` is what it loaded, without what accelerate puts around it.
        config = patch(self.model, **settings).config
        logger.info(f"illava_hooks merges with {config.method.name!r}; images {config.image}; videos {config.video}")


class _OneDevice:
    """Names the device of a single process: the empty ``device_map`` that is the default there is refused by now."""

    def __init__(self, **arguments: Any) -> None:
        if PartialState().num_processes == 1:
            arguments.setdefault("device_map", arguments.get("device", "cuda"))
        super().__init__(**arguments)


class LlavaOnevisionIllava(_Merging, _OneDevice, ChatLlava):  # type: ignore[misc, unused-ignore]
    """LLaVA-OneVision in its Hugging Face form, asked in the model's chat format."""


class LlavaOnevisionIllavaSimple(_Merging, _OneDevice, SimpleLlava):  # type: ignore[misc, unused-ignore]
    """LLaVA-OneVision in its Hugging Face form, for tasks of text and pictures (``--force_simple``)."""


class Qwen2VLIllava(_Merging, Qwen2_VL):  # type: ignore[misc, unused-ignore]
    """Qwen2-VL."""
