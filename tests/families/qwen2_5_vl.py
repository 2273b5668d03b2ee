"""Qwen2.5-VL: Qwen2-VL's prompts and positions, a tower whose last block attends within windows.

Windows are 3 x 3 groups of 2 x 2 patches, so that the sides of most grids are no multiple of them. Three of the four
blocks have full attention, since only those merge and the suite merges in all but the last; towers in which both kinds
alternate have tests of their own (`tests/families_only/test_qwen2_5_vl.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from families import Family, Suite
from families.qwen2_vl import FRAMES_PER_SLICE, KINDS, MERGE, PATCH, Qwen2VL
from tiny_models import Inputs

WINDOW_GROUPS = 3


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    title = "Qwen2.5-VL"
    model_class = Qwen2_5_VLForConditionalGeneration
    published = False
    merging_layers = (0, 1, 2)
    has_windows = True
    vision_config = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES_PER_SLICE,
        "window_size": WINDOW_GROUPS * MERGE * PATCH,
        "fullatt_block_indexes": list(merging_layers),
        "tokens_per_second": 2,
    }
    waits_in_layers = {"unique_consecutive": 1}  # windows that were left empty are left out, once after the last merge
    rounding = 10  # the tower's norms, too
    encoder_mlp = "up_proj"
    silenced = ("attn.proj", "o_proj", "down_proj")
    retrievers = ()
    embedded = None
    embedded_settings = {}
    embedded_floor = 0.0
    paper_kept = None
    suites = {
        "Qwen25VL": Suite(  # the second block has windows
            vision={"fullatt_block_indexes": [0], "hidden_size": 48, "window_size": 16},
            image=(24, 24),
            frames=4,
            vit_layers=(0,),
        )
    }
    shapes = {"qwen2.5-vl-3b": 3.4, "qwen2.5-vl-7b": 7.2}
    stock_modules = ("qwen2_5_vl.modeling_qwen2_5_vl",)
    lmms_eval = None
    vlmevalkit = None
    spots = Family.spots  # no embedded model draws for it

    def encoder_sizes(self, model: Any) -> tuple[int, int]:
        """The tower's own width."""
        config = model.config.vision_config
        return config.num_heads, config.hidden_size

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """As pictures have them: the first block gets them in the order of its windows."""
        names = [name for _, _, name in KINDS if name in inputs]
        grids = [grid for name in names for grid in inputs[name].tolist()]
        rows = super().split_patches(hidden, inputs)
        return [part[places_in_row(grid)] for part, grid in zip(rows, grids, strict=True)]

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Slice by slice, windows by each survivor's own coordinates."""
        from families import _qwen2_5_vl_reference as reference

        return reference.visuals(model, inputs, settings)

    @property
    def golden_cases(self) -> tuple[str, ...]:
        """None: there is no published code."""
        return ()


FAMILY = Qwen25VL()


def row_of_windows(height: int, width: int, groups: int = WINDOW_GROUPS) -> list[int]:
    """The groups of a slice, by their number in the picture, in the order of the row: window after window.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        groups: Groups along each side of a window.
    """
    rows, columns = height // MERGE, width // MERGE
    return [
        row * columns + column
        for top in range(0, rows, groups)
        for left in range(0, columns, groups)
        for row in range(top, min(top + groups, rows))
        for column in range(left, min(left + groups, columns))
    ]


def places_in_row(grid: Sequence[int], groups: int = WINDOW_GROUPS) -> list[int]:
    """For each patch of an image or video its place in the row of the tower."""
    slices, height, width = grid
    order, unit = row_of_windows(height, width, groups), MERGE**2
    place = {group: index for index, group in enumerate(order)}
    return [
        (part * len(order) + place[group]) * unit + lane
        for part in range(slices)
        for group in range(len(order))
        for lane in range(unit)
    ]
