"""The settings of one patched model: what is given, filled up from a preset, checked against the model's limits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from illava_hooks.config.checks import check_keep, check_layers, check_ratio, check_vit_r
from illava_hooks.config.files import from_entry, read_settings, to_entry, write_settings
from illava_hooks.config.schedule import MergeSchedule, Modality, split_keep
from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import DefaultMethod, Method, resolve_method

__all__ = ["MergeConfig", "ModelLimits", "check_preset"]

#: The two numbers of each stage, and the amount that removes nothing.
_NOTHING = (("vit_layers", "vit_r", 0), ("llm_layers", "llm_ratio", 1))


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

    def out_of_reach(self) -> Iterator[str]:
        """Amounts that the method cannot remove in a layer, which leaves more than they say; in words."""
        for modality, schedule in (("image", self.image), ("video", self.video)):
            asked = {
                "vit_r": (schedule.vit_layers, schedule.vit_r, self.method.least_kept(1)),
                "llm_ratio": (schedule.llm_layers, 1 - schedule.llm_ratio, self.method.in_llm.least_kept(1)),
            }
            for name, (layers, removed, least) in asked.items():
                if layers and isinstance(removed, float) and removed > 1 - least and schedule.keep is None:
                    yield (
                        f"{name} of {modality}s asks for {removed:.4g} of the tokens of a layer, and method "
                        f"{self.method.name!r} removes {1 - least:.4g} at most: that is what happens; list more "
                        "layers, or use another method"
                    )

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
        preset: str | os.PathLike[str] | MergeConfig,
        track: bool,
        keep: float | None = None,
    ) -> MergeConfig:
        """Fills what is None from the preset, which may be other settings, and checks every number.

        Raises:
            MergeConfigError: a value is outside of its range; the message names value, range and cure.
        """
        saved = check_preset(preset)
        if saved is not None:
            presets: Mapping[Modality, MergeSchedule] = {"image": saved.image, "video": saved.video}
            method, track = saved.method if isinstance(method, DefaultMethod) else method, track or saved.track
        else:
            presets = limits.presets
        given: dict[str, object] = {
            "vit_layers": _once(vit_layers),
            "vit_r": vit_r,
            "llm_layers": _once(llm_layers),
            "llm_ratio": llm_ratio,
        }
        how = resolve_method(method)
        if keep is not None:
            keep = _keep_alone(keep, given)
        one = str(preset) if preset in get_args(Modality) else None
        schedules = [
            _schedule(limits, given, keep, how, _preset(limits, presets, one or modality, given, keep))
            for modality in get_args(Modality)
        ]
        if keep is not None and keep < 1 and not any(s.vit_layers or s.llm_layers for s in schedules):
            raise MergeConfigError(
                f"keep is {keep:.4g}, and neither vit_layers nor llm_layers lists a layer; list layers of one, or use "
                "keep=1"
            )
        return cls(schedules[0], schedules[1], how, bool(track))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the settings to a JSON file, which ``load`` and ``patch(model, preset=path)`` read.

        Args:
            path: of the file, which ends in ``.json``; what is there is replaced.

        Raises:
            MergeConfigError: the method has functions of one's own, which a file cannot hold, or the file cannot be
                written.
        """
        write_settings(path, {"image": self.image, "video": self.video}, self.method, self.track)

    def to_entry(self) -> dict[str, Any]:
        """What ``save`` writes, as JSON's own types."""
        return to_entry({"image": self.image, "video": self.video}, self.method, self.track)

    @classmethod
    def from_entry(cls, entry: Any) -> MergeConfig:
        """The way back from ``to_entry``.

        Raises:
            MergeConfigError: something in it is not understood.
        """
        schedules, method, track = from_entry(entry)
        return cls(schedules["image"], schedules["video"], method, track)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MergeConfig:
        """Reads what ``save`` wrote.

        Raises:
            MergeConfigError: there is no such file, or it holds something else; the message says what.
        """
        schedules, method, track = read_settings(path)
        return cls(schedules["image"], schedules["video"], method, track)


def check_preset(preset: str | os.PathLike[str] | MergeConfig) -> MergeConfig | None:
    """What a preset's file says, or settings that stand in for one; None for the name of a preset.

    Raises:
        MergeConfigError: it is neither, or the file cannot be read.
    """
    if isinstance(preset, MergeConfig):
        return preset
    if isinstance(preset, os.PathLike) or (isinstance(preset, str) and preset.endswith(".json")):
        return MergeConfig.load(preset)
    choices = [*get_args(Modality), "auto"]
    if preset not in choices:
        raise MergeConfigError(
            f"preset is {preset!r}; choose one of {choices}, or give the path of a file that MergeConfig.save wrote, "
            "which ends in .json"
        )
    return None


def _once(layers: object) -> object:
    """A generator as a tuple: images and videos both read it."""
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers


def _keep_alone(keep: object, given: Mapping[str, object]) -> float:
    """The one number, which leaves no room for the amounts that follow from it."""
    for _, amount, _ in _NOTHING:
        if given[amount] is not None:
            raise MergeConfigError(
                f"keep is {keep!r} and {amount} is {given[amount]!r}; give keep alone, or vit_r and llm_ratio without "
                "it; vit_layers=[] or llm_layers=[] keeps a stage out"
            )
    return check_keep("keep", keep)


def _preset(
    limits: ModelLimits,
    presets: Mapping[Modality, MergeSchedule],
    name: str,
    given: Mapping[str, object],
    keep: float | None,
) -> MergeSchedule:
    """A preset of the model; of a model that has none for this modality, the identity, if what counts is given."""
    for modality, schedule in presets.items():
        if modality == name:
            return schedule
    missing = [argument for stage in _stages(given, keep) for argument, value in stage.items() if value is None]
    if missing and not presets:
        raise MergeConfigError(f"{missing[0]} is None, and {limits.family} has no presets; give {', '.join(missing)}")
    return MergeSchedule()


def _stages(given: Mapping[str, object], keep: float | None) -> Iterator[dict[str, object]]:
    """The numbers of the stages that are not switched off by one of their two, no layers or nothing to remove."""
    for layers, amount, nothing in _NOTHING:
        value = nothing if keep == 1 else given[amount]
        if given[layers] != () and not (value is not None and value == nothing):
            yield {layers: given[layers]} | ({amount: value} if keep is None else {})


def _schedule(
    limits: ModelLimits, given: Mapping[str, object], keep: float | None, method: Method, preset: MergeSchedule
) -> MergeSchedule:
    wish = None
    if keep is None and preset.keep is not None:
        missing = [amount for _, amount, _ in _NOTHING if given[amount] is None]
        if len(missing) == 1:
            raise MergeConfigError(
                f"{missing[0]} is None, and the preset has keep instead; give {missing[0]} too, or neither amount"
            )
        keep, wish = (preset.keep, preset.keep_encoder) if missing else (None, None)
    value = {name: getattr(preset, name) if chosen is None else chosen for name, chosen in given.items()}
    for layers, amount, nothing in _NOTHING:
        idle = keep == 1 if keep is not None else given[amount] is not None and given[amount] == nothing
        if given[layers] is None and idle:
            value[layers] = ()  # where nothing is removed, the preset's layers need not fit the model
    origin = {name: " (from the preset; give it yourself)" if chosen is None else "" for name, chosen in given.items()}
    vit_layers = check_layers("vit_layers", value["vit_layers"], 0, limits.vit_depth, origin["vit_layers"])
    llm_layers = check_layers("llm_layers", value["llm_layers"], 1, limits.llm_depth, origin["llm_layers"])
    if keep is not None:
        return _kept_schedule(vit_layers, llm_layers, keep, wish, method)
    schedule = MergeSchedule(vit_layers, check_vit_r(value["vit_r"]), llm_layers, check_ratio(value["llm_ratio"]))
    total = len(schedule.vit_layers) * schedule.vit_r
    if isinstance(total, int) and limits.tokens_per_tile is not None and total >= limits.tokens_per_tile:
        most = (limits.tokens_per_tile - 1) // len(schedule.vit_layers)
        raise MergeConfigError(
            f"vit_r is {schedule.vit_r}: removed in {len(schedule.vit_layers)} layers it leaves none of the "
            f"{limits.tokens_per_tile} tokens of a tile; use at most {most}"
        )
    return schedule


def _kept_schedule(
    vit_layers: tuple[int, ...], llm_layers: tuple[int, ...], keep: float, wish: float | None, method: Method
) -> MergeSchedule:
    """The schedule of one number; of a modality without any layer, the identity."""
    if not (vit_layers or llm_layers) or keep == 1:
        return MergeSchedule(vit_layers, 0, llm_layers, 1.0)
    least = method.least_kept(len(vit_layers)), method.in_llm.least_kept(len(llm_layers))
    encoder = split_keep(keep, *least, wish)
    if encoder is None:
        raise MergeConfigError(
            f"keep is {keep:.4g}, and method {method.name!r} removes at most half in a layer, so that "
            f"{len(vit_layers)} encoder and {len(llm_layers)} decoder layers leave {least[0] * least[1]:.4g}; use at "
            "least that, list more layers, or use another method"
        )
    return MergeSchedule(vit_layers, 0, llm_layers, 1.0, keep, encoder)
