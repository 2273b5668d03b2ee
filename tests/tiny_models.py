"""What the tiny models of all families share: ids, prompts, padding, pixels and weights drawn from seeds.

Models and inputs themselves are the families' (`tests/families`): stock transformers, built from a config, its weights
redrawn from a seed (wide enough that attention is far from uniform and token scores are well apart), and input
dictionaries with expanded placeholders, as the stock processors give them.

* Equal models with another attention back-end differ by up to 1e-5 in float32. In float64 nearly all rounding
  goes away, because the families round to float32 at the same places: use it where 1e-6 is to be shown.
  Padded rows in float64 want "sdpa": stock "eager" overflows the mask in its float32 softmax and gives NaN.
* The output rows of all special ids are zero, so that `generate` hardly ever produces a placeholder.

Legend: `n` counts tokens of one visual. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, family, family_of

__all__ = [
    "FAMILIES",
    "FIRST_TEXT_ID",
    "IMAGE_ID",
    "PAD_ID",
    "ROPE",
    "TEXT_CONFIG",
    "VIDEO_ID",
    "VISION_END_ID",
    "VISION_START_ID",
    "VOCAB_SIZE",
    "Inputs",
    "Sample",
    "Side",
    "build",
    "inputs_for",
    "padded",
    "pixels",
    "prompt_ids",
    "real_positions",
    "tiny_model",
]

VOCAB_SIZE = 120
PAD_ID = 0
VISION_START_ID = 3
VISION_END_ID = 4
IMAGE_ID = 5
VIDEO_ID = 6
FIRST_TEXT_ID = 10

#: The decoder of every tiny model, as a text config has it.
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD_ID,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

Side = Literal["left", "right"]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """One row of a batch: text with visuals in it.

    Its content depends on `text_seed` only, never on the batch.

    Attributes:
        text_seed: Seed of the text and of the pixels.
        images: Sizes (height, width) of the images in pixels.
        videos: Number of frames of each video.
        text: Text tokens before each visual; the last entry stands after the last visual. Where there are
            fewer entries than visuals + 1, the later visuals follow each other without text between.
        order: Kinds of the visuals in order, such as "ivi"; images first, then videos, when empty.
        video_size: Size of the video frames, in families whose frames have sizes.
    """

    text_seed: int = 0
    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[int, ...] = ()
    text: tuple[int, ...] = (5, 7)
    order: str = ""
    video_size: tuple[int, int] = (24, 32)

    @property
    def kinds(self) -> str:
        """The kind of each visual in the order of the prompt: "i" for an image, "v" for a video."""
        kinds = self.order or "i" * len(self.images) + "v" * len(self.videos)
        if sorted(kinds) != sorted("i" * len(self.images) + "v" * len(self.videos)):
            raise ValueError(f"order={self.order!r} does not list {len(self.images)} i and {len(self.videos)} v")
        return kinds


# ------------------------------------------------------------------------------------ models


def tiny_model(name: str, **kwargs: Any) -> Any:
    """Builds the tiny model of a family.

    Args:
        name: One of `FAMILIES`.
        **kwargs: As for `Family.build`.

    Returns:
        The model in eval mode.
    """
    return family(name).build(**kwargs)


def build(
    model_class: type[PreTrainedModel], config: Any, attn_implementation: str, seed: int, dtype: torch.dtype
) -> Any:
    """A model from its config with redrawn weights, in eval mode; `generate` runs on to `max_new_tokens`."""
    model = model_class._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    _redraw_weights(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.do_sample = False
    return model.eval()


@torch.no_grad()
def _redraw_weights(model: PreTrainedModel, seed: int) -> None:
    """Redraws every parameter in its order; drawn in float32, so equal in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and id(parameter) not in embeddings:
            noise *= 1.2 / math.sqrt(parameter[0].numel())
        elif parameter.dim() == 1 and name.endswith("weight"):  # a norm
            noise = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            noise *= 0.2
        parameter.copy_(noise)
    model.get_output_embeddings().weight[:FIRST_TEXT_ID] = 0.0


# ------------------------------------------------------------------------------------ inputs


def inputs_for(model: PreTrainedModel, samples: Sequence[Sample], side: Side = "left") -> Inputs:
    """Builds the inputs of a batch for a model, on its device.

    Args:
        model: A model of one of the families.
        samples: The rows.
        side: Padding side.

    Returns:
        What the family's processor would give.
    """
    return {name: tensor.to(model.device) for name, tensor in family_of(model).inputs(samples, side, model).items()}


def real_positions(inputs: Inputs, row: int) -> Tensor:
    """The positions of a row that are not padding, ascending.

    Args:
        inputs: A batch as the builders give it.
        row: The row.

    Returns:
        Indices into the sequence.
    """
    return inputs["attention_mask"][row].nonzero().flatten()


def prompt_ids(sample: Sample, pieces: dict[str, Iterator[list[int]]]) -> list[int]:
    """Token ids of a sample: text segments with the placeholders of its visuals between."""
    kinds = sample.kinds
    before, after = list(sample.text[:-1]), sample.text[-1]
    if len(before) > len(kinds):
        before, after = before[: len(kinds)], sum(sample.text[len(kinds) :])
    before += [0] * (len(kinds) - len(before))
    generator = torch.Generator().manual_seed(1000 + sample.text_seed)

    def text(count: int) -> list[int]:
        return torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (count,), generator=generator).tolist()

    ids: list[int] = []
    for kind, count in zip(kinds, before, strict=True):
        ids += text(count) + next(pieces[kind])
    return ids + text(after)


def padded(rows: list[list[int]], side: Side) -> Inputs:
    """Pads rows to the longest one."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    attention_mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": attention_mask}


def pixels(sample: Sample, kind: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Pixels of one visual of a sample: seeded by the sample, the kind and the index among its kind."""
    generator = torch.Generator().manual_seed(100 * sample.text_seed + 10 * index + (kind == "v") + 7)
    return torch.randn(shape, generator=generator)
