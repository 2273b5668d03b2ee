"""Tiny random models of both families, and inputs as the stock processors give them.

Everything here is stock transformers: a model built from a config, its weights redrawn from a seed (wide
enough that attention is far from uniform and token scores are well apart), and input dictionaries with
expanded placeholders.

What the stock models want, learned by running them:

* LLaVA-OneVision: `pixel_values` (images, most tiles, 3, 32, 32) padded with zero tiles, `image_sizes`, and
  `batch_num_images` with one entry per sample *that has images* (text-only rows have none). A sample with one
  image is cut into tiles (base + anyres); with several images each image is a single tile. All videos of a
  batch have the same number of frames.
* Qwen2-VL: packed patches `pixel_values` / `pixel_values_videos` (patches, 96) with their grids, and
  `mm_token_type_ids` (0 text, 1 image, 2 video), without which positions cannot be computed. Positions come
  from `get_rope_index`, which reads `attention_mask`, so padded rows have the positions of the single sample.
* Left padding: `forward` of LLaVA-OneVision counts positions over the padding, which shifts all of a row
  alike; RoPE is relative, so logits at real positions agree with the single sample to rounding: 2e-5 up to
  200 padding tokens, 6e-5 at 700 (float32 angles). `generate` counts positions without the padding.
* Equal models with another attention back-end differ by up to 1e-5 in float32. In float64 nearly all rounding
  goes away, because both families round to float32 at the same places: use it where 1e-6 is to be shown.
  Padded rows in float64 want "sdpa": stock "eager" overflows the mask in its float32 softmax and gives NaN.
* The output rows of all special ids are zero, so that `generate` hardly ever produces a placeholder.

Legend: `n` counts tokens of one visual. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

FAMILIES = ("llava_onevision", "qwen2_vl")

VOCAB_SIZE = 120
PAD_ID = 0
VISION_START_ID = 3
VISION_END_ID = 4
IMAGE_ID = 5
VIDEO_ID = 6
FIRST_TEXT_ID = 10

TILE = 32
LLAVA_PATCH = 4
PINPOINTS = [
    [32, 32],
    [32, 64],
    [64, 32],
    [64, 64],
    [32, 96],
    [96, 32],
    [64, 96],
    [96, 64],
    [96, 96],
    [96, 128],
    [128, 96],
]

QWEN_PATCH = 4
QWEN_MERGE = 2
QWEN_FRAMES_PER_SLICE = 2

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
        video_size: Size of the video frames (Qwen2-VL; LLaVA-OneVision frames are always one tile).
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


def tiny_llava_onevision(
    attn_implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **overrides: Any,
) -> LlavaOnevisionForConditionalGeneration:
    """Builds a stock LLaVA-OneVision: SigLIP with 4 layers and 64 tokens per tile, Qwen2 with 4 layers.

    Args:
        attn_implementation: Attention back-end of all parts.
        seed: Seed of the weights; equal seeds give equal weights in every dtype.
        dtype: Parameter dtype.
        vision: Overrides of the vision config.
        text: Overrides of the text config.
        **overrides: Overrides of the top config, e.g. `vision_aspect_ratio="anyres_max_2"`.

    Returns:
        The model in eval mode; `generate` runs on to `max_new_tokens`.
    """
    vision_settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": LLAVA_PATCH,
        "vision_use_head": False,
    }
    text_settings: dict[str, Any] = {**_text_settings(), "rope_parameters": _rope()}
    settings: dict[str, Any] = {
        "image_token_index": IMAGE_ID,
        "video_token_index": VIDEO_ID,
        "image_grid_pinpoints": [list(size) for size in PINPOINTS],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": False,
    }
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**(vision_settings | (vision or {}))),
        text_config=Qwen2Config(**(text_settings | (text or {}))),
        **(settings | overrides),
    )
    return _build(LlavaOnevisionForConditionalGeneration, config, attn_implementation, seed, dtype)


def tiny_qwen2_vl(
    attn_implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **overrides: Any,
) -> Qwen2VLForConditionalGeneration:
    """Builds a stock Qwen2-VL: encoder of 4 blocks with 4 x 4 patches in 2 x 2 groups, text of 4 layers.

    Args:
        attn_implementation: Attention back-end of all parts.
        seed: Seed of the weights; equal seeds give equal weights in every dtype.
        dtype: Parameter dtype.
        vision: Overrides of the vision config.
        text: Overrides of the text config.
        **overrides: Overrides of the top config.

    Returns:
        The model in eval mode; `generate` runs on to `max_new_tokens`.
    """
    vision_settings: dict[str, Any] = {
        "depth": 4,
        "embed_dim": 32,
        "hidden_size": 48,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": QWEN_FRAMES_PER_SLICE,
    }
    text_settings: dict[str, Any] = {
        **_text_settings(),
        "rope_parameters": _rope() | {"mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    settings: dict[str, Any] = {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": VISION_START_ID,
        "vision_end_token_id": VISION_END_ID,
        "tie_word_embeddings": False,
    }
    config = Qwen2VLConfig(
        vision_config=vision_settings | (vision or {}),
        text_config=text_settings | (text or {}),
        **(settings | overrides),
    )
    return _build(Qwen2VLForConditionalGeneration, config, attn_implementation, seed, dtype)


def tiny_model(family: str, **kwargs: Any) -> PreTrainedModel:
    """Builds the tiny model of a family.

    Args:
        family: One of `FAMILIES`.
        **kwargs: As for `tiny_llava_onevision` and `tiny_qwen2_vl`.

    Returns:
        The model in eval mode.
    """
    return {"llava_onevision": tiny_llava_onevision, "qwen2_vl": tiny_qwen2_vl}[family](**kwargs)


def _text_settings() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD_ID,
    }


def _rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0}


def _build(
    model_class: type[PreTrainedModel], config: Any, attn_implementation: str, seed: int, dtype: torch.dtype
) -> Any:
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
    build = {"llava_onevision": llava_inputs, "qwen2_vl": qwen_inputs}[model.config.model_type]
    return {name: tensor.to(model.device) for name, tensor in build(samples, side, model).items()}


def llava_inputs(
    samples: Sequence[Sample],
    side: Side = "left",
    model: LlavaOnevisionForConditionalGeneration | None = None,
) -> Inputs:
    """Builds what the LLaVA-OneVision processor gives.

    Args:
        samples: The rows.
        side: Padding side.
        model: Where tile size, pinpoints and aspect ratio are read from; the defaults of
            `tiny_llava_onevision` when not given.

    Returns:
        `input_ids`, `attention_mask` and, where there are such, `pixel_values`, `image_sizes`,
        `batch_num_images`, `pixel_values_videos`.
    """
    config = model.config if model is not None else tiny_llava_onevision().config
    rows, images, sizes, videos = [], [], [], []
    for sample in samples:
        tiles = [_llava_num_tiles(config, size, len(sample.images)) for size in sample.images]
        image_lengths = [_llava_image_length(config, n, size) for n, size in zip(tiles, sample.images, strict=True)]
        video_lengths = [_llava_video_length(config, n) for n in sample.videos]
        pieces = {
            "i": iter([[IMAGE_ID] * n for n in image_lengths]),
            "v": iter([[VIDEO_ID] * n for n in video_lengths]),
        }
        rows.append(_prompt(sample, pieces))
        images += [_pixels(sample, "i", i, (n, 3, TILE, TILE)) for i, n in enumerate(tiles)]
        sizes += [list(size) for size in sample.images]
        videos += [_pixels(sample, "v", i, (n, 3, TILE, TILE)) for i, n in enumerate(sample.videos)]
    inputs = _padded(rows, side)
    if images:
        inputs["pixel_values"] = _stack_tiles(images)
        inputs["image_sizes"] = torch.tensor(sizes)
        inputs["batch_num_images"] = torch.tensor([len(s.images) for s in samples if s.images])
    if videos:
        if len({len(video) for video in videos}) > 1:
            raise ValueError("LLaVA-OneVision wants the same number of frames in all videos of a batch")
        inputs["pixel_values_videos"] = torch.stack(videos)
    return inputs


def qwen_inputs(
    samples: Sequence[Sample], side: Side = "left", model: Qwen2VLForConditionalGeneration | None = None
) -> Inputs:
    """Builds what the Qwen2-VL processor gives.

    Args:
        samples: The rows.
        side: Padding side.
        model: Unused; the tiny model's patch sizes are fixed.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids` and, where there are such, `pixel_values`,
        `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`.
    """
    del model
    rows: list[list[int]] = []
    pixels: dict[str, list[Tensor]] = {"i": [], "v": []}
    grids: dict[str, list[list[int]]] = {"i": [], "v": []}
    for sample in samples:
        own = {
            "i": [_qwen_grid(1, size) for size in sample.images],
            "v": [_qwen_grid(math.ceil(n / QWEN_FRAMES_PER_SLICE), sample.video_size) for n in sample.videos],
        }
        pieces = {
            kind: iter([_qwen_placeholders(kind, math.prod(grid) // QWEN_MERGE**2) for grid in own[kind]])
            for kind in "iv"
        }
        rows.append(_prompt(sample, pieces))
        for kind in "iv":
            grids[kind] += own[kind]
            pixels[kind] += [_qwen_pixels(sample, kind, i, grid) for i, grid in enumerate(own[kind])]
    inputs = _padded(rows, side)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    for kind, pixel_name, grid_name in (
        ("i", "pixel_values", "image_grid_thw"),
        ("v", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels[kind]:
            inputs[pixel_name] = torch.cat(pixels[kind])
            inputs[grid_name] = torch.tensor(grids[kind])
    return inputs


def real_positions(inputs: Inputs, row: int) -> Tensor:
    """The positions of a row that are not padding, ascending.

    Args:
        inputs: A batch as the builders give it.
        row: The row.

    Returns:
        Indices into the sequence.
    """
    return inputs["attention_mask"][row].nonzero().flatten()


def _prompt(sample: Sample, pieces: dict[str, Iterator[list[int]]]) -> list[int]:
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


def _padded(rows: list[list[int]], side: Side) -> Inputs:
    """Pads rows to the longest one."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    attention_mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": attention_mask}


def _pixels(sample: Sample, kind: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Pixels of one visual of a sample: seeded by the sample, the kind and the index among its kind."""
    generator = torch.Generator().manual_seed(100 * sample.text_seed + 10 * index + (kind == "v") + 7)
    return torch.randn(shape, generator=generator)


def _llava_num_tiles(config: LlavaOnevisionConfig, size: tuple[int, int], num_images: int) -> int:
    if num_images > 1:
        return 1
    return image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)


def _llava_image_length(config: LlavaOnevisionConfig, num_tiles: int, size: tuple[int, int]) -> int:
    """Placeholders of an image, counted by the stock packing itself run over one channel of zeros."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.zeros(num_tiles, tokens, 1)],
        torch.tensor([size]),
        image_newline=torch.zeros(1),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    return len(packed[0])


def _llava_video_length(config: LlavaOnevisionConfig, num_frames: int) -> int:
    """Placeholders of a video, counted by the stock pooling itself; one newline ends it."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), torch.zeros(num_frames, tokens, 1))
    return pooled.shape[0] * pooled.shape[1] + 1


def _stack_tiles(images: list[Tensor]) -> Tensor:
    """Pads the tiles of each image with zero tiles to the largest number, as the stock processor does."""
    most = max(len(image) for image in images)
    return torch.stack([nn.functional.pad(image, (0, 0, 0, 0, 0, 0, 0, most - len(image))) for image in images])


def _qwen_grid(slices: int, size: tuple[int, int]) -> list[int]:
    """Grid of patches; sides are rounded to whole groups as the stock smart resize does."""
    group = QWEN_PATCH * QWEN_MERGE
    return [slices, *(max(1, round(side / group)) * QWEN_MERGE for side in size)]


def _qwen_placeholders(kind: str, count: int) -> list[int]:
    return [VISION_START_ID, *[IMAGE_ID if kind == "i" else VIDEO_ID] * count, VISION_END_ID]


def _qwen_pixels(sample: Sample, kind: str, index: int, grid: list[int]) -> Tensor:
    """Flattened patches (channel, frame, row, column); an image's frame is doubled, as the processor does."""
    frames = 1 if kind == "i" else QWEN_FRAMES_PER_SLICE
    pixels = _pixels(sample, kind, index, (math.prod(grid), 3, frames, QWEN_PATCH, QWEN_PATCH))
    return pixels.expand(-1, -1, QWEN_FRAMES_PER_SLICE, -1, -1).flatten(1)
