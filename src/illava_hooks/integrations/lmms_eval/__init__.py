"""Models for lmms-eval 0.7, which finds them by the entry point ``lmms_eval.models`` of this package.

``lmms-eval --model qwen2_vl_illava --model_args pretrained=...,vit_layers=12-13-14-15,vit_r=0.16,llm_layers=6-7-8,
llm_ratio=0.90,method=illava --tasks ...`` measures a merged model; ``llava_onevision_illava`` is the other one.
What the harness's own classes (``qwen2_vl``, ``llava_hf``) can do, these can do. LLaVA-OneVision takes one prompt at a
time there, and videos only with ``--force_simple``.
"""

from __future__ import annotations

from typing import Any

from illava_hooks.engine.family import Family
from illava_hooks.engine.finding import families

__all__ = ["classes_of", "manifests"]

_MODELS = f"{__name__}.models"


def manifests() -> list[Any]:
    """Our models for lmms-eval's registry, by name; their classes are made when one is used."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found, unused-ignore]

    return [
        ModelManifest(
            f"{family.name}_illava",
            **{f"{kind}_class_path": f"{_MODELS}.{name}" for kind, name in classes_of(family).items()},
        )
        for family in families()
        if family.lmms_eval is not None
    ]


def classes_of(family: Family) -> dict[str, str]:
    """The names of our classes for a family, by what they are for: "simple", and "chat" where the harness has that."""
    name = f"{type(family).__name__}Illava"
    harness = family.lmms_eval
    if harness is None:
        return {}
    if harness.simple is None or harness.chat is None:
        return {"simple" if harness.chat is None else "chat": name}
    return {"simple": f"{name}Simple", "chat": name}
