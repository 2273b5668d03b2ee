"""LLaVA-NeXT: CLIP tiles with a class token, packed with newlines, in front of a Llama.

What the stock model wants, learned by running it: `pixel_values` (images, most tiles, 3, 32, 32) padded with zero
tiles, and `image_sizes`. Every image is cut into a base tile and those of its grid, also where a sample has several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from families import Modality, Suite
from families.llava import FEW_PATCHES, LAST_LAYER, PATCHES, TILE, ClipFamily
from tiny_models import IMAGE_ID, Inputs, Sample, Side, padded, pixels, prompt_ids

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ANYRES_SUITE = Suite(vision=FEW_PATCHES, top=LAST_LAYER, rows_are_visuals=False, all_weights_train=False)


class AnyresFamily(ClipFamily):
    """What models share that cut all images into tiles."""

    top_config = {**ClipFamily.top_config, "image_grid_pinpoints": PINPOINTS}
    image_inputs = ("pixel_values", "image_sizes")
    one_to_one = False
    fragile_choice = True
    rounding = 2
    head_makes_tuples = True

    def image_inputs_of(self, samples: Sequence[Sample], model: Any) -> tuple[Inputs, list[int]]:
        """Tiles and sizes of all images, and the number of placeholders of each."""
        config, images, sizes, lengths = model.config, [], [], []
        for sample in samples:
            for index, size in enumerate(sample.images):
                count = num_tiles(config, size)
                images.append(pixels(sample, "i", index, (count, 3, TILE, TILE)))
                sizes.append(list(size))
                lengths.append(image_length(config, count, size))
        if not images:
            return {}, lengths
        most = max(len(image) for image in images)
        stacked = [nn.functional.pad(image, (0, 0, 0, 0, 0, 0, 0, most - len(image))) for image in images]
        return {"pixel_values": torch.stack(stacked), "image_sizes": torch.tensor(sizes)}, lengths

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Tiles, cut into patches."""
        tiles = pixels.flatten(0, 1).unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, 8, 8, patch, patch)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """64 patches in each tile and frame."""
        counts = [num_tiles(model.config, size) for sample in samples for size in sample.images]
        return [[PATCHES] * n for n in [*counts, *(frames for sample in samples for frames in sample.videos)]]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """Tiles and size of every image, frames of every video."""
        images: list[tuple[int, ...]] = [
            (num_tiles(model.config, size), *size) for sample in samples for size in sample.images
        ]
        return {"image": images, "video": [(frames,) for sample in samples for frames in sample.videos]}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """Tiles of images and frames of videos, of any size."""
        vision, sizes = model.config.vision_config, inputs.get("image_sizes", torch.empty(0, 2)).tolist()
        counts = [num_tiles(model.config, size) for size in sizes]
        counts += [len(frames) for frames in inputs.get("pixel_values_videos", ())]
        return [count * (vision.image_size // vision.patch_size) ** 2 for count in counts]

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """All tiles of all images, those that pad too."""
        return inputs["pixel_values"].flatten(0, 1), {}

    def beside_features(self, inputs: Inputs) -> Inputs:
        """Nothing about images: they are packed already."""
        return {name: value for name, value in inputs.items() if name in self.token_inputs}

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for the tiles of all images, one for the frames of all videos."""
        parts, calls = [], iter(hidden)
        if "image_sizes" in inputs:
            counts = [len(image[image.flatten(1).any(1)]) for image in inputs["pixel_values"]]
            parts += list(next(calls).split(counts))
        if "pixel_values_videos" in inputs:
            parts += list(next(calls).chunk(len(inputs["pixel_values_videos"])))
        return [self.patches(part) for part in parts]

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Tile by tile."""
        from families import _clip_reference as reference

        return reference.tiled_images(model, inputs, settings)

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Tokens that come from no patch are newlines."""
        text = weights.to_dense().sum(1) < 0.5
        return torch.where(text[:, None], model.model.image_newline, self.projector(model)(weights @ patches))


class LlavaNext(AnyresFamily):
    """LLaVA-NeXT."""

    title = "LLaVA-NeXT"
    model_class = LlavaNextForConditionalGeneration
    suites = {"LlavaNext": ANYRES_SUITE}
    shapes = {"llava-next-7b": 6.9, "llava-next-mistral-7b": 7.4}
    stock_modules = ("llava_next.modeling_llava_next", "clip.modeling_clip", "llama.modeling_llama")

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Tiles and sizes."""
        visuals, lengths = self.image_inputs_of(samples, model)
        pieces = {"i": iter([[IMAGE_ID] * length for length in lengths])}
        return {**padded([prompt_ids(sample, pieces) for sample in samples], side), **visuals}


FAMILY = LlavaNext()


def num_tiles(config: Any, size: Sequence[int]) -> int:
    """Tiles of one image."""
    return image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)


def image_length(config: Any, tiles: int, size: Sequence[int]) -> int:
    """Placeholders of an image, counted by the stock packing itself run over one channel of zeros."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.zeros(tiles, tokens, 1)],
        torch.tensor([list(size)]),
        vision_feature_select_strategy="default",
        image_newline=torch.zeros(1),
    )
    return len(packed[0])
