"""Gemma 4, in its vision encoder only: rows of patches, padded to one length, that are pooled 3 x 3 by position.

A patch carries its position along: in the rotary embedding and in the pooling. So the patches of an image can come in
any order, and they come block by block: those of one pooled token follow each other, are kept or merged as one, and a
survivor is pooled as in stock. Rows are as long as the largest image of a call; what shorter ones lack is padding that
nobody sees. Behind the encoder every patch shows its survivor, in front of stock's pooling. The language model is left
alone: most of its layers slide over a window that counts columns, some share keys, and each embeds ids of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer, TowerHook, change_layers, run_features
from illava_hooks.engine.family import Family, ModelParts, Stage, changed_layers
from illava_hooks.engine.hookset import CALLED, Called, Hook
from illava_hooks.engine.provenance import block_diagonal, selection
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import PIXELS, LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import ENCODER_RUN, in_features
from illava_hooks.errors import InputError, UnsupportedModelError
from illava_hooks.patchers._padded import Rows, flat, frames_of, rows_of

__all__ = ["FAMILY", "Gemma4", "Rows", "rows_of"]

#: LLaVA-OneVision's layers and the amount of Qwen2-VL; not yet measured on trained weights.
PRESET = MergeSchedule((5, 6, 7, 8), 0.16, (), 1.0)
_TOWER: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16}
_NARROW_TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12}
#: Decoder layers whose last one in each group attends to everything, and those that share keys, by their number.
_GROUPS, _SHARED = {35: 5, 42: 6}, {35: 20, 42: 18}


class MergingGemma4VisionEncoderLayer(MergingLayer, Gemma4VisionEncoderLayer):  # type: ignore[no-untyped-call]
    """A layer that merges between attention and MLP, each of which has a norm in front and one behind."""

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the stock layer."""
        mixed, _ = self.self_attn(self.input_layernorm(hidden), *args, **kwargs)
        out: Tensor = hidden + self.post_attention_layernorm(mixed)
        return out

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        mixed = self.mlp(self.pre_feedforward_layernorm(hidden))
        out: Tensor = hidden + self.post_feedforward_layernorm(mixed)
        return out


MergingGemma4VisionEncoderLayer.__name__ = Gemma4VisionEncoderLayer.__name__  # `_no_split_modules` goes by name


class Gemma4(Family):
    """Gemma 4's family: blocks of patches that are pooled together merge inside of their image or frame."""

    name = "gemma4"
    title = "Gemma 4"
    model_types = ("gemma4",)
    stages: frozenset[Stage] = frozenset({"vision"})
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": PRESET, "video": PRESET})
    encoder_layer_types = (Gemma4VisionEncoderLayer,)
    other_tower = "vision_tower has {kind} layers; only Gemma 4's own can be patched; use a stock model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "gemma-4-e2b": PublishedShape(1536, 6144, 35, 8, 1, "google/gemma-4-E2B-it"),
            "gemma-4-e4b": PublishedShape(2560, 10240, 42, 8, 2, "google/gemma-4-E4B-it"),
        }
    )
    lmms_eval = LmmsEval("simple.gemma4.Gemma4")
    vlmevalkit = ("Gemma4-E4B-it", "Gemma4-E2B-it", "Gemma4-31B-it", "Gemma4-26B-A4B-it")

    def tower(self, base: Any) -> Any:
        """The vision tower.

        Raises:
            UnsupportedModelError: the model has none.
        """
        if base.vision_tower is None:
            raise UnsupportedModelError(
                "model has vision_config=None, so there are no visual tokens to merge; use a Gemma 4 that has one"
            )
        return base.vision_tower

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """The layers of the tower."""
        layers: Sequence[nn.Module] = tower.encoder.layers
        return layers

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes, wraps the feature methods, hooks tower and encoder."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(
            parts.encoder_layers, changed, {Gemma4VisionEncoderLayer: MergingGemma4VisionEncoderLayer}, session
        )
        methods = _Features(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "get_video_features", methods.video_features)
        for tower in parts.towers:
            encoder: Any = tower.encoder
            session.hooks.around_forward(tower, TowerHook(session))
            session.hooks.around_forward(encoder, _MarkCall(), _ExpandEncoder())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the tower; the projection of a pooled token."""
        vision, text = model.config.vision_config, self.text_config(model)
        return EncoderShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            vision.pooling_kernel_size**2,
            2 * vision.hidden_size * text.hidden_size,
            projects_survivors=False,
            mlp_matrices=3,
        )

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of one grid (t, h, w) of patches, as many as without merging: the language model is left alone."""
        time, height, width = shape
        return int(time * height * width // base.config.vision_config.pooling_kernel_size**2)

    def projector(self, base: Any) -> nn.Module:
        """The projection of pooled tokens."""
        projector: nn.Module = base.embed_vision
        return projector

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, or frames of one video, of as many pooled blocks as the patches have, nearly square.

        Raises:
            InputError: the patches are less than a block, or this release takes no such videos.
        """
        config, pool = model.config, model.config.vision_config.pooling_kernel_size
        blocks = load.patches // pool**2
        if not blocks:
            raise InputError(f"patches is {load.patches}; give {pool**2} or more, which are pooled into one token")
        if load.frames and "num_frames_per_video" not in inspect.signature(type(model).forward).parameters:
            raise InputError(f"frames is {load.frames}, and this transformers joins no video with text; use frames 0")
        modality: Modality = "video" if load.frames else "image"
        token, count = (config.video_token_id, load.frames) if load.frames else (config.image_token_id, load.images)
        height = isqrt(blocks)
        width = blocks // height
        columns, rows = torch.arange(width * pool), torch.arange(height * pool)
        places = torch.cartesian_prod(rows, columns).flip(1).repeat(load.batch * count, 1, 1)
        inputs = load.prompt(token, height * width, count, generator, time=bool(load.frames))
        channels = 3 * config.vision_config.patch_size**2
        inputs[PIXELS[modality]] = torch.rand(*places.shape[:2], channels, generator=generator)
        inputs[f"{modality}_position_ids"] = places
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int() * (2 if load.frames else 1)
        if load.frames:
            inputs["num_frames_per_video"] = torch.full((load.batch,), load.frames)
        return inputs

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The small ones' tower; in the decoder windows, heads of their own width, and layers that share keys."""
        from transformers import Gemma4Config

        depth = text["num_hidden_layers"]
        group, shared = (5, 4) if narrow else (_GROUPS[depth], _SHARED[depth])
        kinds = ["sliding_attention"] * (group - 1) + ["full_attention"]
        decoder = {
            "head_dim": 32 if narrow else 256,
            "global_head_dim": 64 if narrow else 512,
            "layer_types": kinds * (depth // group),
            "num_kv_shared_layers": shared,
            "use_double_wide_mlp": depth == 35,
            "vocab_size_per_layer_input": text["vocab_size"],
            "hidden_size_per_layer_input": 16 if narrow else 256,
        }
        vision = _TOWER | (_NARROW_TOWER if narrow else {})
        heads = {
            "num_attention_heads": vision["hidden_size"] // 64,
            "num_key_value_heads": vision["hidden_size"] // 64,
        }
        names: dict[str, Any] = {f"{modality}_token_id": token for modality, token in placeholders.items()}
        more: dict[str, Any] = {"audio_token_id": 7, "boa_token_id": 8, "eoa_token_index": 9}
        more |= {"boi_token_id": 3, "eoi_token_id": 4}
        return Gemma4Config(
            vision_config={**vision, **heads}, text_config={**text, **decoder}, audio_config=None, **names, **more
        )

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Each image, and the frames of each video."""
        found, size = list[Picture](), model.config.vision_config.patch_size
        for modality, name in PIXELS.items():
            if inputs.get(name) is None:
                continue
            pixels, places = inputs[name].detach().double().cpu(), inputs[f"{modality}_position_ids"].cpu()
            counts = frames_of(modality, pixels, inputs)
            frames = [_picture(*row, size) for row in zip(flat(pixels), flat(places), strict=True)]
            for count in counts:
                mine, frames = frames[:count], frames[count:]
                found.append(Picture(modality, tuple((frame,) for frame in _numbered_on(mine))))
        return found


# ---------------------------------------------------------------------- around the tower


class _Features:
    """Around the feature methods: same shapes, records attached."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        self.base, self.session = base, session

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features("image", method, args, kwargs)

    def video_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features("video", method, args, kwargs)

    def _features(self, modality: Modality, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if in_features():
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        call = {**call, **call.pop("kwargs", {})}
        call.pop("kwargs", None)
        pixels, positions = call[PIXELS[modality]], call.get(f"{modality}_position_ids")
        merges = self.session.active and not self.session.config.schedule(modality).is_identity
        if not merges or positions is None:
            return run_features(self.session, method, args, kwargs, None, self.base.config, lambda output: None)
        vision = self.base.config.vision_config
        rows = rows_of(flat(positions), vision.pooling_kernel_size)
        unit = vision.pooling_kernel_size**2
        run = EncoderRun(
            self.session,
            modality,
            EncoderTraits(unit, granularity=unit, order=rows.order),
            rows.lengths,
            1,
            pixels.device,
            shrink=_shrink_of(self.base),
            filled=rows.ragged,
        )
        call[PIXELS[modality]] = rows.arrange(pixels, 0.0)
        call[f"{modality}_position_ids"] = rows.arrange(positions, -1)
        counts = frames_of(modality, pixels, call)

        def behind(output: Any) -> None:
            if output.hidden_states is not None:
                output.hidden_states = tuple(
                    # Stock has the pooled tokens in place of the last.
                    hidden
                    if hidden is None or hidden is output.last_hidden_state
                    else rows.put_back(run.expand(hidden, run.merges_before(i)), pixels.shape[-2])
                    for i, hidden in enumerate(output.hidden_states)
                )
            # Behind each row's segment stands one of padding, if there is any.
            frames = [_record(run, segment) for segment in range(0, len(run.lengths), 1 + rows.ragged)]
            for count in counts:
                run.records.append(_joined(frames[:count]))
                frames = frames[count:]

        return run_features(self.session, method, (), call, run, self.base.config, behind)


def _shrink_of(base: Any) -> Callable[[dict[str, Any], EncoderRun, int], dict[str, Any]]:
    """Cuts a layer's keyword arguments down to survivors: positions, rotary tables, and the mask of padding."""

    def shrink(kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        positions, tables = kwargs["position_ids"], kwargs["position_embeddings"]
        places, rows = run.patch_origins(merges)[0].to(positions.device), len(positions)

        def survivors(table: Tensor) -> Tensor:
            return table.flatten(0, 1)[places].view(rows, -1, table.shape[-1])

        positions, tables = survivors(positions), tuple(map(survivors, tables))
        mask = kwargs["attention_mask"]
        if mask is not None:
            real = (positions != -1).any(-1)
            mask = create_bidirectional_mask(
                config=base.config.vision_config,
                inputs_embeds=tables[0],
                attention_mask=real,
                allow_is_bidirectional_skip=False,  # asking whether all are real would wait for the device
            )
        return {**kwargs, "position_ids": positions, "position_embeddings": tables, "attention_mask": mask}

    return shrink


class _MarkCall(Hook):
    """Pre-hook that changes nothing: the encoder was called as a module."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        return args, {**kwargs, CALLED: Called(module)}


class _ExpandEncoder(Hook):
    """Hook behind the encoder: every patch shows its survivor, before stock pools them."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        run: EncoderRun | None = kwargs.get(ENCODER_RUN)
        (out,) = output
        if run is None or out is None:
            return None
        run.check_finished()  # a merge that did not happen leaves states of lengths that nobody planned
        out.last_hidden_state = run.expand(out.last_hidden_state, len(run.plans))
        return out


# ---------------------------------------------------------------------- what merged


def _record(run: EncoderRun, segment: int) -> VisualRecord:
    """What merged in one image or frame; each block is one of its tokens, in the order in which stock pools them."""
    start, kept = (sum(run.segments[merges].lengths[:segment]) for merges in (0, len(run.plans)))
    units, left = run.lengths[segment][0], run.lengths[segment][-1]
    survivor = run.final.kept_at[0, start : start + units]
    keep = run.keep_mask(run.final)[0, start : start + units]
    survivor_of = run.final.origins[0][survivor] - start
    counts = run.patch_counts(segment, segment + 1)
    record = VisualRecord(run.modality, units, keep, survivor_of, counts, run.layers)
    if run.session.config.track:
        tokens = selection(survivor.cpu() - kept, left)
        record.sources = token_sources(run, segment, segment + 1, tokens)
        record.vision = vision_tracks(run, segment, segment + 1)
    return record


def _joined(frames: Sequence[VisualRecord]) -> VisualRecord:
    """The record of a video from those of its frames."""
    first, patches, tokens = frames[0], 0, 0
    if len(frames) == 1:
        return first
    survivors, keeps, segments = list[Tensor](), list[Tensor](), list[tuple[int, ...]]()
    origins: dict[int, list[Tensor]] = {}
    for frame in frames:
        assert frame.keep is not None and frame.survivor_of is not None
        keeps.append(frame.keep)
        survivors.append(frame.survivor_of + tokens)
        segments += frame.segments
        for layer, (places, _) in frame.vision.items():
            origins.setdefault(layer, []).append(places + patches)
        tokens, patches = tokens + frame.num_tokens, patches + frame.segments[0][0]
    record = VisualRecord(
        first.modality, tokens, torch.cat(keeps), torch.cat(survivors), tuple(segments), first.layers
    )
    if first.sources is not None:
        record.sources = block_diagonal([frame.sources for frame in frames if frame.sources is not None])
        record.vision = {
            layer: (torch.cat(places), block_diagonal([frame.vision[layer][1] for frame in frames]))
            for layer, places in origins.items()
        }
    return record


def _picture(pixels: Tensor, positions: Tensor, size: int) -> Tensor:
    """``(4, H, W)`` of the patches ``(N, 3 * size * size)`` of one image: their colours, and their numbers."""
    real = (positions != -1).any(-1)
    pixels, positions = pixels[real].view(-1, size, size, 3), positions[real]
    width, height = (positions.amax(0) + 1).tolist()
    shown = torch.zeros(height, width, size, size, 4, dtype=pixels.dtype)
    numbers = torch.arange(len(pixels)).to(pixels)[:, None, None, None].expand(-1, size, size, 1)
    shown[positions[:, 1], positions[:, 0]] = torch.cat([pixels, numbers], -1)
    return shown.permute(4, 0, 2, 1, 3).reshape(4, height * size, width * size)


def _numbered_on(frames: Sequence[Tensor]) -> list[Tensor]:
    """Pictures of the frames of one video, whose patches are counted through all of them."""
    found, first = [], 0
    for frame in frames:
        number = frame[3:]
        found.append(torch.cat([frame[:3], number + first]))
        first += int(number.max()) + 1
    return found


FAMILY = Gemma4()
