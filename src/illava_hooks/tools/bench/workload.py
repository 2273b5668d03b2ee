"""Inputs of a given size, without a processor: pixels at random, placeholders as the stock processors expand them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.engine.compat import takes_ready_features
from illava_hooks.errors import InputError

__all__ = ["Workload", "build_workload"]

#: Rows and columns of tiles by their number, as the stock grid has them.
_GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 5: (1, 5), 6: (2, 3), 8: (2, 4), 9: (3, 3), 10: (2, 5)}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured.

    Attributes:
        tiles: LLaVA-OneVision: tiles per image, the base tile included; 1 is the base tile alone.
        images: images per sample (each its base tile where there are several).
        frames: frames of one video instead of images; 0 for images.
        patches: Qwen2-VL: patches per image or per frame, a multiple of 4.
        batch: samples.
        text: text tokens per sample.
        new: generated tokens.
    """

    tiles: int = 3
    images: int = 1
    frames: int = 0
    patches: int = 4096
    batch: int = 1
    text: int = 64
    new: int = 8


def build_workload(model: Any, load: Workload, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``model.forward``.

    Raises:
        InputError: a number is out of range, or the release of transformers cannot run the stages apart.
    """
    if not takes_ready_features(model):
        raise InputError(
            "this transformers takes no ready-made features, so stages cannot be timed apart; use 5.18 or newer"
        )
    for name in ("tiles", "images", "patches", "batch", "text", "new"):
        if getattr(load, name) < 1:
            raise InputError(f"{name} is {getattr(load, name)}; give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    build = _llava if model.config.model_type == "llava_onevision" else _qwen
    inputs = build(model, load, generator)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _ids(load: Workload, token: int, length: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Text, ``count`` visuals of ``length`` tokens, each in brackets as processors have them, and text."""
    visual = [3, *[token] * length, 4] * count
    text = torch.randint(10, 1000, (load.batch, load.text), generator=generator)
    before = load.text // 2
    row = torch.tensor(visual).expand(load.batch, -1)
    ids = torch.cat([text[:, :before], row, text[:, before:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava(model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    size, tokens = config.vision_config.image_size, side * side
    if load.frames:
        length = load.frames * ((side + 1) // 2) ** 2 + 1
        pixels = torch.randn(load.batch, load.frames, 3, size, size, generator=generator)
        return {**_ids(load, config.video_token_id, length, 1, generator), "pixel_values_videos": pixels}
    total = load.batch * load.images
    if load.images > 1 or load.tiles == 1:
        # The stock model takes an image as its base tile alone where a sample has several; one such image
        # is a batch entry that says so.
        length, tiles, rows, columns = tokens + 1, 1, 1, 1
    else:
        if load.tiles - 1 not in _GRIDS:
            raise InputError(f"tiles is {load.tiles}; choose one of {[1, *(n + 1 for n in _GRIDS)]}")
        rows, columns = _GRIDS[load.tiles - 1]
        length = tokens + rows * side * (columns * side + 1)
        tiles = load.tiles
    if load.images == 1 and load.tiles == 1:
        raise InputError(
            "tiles is 1, which the stock model has only for several images; give --images 2 or tiles >= 2"
        )
    return {
        **_ids(load, config.image_token_id, length, load.images, generator),
        "pixel_values": torch.randn(total, tiles, 3, size, size, generator=generator),
        "image_sizes": torch.tensor([[rows * size, columns * size]] * total),
        "batch_num_images": torch.tensor([load.images] * load.batch),
    }


def _qwen(model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
    vision = model.config.vision_config
    height = max(h for h in range(2, int(load.patches**0.5) + 1, 2) if load.patches % (2 * h) == 0)
    width = load.patches // height
    if height * width != load.patches or width % 2:
        raise InputError(f"patches is {load.patches}; give a product of two even numbers")
    slices = -(-load.frames // vision.temporal_patch_size) if load.frames else 1
    count = 1 if load.frames else load.images
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    token = model.config.video_token_id if load.frames else model.config.image_token_id
    inputs = _ids(load, token, slices * load.patches // 4, count, generator)
    kind = "_videos" if load.frames else ""
    inputs[f"pixel_values{kind}"] = torch.randn(
        load.batch * count * slices * load.patches, channels, generator=generator
    )
    grid = [[slices, height, width]] * (load.batch * count)
    inputs["video_grid_thw" if load.frames else "image_grid_thw"] = torch.tensor(grid)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int() * (2 if load.frames else 1)
    return inputs
