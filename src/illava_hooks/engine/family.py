"""The contract of a family: everything that the engine and the tools ask about a model.

A family is one module that subclasses ``Family`` and answers what differs; the defaults are what most families do.
One of this package lies in ``illava_hooks.patchers`` and is found by ``config.model_type``; one of another package is
added with ``register_family``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.decoder import LayerKind
from illava_hooks.engine.modules import inside
from illava_hooks.engine.report import DecoderShape, EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.errors import UnsupportedModelError

__all__ = ["Family", "LayerKind", "ModelParts", "Stage", "changed_layers", "schedules_of"]

Stage = Literal["vision", "language"]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Where the parts of a model are.

    A part may stand there several times: an adapter keeps a copy of a module beside the original, and which of them
    runs is decided in each call. All of them are changed.

    Attributes:
        top: the model with the language-model head; None if the bare model was given.
        base: the model that joins vision and language.
        towers: the vision encoder.
        text_models: the decoder with its embedding.
        encoder_layers: by index, the layer in each tower.
        decoder_layers: by index, the layer in each text model.
    """

    top: nn.Module | None
    base: nn.Module
    towers: Sequence[nn.Module]
    text_models: Sequence[nn.Module]
    encoder_layers: Sequence[Sequence[nn.Module]]
    decoder_layers: Sequence[Sequence[nn.Module]]


class Family:
    """One family of models.

    Attributes:
        name: of the family, for messages and tables.
        model_types: the values of ``config.model_type`` that it stands for.
        modalities: what the model has feature methods for.
        stages: where merging is supported.
        presets: what stands in for numbers that are not given, by modality; empty: ``patch`` asks for them.
        published_llm_score: what the published code ranks by in the language model; None: there is no such code.
        head_methods: methods of a model with its head that must be there.
        encoder_layer_types: stock classes of encoder layers that the family can change.
        other_tower: what is said of a tower with layers of another ``{kind}``.
        title: how people call it; empty: by its name.
        shapes: published sizes that ``bench`` can build with random weights, by name.
        lmms_eval: its classes in lmms-eval; None: there are none.
        vlmevalkit: its entries in VLMEvalKit; the first lends its arguments to models of one's own.
    """

    name: str
    model_types: tuple[str, ...]
    modalities: tuple[Modality, ...] = ("image", "video")
    stages: frozenset[Stage] = frozenset({"vision", "language"})
    presets: Mapping[Modality, MergeSchedule] = {}
    published_llm_score: str | None = None
    head_methods: tuple[str, ...] = ("generate",)
    encoder_layer_types: tuple[type[nn.Module], ...] = ()
    other_tower: str = "the vision encoder has {kind} layers, which this family cannot patch; use a stock model"
    title: str = ""
    shapes: Mapping[str, PublishedShape] = {}
    lmms_eval: LmmsEval | None = None
    vlmevalkit: tuple[str, ...] = ()

    # ------------------------------------------------------------------ where things are

    def base(self, model: Any) -> Any:
        """The model that joins vision and language, inside of one with a head."""
        return model.model if hasattr(model, "lm_head") else model

    def tower(self, base: Any) -> Any:
        """The vision encoder as the base model holds it, wrappers included."""
        return base.visual

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """The layers of the vision encoder."""
        layers: Sequence[nn.Module] = tower.blocks
        return layers

    def text_model(self, base: Any) -> Any:
        """The decoder with its embedding."""
        return base.language_model

    def config(self, model: Any) -> Any:
        """The configuration of the model that joins vision and language."""
        return model.config

    def text_config(self, model: Any) -> Any:
        """The configuration of the decoder."""
        return self.config(model).text_config

    def locate(self, model: Any) -> ModelParts:
        """The model's parts, all of them there.

        Raises:
            UnsupportedModelError: a release of transformers renamed a seam.
        """
        import transformers

        try:
            base = inside(self.base(model))[0]
            text_models = inside(self.text_model(base)) if "language" in self.stages else []
            parts = replace(
                self.locate_encoder(base),
                top=None if base is model else model,
                text_models=text_models,
                decoder_layers=_by_index([text.layers for text in text_models]),
            )
            seams = [f"get_{modality}_features" for modality in self.modalities]
            for name in (*seams, self.placeholder_method(base)) if "language" in self.stages else seams:
                getattr(base, name)
            if "language" in self.stages:
                _check_language_seams(parts, self.layer_kinds(self.text_config(model)))
            for name in self.head_methods if parts.top is not None else ():
                getattr(parts.top, name)
        except AttributeError as missing:
            raise UnsupportedModelError(
                f"model {type(model).__name__} of transformers {transformers.__version__} lacks {missing.name!r}, "
                "which patching needs; use a version of transformers that this library supports"
            ) from missing
        return parts

    def locate_encoder(self, base: Any) -> ModelParts:
        """The parts of the vision stage alone, for a model whose decoder is somebody else's.

        Args:
            base: the model that joins vision and language.
        """
        towers = inside(self.tower(base))
        layers = _by_index([self.layers_of(tower) for tower in towers])
        return ModelParts(None, base, towers, [], layers, [])

    # ------------------------------------------------------------------ what is possible

    def limits(self, model: Any) -> ModelLimits:
        """What the model allows."""
        depth = self.encoder_shape(model).depth
        return ModelLimits(self.name, depth, self.text_config(model).num_hidden_layers, None, self.presets_of(model))

    def presets_of(self, model: Any) -> Mapping[Modality, MergeSchedule]:
        """The presets of one model: those of its own configuration (``illava_presets``), else the family's."""
        own = getattr(self.config(model), "illava_presets", None)
        return schedules_of(own) if own else self.presets

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses what cannot work.

        Raises:
            UnsupportedModelError: with what is in the way, and the cure.
        """
        changed = {0, *changed_layers(config, len(parts.encoder_layers))} if config.vit_layers else {0}
        for layer in (layer for index in sorted(changed) for layer in parts.encoder_layers[index]):
            if not isinstance(layer, self.encoder_layer_types):
                raise UnsupportedModelError(self.other_tower.format(kind=type(layer).__name__))
        if config.method.is_published and self.published_llm_score is None:
            raise UnsupportedModelError(
                f"method {config.method.name!r} follows published code, and there is none for {self.name}; use another"
            )
        for stage, layers, argument in (
            ("vision", config.vit_layers, "vit_layers"),
            ("language", config.llm_layers, "llm_layers"),
        ):
            if layers and stage not in self.stages:
                raise UnsupportedModelError(
                    f"{argument} is {list(layers)}; {self.name} merges in its {min(self.stages)} stage only; use "
                    f"{argument}=[]"
                )
        if "language" in self.stages:
            text = self.text_config(model)
            kinds = self.layer_kinds(text)
            _check_full_attention(text, kinds)
            _check_ranked(config.llm_layers, kinds)

    # ------------------------------------------------------------------ the vision stage

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Puts the vision stage in: layer classes, and wrappers around the feature methods."""
        raise NotImplementedError

    def around(self, parts: ModelParts, session: MergeSession) -> bool:
        """Puts in what stands around a model that is built otherwise than most; returns whether it did.

        Most have a base model with feature methods, ``get_placeholder_mask`` and a text model, and a head around it.
        """
        return False

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of tower and projector, for the report."""
        raise NotImplementedError

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Visual tokens that enter the language model for one image or video, from its shape alone.

        Args:
            base: the model that joins vision and language; only its configuration and stock methods are read.
            config: the settings.
            modality: of the visual.
            shape: what decides in this family: a grid of patches, or the size of a picture.
        """
        raise NotImplementedError

    def tokens_behind(self, base: Any) -> Mapping[Modality, int]:
        """How many tokens the base model appends to each feature that its feature methods return."""
        return {}

    def placeholder_method(self, base: Any) -> str:
        """The method of the base model that finds the places of visual tokens."""
        return "get_placeholder_mask"

    def placeholder_masks(self, base: Any, call: Mapping[str, Any], result: Any) -> Mapping[Modality, Tensor]:
        """The placeholders ``(B, N)`` that a call of that method has found, by modality.

        A modality's mask is right in the call that carries its features.

        Args:
            base: the model that joins vision and language.
            call: the method's arguments by name.
            result: what it returned.
        """
        masks = (result,) if isinstance(result, Tensor) else result
        named = zip(self.modalities, masks, strict=False)
        return {modality: mask[..., 0] for modality, mask in named if call.get(f"{modality}_features") is not None}

    def visuals_in(self, base: Any, output: Any) -> list[list[int]]:
        """How many tokens each image or video has, in each entry of a feature output's ``pooler_output``."""
        # Some releases give a video as its frames, (frames, tokens, C).
        return [[feature.shape[:-1].numel()] for feature in output.pooler_output]

    # ------------------------------------------------------------------ the language stage

    def decoder_shape(self, model: Any) -> DecoderShape:
        """Sizes of the decoder, for the report."""
        text = self.text_config(model)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys, queries = head * text.num_key_value_heads, head * text.num_attention_heads
        return DecoderShape(text.num_hidden_layers, text.hidden_size, text.intermediate_size, keys, queries)

    def layer_kinds(self, text: Any) -> Sequence[LayerKind]:
        """The kind of each decoder layer.

        A recurrent one (linear attention) holds no keys, ranks no tokens, and takes a 2-D padding mask; the shape of
        the decoder says what it costs.

        Args:
            text: the configuration of the decoder.
        """
        kinds: tuple[LayerKind, ...] = ("attention",)
        return kinds * int(text.num_hidden_layers)

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``position_ids`` as the text model rotates by: without rows that only tell packed sequences apart."""
        return position_ids

    def compact(self, kwargs: dict[str, Any], columns: Tensor, run: Any) -> None:
        """Brings what else lies along the sequence in the text model's arguments to its compact columns.

        Args:
            kwargs: keyword arguments of the text model; changed in place. Embeddings, positions and mask are done.
            columns: ``(B, K)`` int64, the logical column of each compact one.
            run: the ``DecoderRun``.
        """

    # ------------------------------------------------------------------ tools

    def projector(self, base: Any) -> nn.Module:
        """What brings the features of the tower to the width of the decoder."""
        projector: nn.Module = self.tower(base).merger
        return projector

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture] | None:
        """What the encoder looks at, for drawing; None: this family cannot be drawn.

        Args:
            model: the model.
            inputs: one sample, as the stock processor gives it.

        Returns:
            The images in their order, then the videos.
        """
        return None

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Inputs of ``model.forward`` for a benchmark, without a processor; None: this family cannot be measured.

        Pixels are random; placeholders stand as the stock processor expands them.

        Args:
            model: the model.
            load: sizes, in range as far as they do not depend on each other.
            generator: where random numbers come from.

        Raises:
            InputError: the family has no such images or videos.
        """
        return None

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The stock configuration with the published vision encoder, for one of ``shapes``.

        Args:
            text: sizes of the decoder; what else the family's decoder needs is added.
            placeholders: the token that stands for visual tokens.
            narrow: a small vision encoder instead, for smoke tests.
        """
        raise NotImplementedError


def schedules_of(settings: Mapping[Modality, Mapping[str, Any]]) -> Mapping[Modality, MergeSchedule]:
    """Presets as a configuration writes them down: the four settings by modality."""
    return MappingProxyType(
        {
            modality: MergeSchedule(
                tuple(given["vit_layers"]), given["vit_r"], tuple(given["llm_layers"]), given["llm_ratio"]
            )
            for modality, given in settings.items()
        }
    )


def changed_layers(config: MergeConfig, depth: int) -> Sequence[int]:
    """Encoder layers whose class is swapped: those that merge, with a proportional method all behind the first.

    All if the first layer merges: tools tell a list of equal layers by the class of its first.
    """
    if config.vit_layers and (config.method.proportional or config.vit_layers[0] == 0):
        return range(config.vit_layers[0], depth)
    return config.vit_layers


def _by_index(layers: Sequence[Sequence[nn.Module]]) -> list[list[nn.Module]]:
    """Layers of several copies of a model, by their index."""
    return [[part for layer in copies for part in inside(layer)] for copies in zip(*layers, strict=True)]


def _check_language_seams(parts: ModelParts, kinds: Sequence[LayerKind]) -> None:
    """Raises ``AttributeError`` with the name of what the language stage needs and a release does not have."""
    for index, layers in enumerate(parts.decoder_layers):
        for layer in layers:
            if kinds[index] == "attention" and not hasattr(layer, "self_attn"):
                raise UnsupportedModelError(
                    f"decoder layer {index} is a {type(layer).__name__} without self_attn: its tokens cannot be "
                    "ranked; use a language model whose layers have one, such as Llama's or Qwen's"
                )
    for function, argument in (
        *((type(text).forward, CACHE) for text in parts.text_models),
        (create_causal_mask, "allow_is_causal_skip"),
    ):
        if argument not in inspect.signature(function).parameters:
            raise AttributeError(name=argument)


def _check_ranked(llm_layers: Sequence[int], kinds: Sequence[LayerKind]) -> None:
    """Refuses to merge behind a layer that pays no attention.

    Raises:
        UnsupportedModelError: with the layers that can.
    """
    if blind := [layer for layer in llm_layers if kinds[layer - 1] != "attention"]:
        allowed = [layer for layer in range(1, len(kinds)) if kinds[layer - 1] == "attention"]
        raise UnsupportedModelError(
            f"llm_layers contains {', '.join(map(str, blind))}, where the layer before is recurrent (linear "
            f"attention) and cannot rank tokens; {f'choose from {allowed}' if allowed else 'use llm_layers=[]'}"
        )


def _check_full_attention(text: Any, layer_kinds: Sequence[LayerKind]) -> None:
    """Refuses decoders in which a layer that pays attention does not see the whole sequence.

    Raises:
        UnsupportedModelError: with the cure.
    """
    kinds = getattr(text, "layer_types", None)
    recurrent = {index for index, kind in enumerate(layer_kinds) if kind == "recurrent"}
    slides = any(kind != "full_attention" for index, kind in enumerate(kinds or ()) if index not in recurrent)
    if kinds is None and getattr(text, "sliding_window", None) is not None:
        slides = getattr(text, "use_sliding_window", True)  # Mistral slides by that number alone
    if slides:
        raise UnsupportedModelError(
            "text_config has sliding-window layers; merging needs full attention in every layer; load the model with "
            "use_sliding_window=False, or sliding_window=None"
        )
