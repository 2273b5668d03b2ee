"""What the tools ask a family for, as values: pictures to draw, workloads to measure, names in other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from illava_hooks.config import Modality

__all__ = ["PIXELS", "LmmsEval", "Picture", "PublishedShape", "Workload"]

#: What transformers calls the pixels of each modality. A plain dict: torch.compile traces the hooks that read it.
PIXELS: Final[Mapping[Modality, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image or a video as the encoder looked at it, in which every pixel knows its source patch.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        frames: of an image one, of a video each frame or temporal slice; a frame has one view or several, of which
            the last is the most detailed. A view is ``(4, H, W)``: three channels as the processor normalised them,
            and the number of the patch, counted through the whole image or video in the order of the encoder.
    """

    modality: Modality
    frames: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured.

    Attributes:
        tiles: tiles per image where a family cuts images into tiles, the base tile included; 1 is that alone.
        images: images per sample (each its base tile where there are several).
        frames: frames of one video instead of images; 0 for images.
        patches: patches per image or per frame where a family takes images of any size.
        batch: samples.
        text: text tokens per sample.
        new: generated tokens.
        words: ids that text is drawn from; those of the model's vocabulary that mean nothing special to it.
    """

    tiles: int = 3
    images: int = 1
    frames: int = 0
    patches: int = 4096
    batch: int = 1
    text: int = 64
    new: int = 8
    words: tuple[int, ...] = tuple(range(10, 1000))

    def prompt(
        self, token: int, length: int, count: int, generator: torch.Generator, time: int = 0
    ) -> dict[str, Tensor]:
        """Ids and mask: text, ``count`` visuals of ``length`` placeholders between two words each, and text.

        Args:
            token: the placeholder.
            length: placeholders of a visual.
            count: visuals of a sample.
            generator: where random numbers come from.
            time: text tokens in front of each visual, that tell the time of a frame.
        """
        first, last = self.words[0], self.words[-1]
        visual = [*[first] * time, first, *[token] * length, last] * count
        text = torch.tensor(self.words)[torch.randint(len(self.words), (self.batch, self.text), generator=generator)]
        before = self.text // 2
        row = torch.tensor(visual).expand(self.batch, -1)
        ids = torch.cat([text[:, :before], row, text[:, before:]], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """Decoder sizes of a published model.

    Attributes:
        hidden: width.
        mlp: MLP width.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key heads.
        source: the checkpoint whose configuration it is.
        experts: of each layer in place of one MLP; 0: there are none.
        chosen: experts that a token is sent to.
        expert_mlp: MLP width of an expert.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    source: str
    experts: int = 0
    chosen: int = 0
    expert_mlp: int = 0


@dataclass(frozen=True, slots=True)
class LmmsEval:
    """The model classes of lmms-eval for a family, as module and class below ``lmms_eval.models``.

    Attributes:
        simple: for tasks of text and pictures; None: there is none.
        chat: for the model's chat format; None: there is none.
        names_device: whether the class's default device map is refused by now, so that one must be given.
    """

    simple: str | None = None
    chat: str | None = None
    names_device: bool = False
