"""Merging adds no wait for the device inside layers, and never holds an attention map."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from decode_helpers import SETTINGS
from families import FAMILIES, families, families_and_methods, family_of
from illava_hooks import METHODS, merging, patch
from illava_hooks.merge.scores import SCORES, ScoreInputs
from tiny_models import Inputs, Sample, inputs_for, tiny_model

RAGGED = [
    Sample(text_seed=1, images=((48, 30), (64, 64))),
    Sample(text_seed=2),
    Sample(text_seed=3, images=((32, 90),), videos=(4,)),
]
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "equal",
    "is_nonzero",
    "item",
)


def ragged(family: str) -> list[Sample]:
    """Two images, text, and an image with a video where the family takes videos."""
    last = RAGGED[-1] if family_of(family).with_videos else dataclasses.replace(RAGGED[-1], videos=())
    return [*RAGGED[:-1], last]


class WaitCounter(TorchDispatchMode):
    """Counts operations that wait for the device, by where they happen: inside a layer, or outside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inside: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self.depth = 0
        self.handles = []
        for layer in [*family_of(model).encoder_layers(model), *family_of(model).language(model).layers]:
            # Our own pre-hooks were there first; this one must run before them.
            self.handles.append(layer.register_forward_pre_hook(self.enter, prepend=True))
            self.handles.append(layer.register_forward_hook(self.leave, always_call=True))

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        if masked or name in WAITING:
            (self.inside if self.depth else self.outside)["boolean index" if masked else name] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()


def waits(model: Any, inputs: Inputs) -> WaitCounter:
    with torch.no_grad(), WaitCounter(model) as counter:
        model(**inputs)
    return counter


@pytest.mark.parametrize(("family", "method"), families_and_methods(METHODS))
def test_layers_wait_no_more_than_stock(family: str, method: str) -> None:
    model = tiny_model(family)
    inputs = inputs_for(model, ragged(family))
    patch(model, **SETTINGS[family], method=method)
    waits(model, inputs)  # tables that are made once and remembered
    merged = waits(model, inputs)
    with merging(model, False):
        stock = waits(model, inputs)
    calls = sum(name in inputs for name in ("pixel_values", "pixel_values_videos"))
    added = Counter({name: count * calls for name, count in family_of(family).waits_in_layers.items()})
    assert not merged.inside - stock.inside - added, (merged.inside, stock.inside)
    assert not added - merged.inside, f"{family} waits less than it says"


@pytest.mark.parametrize("times", [1, 0, 3], ids=["ragged", "one", "nine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outside_layers_the_number_of_waits_is_fixed(family: str, times: int) -> None:
    """One transfer plans the language stage; what is read from image sizes and grids is on the host anyway."""
    model = tiny_model(family)
    inputs = inputs_for(model, ragged(family) * times or RAGGED[:1])
    patch(model, **SETTINGS[family])
    waits(model, inputs)
    merged = waits(model, inputs).outside
    with merging(model, False):
        stock = waits(model, inputs).outside
    added = merged - stock
    assert set(added) <= {"_local_scalar_dense"} and added.total() <= 2, added


class LargestOutput(TorchDispatchMode):
    """The largest number of elements that any operation puts out."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("name", SCORES)
def test_no_score_holds_a_map(name: str) -> None:
    heads, tokens, width = 4, 4096, 16
    query, key = torch.randn(1, heads, tokens, width), torch.randn(1, heads, tokens, width)
    inputs = ScoreInputs(
        key=key,
        query=lambda: query,
        last_query=lambda: query[:, :, -1],
        positions=torch.arange(tokens)[None],
        key_valid=None,
        scale=width**-0.5,
        layer_idx=1,
        causal=name != "received_attention",
    )
    with LargestOutput() as watch:
        SCORES[name](inputs)
    assert 0 < watch.largest < tokens * tokens // 4


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family, method in families_and_methods(["illava", "illava-reference"])
        if family in families(with_tiles=False)
    ],
)
def test_no_map_in_a_whole_forward(family: str, method: str) -> None:
    """4,096 patches of one image through both stages, SDPA doing its own work in its kernel."""
    model, samples = tiny_model(family), [Sample(text_seed=1, images=((256, 256),))]
    inputs = inputs_for(model, samples)
    assert family_of(family).segments(model, samples) == [[4096]]
    patch(model, **SETTINGS[family], method=method)
    with torch.no_grad(), LargestOutput() as watch:
        model(**inputs)
    assert 0 < watch.largest < 4096 * 4096 // 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counter_counts(family: str) -> None:
    """The tests above could fail: a layer that asks the device is seen."""
    model = tiny_model(family)
    inputs = inputs_for(model, RAGGED[:1])
    layer = family_of(family).language(model).layers[2]
    handle = layer.input_layernorm.register_forward_hook(
        lambda module, args, out: out[out.sum(-1) > 0].sum().item() and None
    )
    counted = waits(model, inputs).inside
    handle.remove()
    without = waits(model, inputs).inside
    assert counted["_local_scalar_dense"] > without["_local_scalar_dense"]
    assert counted["boolean index"] > without["boolean index"]
