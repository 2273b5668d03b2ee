"""What the tools ask LLaVA-OneVision for: its tiles as pictures, inputs and sizes to measure.

Shapes: ``T`` tiles or frames of ``S`` x ``S`` pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from illava_hooks.config import Modality
from illava_hooks.engine.tooling import PIXELS, LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.errors import InputError
from illava_hooks.patchers._anyres import views_of
from illava_hooks.patchers._towers import with_patch_numbers

__all__ = ["LMMS_EVAL", "SHAPES", "VLMEVALKIT", "pictures", "published_config", "workload"]

SHAPES: Mapping[str, PublishedShape] = MappingProxyType(
    {
        "llava-onevision-0.5b": PublishedShape(896, 4864, 24, 14, 2, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
        "llava-onevision-7b": PublishedShape(3584, 18944, 28, 28, 4, "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    }
)
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_attention_heads": 2}

LMMS_EVAL = LmmsEval("simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf", names_device=True)
VLMEVALKIT = ("llava-onevision-qwen2-7b-ov-hf", "llava-onevision-qwen2-0.5b-ov-hf")

#: Rows and columns of tiles by their number, as the stock grid has them.
_GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 5: (1, 5), 6: (2, 3), 8: (2, 4), 9: (3, 3), 10: (2, 5)}


def pictures(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Per image the base view and, where it was cut into tiles, their mosaic without padding; a video's frames."""
    found: list[Picture] = []
    pixels: dict[Modality, Any] = {modality: inputs.get(name) for modality, name in PIXELS.items()}
    if pixels["image"] is not None:
        values, sizes = pixels["image"].detach().double().cpu(), inputs["image_sizes"].tolist()
        views = _tiled(config, values, sizes, inputs.get("batch_num_images"))
        found += [Picture("image", (tuple(image),)) for image in views]
    if pixels["video"] is not None:
        for video in pixels["video"].detach().double().cpu():
            frames = with_patch_numbers(config.vision_config.patch_size, video)
            found.append(Picture("video", tuple((frame,) for frame in frames)))
    return found


def _tiled(config: Any, values: Tensor, sizes: list[list[int]], batch_num_images: Any) -> list[list[Tensor]]:
    """The views of each image, ``(4, H, W)``."""
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    # Stock cuts an image into tiles only where it is the only one of its sample.
    cut = batch_num_images is None or int(batch_num_images[0]) == 1
    counts = [image_size_to_num_patches(size, pinpoints, side) if cut else 1 for size in sizes]
    padded = list(values) if values.dim() == 5 else torch.split_with_sizes(values, counts)
    return [views_of(config, tiles[:count], size) for tiles, count, size in zip(padded, counts, sizes, strict=True)]


def workload(config: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
    """Tiles or frames at random.

    Raises:
        InputError: there is no grid of so many tiles.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    size, tokens = config.vision_config.image_size, side * side
    if load.frames:
        length = load.frames * ((side + 1) // 2) ** 2 + 1
        pixels = torch.randn(load.batch, load.frames, 3, size, size, generator=generator)
        return {**load.prompt(config.video_token_id, length, 1, generator), "pixel_values_videos": pixels}
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
        **load.prompt(config.image_token_id, length, load.images, generator),
        "pixel_values": torch.randn(total, tiles, 3, size, size, generator=generator),
        "image_sizes": torch.tensor([[rows * size, columns * size]] * total),
        "batch_num_images": torch.tensor([load.images] * load.batch),
    }


def published_config(text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
    """SigLIP in front of a Qwen2."""
    from transformers import LlavaOnevisionConfig

    rope = {"rope_type": "default", "rope_theta": 1e6}
    return LlavaOnevisionConfig(
        vision_config=_SIGLIP | _NARROW if narrow else _SIGLIP,
        text_config={**text, "model_type": "qwen2", "rope_parameters": rope},
        image_token_index=placeholders["image"],
        video_token_index=placeholders["video"],
    )
