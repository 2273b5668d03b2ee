"""Where and how much a modality merges, validated against a model's limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import Method, resolve_method

__all__ = ["MergeConfig", "MergeSchedule", "Modality", "ModelLimits", "llm_removed"]

Modality = Literal["image", "video"]

#: The two numbers of each stage, and the amount that removes nothing.
_NOTHING = (("vit_layers", "vit_r", 0), ("llm_layers", "llm_ratio", 1))


@dataclass(frozen=True, slots=True)
class MergeSchedule:
    """Where and how much one modality merges.

    Attributes:
        vit_layers: 0-based vision-encoder layers, ascending.
        vit_r: int: tokens removed per tile, image or frame in each listed layer; float in (0, 1): that fraction
            of the layer's current tokens, rounded down.
        llm_layers: 0-based decoder layers, ascending, each at least 1; the merge happens on entry.
        llm_ratio: fraction of a visual's current tokens kept at each listed decoder layer, in (0, 1].
    """

    vit_layers: tuple[int, ...] = ()
    vit_r: int | float = 0
    llm_layers: tuple[int, ...] = ()
    llm_ratio: float = 1.0

    @property
    def merges_in_encoder(self) -> bool:
        """Whether anything can be removed in the vision encoder."""
        return bool(self.vit_layers) and self.vit_r > 0

    @property
    def merges_in_llm(self) -> bool:
        """Whether anything can be removed in the language model."""
        return bool(self.llm_layers) and self.llm_ratio < 1.0

    @property
    def is_identity(self) -> bool:
        """Whether nothing can be removed anywhere."""
        return not (self.merges_in_encoder or self.merges_in_llm)

    def encoder_removed(
        self, num_tokens: int, granularity: int = 1, most: Callable[[int], int] | None = None
    ) -> list[int]:
        """Tokens removed at each listed encoder layer from a segment of ``num_tokens``.

        Args:
            num_tokens: length of the segment before the first merge.
            granularity: the counts are rounded down to multiples of this (4 for 2x2 groups).
            most: how many a method can remove from so many tokens, if fewer than all but one.

        Returns:
            One count per listed layer; clamped so that at least ``granularity`` tokens stay.
        """
        counts = []
        for _ in self.vit_layers:
            wish = self.vit_r if isinstance(self.vit_r, int) else math.floor(num_tokens * self.vit_r)
            limit = num_tokens - granularity if most is None else most(num_tokens) // granularity * granularity
            counts.append(max(0, min(wish // granularity * granularity, limit)))
            num_tokens -= counts[-1]
        return counts


def llm_removed(num_tokens: int, keep_ratio: float) -> int:
    """Tokens removed from the ``num_tokens`` of a visual: Python's ``round``, and one token always stays."""
    return max(0, min(round(num_tokens * (1 - keep_ratio)), num_tokens - 1))


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model allows.

    Attributes:
        family: its name.
        vit_depth: number of vision-encoder layers whose output is used.
        llm_depth: number of decoder layers.
        tokens_per_tile: tokens of one encoder segment, where that is fixed by the model; else None.
        presets: what stands in for numbers that are not given, by modality.
    """

    family: str
    vit_depth: int
    llm_depth: int
    tokens_per_tile: int | None
    presets: Mapping[Modality, MergeSchedule] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """Validated settings of one patched model.

    Attributes:
        image: what images do.
        video: what videos do.
        method: the method in use.
        track: whether provenance is kept.
    """

    image: MergeSchedule
    video: MergeSchedule
    method: Method
    track: bool = False

    def schedule(self, modality: Modality) -> MergeSchedule:
        """The schedule of one modality."""
        return self.image if modality == "image" else self.video

    @property
    def vit_layers(self) -> tuple[int, ...]:
        """Encoder layers in which some modality merges."""
        return tuple(sorted({i for s in (self.image, self.video) if s.merges_in_encoder for i in s.vit_layers}))

    @property
    def llm_layers(self) -> tuple[int, ...]:
        """Decoder layers in which some modality merges."""
        return tuple(sorted({i for s in (self.image, self.video) if s.merges_in_llm for i in s.llm_layers}))

    @classmethod
    def build(
        cls,
        limits: ModelLimits,
        vit_layers: Iterable[int] | None,
        vit_r: int | float | None,
        llm_layers: Iterable[int] | None,
        llm_ratio: float | None,
        method: str | Method,
        preset: str,
        track: bool,
    ) -> MergeConfig:
        """Fills what is None from the preset and checks every number.

        Raises:
            MergeConfigError: a value is outside of its range; the message names value, range and cure.
        """
        choices = (*get_args(Modality), "auto")
        if preset not in choices:
            raise MergeConfigError(f"preset is {preset!r}; choose one of {list(choices)}")
        given: dict[str, object] = {
            "vit_layers": _once(vit_layers),
            "vit_r": vit_r,
            "llm_layers": _once(llm_layers),
            "llm_ratio": llm_ratio,
        }
        schedules = [
            _schedule(limits, given, _preset(limits, modality if preset == "auto" else preset, given))
            for modality in get_args(Modality)
        ]
        return cls(schedules[0], schedules[1], resolve_method(method), bool(track))


def _once(layers: object) -> object:
    """A generator as a tuple: images and videos both read it."""
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers


def _preset(limits: ModelLimits, name: str, given: Mapping[str, object]) -> MergeSchedule:
    """A preset of the model; of a model that has none for this modality, the identity, if what counts is given."""
    for modality, schedule in limits.presets.items():
        if modality == name:
            return schedule
    missing = [argument for stage in _stages(given) for argument, value in stage.items() if value is None]
    if missing and not limits.presets:
        raise MergeConfigError(f"{missing[0]} is None, and {limits.family} has no presets; give {', '.join(missing)}")
    return MergeSchedule()


def _stages(given: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """The numbers of the stages that are not switched off by one of their two, no layers or nothing to remove."""
    for layers, amount, nothing in _NOTHING:
        if given[layers] != () and not (given[amount] is not None and given[amount] == nothing):
            yield {layers: given[layers], amount: given[amount]}


def _schedule(limits: ModelLimits, given: Mapping[str, object], preset: MergeSchedule) -> MergeSchedule:
    value = {name: getattr(preset, name) if chosen is None else chosen for name, chosen in given.items()}
    for layers, amount, nothing in _NOTHING:
        if given[layers] is None and given[amount] is not None and given[amount] == nothing:
            value[layers] = ()  # where nothing is removed, the preset's layers need not fit the model
    origin = {name: " (from the preset; give it yourself)" if chosen is None else "" for name, chosen in given.items()}
    schedule = MergeSchedule(
        _layers("vit_layers", value["vit_layers"], 0, limits.vit_depth, origin["vit_layers"]),
        _vit_r(value["vit_r"]),
        _layers("llm_layers", value["llm_layers"], 1, limits.llm_depth, origin["llm_layers"]),
        _ratio(value["llm_ratio"]),
    )
    total = len(schedule.vit_layers) * schedule.vit_r
    if isinstance(total, int) and limits.tokens_per_tile is not None and total >= limits.tokens_per_tile:
        most = (limits.tokens_per_tile - 1) // len(schedule.vit_layers)
        raise MergeConfigError(
            f"vit_r is {schedule.vit_r}: removed in {len(schedule.vit_layers)} layers it leaves none of the "
            f"{limits.tokens_per_tile} tokens of a tile; use at most {most}"
        )
    return schedule


def _layers(name: str, value: object, first: int, depth: int, origin: str) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise MergeConfigError(f"{name} is {value!r}; give a list of layer numbers in {first}..{depth - 1}")
    layers = []
    for given in value:
        layer = _number(given)
        if not isinstance(layer, int) or not first <= layer < depth:
            why = ": a layer needs the scores of the one before it" if layer == 0 and first == 1 else ""
            raise MergeConfigError(
                f"{name} contains {given!r}{origin}; this model allows {first}..{depth - 1}{why}; choose other layers"
            )
        layers.append(layer)
    if len(set(layers)) < len(layers):
        raise MergeConfigError(f"{name} is {layers} and lists a layer twice; list each layer once")
    return tuple(sorted(layers))


def _number(value: object) -> int | float | None:
    """A number of any library as Python's own; None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _vit_r(value: object) -> int | float:
    number = _number(value)
    if number is None:
        raise MergeConfigError(f"vit_r is {value!r}; give an int >= 0 (tokens) or a float in (0, 1) (a fraction)")
    if number != 0 and (number < 0 if isinstance(number, int) else not 0 < number < 1):
        raise MergeConfigError(
            f"vit_r is {number!r}; an int must be >= 0 (tokens removed per layer), a float in (0, 1) (a fraction); "
            "use 0 to remove none"
        )
    return number or 0


def _ratio(value: object) -> float:
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise MergeConfigError(f"llm_ratio is {value!r}; it must be in (0, 1], the fraction kept; use 1.0 to keep all")
    return float(number)
