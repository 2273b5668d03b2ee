"""Inputs of a given size, without a processor: pixels at random, placeholders as the stock processors expand them."""

from __future__ import annotations

from dataclasses import replace
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
    inputs = family.workload(model, replace(load, words=_words(model)), torch.Generator().manual_seed(seed))
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


def _words(model: Any) -> tuple[int, ...]:
    """Ids that text can be drawn from: of the model's vocabulary, without those that mean something to it."""
    size = model.get_input_embeddings().num_embeddings
    special = set[int]()
    for config in (model.config, model.config.get_text_config()):
        for name in {*vars(config), *config.attribute_map}:
            if name.endswith(("_token_id", "_token_index")):
                value: Any = getattr(config, name, None)
                special.update(value if isinstance(value, list | tuple) else [value])
    usual = [word for word in range(10, min(1000, size)) if word not in special]
    return tuple(usual or (word for word in range(size) if word not in special))
