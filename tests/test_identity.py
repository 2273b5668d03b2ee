"""Where nothing merges, nothing changes: bitwise where merging is off, to 1e-6 where the machinery runs idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import skip_where_stock_mixes_images
from families import families_and, families_and_methods, family_of
from helpers import (
    MERGING,
    PROMPTS,
    VISUAL,
    Found,
    assert_differ,
    assert_near,
    assert_same,
    everything,
    feature_outputs,
    features,
    forward,
    generate,
    logits,
    prompt,
    richest,
)
from illava_hooks import METHODS, merging, patch, unpatch
from illava_hooks.engine.compat import CACHE
from tiny_models import FAMILIES, Inputs, tiny_model

BACK_ENDS = ("sdpa", "eager")

#: Not identity, yet too little to remove a single token of the tiny prompts.
IDLE: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 1e-4, "llm_layers": [1, 3], "llm_ratio": 0.9999}


# ------------------------------------------------------------------------------ ways to be the identity


@contextmanager
def zero_removed(model: Any, inputs: Inputs) -> Iterator[None]:
    patch(model, vit_layers=[1, 2], vit_r=0, llm_layers=[2], llm_ratio=1.0)
    yield


@contextmanager
def zero_fraction(model: Any, inputs: Inputs) -> Iterator[None]:
    patch(model, vit_layers=[1, 2], vit_r=0.0, llm_layers=[2], llm_ratio=1)
    yield


@contextmanager
def no_layers(model: Any, inputs: Inputs) -> Iterator[None]:
    patch(model, vit_layers=[], vit_r=0.25, llm_layers=[], llm_ratio=0.5)
    yield


@contextmanager
def switched_off_here(model: Any, inputs: Inputs) -> Iterator[None]:
    patch(model, **MERGING)
    forward(model, inputs)
    with merging(model, False):
        yield


@contextmanager
def switched_off_for_all(model: Any, inputs: Inputs) -> Iterator[None]:
    session = patch(model, **MERGING)
    forward(model, inputs)
    session.enabled = False
    yield


@contextmanager
def unpatched(model: Any, inputs: Inputs) -> Iterator[None]:
    patch(model, **MERGING)
    forward(model, inputs)
    generate(model, inputs)
    unpatch(model)
    yield


IDENTITIES = (zero_removed, zero_fraction, no_layers, switched_off_here, switched_off_for_all, unpatched)


@cache
def stock(family: str, back_end: str, kind: str) -> Found:
    model = tiny_model(family, attn_implementation=back_end)
    return everything(model, prompt(model, kind))


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize(("family", "kind"), families_and(PROMPTS))
def test_bitwise_the_stock_model(family: str, kind: str, back_end: str, identity: Callable[..., Any]) -> None:
    model = tiny_model(family, attn_implementation=back_end)
    inputs = prompt(model, kind)
    with identity(model, inputs):
        assert_same(everything(model, inputs), stock(family, back_end, kind))


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_feature_outputs_have_the_stock_entries(family: str, identity: Callable[..., Any]) -> None:
    model = tiny_model(family)
    inputs = prompt(model, richest(family))
    expected = {kind: list(out) for kind, out in feature_outputs(model, inputs).items()}
    with identity(model, inputs):
        assert {kind: list(out) for kind, out in feature_outputs(model, inputs).items()} == expected


@pytest.mark.parametrize(("family", "kind"), families_and(VISUAL, PROMPTS))
def test_merging_would_be_seen(family: str, kind: str) -> None:
    model = tiny_model(family)
    inputs = prompt(model, kind)
    skip_where_stock_mixes_images(family, PROMPTS[kind])
    session = patch(model, **MERGING)
    ours, theirs = everything(model, inputs), stock(family, "sdpa", kind)
    assert session.report.kept_fraction < 0.6
    for name in ("forward.logits", "generate.logits.0", "generate 2.logits.0", "generate static.logits.0"):
        assert_differ(ours[name], theirs[name])
    cached = f"forward.{CACHE}.{family_of(family).attending(model)[-1]}.keys"
    assert ours[cached].shape[-2] < theirs[cached].shape[-2]


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_bitwise_stock_while_merging(family: str, back_end: str) -> None:
    model = tiny_model(family, attn_implementation=back_end)
    inputs = prompt(model, "text")
    patch(model, **MERGING)
    logits(model, prompt(model, "image"))
    assert_same(everything(model, inputs), stock(family, back_end, "text"))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_alone_stay_stock_when_only_the_language_model_merges(family: str) -> None:
    model = tiny_model(family)
    inputs = prompt(model, richest(family))
    expected = features(model, inputs)
    patch(model, **{**MERGING, "vit_layers": []})
    assert_same(features(model, inputs), expected)


# --------------------------------------------------------------------------- the machinery, idle


def at_real_tokens(found: Found, inputs: Inputs, *, right_aligned: bool = False) -> Found:
    """Leaves padding out: of hidden states and logits, and of cached keys and values.

    Args:
        found: what a model gave out.
        inputs: what it was given.
        right_aligned: whether cached rows end together, whatever the side of the padding.
    """
    real = inputs["attention_mask"].bool()
    cached = real.sort(dim=1).values if right_aligned else real
    return {name: _real(name, tensor, real, cached) for name, tensor in found.items()}


def _real(name: str, tensor: Tensor, real: Tensor, cached: Tensor) -> Tensor:
    if name.endswith((".keys", ".values")):
        decoded = tensor.shape[-2] - cached.shape[1]
        return tensor.transpose(1, 2)[torch.nn.functional.pad(cached, (0, decoded), value=True)]
    return tensor[real] if tensor.shape[:2] == real.shape and tensor.dim() == 3 else tensor


def check_idle(
    family: str,
    kind: str,
    settings: dict[str, Any],
    run: Callable[[Any, Inputs], Found],
    side: Any = "left",
    **kwargs: Any,
) -> None:
    """A patched model that merges nothing gives what the stock model gives, at every real position."""
    model = tiny_model(family, **kwargs)
    inputs = prompt(model, kind, side=side)
    expected = at_real_tokens(run(model, inputs), inputs)
    session = patch(model, **settings)
    found = at_real_tokens(run(model, inputs), inputs, right_aligned=True)
    if side == "right":  # padding behind a row fades a state that stock carries along
        found, expected = ({n: t for n, t in some.items() if not n.endswith("_states")} for some in (found, expected))
    assert session.report.kept_fraction == 1
    assert_near(found, expected, atol=1e-6, rtol=1e-6)


STAGES = {
    "both": IDLE,
    "encoder": {**IDLE, "llm_layers": []},
    "decoder": {**IDLE, "vit_layers": []},
}


#: Stock eager attention gives NaN for padding in float64: its mask overflows in a float32 softmax.
IDLE_CASES = [
    (family, back_end, kind, dtype)
    for family, kind in families_and(VISUAL, PROMPTS)
    for back_end in BACK_ENDS
    for dtype in (torch.float32, torch.float64)
    if (back_end, kind, dtype) != ("eager", "ragged", torch.float64)
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("family", "back_end", "kind", "dtype"), IDLE_CASES)
def test_idle_machinery(family: str, back_end: str, kind: str, stage: str, dtype: Any) -> None:
    check_idle(family, kind, STAGES[stage], everything, attn_implementation=back_end, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_machinery_with_right_padding(family: str) -> None:
    check_idle(family, "ragged", IDLE, forward, side="right", dtype=torch.float64)


@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [
        (family, method, kind)
        for family, method in families_and_methods(METHODS)
        for name, kind in families_and(VISUAL, PROMPTS)
        if name == family
    ],
)
def test_idle_methods(family: str, method: str, kind: str) -> None:
    check_idle(family, kind, {**IDLE, "method": method}, everything, dtype=torch.float64)
