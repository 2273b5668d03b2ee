"""Inputs of a given size, without a processor: pixels at random, placeholders as the stock processors expand them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from illava_hooks.engine.compat import takes_ready_features
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.tooling import Workload
from illava_hooks.errors import InputError

__all__ = ["Workload", "build_workload"]


def build_workload(model: Any, load: Workload, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``model.forward``.

    Raises:
        InputError: a number is out of range, the family cannot be measured, or the release of transformers cannot
            run the stages apart.
    """
    for name in ("tiles", "images", "patches", "batch", "text", "new"):
        if getattr(load, name) < 1:
            raise InputError(f"{name} is {getattr(load, name)}; give 1 or more")
    family = find_family(model)
    inputs = family.workload(model, load, torch.Generator().manual_seed(seed))
    if inputs is None:
        raise InputError(f"model is a {family.title or family.name}, which cannot be measured; give another model")
    if not takes_ready_features(model):
        raise InputError(
            "this transformers takes no ready-made features, so stages cannot be timed apart; use 5.18 or newer"
        )
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
