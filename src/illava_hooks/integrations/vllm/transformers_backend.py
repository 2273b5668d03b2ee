"""Models on vLLM's Transformers back-end: transformers' own vision encoder runs there, and merges as by ``patch``.

Between the family's own wrapper around a feature method and vLLM stands one more: it hands survivors over, with
digits of their places. Positions of the text model are plain numbers, and vLLM's way for M-RoPE carries them, since no
other follows pictures: three rows, of which the text model gets the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

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
from illava_hooks.integrations.vllm.counts import KeptCounts
from illava_hooks.integrations.vllm.cpu import let_positions_follow
from illava_hooks.integrations.vllm.positions import Item, place, prompt_positions, with_table
from illava_hooks.integrations.vllm.processing import MergingInfo, MergingProcessor, strength_of
from illava_hooks.integrations.vllm.settings import AS_SERVED, Settings, Strength, settings_of

__all__ = ["MergingTransformers"]


class Info(MergingInfo, MultiModalProcessingInfo):
    """Knows the settings."""


class Processor(MergingProcessor, MultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""

    apart = False

    def shape_of(self, modality: Modality, item: Any) -> Sequence[int]:
        """(tiles, height, width) of an image, (frames,) of a video."""
        return shape_of(modality, {name: field.data for name, field in item.items()})

    def items_in(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """As many as vLLM has counted patches of."""
        counts = inputs.get(f"num_{modality}_patches")
        return 0 if counts is None else len(counts)


def shape_of(modality: Modality, fields: Mapping[str, Tensor]) -> tuple[int, ...]:
    """What the family counts an item by.

    Args:
        modality: of the item.
        fields: what the processor made of it.
    """
    if modality == "video":
        return (int(fields["pixel_values_videos"].shape[-4]),)
    height, width = fields["image_sizes"].flatten().tolist()
    return int(fields["num_image_patches"]), height, width


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
class MergingTransformers(TransformersMultiModalForCausalLM):
    """vLLM's wrapper around a model of transformers, whose vision encoder merges where there are settings."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """As stock; with settings the model's feature methods merge."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.merging = settings_of(self.config)
        if self.merging is None:
            return
        self.kept_tokens = KeptCounts(self.merging, self.config)
        self.merge_session = install_vision(self.merging, self.model)
        let_positions_follow(self, vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As stock, at the strength of these items."""
        if self.merging is None:
            return super().embed_multimodal(**kwargs)
        strengths = [strength_of(modality, kwargs) for modality in get_args(Modality)]
        strength = next((said for said in strengths if said != AS_SERVED), AS_SERVED)
        self.merge_session.config = self.merging.at(strength)
        return super().embed_multimodal(**kwargs)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Of survivors provisional; of text exact."""
        if self.merging is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[no-any-return]
        items = [self._item(feature) for feature in sorted(mm_features, key=lambda one: one.mm_position.offset)]
        return prompt_positions(len(input_tokens), items, flat=True)

    def _item(self, feature: Any) -> Item:
        position, modality = feature.mm_position, feature.modality
        fields = {name: field.data for name, field in feature.data.items()}
        whole = self.kept_tokens(modality, shape_of(modality, fields), Strength(vit_r=0))
        return Item(position.offset, position.length, whole)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> Any:
        """What vLLM asks with the embeddings of each chunk."""
        visual = [self.config.image_token_id, self.config.video_token_id]
        return place(input_ids, visual, multimodal_embeddings, mrope_positions, num_computed_tokens, flat=True)

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
