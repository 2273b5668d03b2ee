"""What model classes of vLLM's share whose tower has a packed row of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.integrations.vllm.blocks import MergingBlock, TowerMerging
from illava_hooks.integrations.vllm.counts import check_counts
from illava_hooks.integrations.vllm.merging_model import MergingModel, visual_runs
from illava_hooks.integrations.vllm.positions import Item
from illava_hooks.integrations.vllm.processing import MergingProcessor, strength_of
from illava_hooks.integrations.vllm.settings import Settings, Strength

__all__ = ["PackedModel", "PackedProcessor"]


class PackedProcessor(MergingProcessor):
    """In front of a processor that tells grids of patches."""

    def shape_of(self, modality: Modality, item: Any) -> Sequence[int]:
        """The grid of patches."""
        grid: list[int] = item[f"{modality}_grid_thw"].data.tolist()
        return grid

    def items_in(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """As many as there are grids."""
        grids = inputs.get(f"{modality}_grid_thw")
        return 0 if grids is None else len(grids)


class PackedModel(MergingModel):
    """In front of vLLM's model, whose tower is ``visual``.

    Attributes:
        block: the merging class of the tower's blocks.
        tower_merging: what makes the tower merge.
    """

    block: type[MergingBlock]
    tower_merging: type[TowerMerging] = TowerMerging
    strengths: dict[Modality, Strength]

    def install(self, settings: Settings) -> None:
        """The tower's blocks merge."""
        tower: Any = self.visual  # type: ignore[attr-defined]  # of the class behind, as others below
        group = tower.spatial_merge_size**2
        sharded = tower.blocks[0].attn.tp_size > 1
        self.merging_tower = self.tower_merging(tower, self.block, EncoderTraits(group, granularity=group), sharded)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As stock; the strengths that items carry are taken out first."""
        if self.merging is not None:
            self.strengths = {modality: strength_of(modality, kwargs) for modality in get_args(Modality)}
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _process_image_input(self, image_input: Any) -> Any:
        return self._process("image", image_input, super()._process_image_input)  # type: ignore[misc]

    def _process_video_input(self, video_input: Any) -> Any:
        return self._process("video", video_input, super()._process_video_input)  # type: ignore[misc]

    def _process(self, modality: Modality, given: Any, stock: Callable[[Any], Any]) -> Any:
        """Calls stock while the tower merges; what it returns of each item is cut to the survivors."""
        if self.merging is None:
            return stock(given)
        strength = self.strengths[modality]
        with self.merging_tower.calling(modality, self.merging.at(strength)):
            items = stock(given)
        grids = given[f"{modality}_grid_thw"].tolist()
        kept = [self.kept_tokens(modality, grid, strength) for grid in grids]
        if not self.use_data_parallel:  # type: ignore[attr-defined]  # else each rank has some of the items
            check_counts(self.merging_tower.counts, kept)
        cut = [item[:count] for item, count in zip(items, kept, strict=True)]
        return tuple(self.in_time(modality, given, cut))

    def in_time(self, modality: Modality, given: Any, items: list[Tensor]) -> list[Tensor]:
        """Survivors of each item, whose digits tell slices, with digits that tell positions."""
        return items

    def items_of(self, feature: Any) -> list[Item]:
        """The text behind each run of visual tokens goes on behind the largest side of its grid."""
        grid = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        extent = self.extent(feature, *self.merging_tower.sides(grid))
        return [Item(offset, length, extent) for offset, length in visual_runs(feature.mm_position)]

    def extent(self, feature: Any, time: int, height: int, width: int) -> int:
        """By how much the text moves on behind a grid that stands together in the prompt, in tokens."""
        return max(time, height, width)

    def get_encoder_cudagraph_config(self) -> Any:
        """No captured graphs while the encoder's lengths change inside of it."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        if self.merging is not None:
            config.modalities = []
        return config
