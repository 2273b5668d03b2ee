"""What vLLM's configuration says under ``illava``, and a strength that a request brings: nothing here needs vLLM."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from illava_hooks.config import MergeConfig, ModelLimits, check_preset
from illava_hooks.engine.family import Family
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import DEFAULT_METHOD, Method

__all__ = ["AS_SERVED", "KEY", "Settings", "Strength", "overrides", "read_settings", "settings_of", "take_strength"]

#: Where the settings stand in a model's configuration.
KEY = "illava"

_NAMES = ("vit_layers", "vit_r", "keep_encoder", "method", "preset")
_OF_DECODER = ("llm_layers", "llm_ratio", "keep")
_CHOICES = tuple(name for name in Method.__dataclass_fields__)


def overrides(
    vit_layers: Iterable[int] | None = None,
    vit_r: int | float | None = None,
    *,
    keep_encoder: float | None = None,
    method: str | Method | None = None,
    preset: str | Path | None = None,
) -> dict[str, Any]:
    """What ``LLM(..., hf_overrides=...)`` takes; what is not given comes from the model's preset.

    Args:
        vit_layers: vision-encoder layers that merge, as for ``patch``.
        vit_r: how many tokens each removes, as for ``patch``.
        keep_encoder: instead of ``vit_r``, the fraction of an image's patches that is left behind the encoder.
        method: a name in ``METHODS``, or a ``Method`` of names only.
        preset: a preset's name, or a file that ``MergeConfig.save`` wrote, which is read here.

    Raises:
        MergeConfigError: a file or a function of one's own that cannot travel; numbers are checked with the model.
    """
    layers = None if vit_layers is None else list(vit_layers)
    given = {"vit_layers": layers, "vit_r": vit_r, "keep_encoder": keep_encoder, "method": method, "preset": preset}
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(method, Method):
        said["method"] = {name: getattr(method, name) for name in _CHOICES}
        for name, choice in said["method"].items():
            if callable(choice):
                raise MergeConfigError(
                    f"{name} of method {method.name!r} is a function, which does not travel to vLLM's processes; use "
                    "names"
                )
    if preset is not None and (saved := check_preset(preset)) is not None:
        said["preset"] = saved.to_entry()
    return {KEY: said}


@dataclass(frozen=True, slots=True)
class Strength:
    """How much one request merges; None everywhere: as the server says.

    Attributes:
        vit_r: as for ``patch``.
        keep_encoder: the fraction of an image's patches that is left behind the encoder.
    """

    vit_r: int | float | None = None
    keep_encoder: float | None = None

    def to_numbers(self) -> tuple[int, int]:
        """Two whole numbers that hold both exactly: they travel with an item, through processes, as a tensor."""
        return _bits(self.vit_r), _bits(self.keep_encoder)

    @classmethod
    def from_numbers(cls, numbers: Iterable[int]) -> Strength:
        """The way back."""
        amount, keep = (_number(bits) for bits in numbers)
        return cls(int(amount) if amount is not None and (amount >= 1 or amount == 0) else amount, keep)


AS_SERVED = Strength()


def _bits(number: float | None) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", math.nan if number is None else number))[0]
    return bits


def _number(bits: int) -> float | None:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return None if math.isnan(number) else number


def take_strength(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Strength]:
    """Takes ``illava_vit_r`` and ``illava_keep_encoder`` out of a request's processor arguments.

    Args:
        arguments: by name.

    Raises:
        MergeConfigError: another name begins with ``illava``, or a value is no number.
    """
    left, found = dict(arguments), dict[str, Any]()
    for name in [name for name in left if name.startswith(KEY)]:
        value, known = left.pop(name), [f"{KEY}_vit_r", f"{KEY}_keep_encoder"]
        if name not in known:
            raise MergeConfigError(f"{name} is {value!r}; a request may say {known[0]} or {known[1]}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeConfigError(f"{name} is {value!r}; it must be a number")
        found[name.removeprefix(f"{KEY}_")] = value
    if len(found) == 2:
        raise MergeConfigError(f"{KEY}_vit_r and {KEY}_keep_encoder are both given; give one of them")
    return left, Strength(**found) if found else AS_SERVED


@dataclass(frozen=True)
class Settings:
    """The encoder stage of one served model.

    Attributes:
        family: the model's.
        limits: what the model allows.
        config: the settings, without a language stage.
    """

    family: Family
    limits: ModelLimits
    config: MergeConfig

    @cached_property
    def digest(self) -> str:
        """What tells items of these settings from items of others, in caches that several servers share."""
        return sha256(json.dumps(self.config.to_entry(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def strongest(self) -> MergeConfig:
        """The settings with every listed layer at work: a request may ask for it where the server idles."""
        layers = self.config.image.vit_layers or self.config.video.vit_layers
        return self.at(Strength(keep_encoder=0.5)) if layers else self.config

    @cached_property
    def _configs(self) -> dict[Strength, MergeConfig]:
        return {AS_SERVED: self.config}

    def at(self, strength: Strength) -> MergeConfig:
        """The settings at a request's strength.

        Raises:
            MergeConfigError: the number is out of range.
        """
        if strength not in self._configs:
            if len(self._configs) >= 1024:  # numbers come from outside
                self._configs.clear()
            self._configs[strength] = self._config_at(strength)
        return self._configs[strength]

    def _config_at(self, strength: Strength) -> MergeConfig:
        if not self.config.image.vit_layers and not self.config.video.vit_layers:
            raise MergeConfigError(
                "vit_layers is [] on this server, so no request can merge; start it with layers, and vit_r 0 if "
                "requests are to ask for it"
            )
        keep, method = strength.keep_encoder, self.config.method
        ratio = None if keep is not None else 1.0
        return MergeConfig.build(self.limits, None, strength.vit_r, [], ratio, method, self.config, False, keep)


def settings_of(hf_config: Any) -> Settings | None:
    """The settings in a model's configuration; None: there are none, and vLLM is stock.

    Args:
        hf_config: the configuration of the whole model.

    Raises:
        MergeConfigError: a value is out of range, or says what vLLM cannot do.
        UnsupportedModelError: no family knows the model.
    """
    given = getattr(hf_config, KEY, None)
    if given is None:
        return None
    model = SimpleNamespace(config=hf_config)
    family = find_family(model)
    limits = family.limits(model)
    return Settings(family, limits, read_settings(given, limits))


def read_settings(given: Any, limits: ModelLimits) -> MergeConfig:
    """The settings that were given, filled up from a preset and checked.

    Args:
        given: the name of a preset, the path of a file, what such a file holds, or an object with some of
            ``vit_layers``, ``vit_r``, ``keep_encoder``, ``method`` and ``preset``.
        limits: of the model.

    Raises:
        MergeConfigError: as ``patch``; also for a language stage.
    """
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping):
        raise MergeConfigError(f"{KEY} is {given!r}; give an object with some of {list(_NAMES)}, or a preset")
    if "illava_hooks" in given:
        given = {"preset": given}
    for name in given:
        if name in _OF_DECODER and not _is_idle(name, given[name]):
            raise MergeConfigError(
                f"{name} is {given[name]!r}: inside vLLM only the vision encoder merges; leave it out (vit_r or "
                "keep_encoder say how much), or run patch(model, ...) by Ray Data or torchrun, see docs/distributed.md"
            )
        if name not in _NAMES and name not in _OF_DECODER:
            raise MergeConfigError(f"{KEY} has an unknown key {name!r}; it may have {list(_NAMES)}")
    preset = given.get("preset", "auto")
    saved = MergeConfig.from_entry(preset) if isinstance(preset, Mapping) else check_preset(preset)
    if saved is not None and saved.llm_layers:
        raise MergeConfigError(
            f"llm_layers is {list(saved.llm_layers)} in the preset's file: inside vLLM only the vision encoder "
            "merges; write a file with llm_layers=[], or run patch(model, ...) by Ray Data or torchrun, see "
            "docs/distributed.md"
        )
    method, keep = _method(given.get("method", DEFAULT_METHOD)), given.get("keep_encoder")
    if keep is not None and given.get("vit_r") is not None:
        raise MergeConfigError(f"keep_encoder is {keep!r} and vit_r is {given['vit_r']!r}; give one of them")
    # Without a decoder's layers what is left behind the encoder is what is left in the end.
    ratio = None if keep is not None or given.get("vit_r") is None else 1.0
    layers = given.get("vit_layers")
    config = MergeConfig.build(
        limits, layers, given.get("vit_r"), [], ratio, method, preset if saved is None else saved, False, keep
    )
    # What a layout crops away merges apart, else the length of a prompt would depend on the picture.
    quota = config.method.merge != "bipartite"
    return replace(config, track=False, method=replace(config.method, quota=quota))


def _is_idle(name: str, value: Any) -> bool:
    """Whether a setting of the language stage asks for nothing."""
    return value is None or value == ([] if name == "llm_layers" else 1)


def _method(given: Any) -> str | Method:
    """A method by its name, or from the names of its choices."""
    if not isinstance(given, Mapping):
        return given  # type: ignore[no-any-return]  # what it is not is refused where it is looked up
    for name in given:
        if name not in _CHOICES:
            raise MergeConfigError(f"method has an unknown key {name!r}; it may have {list(_CHOICES)}")
    return Method(**{"name": "custom", **given})
