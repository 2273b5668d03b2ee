"""Qwen2.5-VL: a packed row of patches in the order of attention windows, a 2x2 patch merger, M-RoPE.

Most blocks attend within windows; those in ``fullatt_block_indexes`` see the whole image or temporal slice, and only
they can rank its tokens. The row is permuted so that the groups of a window follow each other, and windows lie within
images and slices. Behind the patch merger stock takes the permutation back by an index as long as the whole row, so
that is where survivors are spread out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_window_index

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.hookset import Hook
from illava_hooks.engine.modules import inside
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, PublishedShape
from illava_hooks.engine.transport import current_run
from illava_hooks.errors import InputError, UnsupportedModelError
from illava_hooks.merge.segments import scatter_back
from illava_hooks.patchers._packed import MergingBlock, PackedFamily
from illava_hooks.patchers._windows import window_borders

__all__ = ["FAMILY", "ExpandMerged", "MergingQwen25VLVisionBlock", "Qwen25VL"]

#: Not yet measured on trained weights: two of the four blocks with full attention, as much in all as Qwen2-VL's four.
_PRESET = MergeSchedule((7, 15), 0.30, (6, 7, 8), 0.90)
_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_NARROW_TOWER = {"depth": 16, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
_READY_MADE = ("window_index", "cu_window_seqlens")


class MergingQwen25VLVisionBlock(MergingBlock, Qwen2_5_VLVisionBlock):  # type: ignore[no-untyped-call]  # by the base
    """A vision block that merges between attention and MLP."""


MergingQwen25VLVisionBlock.__name__ = Qwen2_5_VLVisionBlock.__name__  # `_no_split_modules` goes by name


class Qwen25VL(PackedFamily):
    """Qwen2.5-VL's family: groups of 2x2 patches are kept or merged as one, in blocks with full attention."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    presets = MappingProxyType({"image": _PRESET, "video": _PRESET})
    encoder_layer_types = (Qwen2_5_VLVisionBlock,)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {Qwen2_5_VLVisionBlock: MergingQwen25VLVisionBlock}
    )
    other_tower = "visual has {kind} blocks; use a stock Qwen2.5-VL model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "qwen2.5-vl-3b": PublishedShape(2048, 11008, 36, 16, 2, "Qwen/Qwen2.5-VL-3B-Instruct"),
            "qwen2.5-vl-7b": PublishedShape(3584, 18944, 28, 28, 4, "Qwen/Qwen2.5-VL-7B-Instruct"),
        }
    )
    lmms_eval = LmmsEval("simple.qwen2_5_vl.Qwen2_5_VL", "chat.qwen2_5_vl.Qwen2_5_VL")
    vlmevalkit = ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct")

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses merges where attention stays within windows, too."""
        super().check(model, parts, config)
        full = sorted(self.config(model).vision_config.fullatt_block_indexes)
        if blind := [layer for layer in config.vit_layers if layer not in full]:
            cure = f"choose from {full}" if full else "use vit_layers=[]"
            raise UnsupportedModelError(
                f"vit_layers contains {', '.join(map(str, blind))}, where attention stays within windows and cannot "
                f"rank an image's tokens; {cure}"
            )

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """What stands around a packed row, and the way back to its full length behind the patch merger."""
        super().install(parts, session)
        for tower in parts.towers:
            for merger in inside(tower.merger):
                session.hooks.after(merger, ExpandMerged())

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # windows are counted on the host, as in stock
    def lay_out(self, run: EncoderRun, tower: Any, grids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Windows that the caller brings count, as in stock; else they are computed here, and stock need not.

        Raises:
            InputError: those of the caller reach across images or temporal slices.
        """
        given = {name: kwargs[name] for name in _READY_MADE if kwargs.get(name) is not None}
        index, borders = get_vision_window_index(
            grids,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
            kwargs=dict(given),
        )
        if len(given) == len(_READY_MADE):
            _check_windows(run, index, borders)
        unit, device = run.traits.patches_per_unit, run.states[0].origins.device
        order = (index.to(device)[:, None] * unit + torch.arange(unit, device=device)).flatten()
        run.traits = replace(run.traits, order=order, windows=borders.to(device, torch.int64))
        kwargs = {**kwargs, **dict(zip(_READY_MADE, (index, borders), strict=True))}
        if not is_flash_attention_requested(tower.config):
            kwargs.pop("max_window_seqlen", None)  # by it blocks tell who attends; others do not look at it
        return kwargs

    def borders(self, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        """Of the windows, where a block is given those; the longest one may have become shorter than is said.

        Flash attention, which has a longest window, takes empty ones. For others they are left out: the one wait for
        the device that this needs is spent once after a merge, where stock waits in every block.
        """
        given, windows, state = kwargs["cu_seqlens"], run.traits.windows, run.states[merges]
        if windows is None or len(given) != len(windows):
            return super().borders(kwargs, run, merges)
        if state.windows is None:
            state.windows = window_borders(run, merges)
            if kwargs.get("max_seqlen") is None:
                state.windows = torch.unique_consecutive(state.windows)
            state.windows = state.windows.to("cpu" if run.borders_on_host else given.device, given.dtype)
        return {"cu_seqlens": state.windows}

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower, whose MLP is gated, and of the patch merger."""
        vision = self.config(model).vision_config
        patches = vision.spatial_merge_size**2
        wide = vision.hidden_size * patches
        return EncoderShape(
            vision.depth,
            vision.hidden_size,
            vision.intermediate_size,
            patches,
            2 * wide * (wide + vision.out_hidden_size),
            mlp_matrices=3,
            windowed=frozenset(range(vision.depth)) - frozenset(vision.fullatt_block_indexes),
        )

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, and M-RoPE in the decoder."""
        from transformers import Qwen2_5_VLConfig

        sections = [4, 6, 6] if narrow else [16, 24, 24]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        vision = {**_TOWER, "out_hidden_size": text["hidden_size"]} | (_NARROW_TOWER if narrow else {})
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config={**text, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


class ExpandMerged(Hook):
    """Hook behind the patch merger: every group shows who stands for it, since stock un-permutes the whole row."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what a run knows is no business of a graph
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone where no run is going on."""
        (merged,), run = output, current_run()
        if run is None or merged is None or len(merged) != run.final.origins.shape[1]:
            return None
        return scatter_back(merged[None], run.final.kept_at.to(merged.device))[0]


def _check_windows(run: EncoderRun, index: Tensor, borders: Tensor) -> None:
    """Raises ``InputError`` where windows of the caller's own do not lie within segments; one transfer."""
    places, ends, first = index.tolist(), set(borders.tolist()), 0
    for units in run.segments[0].lengths:
        last = first + units
        inside_segment = sorted(places[first:last]) == list(range(first, last))
        if not inside_segment or last * run.traits.patches_per_unit not in ends:
            raise InputError(
                "window_index or cu_window_seqlens has windows across images or temporal slices, whose tokens never "
                "merge with each other; leave both out, or use transformers.vision_utils.get_vision_window_index"
            )
        first = last


FAMILY = Qwen25VL()
