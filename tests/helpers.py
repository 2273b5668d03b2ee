"""What several test files share: prompts of every kind, settings that merge, and all that a model gives out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache

from families import family, family_of
from tiny_models import Inputs, Sample, inputs_for

#: Settings that merge in both stages of the tiny models.
MERGING: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [2], "llm_ratio": 0.5}

#: Every kind of input; a family may cut single images into tiles.
PROMPTS: dict[str, tuple[Sample, ...]] = {
    "image": (Sample(1, images=((60, 64),)),),
    "images": (Sample(2, images=((48, 30), (64, 64), (32, 32))),),
    "ragged": (Sample(1, images=((48, 30),)), Sample(2, images=((30, 30), (64, 64))), Sample(5, text=(9,))),
    "video": (Sample(3, videos=(4,)),),
    "image and video": (Sample(4, images=((60, 40),), videos=(4,), order="vi", text=(2, 3, 5)),),
    "text": (Sample(5, text=(9,)),),
}
VISUAL = tuple(kind for kind in PROMPTS if kind != "text")

NEW_TOKENS = 3

#: The key under which a patched model's feature outputs carry what the language stage must know.
RECORDS = "illava_records"

#: Older releases put the rope deltas of the last prompt into every output, also of a prompt without images.
LEFT_OVER = "rope_deltas"


def before(release: str) -> bool:
    """Whether the installed transformers is older."""
    return Version(transformers.__version__) < Version(release)


#: Whether forwards take the outputs of feature methods.
TAKES_READY_FEATURES = not before("5.18")
needs_ready_features = pytest.mark.skipif(not TAKES_READY_FEATURES, reason="this release takes no ready-made features")

#: The lowest torch of pyproject.toml lacks what newer ones have, for stock models as well (docs/COMPATIBILITY.md).
OLD_TORCH = Version(torch.__version__) < Version("2.7")
needs_any_head_width = pytest.mark.skipif(OLD_TORCH, reason="flex attention of torch 2.6 takes powers of two only")
needs_tracing = pytest.mark.skipif(OLD_TORCH, reason="stock: torch 2.6 cannot trace transformers' forwards")

Found = dict[str, Tensor]


def prompt(model: Any, kind: str, **kwargs: Any) -> Inputs:
    """The inputs of one kind for a model."""
    return inputs_for(model, PROMPTS[kind], **kwargs)


def richest(name: str) -> str:
    """The kind of prompt with most in it that a family takes."""
    return "image and video" if family(name).with_videos else "images"


# ---------------------------------------------------------------------------- what a model gives out


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output with its place, caches opened up."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Cache):
        yield f"{name}.length", torch.as_tensor(value.get_seq_length())
        for index, layer in enumerate(value.layers):
            for part in ("keys", "values") if hasattr(layer, "keys") else ("conv_states", "recurrent_states"):
                held = getattr(layer, part)
                yield f"{name}.{index}.{part}", held if isinstance(held, Tensor) else held[0]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in (RECORDS, LEFT_OVER):
                yield from tensors_of(item, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{name}.{index}")
    elif value is not None:
        raise TypeError(f"{name} is a {type(value).__name__}")


@torch.no_grad()
def forward(model: Any, inputs: Inputs, **kwargs: Any) -> Found:
    """Logits, hidden states and cache of a forward."""
    return dict(tensors_of(model(**inputs, output_hidden_states=True, **kwargs), "forward"))


def keyed(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys; others carry a state along."""
    return [layer for layer in cache.layers if hasattr(layer, "keys")]


def key_lengths(cache: Any) -> list[int]:
    """The number of keys in each of them."""
    return [layer.keys.shape[-2] for layer in keyed(cache)]


def logits(model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
    """Logits of a forward."""
    return forward(model, inputs, **kwargs)["forward.logits"]


def generate(model: Any, inputs: Inputs, **kwargs: Any) -> Found:
    """Ids, logits of each step and, for greedy search, hidden states and cache of a generation."""
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": not kwargs}
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **wanted, **kwargs)
    if kwargs:
        out = {"sequences": out.sequences, "logits": out.logits}
    return dict(tensors_of(out, " ".join(["generate", *map(str, kwargs.values())])))


def feature_arguments(model: Any, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What the feature methods take, by modality."""
    return family_of(model).feature_arguments(inputs)


def feature_outputs(model: Any, inputs: Inputs, **kwargs: Any) -> dict[str, Any]:
    """What the feature methods return, by modality."""
    return {
        kind: getattr(model, f"get_{kind}_features")(**named, **kwargs)
        for kind, named in feature_arguments(model, inputs).items()
    }


@torch.no_grad()
def features(model: Any, inputs: Inputs) -> Found:
    """Visual features and the vision encoder's hidden states."""
    return dict(tensors_of(feature_outputs(model, inputs, output_hidden_states=True), "features"))


def everything(model: Any, inputs: Inputs) -> Found:
    """All that a model gives out for one prompt, whichever way it is called."""
    found = forward(model, inputs) | features(model, inputs) | generate(model, inputs)
    return found | generate(model, inputs, num_beams=2) | generate(model, inputs, cache_implementation="static")


# ------------------------------------------------------------------------------------ comparing


def assert_same(ours: Found, theirs: Found) -> None:
    """Bitwise the same tensors at the same places."""
    assert list(ours) == list(theirs)
    changed = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not changed, f"{len(changed)} of {len(theirs)} tensors differ: {changed[:8]}"


def query_width(model: Any) -> int:
    """All query heads of a decoder layer side by side."""
    layer = next(layer for layer in family_of(model).language(model).layers if hasattr(layer, "self_attn"))
    width: int = layer.self_attn.o_proj.in_features  # queries may share their projection with a gate
    return width


def under(name: str) -> Callable[[str], str]:
    """`msg` of `assert_close`: its own words under a name."""
    return lambda message: f"{name}\n{message}"


def assert_near(ours: Found, theirs: Found, *, atol: float, rtol: float = 0.0) -> None:
    """The same tensors at the same places up to a tolerance."""
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=atol, rtol=rtol, msg=under(name))


def assert_differ(ours: Tensor, theirs: Tensor, by: float = 1e-3) -> None:
    """Some value of the same shape is clearly another: what is compared elsewhere could have differed."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() > by


def assert_says(error: BaseException, *parts: str) -> None:
    """The message is one line and holds each part, a regular expression."""
    message = str(error)
    assert "\n" not in message
    missing = [part for part in parts if not re.search(part, message)]
    assert not missing, f"{missing} not in {message!r}"


def every(function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
    """``[function(item), ...]``."""
    return [function(item) for item in items]
