"""Models for VLMEvalKit (``ms-vlmeval`` on PyPI): its own model classes, whose loaded model merges.

``python -m illava_hooks.integrations.vlmevalkit --data MMBench_DEV_EN --model Qwen2-VL-7B-Instruct-iLLaVA`` is the
kit's ``run.py`` with the merged models added, and ``--add NAME=FOLDER`` adds one of your own. In a program of your
own, or in front of the kit's ``--config``, ``register`` does the same. The kit itself is not changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from illava_hooks.api import patch
from illava_hooks.config import check_preset
from illava_hooks.engine.finding import FromFamilies, families
from illava_hooks.errors import IllavaHooksError, InputError, UnsupportedModelError
from illava_hooks.integrations.arguments import known_method, split_arguments
from illava_hooks.methods import DEFAULT_METHOD, METHODS, Method

__all__ = ["STOCK", "main", "register"]

#: The kit's entries that get a merged twin; the first of a family also lends its arguments to models of your own.
STOCK: Mapping[str, tuple[str, ...]] = FromFamilies(
    lambda family: {family.name: family.vlmevalkit} if family.vlmevalkit else {}
)
_SUFFIX = "-iLLaVA"
#: Arguments of the kit's classes that put another engine in place of transformers' model.
_ENGINES = ("use_vllm", "use_lmdeploy")


def register(
    name: str | None = None,
    model_path: str | None = None,
    *,
    family: str | None = None,
    vit_layers: Iterable[int] | str | None = None,
    vit_r: int | float | None = None,
    llm_layers: Iterable[int] | str | None = None,
    llm_ratio: float | None = None,
    keep: float | str | None = None,
    method: str | Method = DEFAULT_METHOD,
    preset: str = "auto",
    **arguments: Any,
) -> list[str]:
    """Adds merged models to the kit's ``supported_VLM``; what is there under the same name is replaced.

    An entry is the kit's own one, arguments included, but for its class, which patches the model that it loads, and
    for another engine such as vLLM, which is switched off. It takes the settings of ``patch`` beside the arguments of
    the kit's class, also from a ``--config`` of the kit.

    Args:
        name: of the entry; by default all of ``STOCK`` with "-iLLaVA" behind their names. Without ``model_path`` the
            name of any entry of the kit with "-iLLaVA" behind it.
        model_path: a folder or a hub name, for an entry of your own.
        family: a key of ``STOCK``, where it is not to be read from the model's configuration.
        vit_layers: as for ``patch``, like the others down to ``preset``; what is not given comes from the preset.
        vit_r: tokens removed (int) or fraction removed (float).
        llm_layers: decoder layers.
        llm_ratio: fraction kept.
        keep: fraction left in the end, instead of ``vit_r`` and ``llm_ratio``.
        method: a name in ``METHODS``, ``file.py:NAME`` or a ``Method``.
        preset: "image", "video", "auto" or a file of settings.
        arguments: of the kit's class, such as ``min_pixels``, instead of those of its entry.

    Returns:
        The names of the entries.

    Raises:
        InputError: the kit is not installed or has no such entry, or the family of a model cannot be told.
        MergeConfigError: there is no such method or preset, or ``keep`` comes with an amount; what only the model
            knows is refused when it is loaded.
    """
    entries = _entries()
    method = known_method(method)
    check_preset(preset)
    given = {"vit_layers": vit_layers, "vit_r": vit_r, "llm_layers": llm_layers, "llm_ratio": llm_ratio, "keep": keep}
    settings, _ = split_arguments({setting: value for setting, value in given.items() if value is not None})
    arguments |= {**settings, "method": method, "preset": preset}
    if model_path is not None:
        if name is None:
            raise InputError(f"model_path is {model_path!r} and there is no name; give the entry a name")
        arguments["model_path"] = model_path
        stocks = {name: STOCK[_family(model_path, family)][0]}
    else:
        names = [stock + _SUFFIX for known in STOCK.values() for stock in known] if name is None else [name]
        stocks = {wanted: wanted.removesuffix(_SUFFIX) for wanted in names}
    made = {}
    for wanted, stock in stocks.items():
        entry = entries.get(stock)
        if stock == wanted or not isinstance(entry, partial):
            raise InputError(
                f"name is {wanted!r}; give a name of the kit with {_SUFFIX!r} behind it, or model_path for a model of "
                "your own"
            )
        stay = {engine: False for engine in _ENGINES if engine in entry.keywords}  # what merges is transformers' model
        made[wanted] = partial(_merging(entry.func), *entry.args, **{**entry.keywords, **stay, **arguments})
    entries.update(made)
    return list(made)


def main(arguments: Sequence[str] | None = None) -> None:
    """The kit's ``run.py`` with merged models: takes the options of ``patch`` and hands all others on.

    Args:
        arguments: of the command line; by default those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m illava_hooks.integrations.vlmevalkit",
        description="Options for merging, for every added model; all other options are the kit's, listed below.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--vit-layers", help="encoder layers, as 5-6-7-8")
    parser.add_argument("--vit-r", help="tokens removed in each, 92, or the fraction, 0.16")
    parser.add_argument("--llm-layers", help="decoder layers, as 6-7-8")
    parser.add_argument("--llm-ratio", help="fraction of the visual tokens kept in each")
    parser.add_argument("--keep", help="one number instead of --vit-r and --llm-ratio: the fraction left, as 1/3")
    parser.add_argument("--method", default=DEFAULT_METHOD, help=f"one of {', '.join(METHODS)}, or file.py:NAME")
    parser.add_argument("--preset", default="auto", help="image, video, auto or a file, of what is not given")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=PATH", help="a model of your own: folder or hub name"
    )
    own, others = parser.parse_known_args(arguments)
    settings = vars(own)
    added = [entry.partition("=") for entry in settings.pop("add")]
    try:
        register(**settings)
        for name, _, path in added:
            if not name or not path:
                raise InputError(f"--add is {name!r}; write NAME=PATH")
            register(name, path, **settings)
    except IllavaHooksError as error:
        parser.error(str(error))
    from vlmeval import run  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if {"-h", "--help"} & set(others):
        parser.print_help()
    before = sys.argv
    sys.argv = [before[0], *others]  # where the kit reads its options
    try:
        run.main()
    finally:
        sys.argv = before


def _entries() -> dict[str, Any]:
    """The kit's models by name."""
    try:
        from vlmeval.config import supported_VLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError(f"VLMEvalKit cannot be imported ({error}); pip install ms-vlmeval") from error
    entries: dict[str, Any] = supported_VLM
    return entries


def _family(model_path: str, family: str | None) -> str:
    """The family that a model's configuration names, if none is given."""
    if family is None:
        from transformers import AutoConfig

        try:
            kind = AutoConfig.from_pretrained(model_path, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise InputError(
                f"model_path is {model_path!r}, whose configuration cannot be read; give a folder with a model, a hub "
                f"name that can be reached, or family, one of {list(STOCK)}"
            ) from error
        family = next((known.name for known in families() if kind in known.model_types), str(kind))
    if family not in STOCK:
        raise InputError(f"family of {model_path!r} is {family!r}; it must be one of {list(STOCK)}")
    return family


class _Merging:
    """Takes the merge settings out of the arguments of a class of the kit, and patches the model that it loads."""

    model: Any

    def __init__(self, *given: Any, **arguments: Any) -> None:
        settings, others = split_arguments(arguments)
        for engine in _ENGINES:
            if others.get(engine):
                raise UnsupportedModelError(
                    f"{engine} is {others[engine]!r}; only the model of transformers can merge; leave {engine} out"
                )
        super().__init__(*given, **others)
        patch(self.model, **settings)


@cache
def _merging(stock: type) -> type:
    """A class of the kit whose model merges."""
    return type(f"{stock.__name__}{_SUFFIX}", (_Merging, stock), {})


if __name__ == "__main__":
    main()
