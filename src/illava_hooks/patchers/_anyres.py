"""What LLaVA-NeXT and LLaVA-NeXT-Video share: every image is cut into tiles, packed with newlines.

Shapes: ``T`` tiles of ``S`` x ``S`` pixels and ``N`` tokens each, the base view first; ``P`` packed tokens of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_state import Visible
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture, Workload
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import current_run, in_features
from illava_hooks.errors import InputError
from illava_hooks.patchers._tiles import Geometry, Tiles, geometry_of, kept_of_image, place_image
from illava_hooks.patchers._towers import (
    TowerFamily,
    TowerFeatures,
    class_tokens,
    tokens_per_tile,
    with_patch_numbers,
)

__all__ = ["AnyresFamily", "AnyresFeatures", "host_sizes", "views_of"]


class AnyresFamily(TowerFamily):
    """A family whose images are all cut into tiles."""

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of an image's (tiles, height, width), newlines included."""
        tiles, *size = map(int, shape)
        geometry = image_geometry(base, tiles, size)
        return kept_of_image(config, geometry, self.tile_units(base, config, modality), size)

    def tile_units(self, base: Any, config: MergeConfig, modality: Modality) -> tuple[int, ...]:
        """Tokens of a tile or frame before, between and after the merges."""
        traits = EncoderTraits(prefix=class_tokens(base.config))
        return encoder_counts(config, modality, traits, tokens_per_tile(base.config)).units

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """The base view of each image and the mosaic of its tiles, without padding."""
        if inputs.get("pixel_values") is None:
            return []
        config, values = model.config, inputs["pixel_values"].detach().double().cpu()
        sizes = host_sizes(inputs["image_sizes"])
        counts = [num_tiles(config, size) for size in sizes]
        padded = list(values) if values.dim() == 5 else torch.split_with_sizes(values, counts)
        return [
            Picture("image", (tuple(views_of(config, tiles[:count], size)),))
            for tiles, count, size in zip(padded, counts, sizes, strict=True)
        ]

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles at random.

        Raises:
            InputError: there is no grid of so many tiles, or a video is asked for.
        """
        if load.frames:
            raise InputError(f"frames is {load.frames}, and {self.title} takes images only; use frames 0")
        config = model.config
        size, side = (
            config.vision_config.image_size,
            config.vision_config.image_size // config.vision_config.patch_size,
        )
        grids = {h * w // size**2 + 1: (h // size, w // size) for h, w in config.image_grid_pinpoints}
        if load.tiles not in grids:
            raise InputError(f"tiles is {load.tiles}; choose one of {sorted(grids)}")
        rows, columns = grids[load.tiles]
        total, length = load.batch * load.images, side * side + rows * side * (columns * side + 1)
        return {
            **load.prompt(config.image_token_id, length, load.images, generator),
            "pixel_values": torch.randn(total, load.tiles, 3, size, size, generator=generator),
            "image_sizes": torch.tensor([[rows * size, columns * size]] * total),
        }


class AnyresFeatures(TowerFeatures):
    """Around the feature method of images, and the packing that it calls."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        super().__init__(base, session)
        self._geometries: dict[tuple[Any, ...], Geometry] = {}

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        if not self.merges("image"):
            return self.run(method, None, args, kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        device, sizes = call["pixel_values"].device, host_sizes(call["image_sizes"])
        tiles = [num_tiles(self.base.config, size) for size in sizes]
        shown = torch.cat([self.geometry(count, size).visible for count, size in zip(tiles, sizes, strict=True)])
        visible = Visible(shown.to(device), tuple(shown.sum(1).tolist()))
        lengths = [tokens_per_tile(self.base.config)] * sum(tiles)
        run = EncoderRun(self.session, "image", self.traits(), lengths, len(lengths), device, visible=visible)
        return self.run(method, run, args, kwargs)

    def geometry(self, tiles: int, size: tuple[int, ...]) -> Geometry:
        """The packing of one kind of image, remembered."""
        if (tiles, size) not in self._geometries:
            if len(self._geometries) >= 256:
                self._geometries.clear()
            self._geometries[tiles, size] = image_geometry(self.base, tiles, size)
        return self._geometries[tiles, size]

    def pack(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``pack_image_features``: packs the expanded grid, and notes which packed tokens are survivors."""
        run = current_run()
        if run is None:
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs)
        features, sizes = call.arguments["image_features"], host_sizes(call.arguments["image_sizes"])
        counts = [len(feature) for feature in features]
        tiles = [Tiles.of(run, sum(counts[:i]), sum(counts[: i + 1]), f.device) for i, f in enumerate(features)]
        call.arguments["image_features"] = [t.expand(f) for t, f in zip(tiles, features, strict=True)]
        packed, lengths = method(*call.args, **call.kwargs)
        placed = [
            place_image(run, t, p, self.geometry(len(f), size))
            for t, p, f, size in zip(tiles, packed, features, sizes, strict=True)
        ]
        run.records = [record for _, record in placed]
        return [tokens for tokens, _ in placed], lengths


def image_geometry(base: Any, tiles: int, size: Sequence[int]) -> Geometry:
    """Runs the stock packing over a tensor of indices: it has no limit of tiles and interpolates nothing."""

    def pack(values: Tensor, newline: Tensor) -> Tensor:
        packed: Tensor = type(base).pack_image_features(
            base, [values], [list(size)], vision_feature_select_strategy="default", image_newline=newline
        )[0][0]
        return packed

    return geometry_of(tiles, tokens_per_tile(base.config), pack)


def num_tiles(config: Any, size: Sequence[int]) -> int:
    """Tiles of an image, its base view included; as a tensor its size would be counted wrong by stock."""
    return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def host_sizes(image_sizes: Any) -> list[tuple[int, ...]]:
    """Heights and widths of images, given as a tensor, an array or a list."""
    sizes = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    return [tuple(int(side) for side in size) for size in sizes]


def views_of(config: Any, tiles: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The views of one image, ``(4, H, W)`` with patch numbers: its base, and the mosaic of its tiles."""
    stack, side = with_patch_numbers(config.vision_config.patch_size, tiles), config.vision_config.image_size
    views = [stack[0]]
    if len(stack) > 1:
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)  # type: ignore[no-untyped-call]
        mosaic = stack[1:].view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
        mosaic = mosaic.reshape(-1, rows * side, columns * side)
        views.append(unpad_image(mosaic, size))  # type: ignore[no-untyped-call]
    return views
