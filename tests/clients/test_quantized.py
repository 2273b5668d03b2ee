"""Weights of optimum-quanto and of HQQ under a merging model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client_helpers import client
from decode_helpers import IMAGE, IMAGES, SETTINGS, TEXT, single
from helpers import assert_differ, assert_same, forward, generate
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, inputs_for, real_positions, tiny_model

quanto = client("optimum.quanto")
hqq = client("hqq.core.quantize")


def quanto_weights(model: Any) -> Any:
    """Every layer with weights in eight bits; four would first compile a kernel for minutes."""
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def hqq_weights(model: Any, bits: int) -> Any:
    """Every linear layer but the last with weights in few bits."""
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=8)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and module.weight.numel() % 8 == 0:
            new = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model


QUANTIZED: dict[str, Callable[[Any], Any]] = {
    "quanto, 8 bits": quanto_weights,
    "hqq, 8 bits": lambda model: hqq_weights(model, 8),
    "hqq, 4 bits": lambda model: hqq_weights(model, 4),
}


def values(module: Any) -> Tensor:
    """What the few bits of a layer stand for."""
    weight: Tensor = module.dequantize() if hasattr(module, "dequantize") else module.weight.dequantize()
    return weight


def twin_of(model: Any, family: str) -> Any:
    """A model in full precision with the values of a quantized one."""
    twin = tiny_model(family)
    changed = 0
    for name, module in list(twin.named_modules()):
        other = model.get_submodule(name)
        if isinstance(module, nn.Linear | nn.Conv2d) and type(other) is not type(module):
            module.weight = nn.Parameter(values(other).reshape(module.weight.shape).detach().clone())
            changed += 1
    assert changed > 30
    return twin


@pytest.mark.parametrize("order", ["quantized first", "patch first"])
@pytest.mark.parametrize("way", QUANTIZED)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family: str, way: str, order: str) -> None:
    """Merging goes as in full precision with the same values; a batch is its rows; off is bitwise off."""
    quantized = QUANTIZED[way](tiny_model(family))
    twin = twin_of(quantized, family)
    inputs = inputs_for(twin, [IMAGES, TEXT, IMAGE])
    stock = everything(quantized, inputs)
    assert_differ(stock["forward.logits"], forward(tiny_model(family), inputs)["forward.logits"])
    patch(twin, **SETTINGS[family])
    expected = forward(twin, inputs)["forward.logits"]

    if order == "patch first":
        model = tiny_model(family)
        patch(model, **SETTINGS[family])
        model = QUANTIZED[way](model)
    else:
        model = quantized
        patch(model, vit_layers=[], llm_layers=[])
        assert_same(everything(model, inputs), stock)
        patch(model, **SETTINGS[family])
    found = forward(model, inputs)["forward.logits"]
    assert found.isfinite().all() and session_of(model).report.kept_fraction < 0.5
    assert_differ(found, stock["forward.logits"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for row, sample in enumerate([IMAGES, TEXT, IMAGE]):
        alone = forward(model, single(twin, sample))["forward.logits"][0]
        torch.testing.assert_close(found[row][real_positions(inputs, row)], alone, atol=2e-4, rtol=1e-4)
    with merging(model, False):
        assert_same(everything(model, inputs), stock)
    unpatch(model)
    assert_same(everything(model, inputs), stock)


def everything(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return forward(model, inputs) | generate(model, inputs, num_beams=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_calibrated_before_patching(family: str) -> None:
    """The recipe: quantize, calibrate, freeze, patch. Off is then bitwise the calibrated model."""
    model = tiny_model(family)
    inputs = single(model, IMAGES)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with torch.no_grad(), quanto.Calibration():
        model(**inputs)
    quanto.freeze(model)
    stock = forward(model, inputs)
    patch(model, **SETTINGS[family])
    found = forward(model, inputs)["forward.logits"]
    assert found.isfinite().all()
    assert_differ(found, stock["forward.logits"])
    with merging(model, False):
        assert_same(forward(model, inputs), stock)
    unpatch(model)
    assert_same(forward(model, inputs), stock)
