"""Settings as a JSON file: versioned, readable, and refused where anything in it is not understood."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from illava_hooks.config.checks import check_keep, check_layers, check_ratio, check_vit_r
from illava_hooks.config.schedule import MergeSchedule, Modality
from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import METHODS, Method

__all__ = ["VERSION", "from_entry", "read_settings", "to_entry", "write_settings"]

#: Raised when a file of before could be misread.
VERSION = 1
_KEYS = ("illava_hooks", "method", "track", *get_args(Modality))
_METHOD_KEYS = ("name", "encoder_score", "llm_score", "merge", "layout", "proportional", "quota")
#: What files of earlier releases do not have, and what is not written where it says nothing.
_LATER_KEY = "llm_merge"
_AMOUNTS = ("vit_layers", "vit_r", "llm_layers", "llm_ratio")
_ONE_NUMBER = ("vit_layers", "llm_layers", "keep", "keep_encoder")


def write_settings(
    path: str | os.PathLike[str], schedules: Mapping[Modality, MergeSchedule], method: Method, track: bool
) -> None:
    """Writes settings, one line per modality.

    Args:
        path: of the file.
        schedules: of both modalities.
        method: with nothing but names.
        track: whether provenance is kept.

    Raises:
        MergeConfigError: the method has functions of one's own, or the file cannot be written.
    """
    target = _json_path(path)
    body = to_entry(schedules, method, track)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in body.items())
    try:
        target.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    except OSError as error:
        raise MergeConfigError(f"path is {str(target)!r}, which cannot be written ({error.strerror})") from error


def to_entry(schedules: Mapping[Modality, MergeSchedule], method: Method, track: bool) -> dict[str, Any]:
    """What a file holds, as JSON's own types; arguments and errors as of ``write_settings``."""
    body: dict[str, Any] = {"illava_hooks": VERSION, "method": _method_entry(method), "track": track}
    for modality, schedule in schedules.items():
        names = _AMOUNTS if schedule.keep is None else _ONE_NUMBER
        entry = {name: getattr(schedule, name) for name in names}
        body[modality] = {name: list(value) if isinstance(value, tuple) else value for name, value in entry.items()}
    return body


def read_settings(path: str | os.PathLike[str]) -> tuple[dict[Modality, MergeSchedule], Method, bool]:
    """Reads settings: the schedules, the method, and whether provenance is kept.

    Raises:
        MergeConfigError: what is wrong, in one line that begins with the file's name.
    """
    target = _json_path(path)
    try:
        text = target.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise MergeConfigError(
            f"{target}: the file cannot be read ({why}); give one that MergeConfig.save wrote"
        ) from error
    try:
        return _parsed(text)
    except MergeConfigError as error:
        raise MergeConfigError(f"{target}: {error}") from error


def _parsed(text: str) -> tuple[dict[Modality, MergeSchedule], Method, bool]:
    try:
        body = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise MergeConfigError(f"this is no JSON ({error}); give a file that MergeConfig.save wrote") from error
    return from_entry(body)


def from_entry(body: Any) -> tuple[dict[Modality, MergeSchedule], Method, bool]:
    """The way back from ``to_entry``.

    Raises:
        MergeConfigError: something in it is not understood.
    """
    if not isinstance(body, dict) or "illava_hooks" not in body:
        raise MergeConfigError("there is no version under 'illava_hooks'; give a file that MergeConfig.save wrote")
    version = body["illava_hooks"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise MergeConfigError(f"illava_hooks is {version!r}; it must be the version of the file, {VERSION}")
    if version > VERSION:
        raise MergeConfigError(
            f"illava_hooks is {version}, and this release reads files up to version {VERSION}; use a newer release"
        )
    _check_keys("the file", body, _KEYS)
    if not isinstance(body["track"], bool):
        raise MergeConfigError(f"track is {body['track']!r}; it must be true or false")
    schedules: dict[Modality, MergeSchedule] = {
        modality: _schedule_of(modality, body[modality]) for modality in get_args(Modality)
    }
    return schedules, _method_of(body["method"]), body["track"]


def _schedule_of(modality: str, entry: Any) -> MergeSchedule:
    """One modality's settings, either by amounts or by one number."""
    by_number = isinstance(entry, dict) and "keep" in entry
    _check_keys(modality, entry, _ONE_NUMBER if by_number else _AMOUNTS)
    try:
        layers = check_layers("vit_layers", entry["vit_layers"], 0, None)
        decoder = check_layers("llm_layers", entry["llm_layers"], 1, None)
        if not by_number:
            return MergeSchedule(layers, check_vit_r(entry["vit_r"]), decoder, check_ratio(entry["llm_ratio"]))
        keep, encoder = (check_keep(name, entry[name]) for name in ("keep", "keep_encoder"))
    except MergeConfigError as error:
        raise MergeConfigError(f"{modality}: {error}") from error
    if keep < 1 and not (layers or decoder):
        raise MergeConfigError(
            f"{modality}: keep is {keep} and vit_layers and llm_layers are []; list layers that merge, or use keep 1"
        )
    if encoder < keep:
        raise MergeConfigError(
            f"{modality}: keep_encoder is {encoder} and keep is {keep}; the encoder cannot leave less than is left in "
            "the end; use keep_encoder >= keep"
        )
    return MergeSchedule(layers, 0, decoder, 1.0, keep, encoder)


def _method_entry(method: Method) -> Any:
    """A method's name, or the names of its choices."""
    if METHODS.get(method.name) == method:
        return method.name
    keys = _METHOD_KEYS if method.llm_merge is None else (*_METHOD_KEYS, _LATER_KEY)
    entry = {name: getattr(method, name) for name in keys}
    for name, choice in entry.items():
        if not isinstance(choice, str | bool):
            raise MergeConfigError(
                f"{name} of method {method.name!r} is a function of your own, which a file cannot hold; save with a "
                "method of METHODS, and give yours to patch beside the file"
            )
    return entry


def _method_of(entry: Any) -> Method:
    if isinstance(entry, str):
        if entry not in METHODS:
            raise MergeConfigError(f"method is {entry!r}; choose one of {list(METHODS)}")
        return METHODS[entry]
    later = isinstance(entry, dict) and _LATER_KEY in entry
    keys = (*_METHOD_KEYS, _LATER_KEY) if later else _METHOD_KEYS
    _check_keys("method", entry, keys)
    for name in keys:
        kind = bool if name in ("proportional", "quota") else str
        if not isinstance(entry[name], kind):
            wanted = "true or false" if kind is bool else "text"
            raise MergeConfigError(f"method: {name} is {entry[name]!r}; it must be {wanted}")
    return Method(**entry)


def _check_keys(what: str, entry: Any, known: tuple[str, ...]) -> None:
    """Refuses keys that nobody reads, and misses none."""
    if not isinstance(entry, dict):
        raise MergeConfigError(f"{what} is {entry!r}; it must be an object with {list(known)}")
    for name in entry:
        if name not in known:
            raise MergeConfigError(f"{what} has an unknown key {name!r}; it may have {list(known)}")
    for name in known:
        if name not in entry:
            raise MergeConfigError(f"{what} has no {name!r}; it must have {list(known)}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated!r} stands twice in an object")
    return found


def _json_path(path: str | os.PathLike[str]) -> Path:
    """The path, which ends as ``patch`` tells files from names of presets."""
    target = Path(path)
    if target.suffix != ".json":
        raise MergeConfigError(f"path is {str(target)!r}; give one that ends in .json")
    return target
