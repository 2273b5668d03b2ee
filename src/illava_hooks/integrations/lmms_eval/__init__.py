"""Models for lmms-eval 0.7, which finds them by the entry point ``lmms_eval.models`` of this package.

``lmms-eval --model qwen2_vl_illava --model_args pretrained=...,vit_layers=12-13-14-15,vit_r=0.16,llm_layers=6-7-8,
llm_ratio=0.90,method=illava --tasks ...`` measures a merged model; ``llava_onevision_illava`` is the other one.
What the harness's own classes (``qwen2_vl``, ``llava_hf``) can do, these can do. LLaVA-OneVision takes one prompt at a
time there, and videos only with ``--force_simple``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifests"]

_MODELS = f"{__name__}.models"


def manifests() -> list[Any]:
    """Our models for lmms-eval's registry, by name; their classes are loaded when one is used."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found, unused-ignore]

    return [
        ModelManifest(
            "llava_onevision_illava",
            simple_class_path=f"{_MODELS}.LlavaOnevisionIllavaSimple",
            chat_class_path=f"{_MODELS}.LlavaOnevisionIllava",
        ),
        ModelManifest("qwen2_vl_illava", simple_class_path=f"{_MODELS}.Qwen2VLIllava"),
    ]
