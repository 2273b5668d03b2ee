"""The contract of a family: everything that the engine asks about a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from illava_hooks.config import MergeConfig, ModelLimits
from illava_hooks.methods import Method
from illava_hooks.runtime.report import EncoderShape
from illava_hooks.runtime.session import MergeSession
from illava_hooks.schedules import Modality

__all__ = ["EncoderTraits", "Family", "ModelParts", "changed_layers", "max_removed"]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Where the parts of a model are.

    Attributes:
        top: the model with the language-model head; None if the bare model was given.
        base: the model that joins vision and language.
        encoder_layers: layers of the vision encoder.
        text_model: the decoder with its embedding.
        decoder_layers: layers of the text model; each has ``self_attn`` with ``q_proj``, ``k_proj``.
    """

    top: nn.Module | None
    base: nn.Module
    encoder_layers: Sequence[nn.Module]
    text_model: nn.Module
    decoder_layers: Sequence[nn.Module]


class EncoderTraits(Protocol):
    """What a family says about its vision encoder.

    Attributes:
        unit: patches that stay together.
        multiple: counts are rounded down to multiples of this many patches.
        published_score: what the published code ranks by.
    """

    unit: int
    multiple: int
    published_score: str

    def shrink(self, kwargs: dict[str, Any], run: Any, ordinal: int) -> dict[str, Any]:
        """A layer's keyword arguments for the survivors after ``ordinal`` merges of an ``EncoderPass``."""
        ...


class Family(Protocol):
    """One family of models.

    Attributes:
        name: key in ``PRESETS``.
        published_llm_score: what the published code ranks by in the language model.
    """

    name: str
    published_llm_score: str

    def encoder_layers(self, base: Any) -> Any:
        """The layers of the vision encoder; raises ``AttributeError`` where a release renamed them."""
        ...

    def limits(self, model: nn.Module) -> ModelLimits:
        """What the model allows."""
        ...

    def check(self, model: nn.Module, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses what cannot work, with an ``IllavaHooksError``."""
        ...

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Puts the vision stage in: layer classes, and wrappers around the feature methods."""
        ...

    def encoder_shape(self, model: nn.Module) -> EncoderShape:
        """Sizes for the report."""
        ...

    def tokens_behind(self, base: Any) -> Mapping[Modality, int]:
        """How many tokens the base model appends to each feature that its feature methods return."""
        ...

    def text_positions(self, position_ids: Any) -> Any:
        """``position_ids`` as the text model rotates by: without rows that only tell packed sequences apart."""
        ...


def changed_layers(config: MergeConfig, depth: int) -> Sequence[int]:
    """Encoder layers whose class is swapped: those that merge, with a proportional method all behind the first."""
    if config.method.proportional and config.vit_layers:
        return range(config.vit_layers[0], depth)
    return config.vit_layers


def max_removed(method: Method, num_tokens: int) -> int:
    """How many of ``num_tokens`` a method can remove at once: bipartite matching half, others all but one."""
    return num_tokens // 2 if method.merge == "bipartite" else num_tokens - 1
