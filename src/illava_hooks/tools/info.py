"""What is installed, and what a model allows."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from illava_hooks.config import MergeSchedule, describe
from illava_hooks.engine.finding import families, find_family
from illava_hooks.methods import ABOUT, METHODS

__all__ = ["environment", "model_info", "model_lines", "torchvision_state"]

_PACKAGES = ("illava-hooks", "torch", "torchvision", "transformers", "wrapt", "numpy", "pillow", "av")


def environment() -> dict[str, Any]:
    """Versions, devices, methods and families."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "torchvision": torchvision_state(),
        "devices": devices,
        "families": [family.name for family in families()],
        "methods": {name: ABOUT.get(name, "") for name in METHODS},
    }


def torchvision_state() -> str:
    """That it works, or what to install: processors need it, and one built for another torch breaks even models."""
    try:
        import torchvision  # type: ignore[import-untyped]
        from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

        functional.resize(torch.zeros(3, 4, 4), [2, 2], antialias=True)
    except ImportError as error:
        return f"cannot be imported ({error}); install the torchvision that belongs to torch {torch.__version__}"
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        return (
            f"does not fit torch {torch.__version__} ({reason}), which is worse than none; install the pair together: "
            "pip install --upgrade torch torchvision"
        )
    return f"works ({torchvision.__version__})"


def model_info(model: Any) -> dict[str, Any]:
    """Family, depths and presets of a model.

    Raises:
        UnsupportedModelError: the model's family is not known.
    """
    limits = find_family(model).limits(model)
    return {
        "family": limits.family,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "encoder_layers": limits.vit_depth,
        "decoder_layers": limits.llm_depth,
        "tokens_per_tile": limits.tokens_per_tile,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "presets": {modality: asdict(schedule) for modality, schedule in limits.presets.items()},
    }


def model_lines(facts: dict[str, Any]) -> list[str]:
    """What ``model_info`` found, in words; ``patch(model)`` alone uses the presets."""
    lines = [f"{name:<15} {value}" for name, value in facts.items() if name != "presets"]
    if not facts["presets"]:
        return [
            *lines,
            "presets         none; give vit_layers, vit_r, llm_layers and llm_ratio, or keep and the layers",
        ]
    for modality, found in facts["presets"].items():
        said = describe(MergeSchedule(**found))
        lines.append(f"preset {modality + ':':<8} {said}")
    return lines
