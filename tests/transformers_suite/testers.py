"""Small models and inputs in the form that transformers' common tests ask for; both are the families'.

A row is ``text, image, text, video, text``, of what the family has. There are seven rows because
``test_eager_matches_sdpa_inference`` wants seven and fills up smaller batches with random numbers, which are no
placeholders.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from families import Family, Modality, Suite
from tiny_models import Sample

__all__ = ["Tester", "packed"]

TEXT = 4  # tokens of text between the visuals


class Tester:
    """What the common tests read."""

    batch_size = 7
    is_training = True
    num_hidden_layers = 2

    def __init__(self, family: Family, suite: Suite) -> None:
        """With all modalities of the family."""
        self.family, self.suite = family, suite
        self.modalities: tuple[Modality, ...] = family.modalities
        config = self.get_config()
        self.vocab_size = config.text_config.vocab_size
        self.hidden_size = config.text_config.hidden_size
        self.num_attention_heads = config.text_config.num_attention_heads
        depth = getattr(config.vision_config, family.depth_name)
        self.vision_config = self.video_config = {"num_hidden_layers": depth}

    @property
    def model_classes(self) -> tuple[type, ...]:
        """The bare model and that with a head."""
        head = self.suite.model_class or self.family.model_class
        return getattr(transformers, head.__name__.replace("ForConditionalGeneration", "Model")), head

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        return self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    def get_config(self) -> PreTrainedConfig:
        """The model's configuration."""
        suite, few = self.suite, {"num_hidden_layers": self.num_hidden_layers, "max_position_embeddings": 512}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        config: PreTrainedConfig = self.family.config(
            {**self.family.shallow(self.num_hidden_layers), **suite.vision},
            {**few, **ends, **suite.text},
            model_class=suite.model_class,
            **suite.top,
        )
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """A configuration and the inputs of a forward, always the same ones; the first dimension counts rows."""
        config = self.get_config()
        visuals: dict[str, Any] = {}
        if "image" in self.modalities:
            visuals["images"] = (self.suite.image,)
        if "video" in self.modalities:
            visuals |= {"videos": (self.suite.frames,), "video_size": self.suite.video}
        text = (TEXT,) * (1 + len(self.modalities))
        samples = [Sample(row, text=text, **visuals) for row in range(self.batch_size)]
        inputs = self.family.inputs(samples, "left", SimpleNamespace(config=config))
        return config, {
            name: value if len(value) == self.batch_size else value.unflatten(0, (self.batch_size, -1))
            for name, value in inputs.items()
        }


def packed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose patches are packed into one row, as the processor gives them, where a grid belongs to them."""
    by_grid = any(name.endswith("grid_thw") for name in inputs)
    return {
        name: value.flatten(0, 1) if by_grid and name.startswith("pixel_values") and value.dim() == 3 else value
        for name, value in inputs.items()
    }
