"""LLaVA-OneVision: SigLIP tiles, packed with newlines, in front of a Qwen2.

What the stock model wants, learned by running it:

* `pixel_values` (images, most tiles, 3, 32, 32) padded with zero tiles, `image_sizes`, and `batch_num_images` with one
  entry per sample *that has images* (text-only rows have none). A sample with one image is cut into tiles (base and
  anyres); with several images each image is a single tile. All videos of a batch have the same number of frames.
* Left padding: `forward` counts positions over the padding, which shifts all of a row alike; RoPE is relative, so
  logits at real positions agree with the single sample to rounding: 2e-5 up to 200 padding tokens, 6e-5 at 700
  (float32 angles). `generate` counts positions without the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from families import Family, LmmsEval, Modality, Suite, VlmEvalKit
from tiny_models import IMAGE_ID, ROPE, TEXT_CONFIG, VIDEO_ID, Inputs, Sample, Side, padded, pixels, prompt_ids

#: Up to transformers 5.17 frames are `pixel_values`, and their newline comes later.
OLD_VIDEOS = "pixel_values_videos" not in signature(LlavaOnevisionModel.get_video_features).parameters
TILE = 32
PATCH = 4
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


class LlavaOnevision(Family):
    """LLaVA-OneVision."""

    title = "LLaVA-OneVision"
    model_class = LlavaOnevisionForConditionalGeneration
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    text_config = {**TEXT_CONFIG, "model_type": "qwen2", "rope_parameters": ROPE}
    top_config = {
        "image_token_index": IMAGE_ID,
        "video_token_index": VIDEO_ID,
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    settings = {**Family.settings, "vit_r": 14}  # 36 of 64 are left: a square, for the layout "compact"
    published = True
    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    tile_patches = (TILE // PATCH) ** 2
    one_to_one = False
    back_ends = ("eager", "sdpa", "flex_attention")
    forward_counts_padding = True
    takes_labels_by_position = False
    head_makes_tuples = True
    records_hidden_states = True
    suites = {
        "LlavaOnevision": Suite(
            vision={"patch_size": 8},
            vit_r=5,
            rows_are_visuals=False,
            all_weights_train=False,  # the tower's last norm stands behind the chosen features
        )
    }
    embedded = "tiny"
    embedded_settings = {"vit_layers": [3, 4], "vit_r": 16, "llm_layers": [2], "llm_ratio": 0.5}
    embedded_floor = 0.80
    paper_kept = 361 / 729 * 0.7  # 361 tokens of a tile, then 70 % of what enters
    shapes = {"llava-onevision-0.5b": 0.76, "llava-onevision-7b": 6.96}
    stock_modules = (
        "llava_onevision.modeling_llava_onevision",
        "siglip.modeling_siglip",
        "qwen2.modeling_qwen2",
    )
    lmms_eval = LmmsEval(
        models={"chat.llava_hf": "LlavaHf", "simple.llava_hf": "LlavaHf"},
        ours=("LlavaOnevisionIllava", "LlavaOnevisionIllavaSimple"),
        stock="llava_hf",
        names_device=True,
    )
    vlmevalkit = VlmEvalKit(
        model_class="LLaVA_OneVision_HF",
        entries=("llava-onevision-qwen2-0.5b-ov-hf", "llava-onevision-qwen2-7b-ov-hf"),
        hub="llava-hf",
    )

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Tiles and sizes of images, frames of videos."""
        config = model.config
        rows, images, sizes, videos = [], [], [], []
        for sample in samples:
            tiles = [num_tiles(config, size, len(sample.images)) for size in sample.images]
            image_lengths = [_image_length(config, n, size) for n, size in zip(tiles, sample.images, strict=True)]
            video_lengths = [_video_length(config, n) for n in sample.videos]
            pieces = {
                "i": iter([[IMAGE_ID] * n for n in image_lengths]),
                "v": iter([[VIDEO_ID] * n for n in video_lengths]),
            }
            rows.append(prompt_ids(sample, pieces))
            images += [pixels(sample, "i", i, (n, 3, TILE, TILE)) for i, n in enumerate(tiles)]
            sizes += [list(size) for size in sample.images]
            videos += [pixels(sample, "v", i, (n, 3, TILE, TILE)) for i, n in enumerate(sample.videos)]
        inputs = padded(rows, side)
        if images:
            inputs["pixel_values"] = _stack_tiles(images)
            inputs["image_sizes"] = torch.tensor(sizes)
            inputs["batch_num_images"] = torch.tensor([len(s.images) for s in samples if s.images])
        if videos:
            if len({len(video) for video in videos}) > 1:
                raise ValueError("LLaVA-OneVision wants the same number of frames in all videos of a batch")
            inputs["pixel_values_videos"] = torch.stack(videos)
        return inputs

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """Tiles, cut into patches."""
        tiles = pixels.flatten(0, 1).unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, 8, 8, patch, patch)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """64 patches in each tile and frame."""
        images = [num_tiles(model.config, size, len(s.images)) for s in samples for size in s.images]
        return [[self.tile_patches] * count for count in [*images, *(frames for s in samples for frames in s.videos)]]

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """Tiles and size of every image, frames of every video."""
        images: list[tuple[int, ...]] = [
            (num_tiles(model.config, size, len(s.images)), *size) for s in samples for size in s.images
        ]
        return {"image": images, "video": [(frames,) for s in samples for frames in s.videos]}

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """Tiles of images and frames of videos, of any size."""
        config = model.config
        sizes = inputs.get("image_sizes", torch.empty(0, 2)).tolist()
        counts = [num_tiles(config, size, len(sizes)) for size in sizes]
        counts += [len(frames) for frames in inputs.get("pixel_values_videos", ())]
        return [count * (config.vision_config.image_size // config.vision_config.patch_size) ** 2 for count in counts]

    def feature_arguments(self, inputs: Inputs) -> dict[str, dict[str, Any]]:
        """Up to transformers 5.17 the frames of videos are `pixel_values`."""
        found = super().feature_arguments(inputs)
        if "video" in found and OLD_VIDEOS:
            found["video"] = {"pixel_values": inputs["pixel_values_videos"]}
        return found

    def beyond_features(self, modality: str) -> int:
        """Up to transformers 5.17 the newline of a video comes later."""
        return int(modality == "video" and OLD_VIDEOS)

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """All tiles of all images, those that pad too."""
        return inputs["pixel_values"].flatten(0, 1), {}

    def beside_features(self, inputs: Inputs) -> Inputs:
        """Nothing about images: they are packed already."""
        return {name: value for name, value in inputs.items() if name in self.token_inputs}

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """SigLIP's."""
        layers: Sequence[nn.Module] = model.model.vision_tower.encoder.layers
        return layers

    def projector(self, model: Any) -> nn.Module:
        """Works token by token."""
        module: nn.Module = model.model.multi_modal_projector
        return module

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """One call for all images, one for all videos."""
        counts = [len(inputs[name]) for name in ("image_sizes", "pixel_values_videos") if name in inputs]
        parts = [part for states, count in zip(hidden, counts, strict=True) for part in states.chunk(count)]
        return [part.flatten(0, 1) for part in parts]

    def make_projector_linear(self, model: Any) -> None:
        """Without its activation and its biases."""
        projector = model.model.multi_modal_projector
        projector.act = nn.Identity()
        for linear in (projector.linear_1, projector.linear_2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Tokens that come from no patch are newlines."""
        text = weights.to_dense().sum(1) < 0.5
        return torch.where(text[:, None], model.model.image_newline, self.projector(model)(weights @ patches))

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Tile by tile."""
        from families import _llava_onevision_reference as reference

        return reference.visuals(model, inputs, settings)

    @property
    def golden_cases(self) -> tuple[str, ...]:
        """One tile of a published prompt."""
        return ("B1c",)

    def golden_prompt(self, case: str) -> tuple[Any, Any]:
        """The published embeddings as text and ready-made features."""
        from families import _llava_onevision_golden as golden

        return golden.prompt(case)

    def spots(self) -> dict[str, Callable[[str], Any]]:
        """Patches of 8 pixels in tiles of 64."""
        from families import _llava_onevision_spots as spots

        return spots.SPOTS

    def shown(self, picture: Any, images: int) -> Any:
        """Stock pads each of several images to a square."""
        from families import _llava_onevision_spots as spots

        return spots.squared(picture) if images > 1 else picture


FAMILY = LlavaOnevision()


def num_tiles(config: LlavaOnevisionConfig, size: tuple[int, int], num_images: int) -> int:
    """Tiles of one of so many images of a sample."""
    if num_images > 1:
        return 1
    return image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)


def _image_length(config: LlavaOnevisionConfig, tiles: int, size: tuple[int, int]) -> int:
    """Placeholders of an image, counted by the stock packing itself run over one channel of zeros."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.zeros(tiles, tokens, 1)],
        torch.tensor([size]),
        image_newline=torch.zeros(1),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    return len(packed[0])


def _video_length(config: LlavaOnevisionConfig, num_frames: int) -> int:
    """Placeholders of a video, counted by the stock pooling itself; one newline ends it."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), torch.zeros(num_frames, tokens, 1))
    return pooled.shape[0] * pooled.shape[1] + 1


def _stack_tiles(images: list[Tensor]) -> Tensor:
    """Pads the tiles of each image with zero tiles to the largest number, as the stock processor does."""
    most = max(len(image) for image in images)
    return torch.stack([nn.functional.pad(image, (0, 0, 0, 0, 0, 0, 0, most - len(image))) for image in images])
