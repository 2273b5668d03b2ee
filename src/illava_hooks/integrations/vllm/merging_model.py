"""In front of a model class of vLLM's: settings, counts, and positions that follow pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from illava_hooks.integrations.vllm.counts import KeptCounts
from illava_hooks.integrations.vllm.cpu import let_positions_follow
from illava_hooks.integrations.vllm.positions import Item, place, prompt_positions
from illava_hooks.integrations.vllm.settings import Settings, settings_of

__all__ = ["MergingModel", "visual_runs"]


class MergingModel:
    """In front of vLLM's model; without settings everything is stock.

    Attributes:
        flat: whether the text model has plain positions, which are the first row.
        merging: the settings, or None.
    """

    flat = False
    merging: Settings | None
    kept_tokens: KeptCounts

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """As stock; with settings the vision encoder merges."""
        config = vllm_config.model_config.hf_config
        settings = settings_of(config)
        if settings is not None:  # before, since decoders make room for positions that are ahead of their tokens
            let_positions_follow(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # of the class behind
        self.merging = settings
        if settings is None:
            return
        self.supports_multimodal_pruning = True  # what vLLM asks in front of positions that follow pictures
        self.is_multimodal_pruning_enabled = False  # what some models ask in front of pruning of their own
        self.kept_tokens = KeptCounts(settings, config)
        self.install(settings)

    def install(self, settings: Settings) -> None:
        """Makes the vision encoder merge; a subclass does it."""
        raise NotImplementedError

    def items_of(self, feature: Any) -> list[Item]:
        """Spans of visual tokens of an image or video in the prompt; a subclass says it."""
        raise NotImplementedError

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Of survivors provisional; of text exact."""
        if self.merging is None:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
            return found
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        items = [item for feature in features for item in self.items_of(feature)]
        return prompt_positions(len(input_tokens), items, self.flat)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> Any:
        """What vLLM asks with the embeddings of each chunk."""
        config: Any = self.config  # type: ignore[attr-defined]  # of the class behind
        visual = [config.image_token_id, config.video_token_id]
        return place(input_ids, visual, multimodal_embeddings, mrope_positions, num_computed_tokens, self.flat)


def visual_runs(position: Any) -> Iterator[tuple[int, int]]:
    """Where visual tokens of an item stand in the prompt: (offset, length) of each run of them.

    Args:
        position: vLLM's range of placeholders; some of them may be text.
    """
    if position.is_embed is None:
        yield position.offset, position.length
        return
    start = 0
    values, counts = position.is_embed.unique_consecutive(return_counts=True)
    for visual, count in zip(values.tolist(), counts.tolist(), strict=True):
        if visual:
            yield position.offset + start, count
        start += count
