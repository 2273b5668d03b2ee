"""Models on vLLM's Transformers back-end: transformers' own vision encoder runs there, and merges as by ``patch``.

Between the family's own wrapper around a feature method and vLLM stands one more: it hands survivors over, with
digits of their places. Positions of the text model are plain numbers, and vLLM's way for M-RoPE carries them, since no
other follows pictures: three rows, of which the text model gets the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from illava_hooks.config import Modality
from illava_hooks.engine.install import install_encoder
from illava_hooks.engine.records import VisualRecord, records_of
from illava_hooks.engine.session import MergeSession
from illava_hooks.integrations.vllm.counts import check_counts
from illava_hooks.integrations.vllm.merging_model import MergingModel
from illava_hooks.integrations.vllm.positions import Item, with_table
from illava_hooks.integrations.vllm.processing import MergingInfo, MergingProcessor, strength_of
from illava_hooks.integrations.vllm.settings import Settings, Strength
from illava_hooks.patchers._anyres import num_tiles

__all__ = ["MergingTransformers"]


class Info(MergingInfo, MultiModalProcessingInfo):
    """Knows the settings."""


class Processor(MergingProcessor, MultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""

    apart = False

    def shape_of(self, modality: Modality, item: Any) -> Sequence[int]:
        """(tiles, height, width) of an image, (frames,) of a video."""
        (shape,) = shapes_of(self.info.get_hf_config(), modality, {name: field.data for name, field in item.items()})
        return shape

    def items_in(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """As many as vLLM has counted patches of."""
        counts = inputs.get(f"num_{modality}_patches")
        return 0 if counts is None else len(counts)


def shapes_of(hf_config: Any, modality: Modality, fields: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """What the family counts items by.

    Args:
        hf_config: the configuration of the whole model.
        modality: of the items.
        fields: what the processor made of them.
    """
    if modality == "video":
        pixels = fields["pixel_values_videos"]
        alone = isinstance(pixels, Tensor) and pixels.dim() == 4
        return [(len(clip),) for clip in ([pixels] if alone else pixels)]  # a list where clips differ in length
    # Not by the pixels: beside a larger picture they are filled up with empty tiles.
    sizes = fields["image_sizes"].reshape(-1, 2).tolist()
    return [(num_tiles(hf_config, size), *size) for size in sizes]


class KeepSurvivors:
    """Around a feature method that merges: of each visual its survivors, with digits of their places."""

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Puts the survivors in place of ``pooler_output``; what else is in it is not looked at."""
        output = method(*args, **{**kwargs, "return_dict": True})
        visuals = [features.flatten(0, -2) for features in output.pooler_output]
        told = records_of(output)  # nothing where this strength removes nothing
        records: Sequence[VisualRecord | None] = told or [None] * len(visuals)
        output.pooler_output = [survivors(*one) for one in zip(visuals, records, strict=True)]
        return output


def survivors(features: Tensor, record: VisualRecord | None) -> Tensor:
    """``(kept, C + COLUMNS)`` of the features ``(n, C)`` of one visual."""
    seats = torch.arange(len(features), device=features.device)
    if record is not None and record.keep is not None:
        seats = seats[record.keep.to(seats.device)]
    table = torch.stack([seats, seats, seats, torch.full_like(seats, len(features))], 1)
    return with_table(features[seats], table)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=MultiModalDummyInputsBuilder)
class MergingTransformers(MergingModel, TransformersMultiModalForCausalLM):
    """vLLM's wrapper around a model of transformers, whose vision encoder merges where there are settings."""

    flat = True

    def install(self, settings: Settings) -> None:
        """The model's feature methods merge."""
        self.merge_session = install_vision(settings, self.model)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As stock, at the strength of these items."""
        if self.merging is None:
            return super().embed_multimodal(**kwargs)
        # vLLM calls once per modality.
        modality: Modality = "video" if "pixel_values_videos" in kwargs else "image"
        strength = strength_of(modality, kwargs)
        self.merge_session.config = self.merging.at(strength)
        found = super().embed_multimodal(**kwargs)
        shapes = shapes_of(self.config, modality, kwargs)
        check_counts([len(item) for item in found], [self.kept_tokens(modality, one, strength) for one in shapes])
        return found

    def items_of(self, feature: Any) -> list[Item]:
        """Text behind an item goes on behind all of its tokens."""
        position, modality = feature.mm_position, feature.modality
        (shape,) = shapes_of(self.config, modality, {name: field.data for name, field in feature.data.items()})
        whole = self.kept_tokens(modality, shape, Strength(vit_r=0))
        return [Item(position.offset, position.length, whole)]

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As stock; the text model gets the first row of positions, as plain ones."""
        if self.merging is None or positions.dim() == 1:
            return super().forward(input_ids, positions, *args, **kwargs)
        return super(MultiModalMixin, self).forward(input_ids, positions[0], *args, **kwargs)  # past the three rows


def install_vision(settings: Settings, base: Any) -> MergeSession:
    """The vision stage of ``patch`` on a model whose decoder is vLLM's."""
    family = settings.family
    session = MergeSession(settings.strongest, base)
    install_encoder(family, family.locate_encoder(base), session)
    for modality in family.modalities:
        session.hooks.wrap(base, f"get_{modality}_features", KeepSurvivors())
    return session
