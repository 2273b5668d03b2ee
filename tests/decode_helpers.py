"""What the tests of batches, decoding and shapes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from illava_hooks import patch
from tiny_models import Inputs, Sample, inputs_for, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [1, 3], "llm_ratio": 0.6},
    "qwen2_vl": {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [1, 3], "llm_ratio": 0.6},
}
IMAGE = Sample(text_seed=3, images=((32, 90),), text=(5, 7))
IMAGES = Sample(text_seed=1, images=((48, 30), (64, 64)), text=(4, 3, 6))
TEXT = Sample(text_seed=2, text=(12,))
VIDEO = Sample(text_seed=6, videos=(4,))
BOTH = Sample(text_seed=5, images=((60, 40),), videos=(4,), order="vi", text=(2, 3, 5))
RAGGED = [IMAGES, TEXT, IMAGE]
KINDS = {"image": [IMAGE], "images": [IMAGES], "ragged": RAGGED, "video": [VIDEO], "both": [BOTH]}


def patched(family: str, *, track: bool = False, method: Any = "illava", **kwargs: Any) -> Any:
    """A fresh tiny model that merges in both stages."""
    model = tiny_model(family, **kwargs)
    patch(model, **SETTINGS[family], method=method, track=track)
    return model


def steps(model: Any, inputs: Inputs, new_tokens: int = 5, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """New ids and the logits of each step of a greedy generation."""
    done = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return done.sequences[:, -new_tokens:], list(done.logits)


def single(model: Any, sample: Sample) -> Inputs:
    """The inputs of one sample alone."""
    return inputs_for(model, [sample])


def next_positions(model: Any, inputs: Inputs, count: int) -> dict[str, Tensor]:
    """Explicit positions of `count` tokens after a prompt, where the family's forward wants them."""
    if model.config.model_type != "qwen2_vl":
        return {}
    if "mm_token_type_ids" not in inputs or not inputs["mm_token_type_ids"].any():
        length = inputs["input_ids"].shape[1]
        return {"position_ids": torch.arange(length, length + count).expand(3, 1, count)}
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids
    )
    return {"position_ids": (positions.amax() + 1 + torch.arange(count)).expand(3, 1, count)}
