"""What decides an evaluation's figures, as hashes: model, processor, items, versions, settings, and a method's code.

Two runs whose fingerprints are equal measure the same thing, so one may go on with the rows of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.installed import is_installed
from illava_hooks.tools.items import Item

__all__ = ["Fingerprint", "differences", "digest", "fingerprint", "shown"]

#: By part ("model", "items", "versions", "settings"), then by name.
Fingerprint = dict[str, dict[str, Any]]

_PACKAGES = ("illava-hooks", "torch", "torchvision", "transformers", "pillow")
#: The parts of this package that answers depend on.
_CODE = ("config", "methods.py", "api.py", "merge", "engine", "patchers", "tiny", "tools/evaluate")
#: What a tokenizer keeps of its last call.
_OF_A_CALL = ("padding", "truncation")
#: What a configuration says of the place and the program that it was saved by.
_VOLATILE = ("_name_or_path", "_from_model_config", "transformers_version")


def fingerprint(model: Any, processor: Any, items: Sequence[Item], **settings: Any) -> Fingerprint:
    """That of a run.

    Args:
        model: an unpatched model.
        processor: its processor.
        items: what is asked.
        **settings: all else that figures depend on, as JSON takes it.

    Raises:
        InputError: weights are not in memory, or hooks of the user's own change what the model says.
    """
    _check_hooks(model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    return {
        "model": {
            "class": type(model).__name__,
            "weights": digest(_weights(model)),
            "config": digest([_json(config)]),
            "generation": digest([_json(_generation(model))]),
            "adapters": digest(_adapters(model)),
            "processor": digest(_processor(processor)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": str(getattr(model.config, "_attn_implementation", None)),
            "device": model.device.type,
        },
        "items": {"questions": len(items), "content": digest(_items(items))},
        "versions": {"code": code(), "python": python_version(), **{name: _version(name) for name in _PACKAGES}},
        "settings": settings,
    }


def differences(mine: Fingerprint, theirs: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, in words; empty where they are equal."""
    found = []
    for part, entries in mine.items():
        others = theirs.get(part)
        others = others if isinstance(others, Mapping) else {}
        for name in dict.fromkeys([*entries, *others]):
            if entries.get(name) != others.get(name):
                found.append(f"{part} {name}: {others.get(name)}, not {entries.get(name)}")
    return found


def digest(chunks: Iterable[Any]) -> str:
    """The first 16 digits of SHA-256; each chunk, of bytes or an array, counts with its length."""
    total = sha256()
    for chunk in chunks:
        total.update(memoryview(chunk).nbytes.to_bytes(8, "big"))
        total.update(chunk)
    return total.hexdigest()[:16]


@cache
def code() -> str:
    """The sources of this package that answers depend on."""
    root = Path(__file__).parents[2]
    files = {file for part in _CODE for file in [root / part, *(root / part).rglob("*.py")] if file.suffix == ".py"}
    texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(files)}
    return digest(data for name, text in texts.items() for data in (name.encode(), text))


def _weights(model: Any) -> Iterable[Any]:
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            yield f"{name} {tensor!r}".encode()
            continue
        if tensor.is_meta:
            raise InputError(f"weights {name} are not in memory, so rows cannot be told from another model's; leave "
                             "the output out, or load the model without offloading")  # fmt: skip
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _generation(model: Any) -> dict[str, Any]:
    """How answers are generated where nothing else is asked for."""
    settings = getattr(model, "generation_config", None)
    found = {} if settings is None else settings.to_dict()
    return {name: value for name, value in found.items() if name not in _VOLATILE}


def _adapters(model: Any) -> Iterator[bytes]:
    """Which adapters of PEFT are at work, layer by layer; their weights are among the model's."""
    for name, layer in model.named_modules():
        # Every model of transformers has methods of these names.
        if isinstance(getattr(layer, "disable_adapters", None), bool):
            state = [getattr(layer, part, None) for part in ("active_adapters", "merged_adapters", "scaling")]
            yield _json([name, layer.disable_adapters, *state])


def _check_hooks(model: Any) -> None:
    """Refuses what no hash tells.

    Raises:
        InputError: a hook or a replaced ``forward`` is neither this library's nor a package's.
    """
    for name, layer in model.named_modules():
        for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values(), vars(layer).get("forward")):
            if hook is not None and not is_installed(hook):
                raise InputError(
                    f"model has {getattr(hook, '__qualname__', type(hook).__qualname__)} of your own at "
                    f"{name or 'its top'}, so rows cannot be told from those without it; leave the output out, or "
                    "remove it"
                )


def _processor(processor: Any) -> Iterable[bytes]:
    """Its settings, its template and its vocabulary."""
    yield type(processor).__name__.encode()
    yield _json(processor.to_dict() if hasattr(processor, "to_dict") else {})
    yield str(getattr(processor, "chat_template", None)).encode()
    tokenizer = processor.tokenizer
    yield str(getattr(tokenizer, "chat_template", None)).encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield _json(tokenizer.get_vocab())
        return
    # Padding and truncation are what the last call asked for.
    yield _json({name: part for name, part in json.loads(backend.to_str()).items() if name not in _OF_A_CALL})


def _items(items: Sequence[Item]) -> Iterable[bytes]:
    for item in items:
        yield _json([item.kind, item.video, item.question, item.answer, item.others])
        yield from shown(item)


def shown(item: Item) -> Iterator[bytes]:
    """What an item shows, for ``digest``: shape and pixels of each picture."""
    for picture in item.pictures:
        yield str(picture.shape).encode()
        yield picture.tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
