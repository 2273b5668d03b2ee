"""The families that the suite runs on: one module of this folder each, found by its name.

A module holds one subclass of `Family` and an instance of it, `FAMILY`. The rest of the suite knows no family: it is
parametrised over `FAMILIES`, or over those that have what a test needs (`families(with_videos=True)`), and asks
`family_of(name or model)` whatever differs. What a test is about only one family goes to `tests/families_only`.

Modules with an underscore in front are no families; they hold what is large (the slow reference of an encoder, golden
prompts, places in pictures) and are imported when it is asked for. Nothing here knows the library under test, but for
methods by their names.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

if TYPE_CHECKING:
    from tiny_models import Inputs, Sample, Side

__all__ = [
    "FAMILIES",
    "Family",
    "LmmsEval",
    "Suite",
    "VlmEvalKit",
    "families",
    "families_and",
    "families_and_methods",
    "family",
    "family_of",
]

Modality = Literal["image", "video"]

#: The names of all families, in the order of the alphabet.
FAMILIES: tuple[str, ...] = tuple(
    sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
)


@dataclass(frozen=True)
class LmmsEval:
    """Names of a family in lmms-eval.

    Attributes:
        models: Its own model classes by module, below `lmms_eval.models`.
        ours: Our classes.
        stock: Its name for its own model.
        batch_size: Prompts that it takes at a time.
        names_device: Whether its default device map is refused by now, so that ours names a device.
        jpeg_blocks: It shows pictures as JPEG, resized to whole blocks of so many pixels; None: as they are.
    """

    models: Mapping[str, str]
    ours: tuple[str, ...]
    stock: str
    batch_size: int = 1
    names_device: bool = False
    jpeg_blocks: int | None = None


@dataclass(frozen=True)
class VlmEvalKit:
    """Names of a family in VLMEvalKit.

    Attributes:
        model_class: Its class.
        entries: Its entries that get a merged twin, the smaller model first.
        hub: Where its models come from.
        others: Other entries.
        arguments: What its entries say beside the model.
        plain: Arguments of its class that leave pictures as they are.
        blocks: Its reader rounds sides of pictures to multiples of so many pixels; None: it does not.
        least: It shows pictures of as many tokens at least, where nothing is said.
    """

    model_class: str
    entries: tuple[str, str]
    hub: str
    others: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    least: int = 0


@dataclass(frozen=True)
class Suite:
    """How transformers' own model tests are run on models of a family (`tests/transformers_suite`).

    The models are the tiny ones with two layers that merge in each stage, with and without the head.

    Attributes:
        model_class: The model with its head; None: the family's.
        vision: Overrides of the tiny model's vision config.
        text: Overrides of its text config.
        top: Overrides of its config.
        image: Height and width of the image in each row.
        frames: Frames of the video in each row.
        video: Height and width of the frames, where they have sizes.
        vit_layers: The layers of the encoder that merge.
        vit_r: What each of them removes.
        llm_layers: The layers of the decoder that merge.
        rows_are_visuals: Whether the tower's output has a row for each image or video.
        all_weights_train: Whether gradients reach every weight.
        title: The model's name in tables; empty: the family's.
        unpatched: Tests that fail without the patch, and why.
    """

    model_class: type | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = (32, 32)
    frames: int = 2
    video: tuple[int, int] = (16, 16)
    vit_layers: tuple[int, ...] = (0, 1)
    vit_r: int | float = 0.25
    llm_layers: tuple[int, ...] = (1,)
    rows_are_visuals: bool = True
    all_weights_train: bool = True
    title: str = ""
    unpatched: Mapping[str, str] = field(default_factory=dict)


class Family:
    """What the suite asks a family; the defaults are those of a model that needs nothing special.

    Attributes:
        title: The name in tables of the documentation.
        modalities: What the model takes beside text.
        model_class: The class of the tiny model.
        vision_config: Its vision config, 4 layers that count.
        text_config: Its text config, 4 layers.
        top_config: What its config has beside them.
        settings: Settings that merge in both stages of the tiny model, in every method.
        published: Whether there is published code for it, whose arithmetic the method "illava-reference" has.

        image_inputs: Names of what `get_image_features` takes, the pixels first.
        video_inputs: The same of `get_video_features`.
        token_inputs: Names of inputs with one column per token of the prompt.
        markers_behind: Tokens of text that end each visual, behind its placeholders.

        patches_per_token: Patches that stay together and become one visual token of the language model.
        tile_patches: Patches of every tile and frame where all have the same number; None where sizes differ.
        merging_layers: The encoder layers of the tiny model that can merge.
        prefix: Tokens in front of the patches of each row of the encoder, such as a class token.
        layers_behind: Layers of the encoder behind the one whose features are taken: they change nothing.
        takes_frames: Whether `bench` gives it videos.
        beams_mix_images: Releases in which stock repeats the images of a prompt in a wrong order for beams and return
            sequences, so that those with several images see a mixture.
        tiles_are_visuals: Whether the model never learns which tiles or frames belong together: each is a visual.
        one_to_one: Whether the encoder's survivors, patch group by patch group, are what enters the language model:
            nothing is cropped, pooled or added between the stages.
        fragile_choice: Whether rounding decides who stays and how many: a learned token ends each line of patches and
            is as much like the one above as like the one below; borders of tiles are cropped by who lies there.
        has_windows: Whether layers behind a merge attend within windows: how many tokens share one, and so what those
            layers cost, depends on who survives.
        places_in_default_dtype: Whether the tower of the stock model takes the places of patches in torch's default
            dtype, and so fails where that is float64.
        offloads: Whether the stock model runs with its weights elsewhere: not where one module reads another's.
        rounding: How many times further than others it may be from an equal computation in float64, where more of its
            layers round to float32 inside (norms do).
        closest: How far rows of a batch are from the same rows alone in the stock model, in float64, where what is
            rounded to float32 depends on the rows beside.
        waits_in_layers: Operations that wait for the device inside layers beyond stock's, in each call of the encoder.
        list_carries_run: Whether the list of encoder layers is what hands the run on, since the stock tower calls them
            without its keyword arguments: who replaces the list behind `patch` is told to patch again.
        back_ends: Attention back-ends that the stock model offers on a CPU.

        carries_state: Whether some decoder layers carry a state along, from which nothing can be taken back, as in
            stock: its caches cannot be cropped, repeated, quantized or batched continuously, and a zero in a mask
            comes too late for what was read.

        axes: Rows of position ids for each token: 1, or 3 for time, height and width.
        keeps_positions: Whether the stock model keeps the positions of its last prompt, so that calls which go on
            with another prompt need explicit ones.
        forward_counts_padding: Whether a stock forward counts positions over left padding, which shifts all of a row
            alike: its float32 angles round differently then.
        takes_holes_in_images: Whether the stock model takes a mask with zeros inside an image.
        takes_empty_rows: Whether the stock model takes a row that is nothing but padding.
        generates_from_embeddings: Whether stock `generate` places embeddings as it places ids.
        takes_guidance: Whether the stock model takes `guidance_scale`.
        head_makes_tuples: Whether the model with a head, not the one inside, turns features into tuples.
        videos_follow_the_config: Whether stock's method of videos returns a tuple where the configuration says so,
            also when asked for none: it calls the one of images, which is not told.
        records_hidden_states: Whether the stock model asks its tower for hidden states in every forward, for which
            transformers notes down what the tower can record, and hooks it in a way that cannot be pickled.

        takes_labels_by_position: Whether the stock forward takes labels by position.

        seam: The method of the base model that finds placeholders.
        tower_name: The vision tower's name in the base model.
        pooler_name: There too, of what pools frames behind the tower; empty where nothing does.
        language_name: The same of the language model.
        adapter_targets: Linear layers that score, in both stages, as adapters are told them.
        encoder_mlp: The first linear layer of an encoder layer's MLP, by its name in there.
        silenced: Ends of the names of linear layers without which no layer of the tiny model changes a token.
        depth_name: The entry of the vision config that says how many layers there are.

        retrievers: `model_type` of models around it that are no chat models, and that the library patches as well.
        embedded: How the command line calls the embedded model of the family; None where there is none.
        embedded_settings: Settings that merge in both stages of the embedded model.
        embedded_floor: Share of the bundled questions that the embedded model answers at least.
        largest_aspect_ratio: Beyond it the stock processor refuses pictures.
        paper_kept: Fraction of visual tokens that the paper's settings keep; None where the paper has none.
        shapes: Names in `bench`'s `SHAPES` and their parameters in billions, the smallest first.
        stock_modules: Modules of transformers with the stock code of the family, below `transformers.models`.
        lmms_eval: How lmms-eval calls the family; None where it does not.
        vlmevalkit: How VLMEvalKit calls it.
        suites: How transformers' own model tests are run, by names for their classes.
    """

    title: ClassVar[str]
    model_class: ClassVar[Any]
    vision_config: ClassVar[Mapping[str, Any]]
    text_config: ClassVar[Mapping[str, Any]]
    top_config: ClassVar[Mapping[str, Any]]
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    settings: ClassVar[Mapping[str, Any]] = {
        "vit_layers": [1, 2],
        "vit_r": 0.25,
        "llm_layers": [1, 3],
        "llm_ratio": 0.6,
    }
    published: ClassVar[bool] = False

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    video_inputs: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    token_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    markers_behind: ClassVar[int] = 0

    patches_per_token: ClassVar[int] = 1
    tile_patches: ClassVar[int | None] = None
    merging_layers: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    prefix: ClassVar[int] = 0
    layers_behind: ClassVar[int] = 0
    tiles_are_visuals: ClassVar[bool] = False
    beams_mix_images: ClassVar[str] = "<5.19"
    one_to_one: ClassVar[bool] = True
    fragile_choice: ClassVar[bool] = False
    has_windows: ClassVar[bool] = False
    places_in_default_dtype: ClassVar[bool] = False
    offloads: ClassVar[bool] = True
    rounding: ClassVar[int] = 1
    closest: ClassVar[float] = 0.0
    waits_in_layers: ClassVar[Mapping[str, int]] = {}
    list_carries_run: ClassVar[bool] = False
    back_ends: ClassVar[tuple[str, ...]] = ("eager", "sdpa")

    carries_state: ClassVar[bool] = False

    axes: ClassVar[int] = 1
    keeps_positions: ClassVar[bool] = False
    forward_counts_padding: ClassVar[bool] = False
    takes_holes_in_images: ClassVar[bool] = True
    takes_empty_rows: ClassVar[bool] = True
    generates_from_embeddings: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True
    head_makes_tuples: ClassVar[bool] = False
    videos_follow_the_config: ClassVar[bool] = False
    records_hidden_states: ClassVar[bool] = False

    takes_labels_by_position: ClassVar[bool] = True

    seam: ClassVar[str] = "get_placeholder_mask"
    tower_name: ClassVar[str] = "vision_tower"
    pooler_name: ClassVar[str] = ""
    language_name: ClassVar[str] = "language_model"
    adapter_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj")
    encoder_mlp: ClassVar[str] = "fc1"
    silenced: ClassVar[tuple[str, ...]] = ("out_proj", "fc2", "o_proj", "down_proj")
    depth_name: ClassVar[str] = "num_hidden_layers"

    retrievers: ClassVar[tuple[str, ...]] = ()
    embedded: ClassVar[str | None] = None
    embedded_settings: ClassVar[Mapping[str, Any]] = {}
    largest_aspect_ratio: ClassVar[int | None] = None
    embedded_floor: ClassVar[float] = 0.0
    paper_kept: ClassVar[float | None] = None
    shapes: ClassVar[Mapping[str, float]] = {}
    stock_modules: ClassVar[tuple[str, ...]] = ()
    lmms_eval: ClassVar[LmmsEval | None] = None
    vlmevalkit: ClassVar[VlmEvalKit | None] = None
    suites: ClassVar[Mapping[str, Suite]] = {}

    @property
    def name(self) -> str:
        """The module's name, which is the `model_type` of its models and the name that the library lists."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every `config.model_type` of the family."""
        return (self.name,)

    @property
    def with_videos(self) -> bool:
        """Whether the model takes videos."""
        return "video" in self.modalities

    @property
    def takes_frames(self) -> bool:
        """As `with_videos`, also where the suite's prompts have none."""
        return self.with_videos

    @property
    def with_tiles(self) -> bool:
        """Whether all tiles and frames have the same number of patches."""
        return self.tile_patches is not None

    @property
    def with_reference(self) -> bool:
        """Whether the slow reference of `tests/reference.py` knows the family's encoder."""
        return type(self).reference_visuals is not Family.reference_visuals

    @property
    def with_spots(self) -> bool:
        """Whether the places of patches in pictures are known by arithmetic."""
        return type(self).spots is not Family.spots

    @property
    def golden_cases(self) -> tuple[str, ...]:
        """Golden cases of the language stage (`tests/data/README.md`)."""
        return ()

    def takes(self, samples: Any) -> bool:
        """Whether the model has all modalities of one or more samples."""
        rows = samples if isinstance(samples, Iterable) else (samples,)
        return self.with_videos or not any(sample.videos for sample in rows)

    # -------------------------------------------------------------------------------- models and inputs

    def config(
        self,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        model_class: Any = None,
        **overrides: Any,
    ) -> Any:
        """The configuration of the tiny model.

        Args:
            vision: Overrides of the vision config.
            text: Overrides of the text config.
            model_class: Another class of the family, such as a mixture of experts.
            **overrides: Overrides of the top config.
        """
        kind = (model_class or self.model_class).config_class
        vision_config, text_config = {**self.vision_config, **(vision or {})}, {**self.text_config, **(text or {})}
        settings = {"tie_word_embeddings": False, **self.top_config, **overrides}
        return kind(**deepcopy({"vision_config": vision_config, "text_config": text_config, **settings}))

    def build(
        self,
        attn_implementation: str = "sdpa",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Any:
        """Builds a tiny stock model with random weights, 4 layers in each stage.

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
        from tiny_models import build

        return build(self.model_class, self.config(vision, text, **overrides), attn_implementation, seed, dtype)

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Builds what the family's processor would give.

        Args:
            samples: The rows.
            side: Padding side.
            model: Where sizes are read from.

        Returns:
            `input_ids`, `attention_mask`, and whatever else belongs to the visuals.
        """
        raise NotImplementedError

    def token_types(self, model: Any, ids: Tensor) -> Inputs:
        """What the processor gives per token beside ids and mask."""
        del model, ids
        return {}

    def pixels_by_patch(self, pixels: Tensor, patch: int) -> Tensor:
        """`pixel_values` of pictures that fill them, as ``(patches, 3, values)``."""
        raise NotImplementedError

    def segments(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """Patches of every tile or frame of every image, then of every video, in prompt order."""
        raise NotImplementedError

    def visual_shapes(self, model: Any, samples: Sequence[Sample]) -> dict[Modality, list[tuple[int, ...]]]:
        """What decides how many tokens every image and video keeps, in prompt order."""
        raise NotImplementedError

    def patch_counts(self, model: Any, inputs: Inputs) -> list[int]:
        """Patches of every image, then of every video, of one prompt."""
        raise NotImplementedError

    def pixel_rows(self, inputs: Inputs, image: int) -> Any:
        """The index of what belongs to one image of a batch in `pixel_values`."""
        del inputs
        return slice(image, image + 1)

    def feature_arguments(self, inputs: Inputs) -> dict[str, dict[str, Any]]:
        """What the feature methods take, by modality."""
        arguments = {"image": self.image_inputs, "video": self.video_inputs}
        return {
            kind: {name: inputs[name] for name in names if name in inputs}
            for kind, names in arguments.items()
            if names[0] in inputs
        }

    def beside_features(self, inputs: Inputs) -> Inputs:
        """What a forward takes beside ready-made features."""
        pixels = (self.image_inputs[0], self.video_inputs[0])
        return {name: value for name, value in inputs.items() if name not in pixels}

    def beyond_features(self, modality: str) -> int:
        """Tokens at the end of each visual that this release of transformers adds behind the features."""
        del modality
        return 0

    def visual_features(self, output: Any) -> list[Tensor]:
        """The features of every visual in what a feature method returned; older releases keep frames apart."""
        return list(output.pooler_output)

    def tower_arguments(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """What the vision tower itself takes of a batch's images: pixels, and the rest by name."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- parts of a model

    def encoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """The layers of the vision encoder."""
        raise NotImplementedError

    def shallow(self, layers: int) -> dict[str, int]:
        """Settings of a vision encoder with so many layers in front of its features."""
        return {self.depth_name: layers + self.layers_behind}

    def idle_weights(self, model: Any) -> set[int]:
        """The weights, by their `id`, of encoder layers behind the features: nothing trains them."""
        layers = self.encoder_layers(model)
        return {id(w) for layer in layers[len(layers) - self.layers_behind :] for w in layer.parameters()}

    def language(self, model: Any) -> Any:
        """The decoder with its embedding."""
        return getattr(model.model, self.language_name)

    def attending(self, model: Any) -> list[int]:
        """The decoder layers that pay attention, and hold keys; others carry a state along."""
        return list(range(model.config.get_text_config().num_hidden_layers))

    def new_cache(self, model: Any) -> Any:
        """A growing cache as a caller makes one; stock needs no config where all layers are of one kind."""
        del model
        return DynamicCache()

    def encoder_attention(self, layer: Any) -> nn.Module:
        """The attention of an encoder layer."""
        module: nn.Module = layer.self_attn
        return module

    def encoder_sizes(self, model: Any) -> tuple[int, int]:
        """Heads and width of the vision encoder."""
        config = model.config.vision_config
        return config.num_attention_heads, config.hidden_size

    def projector(self, model: Any) -> nn.Module:
        """What brings the encoder's tokens into the language model."""
        raise NotImplementedError

    def projectors(self, model: Any) -> list[nn.Module]:
        """All that bring tokens of the encoder into the language model."""
        return [self.projector(model)]

    def patches(self, hidden: Tensor) -> Tensor:
        """Hidden states that enter an encoder layer, as ``(patches, C)``, without tokens that are no patches."""
        return hidden.reshape(-1, hidden.shape[-1])

    def split_patches(self, hidden: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """Hidden states of the first encoder layer, one entry per call, as one ``(patches, C)`` per visual."""
        raise NotImplementedError

    def make_projector_linear(self, model: Any) -> None:
        """Takes out of the projector what is not linear, where that can be done."""

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """What mixtures of patches are in the language model, after `make_projector_linear`.

        Args:
            model: A model whose layers change nothing.
            weights: ``(tokens, patches)``, sparse; a row of zeros is a token that comes from no patch.
            patches: ``(patches, C)`` as they enter the encoder.

        Returns:
            ``(tokens, C)``; None where the projector cannot be made linear.
        """
        return None

    # -------------------------------------------------------------------------------------- positions

    def spread(self, positions: Tensor) -> Tensor:
        """Text positions ``(B, L)`` in the form of position ids: as they are, or ``(axes, B, L)``."""
        return positions if self.axes == 1 else positions.expand(self.axes, *positions.shape)

    def packed(self, positions: Tensor) -> Tensor:
        """Text positions ``(B, L)`` of packed sequences, as a trainer gives them."""
        return positions if self.axes == 1 else positions.expand(1 + self.axes, *positions.shape)

    def positions(self, model: Any, inputs: Inputs) -> Tensor:
        """Position ids of a prompt as the stock model has them when it generates: padding is not counted."""
        del model
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        return (mask.cumsum(1) - 1).clamp_min(0)

    def explicit(self, positions: Tensor) -> dict[str, Tensor]:
        """The argument that gives text positions ``(B, L)``, where the model would go on with others."""
        return {"position_ids": self.spread(positions)} if self.keeps_positions else {}

    def explicit_positions(self, model: Any, inputs: Inputs) -> dict[str, Tensor]:
        """The argument that gives the positions of a prompt, where the model may go on with others."""
        return {"position_ids": self.positions(model, inputs)} if self.keeps_positions else {}

    def next_positions(self, model: Any, inputs: Inputs, count: int) -> dict[str, Tensor]:
        """The argument that gives the positions of `count` tokens behind a prompt of one row, where it is needed."""
        if not self.keeps_positions:
            return {}
        return self.explicit((self.positions(model, inputs).amax() + 1 + torch.arange(count))[None])

    # --------------------------------------------------------------------------- the decoder, by layers

    def behind_layer(
        self, layer: int, hidden: Tensor, row: int, columns: list[int], given: Mapping[str, Any]
    ) -> Tensor:
        """What the stock decoder makes of the hidden states of a layer before the next one gets them.

        Args:
            layer: Which layer gave them.
            hidden: ``(1, N, C)``, of one row.
            row: Which row of the batch.
            columns: Which columns of it the hidden states belong to.
            given: Arguments of the stock language model for the whole batch, side inputs among them.

        Returns:
            ``(1, N, C)``; as they are, unless the family adds something (DeepStack).
        """
        del layer, row, columns, given
        return hidden

    # ------------------------------------------------------------------ what only some families have

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """The encoder stage of the slow reference: its `Visual`s, images first (`tests/reference.py`)."""
        raise NotImplementedError

    def golden_prompt(self, case: str) -> tuple[Any, Any]:
        """Stock model and prompt of one of `golden_cases` (`tests/golden.py`)."""
        raise NotImplementedError

    def spots(self) -> dict[str, Callable[[str], Any]]:
        """Tokens whose places in pictures are known by arithmetic, by case and stage (`tests/drawing.py`)."""
        raise NotImplementedError

    def shown_frames(self, video: Any) -> list[Any]:
        """Those of a video's frames that pictures of the merging show."""
        return list(video)

    def shown(self, picture: Any, images: int) -> Any:
        """A picture as pictures of the merging show it, up to its size, where so many went in together."""
        del images
        return picture


@cache
def family(name: str) -> Family:
    """The family of a name in `FAMILIES`."""
    found: Family = import_module(f"{__name__}.{name}").FAMILY
    return found


def family_of(model: Any) -> Family:
    """The family of a model, or of a name in `FAMILIES`."""
    if isinstance(model, str):
        return family(model)
    kind = model.config.model_type
    return next(found for found in map(family, FAMILIES) if kind in found.model_types)


def families(*, back_end: str | None = None, **needs: bool) -> tuple[str, ...]:
    """The names of the families that have what a test needs.

    Args:
        back_end: A name that must be in `back_ends`.
        **needs: Attributes of `Family` and their values, such as ``with_videos=True``.
    """
    return tuple(
        name
        for name in FAMILIES
        if all(bool(getattr(family(name), need)) == value for need, value in needs.items())
        and (back_end is None or back_end in family(name).back_ends)
    )


def families_and(
    cases: Mapping[str, Any] | Sequence[str], samples: Mapping[str, Any] | None = None, **needs: Any
) -> list[tuple[str, str]]:
    """Every family with every case that it takes, as ``(family, case)``.

    Args:
        cases: Names of cases, or cases by name: a sample or several of them.
        samples: What the names stand for, where `cases` are names.
        **needs: As for `families`.
    """
    known: Any = samples if samples is not None else cases
    return [(name, case) for name in families(**needs) for case in cases if family(name).takes(known[case])]


def families_and_methods(methods: Collection[str]) -> list[tuple[str, str]]:
    """Every family with every method that it has, as ``(family, method)``."""
    return [
        (name, method)
        for name in FAMILIES
        for method in methods
        if family(name).published or method != "illava-reference"
    ]
