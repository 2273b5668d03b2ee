"""How many placeholders an image or video gets: the shared function of shapes, asked without a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from illava_hooks.config import Modality
from illava_hooks.integrations.vllm.settings import Settings, Strength

__all__ = ["KeptCounts"]


class KeptCounts:
    """Counts of one served model."""

    def __init__(self, settings: Settings, hf_config: Any) -> None:
        """Reads nothing but the model's configuration.

        Args:
            settings: of the model.
            hf_config: its configuration.
        """
        self.settings, self._base = settings, _without_weights(hf_config)
        self._count = lru_cache(4096)(self._counted)

    def __call__(self, modality: Modality, shape: Sequence[int], strength: Strength) -> int:
        """Visual tokens that reach the language model.

        Args:
            modality: of the visual.
            shape: what its family counts by: a grid of patches, or tiles and the size of a picture.
            strength: what the request says.

        Raises:
            MergeConfigError: the strength is out of range, or shapes do not tell.
        """
        return self._count(modality, tuple(int(n) for n in shape), strength)

    def _counted(self, modality: Modality, shape: tuple[int, ...], strength: Strength) -> int:
        config = self.settings.at(strength)
        return self.settings.family.kept_tokens(self._base, config, modality, shape)


def _without_weights(hf_config: Any) -> Any:
    """A stock model that has nothing but its configuration: families ask its methods how they lay tokens out."""
    kind: Any = MODEL_MAPPING[type(hf_config)]
    base: Any = kind.__new__(kind)
    nn.Module.__init__(base)
    base.config = hf_config
    return base
