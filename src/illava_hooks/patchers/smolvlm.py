"""SmolVLM, SmolVLM2 and Idefics3: a SigLIP-like tower for padded tiles, pixel shuffle, a Llama.

The shuffle makes one token of 2 x 2 to 4 x 4 patches of a square grid: those merge as one, and the grid is whole again
in front of it. The model never learns which tiles belong to one image, so each tile is an image here, the global one
too; so are the frames of a video. Stock drops tiles that are nothing but zeros before it looks at any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.idefics3.modeling_idefics3 import Idefics3Encoder, Idefics3EncoderLayer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMEncoder, SmolVLMEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer, TowerHook, change_layers, handed_on
from illava_hooks.engine.family import Family, ModelParts, changed_layers
from illava_hooks.engine.modules import inside
from illava_hooks.engine.padding import Padding
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture, PublishedShape, Workload
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import current_run
from illava_hooks.patchers._blocks import BlockFeatures, ExpandTower, tile_pictures
from illava_hooks.patchers._towers import PreNormLayer

__all__ = ["FAMILY", "MergingIdefics3EncoderLayer", "MergingSmolVLMEncoderLayer", "SmolVLM"]

# The fractions of depth and of tokens of the others; not yet measured on trained weights.
_PRESET = MergeSchedule((5, 6, 7, 8), 0.16, (8,), 0.70)
# The same for towers of 12 layers: as many tokens are left behind three layers.
_SHALLOW_PRESET = MergeSchedule((2, 3, 4), 0.21, (8,), 0.70)
_SHALLOW = 16

_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 512,
}
_NARROW_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
}
_SHAPES = {
    "smolvlm-256m": PublishedShape(576, 1536, 30, 9, 3, "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"),
    "smolvlm-500m": PublishedShape(960, 2560, 32, 15, 5, "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
    "smolvlm-2.2b": PublishedShape(2048, 8192, 24, 32, 32, "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "idefics3-8b": PublishedShape(4096, 14336, 32, 32, 8, "HuggingFaceM4/Idefics3-8B-Llama3"),
}
#: By the width of the decoder: the tower, and how many patches side by side become one token.
_TOWERS: Mapping[int, tuple[dict[str, Any], int]] = MappingProxyType(
    {
        _SHAPES["smolvlm-256m"].hidden: (_BASE, 4),
        _SHAPES["smolvlm-500m"].hidden: (_BASE, 4),
        _SHAPES["smolvlm-2.2b"].hidden: (_SO400M | {"image_size": 384}, 3),
        _SHAPES["idefics3-8b"].hidden: (_SO400M | {"image_size": 364}, 2),
    }
)


class MergingSmolVLMEncoderLayer(PreNormLayer, SmolVLMEncoderLayer):  # type: ignore[no-untyped-call]  # by the base class
    """A layer that merges between attention and MLP."""


class MergingIdefics3EncoderLayer(PreNormLayer, Idefics3EncoderLayer):  # type: ignore[no-untyped-call]  # likewise
    """The same of Idefics3, whose tower has classes of its own."""


class _RunningEncoder(nn.Module):
    """In front of a stock stack of layers, which takes no keyword arguments and so cannot hand a run on.

    Layers need it among their arguments: what a checkpoint replays has no other memory.
    """

    #: By which copies of a swapped class are found again.
    swapped_in = True

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None) -> Any:
        """The stock forward, with the run for every layer."""
        run = current_run()
        if run is None or not isinstance(self, _RunningEncoder):
            stock: Any = SmolVLMEncoder if isinstance(self, SmolVLMEncoder) else Idefics3Encoder
            return stock.forward(self, inputs_embeds, attention_mask)
        encoder: Any = self
        hidden = inputs_embeds
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=attention_mask, **handed_on(layer, run))
        return BaseModelOutput(last_hidden_state=hidden)


class RunningSmolVLMEncoder(_RunningEncoder, SmolVLMEncoder):
    """SmolVLM's."""


class RunningIdefics3Encoder(_RunningEncoder, Idefics3Encoder):
    """Idefics3's."""


# `_no_split_modules` goes by name.
MergingSmolVLMEncoderLayer.__name__ = SmolVLMEncoderLayer.__name__
MergingIdefics3EncoderLayer.__name__ = Idefics3EncoderLayer.__name__
RunningSmolVLMEncoder.__name__ = SmolVLMEncoder.__name__
RunningIdefics3Encoder.__name__ = Idefics3Encoder.__name__

_LAYERS: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
    {SmolVLMEncoderLayer: MergingSmolVLMEncoderLayer, Idefics3EncoderLayer: MergingIdefics3EncoderLayer}
)


class SmolVLM(Family):
    """SmolVLM's family: blocks of patches merge inside of their tile."""

    name = "smolvlm"
    title = "SmolVLM"
    model_types = ("smolvlm", "idefics3")
    modalities: tuple[Modality, ...] = ("image",)
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": _PRESET})
    encoder_layer_types = tuple(_LAYERS)
    other_tower = "vision_model has {kind} layers; use a stock SmolVLM or Idefics3 model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(_SHAPES)
    vlmevalkit = ("SmolVLM2", "SmolVLM2-500M", "SmolVLM2-256M")

    def tower(self, base: Any) -> Any:
        """The tower."""
        return base.vision_model

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """Its layers."""
        layers: Sequence[nn.Module] = tower.encoder.layers
        return layers

    def text_model(self, base: Any) -> Any:
        """The decoder, by its own name."""
        return base.text_model

    def limits(self, model: Any) -> ModelLimits:
        """Depths, and patches of a tile."""
        config = model.config
        depths = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        return ModelLimits(self.name, *depths, tile_side(config) ** 2, self.presets_of(model))

    def presets_of(self, model: Any) -> Mapping[Modality, MergeSchedule]:
        """Those of towers of 27 layers, or of 12."""
        found = super().presets_of(model)
        shallow = model.config.vision_config.num_hidden_layers < _SHALLOW
        return {"image": _SHALLOW_PRESET} if shallow and found is self.presets else found

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps the classes of merging layers and of the stack, wraps the feature method, hooks the tower."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, _LAYERS, session)
        session.hooks.wrap(parts.base, "get_image_features", ImageFeatures(parts.base, session, rows_of).features)
        towers: Sequence[Any] = parts.towers
        for tower in towers:
            smol = isinstance(tower.encoder, SmolVLMEncoder)
            session.hooks.swap_class(tower.encoder, RunningSmolVLMEncoder if smol else RunningIdefics3Encoder)
            session.hooks.around_forward(tower, TowerHook(session), ExpandTower())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the tower; the projector works on as many tokens as ever."""
        config = model.config
        vision, unit = config.vision_config, config.scale_factor**2
        joined = 2 * vision.hidden_size * unit * config.text_config.hidden_size
        return EncoderShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            unit,
            joined,
            projects_survivors=False,
        )

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of one tile without padding."""
        traits, patches = rows_of(base)
        return encoder_counts(config, modality, traits, patches).units[-1]

    def placeholder_method(self, base: Any) -> str:
        """Idefics3, and SmolVLM of older releases, find the places where they fill them."""
        name = "inputs_merger"
        return name if hasattr(base, name) else super().placeholder_method(base)

    def placeholder_masks(self, base: Any, call: Mapping[str, Any], result: Any) -> Mapping[Modality, Tensor]:
        """As of most; ``inputs_merger`` returns none, but compares as is done here."""
        if "image_hidden_states" not in call:
            return super().placeholder_masks(base, call, result)
        ids, embeds, token = call["input_ids"], call["inputs_embeds"], base.config.image_token_id
        if ids is not None:
            return {"image": ids == token}
        wanted = base.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return {"image": (embeds == wanted).all(-1)}

    def visuals_in(self, base: Any, output: Any) -> list[list[int]]:
        """Each tile: newer releases put those of a sample into one entry, older ones make an entry of each."""
        states = getattr(output, "last_hidden_state", None)
        if isinstance(output.pooler_output, Tensor) or states is None:
            return super().visuals_in(base, output)
        each = states.shape[1] // base.config.scale_factor**2
        return [[each] * (len(tiles) // each) for tiles in output.pooler_output]

    def projector(self, base: Any) -> nn.Module:
        """The shuffle, and the matrix behind it."""
        projector: nn.Module = base.connector
        return projector

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Each tile."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        tiles = pixels.detach().double().cpu().flatten(0, 1)
        return tile_pictures(tiles[shows_something(tiles)], model.config.vision_config.patch_size)

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles or frames: to the model each is an image."""
        config = model.config
        tiles = load.frames or load.images * load.tiles
        traits, patches = rows_of(model)
        inputs = load.prompt(config.image_token_id, patches // traits.patches_per_unit, tiles, generator)
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(load.batch, tiles, 3, size, size, generator=generator)
        return inputs

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower that goes with a decoder of that width, and a Llama."""
        from transformers import Idefics3Config, SmolVLMConfig

        tower, factor = _TOWERS.get(text["hidden_size"], (_BASE, 4))  # a narrow decoder has a width of its own
        kind: Any = Idefics3Config if text["hidden_size"] == _SHAPES["idefics3-8b"].hidden else SmolVLMConfig
        return kind(
            vision_config=tower | (_NARROW_TOWER if narrow else {}),
            text_config={**text, "model_type": "llama"},
            image_token_id=placeholders["image"],
            scale_factor=factor,
            pad_token_id=text["pad_token_id"],
        )


class ImageFeatures(BlockFeatures):
    """Around ``get_image_features``: finds the tiles that stock will look at, and their padding."""

    def plan(self, call: Mapping[str, Any]) -> EncoderRun | None:
        """One row for each tile that shows something; None where there is none, or stock will refuse the shape."""
        pixels, mask = call["pixel_values"], call.get("pixel_attention_mask")
        if pixels.dim() != 5:
            return None
        tiles = pixels.flatten(0, 1)
        there, patch = shows_something(tiles.to(self.base.dtype)), self.base.config.vision_config.patch_size
        rows, columns = (side // patch for side in tiles.shape[-2:])
        traits = blocks(rows * columns, self.base.config.scale_factor)
        real = torch.ones(len(tiles), rows * columns, dtype=torch.bool, device=pixels.device)
        if mask is not None:
            shown = mask.flatten(0, 1).unfold(1, patch, patch).unfold(2, patch, patch)
            real = (shown.sum((-1, -2)) > 0).flatten(1).to(real.device)
        count, padding = Padding.of(real, there, traits)
        if not count:
            return None
        config = inside(self.base.vision_model)[0].config
        lengths = [rows * columns] * count
        return EncoderRun(
            self.session, "image", traits, lengths, count, pixels.device, padding=padding, shrink=Masks(config)
        )


class Masks:
    """The attention masks of a run: of the places that are left, as stock makes them."""

    def __init__(self, config: Any) -> None:
        """Knows the tower's configuration, and so its back-end."""
        self.config = config
        self._made: dict[int, Any] = {}

    def __call__(self, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        """Keyword arguments of a layer with the mask after so many merges."""
        if kwargs.get("attention_mask") is None:
            return kwargs
        if merges not in self._made:
            self._made[merges] = self._make(kwargs["attention_mask"], run, merges)
        return {**kwargs, "attention_mask": self._made[merges]}

    def _make(self, given: Any, run: EncoderRun, merges: int) -> Any:
        places = run.patch_origins(merges)
        real = torch.ones_like(places, dtype=torch.bool)
        if run.padding is not None:
            real = run.padding.real.gather(1, places)
        if merges and run.session.config.method.proportional:
            # What weighs tokens by size adds to it, whatever the back-end.
            return None if run.padding is None else real[:, None, None]
        dtype = given.dtype if isinstance(given, Tensor) and given.is_floating_point() else torch.float32
        like = torch.empty(*real.shape, 1, dtype=dtype, device=real.device)
        return create_bidirectional_mask(config=self.config, inputs_embeds=like, attention_mask=real)


def shows_something(tiles: Tensor) -> Tensor:
    """``(T,)`` bool, which tiles ``(T, 3, H, W)`` stock looks at: those with a pixel that is not 0."""
    return (tiles != 0).flatten(1).any(1)


def tile_side(config: Any) -> int:
    """Patches side by side in a tile of the usual size."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def blocks(patches: int, factor: int) -> EncoderTraits:
    """What a tile of so many patches is: the blocks are learned from the stock shuffle of numbers."""
    numbers = torch.arange(patches, dtype=torch.float64).view(1, patches, 1)
    shuffle: Callable[..., Tensor] = SmolVLMConnector.pixel_shuffle
    order = shuffle(None, numbers, factor).flatten().long()
    return EncoderTraits(factor**2, granularity=factor**2, order=order, regroups=True)


def rows_of(base: Any) -> tuple[EncoderTraits, int]:
    """What a tile of the usual size is, and its patches."""
    patches = tile_side(base.config) ** 2
    return blocks(patches, base.config.scale_factor), patches


FAMILY = SmolVLM()
