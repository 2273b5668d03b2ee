"""What stands around LLaVA-OneVision's feature methods: runs of the encoder, packing, pooling."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from illava_hooks.engine.compat import pixels_of_videos
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import expand_output, run_features
from illava_hooks.engine.encoder_state import Visible
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import current_run, in_features
from illava_hooks.patchers._anyres import host_sizes
from illava_hooks.patchers._tiles import Geometry, Tiles, place_image, place_video
from illava_hooks.patchers._towers import check_feature_layer, check_strategy, tokens_per_tile
from illava_hooks.patchers.llava_onevision.packing import (
    compact_grid,
    compact_pool,
    image_geometry,
    place_published,
)

__all__ = ["FeatureMethods"]

#: Tiles of single patches; nothing but hidden states belongs to a token.
TRAITS = EncoderTraits(published_score="received_attention")


class FeatureMethods:
    """What stands around the model's four methods of the vision stage."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.base, self.session = base, session
        self._geometries: dict[tuple[Any, ...], Geometry] = {}

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        if not (self.session.active and not self.session.config.image.is_identity):
            return self._run(method, None, {}, args, kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        config, device = self.base.config, call["pixel_values"].device
        sizes = host_sizes(call["image_sizes"])
        tiles = self._tile_counts(sizes, call.get("batch_num_images"))
        aspect = call.get("vision_aspect_ratio") or config.vision_aspect_ratio
        shown = torch.cat([self.geometry(t, size, aspect).visible for t, size in zip(tiles, sizes, strict=True)])
        visible = Visible(shown.to(device), tuple(shown.sum(1).tolist()))
        lengths = [tokens_per_tile(config)] * sum(tiles)
        run = EncoderRun(self.session, "image", TRAITS, lengths, len(lengths), device, visible=visible)
        return self._run(method, run, call, args, kwargs)

    @property
    def _is_aligned(self) -> bool:
        return self.session.config.method.layout == "aligned"

    def video_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_video_features``: same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        if not (self.session.active and not self.session.config.video.is_identity):
            return self._run(method, None, {}, args, kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        pixels = pixels_of_videos(call)
        lengths = [tokens_per_tile(self.base.config)] * (pixels.shape[0] * pixels.shape[1])
        run = EncoderRun(self.session, "video", TRAITS, lengths, len(lengths), pixels.device)
        run.num_videos = pixels.shape[0]
        return self._run(method, run, call, args, kwargs)

    def _run(self, method: Callable[..., Any], run: EncoderRun | None, call: Any, args: Any, kwargs: Any) -> Any:
        if run is not None and run.layers:
            config = self.base.config
            chosen = call.get("vision_feature_layer")
            chosen = config.vision_feature_layer if chosen is None else chosen
            check_feature_layer(chosen, config.vision_config.num_hidden_layers, run.layers)
            check_strategy(config, call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy)

        def expand(output: Any) -> None:
            if run is not None:
                expand_output(run, output)

        return run_features(self.session, method, args, kwargs, run, self.base.config, expand)

    def _tile_counts(self, sizes: list[tuple[int, ...]], batch_num_images: Any) -> list[int]:
        """Tiles of each image; several images in one sample get their base tile only, as in stock."""
        config = self.base.config
        if isinstance(batch_num_images, Tensor):
            batch_num_images = batch_num_images.tolist()
        counts = [1] * len(sizes) if batch_num_images is None else batch_num_images
        alone = [n == 1 for n in counts for _ in range(n)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if tiled
            else 1
            for size, tiled in zip(sizes, alone, strict=False)  # as stock: who is counted and not there is left out
        ]

    def geometry(self, tiles: int, size: tuple[int, ...], aspect: str) -> Geometry:
        """The packing of one kind of image, remembered."""
        key = (tiles, size if tiles > 1 else (), aspect)
        if key not in self._geometries:
            if len(self._geometries) >= 256:
                self._geometries.clear()
            self._geometries[key] = image_geometry(self.base, tiles, tokens_per_tile(self.base.config), size, aspect)
        return self._geometries[key]

    def pack(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``pack_image_features``: packs the expanded grid, and notes which packed tokens are survivors."""
        run = current_run()
        if run is None:
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs)
        call.apply_defaults()
        features, sizes = call.arguments["image_features"], host_sizes(call.arguments["image_sizes"])
        newline, aspect = call.arguments["image_newline"], call.arguments["vision_aspect_ratio"]
        counts = [len(feature) for feature in features]
        tiles = [Tiles.of(run, sum(counts[:i]), sum(counts[: i + 1]), f.device) for i, f in enumerate(features)]
        call.arguments["image_features"] = [t.expand(f) for t, f in zip(tiles, features, strict=True)]
        packed, lengths = method(*call.args, **call.kwargs)
        if not self._is_aligned:
            small = compact_grid(self.base, features, sizes, newline, aspect)
            placed = [place_published(run, t, s, len(p)) for t, s, p in zip(tiles, small, packed, strict=True)]
        else:
            placed = [
                place_image(run, t, p, self.geometry(len(f), size, aspect), self._show(method, size, aspect))
                for t, p, f, size in zip(tiles, packed, features, sizes, strict=True)
            ]
        run.records = [record for _, record in placed]
        return [tokens for tokens, _ in placed], lengths

    def _show(self, method: Callable[..., Any], size: tuple[int, ...], aspect: str) -> Callable[[Tensor], Tensor]:
        """The stock packing of any values ``(T, N, c)`` on the tiles of one image; newlines are zero."""

        def show(values: Tensor) -> Tensor:
            packed: Tensor = method([values], [list(size)], values.new_zeros(values.shape[-1]), aspect)[0][0]
            return packed

        return show

    def pool(self, method: Callable[..., Any], image_features: Tensor) -> Tensor:
        """Around ``apply_pooling``: pools the expanded frames and keeps as many tokens as the encoder kept."""
        run = current_run()
        if run is None:
            pooled: Tensor = method(image_features)
            return pooled
        tiles = Tiles.of(run, 0, len(image_features), image_features.device)
        pooled = method(tiles.expand(image_features))
        small = None if self._is_aligned else compact_pool(self.base, image_features)
        tokens, run.records = place_video(run, tiles, pooled, method, small)
        return tokens
