"""LLaVA-OneVision: SigLIP tiles, anyres packing, pooled video frames, a Qwen2 decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, Modality, ModelLimits
from illava_hooks.errors import PatchStateError, UnsupportedModelError
from illava_hooks.patchers import encoder
from illava_hooks.patchers.base import ModelParts
from illava_hooks.patchers.encoder import EncoderPass
from illava_hooks.patchers.llava_layout import Geometry, compact_grid, compact_pool, image_geometry, require_square
from illava_hooks.patchers.llava_tiles import Tiles, front_record, settle_image, settle_video
from illava_hooks.runtime.hooks import capture
from illava_hooks.runtime.report import DecoderShape, EncoderShape
from illava_hooks.runtime.session import KEY, MergeSession

__all__ = ["FAMILY", "compact_grid", "compact_pool"]


class MergingSiglipEncoderLayer(SiglipEncoderLayer):
    """A SigLIP layer that merges between attention and MLP when a step travels with the call."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The stock forward, or the merging one."""
        step = kwargs.pop(KEY, None)
        if step is None:
            out: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return out
        return self._merging_forward(step, hidden_states, attention_mask, **kwargs)

    @torch.compiler.disable
    def _merging_forward(
        self, step: encoder.EncoderStep, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        attention = self.self_attn
        step.watch(attention.q_proj, attention.k_proj)
        with capture(attention.q_proj, attention.k_proj) as take:
            mixed, _ = attention(hidden_states=self.layer_norm1(hidden), attention_mask=attention_mask, **kwargs)
            query, key = take(attention.q_proj), take(attention.k_proj)
        heads = (-1, attention.num_heads, attention.head_dim)
        hidden = step.merge(hidden + mixed, query.reshape(heads), key.reshape(heads), attention.scale)
        return hidden + self.mlp(self.layer_norm2(hidden))


MergingSiglipEncoderLayer.__name__ = SiglipEncoderLayer.__name__  # `_no_split_modules` goes by name


class SiglipTraits:
    """Tiles of single patches; nothing but hidden states belongs to a token."""

    unit = 1
    multiple = 1
    published_score = "received_attention"

    def shrink(self, kwargs: dict[str, Any], run: EncoderPass, ordinal: int) -> dict[str, Any]:
        """Nothing to cut."""
        return kwargs


class FeatureMethods:
    """What stands around the model's four methods of the vision stage."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.base, self.session = base, session
        self._geometries: dict[tuple[Any, ...], Geometry] = {}

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        if not (self.session.active and not self.session.config.image.is_identity):
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        config, device = self.base.config, call["pixel_values"].device
        sizes = _host(call["image_sizes"])
        tiles = self._tile_counts(sizes, call.get("batch_num_images"))
        aspect = call.get("vision_aspect_ratio") or config.vision_aspect_ratio
        visible = [self.geometry(t, size, aspect).visible for t, size in zip(tiles, sizes, strict=True)]
        lengths = [tokens_per_tile(config)] * sum(tiles)
        run = EncoderPass(self.session, "image", TRAITS, lengths, len(lengths), device, torch.cat(visible).to(device))
        return self._run(method, run, call, args, kwargs)

    def video_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_video_features``: same shapes, records attached."""
        if not (self.session.active and not self.session.config.video.is_identity):
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        pixels = call["pixel_values_videos"]
        lengths = [tokens_per_tile(self.base.config)] * (pixels.shape[0] * pixels.shape[1])
        run = EncoderPass(self.session, "video", TRAITS, lengths, len(lengths), pixels.device)
        run.num_videos = pixels.shape[0]
        return self._run(method, run, call, args, kwargs)

    def _run(self, method: Callable[..., Any], run: EncoderPass, call: Any, args: Any, kwargs: Any) -> Any:
        check_feature_choice(
            call.get("vision_feature_layer", self.base.config.vision_feature_layer),
            call.get("vision_feature_select_strategy", self.base.config.vision_feature_select_strategy),
            self.base.config.vision_config.num_hidden_layers,
            run.layers,
        )
        with encoder.running(run):
            output = method(*args, **{**kwargs, "return_dict": True, KEY: run})
        encoder.expand_output(run, output)
        self.session.note_vision(run.records)
        if kwargs.get("return_dict") is False:
            return output.to_tuple()
        output[KEY] = run.records
        return output

    def _tile_counts(self, sizes: list[tuple[int, ...]], batch_num_images: Any) -> list[int]:
        """Tiles of each image; several images in one sample get their base tile only, as in stock."""
        config = self.base.config
        counts = [1] * len(sizes) if batch_num_images is None else [int(n) for n in batch_num_images]
        alone = [n == 1 for n in counts for _ in range(n)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if tiled
            else 1
            for size, tiled in zip(sizes, alone, strict=True)
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
        run = encoder.current_run.get()
        if run is None:
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs)
        call.apply_defaults()
        features, sizes = call.arguments["image_features"], _host(call.arguments["image_sizes"])
        newline, aspect = call.arguments["image_newline"], call.arguments["vision_aspect_ratio"]
        counts = [len(feature) for feature in features]
        tiles = [Tiles.of(run, sum(counts[:i]), sum(counts[: i + 1]), f.device) for i, f in enumerate(features)]
        call.arguments["image_features"] = [t.expand(f) for t, f in zip(tiles, features, strict=True)]
        packed, lengths = method(*call.args, **call.kwargs)
        if self.session.config.method.layout == "compact":
            small = compact_grid(self.base, features, sizes, newline, aspect)
            settled = [front_record(run, t, s, len(p)) for t, s, p in zip(tiles, small, packed, strict=True)]
        else:
            settled = [
                settle_image(run, t, p, self.geometry(len(f), size, aspect), self._mass(method, t, size, aspect))
                for t, p, f, size in zip(tiles, packed, features, sizes, strict=True)
            ]
        run.records = [record for _, record in settled]
        return [tokens for tokens, _ in settled], lengths

    def _mass(
        self, method: Callable[..., Any], tiles: Tiles, size: tuple[int, ...], aspect: str
    ) -> Callable[[], Tensor]:
        """How much of each packed token are survivors, by the stock method over their mask."""

        def mass() -> Tensor:
            mask = tiles.keep[..., None].float()
            packed: Tensor = method([mask], [list(size)], mask.new_ones(1), aspect)[0][0]
            return packed[:, 0]

        return mass

    def pool(self, method: Callable[..., Any], image_features: Tensor) -> Tensor:
        """Around ``apply_pooling``: pools the expanded frames and keeps as many tokens as the encoder kept."""
        run = encoder.current_run.get()
        if run is None:
            pooled: Tensor = method(image_features)
            return pooled
        tiles = Tiles.of(run, 0, len(image_features), image_features.device)
        pooled = method(tiles.expand(image_features))
        small = compact_pool(self.base, image_features) if self.session.config.method.layout == "compact" else None
        tokens, run.records = settle_video(run, tiles, pooled, method, small)
        return tokens


class LlavaOnevision:
    """The family."""

    name = "llava_onevision"
    published_llm_score = "last_query_attention"

    def locate(self, model: Any) -> ModelParts:
        """Finds the parts of the model."""
        base = model.model if hasattr(model, "lm_head") else model
        return ModelParts(
            top=model if base is not model else None,
            base=base,
            encoder_layers=base.vision_tower.encoder.layers,
            text_model=base.language_model,
            decoder_layers=base.language_model.layers,
        )

    def limits(self, model: Any) -> ModelLimits:
        """Depths and tokens per tile."""
        config = model.config
        depth = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        used = max(_num_used(layer, depth) for layer in ([chosen] if isinstance(chosen, int) else chosen))
        return ModelLimits(self.name, used, config.text_config.num_hidden_layers, tokens_per_tile(config))

    def check(self, model: Any, config: MergeConfig) -> None:
        """Refuses other vision towers, and feature choices that cut across merges."""
        layer = self.locate(model).encoder_layers[0]
        if not isinstance(layer, SiglipEncoderLayer):
            raise UnsupportedModelError(
                f"vision_tower has {type(layer).__name__} layers; only SigLIP towers can be patched; use a model with one"
            )
        stock = model.config
        depth = stock.vision_config.num_hidden_layers
        if config.vit_layers:
            check_feature_choice(
                stock.vision_feature_layer, stock.vision_feature_select_strategy, depth, config.vit_layers
            )
        if config.method.layout == "compact":
            for schedule in (config.image, config.video):
                removed = sum(schedule.encoder_removed(tokens_per_tile(stock)))
                require_square(tokens_per_tile(stock) - removed)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes and wraps the four methods of the vision stage."""
        for layer in session.config.vit_layers:
            session.hooks.swap_class(parts.encoder_layers[layer], MergingSiglipEncoderLayer)
        methods = FeatureMethods(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "get_video_features", methods.video_features)
        session.hooks.wrap(parts.base, "pack_image_features", methods.pack)
        session.hooks.wrap(parts.base, "apply_pooling", methods.pool)

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the SigLIP tower and the projector."""
        vision, text = model.config.vision_config, model.config.text_config
        projector = 2 * text.hidden_size * (vision.hidden_size + text.hidden_size)
        used = self.limits(model).vit_depth
        # Stock runs the whole tower, also layers behind the chosen feature layer.
        depth = max(used, vision.num_hidden_layers)
        return EncoderShape(depth, vision.hidden_size, vision.intermediate_size, 1, projector)

    def decoder_shape(self, model: Any) -> DecoderShape:
        """Sizes of the Qwen2 decoder."""
        text = model.config.text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return DecoderShape(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, head * text.num_key_value_heads
        )

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``(B, N)`` as they are."""
        return position_ids


def tokens_per_tile(config: Any) -> int:
    """Tokens of one SigLIP tile."""
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)


def check_feature_choice(chosen: Any, strategy: str, depth: int, layers: tuple[int, ...]) -> None:
    """Refuses feature layers with different numbers of merges before them, and strategy ``"default"``.

    Raises:
        UnsupportedModelError: with the cure.
    """
    picked = [chosen] if isinstance(chosen, int) else list(chosen)
    merges = {sum(merging < _num_used(layer, depth) for merging in layers) for layer in picked}
    if len(merges) > 1:
        raise UnsupportedModelError(
            f"vision_feature_layer is {chosen} and spans the merging layers {list(layers)}; choose vit_layers below "
            f"{min(_num_used(layer, depth) for layer in picked)} or vit_layers=[]"
        )
    if strategy != "full":
        raise UnsupportedModelError(
            f"vision_feature_select_strategy is {strategy!r}, which drops a token of each tile; use 'full' or vit_layers=[]"
        )


def _num_used(layer: int, depth: int) -> int:
    """Encoder layers that ``hidden_states[layer]`` has gone through."""
    return layer if layer >= 0 else depth + 1 + layer


def _host(image_sizes: Any) -> list[tuple[int, ...]]:
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    return [tuple(int(side) for side in size) for size in sizes]


TRAITS = SiglipTraits()
FAMILY = LlavaOnevision()
