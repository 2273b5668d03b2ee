"""A patched model with weights in eight bits: torch's dynamic quantization, torchao, bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from decode_helpers import IMAGES, SETTINGS, patched, single
from families import family_of
from helpers import assert_differ, key_lengths
from illava_hooks import merging, patch, session_of, unpatch
from illava_hooks.engine.hookset import Hook
from tiny_models import FAMILIES, Inputs, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s)torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def torch_dynamic(model: Any) -> Any:
    """Linear layers replaced in a copy of the model."""
    quantization = pytest.importorskip("torch.ao.quantization", reason="this release of torch leaves it to torchao")
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao_weights(model: Any) -> Any:
    """Weights in eight bits."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def torchao_dynamic(model: Any) -> Any:
    """Weights and activations in eight bits."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


QUANTIZED: list[Callable[[Any], Any]] = [torch_dynamic, torchao_weights, torchao_dynamic]


@torch.no_grad()
def run(model: Any, inputs: Inputs) -> tuple[Tensor, list[int]]:
    """Logits, and the length of each layer's keys."""
    output = model(**inputs)
    return output.logits, key_lengths(output.past_key_values)


def assert_nearer(found: Tensor, near: Tensor, far: Tensor, family: str) -> None:
    """Eight bits cost less than merging changes: of one family's tiny model, by less than of others."""
    most = 0.7 if family_of(family).rounding < 10 else 0.75
    assert (found - near).abs().mean() < most * (found - far).abs().mean()


def left(model: nn.Module) -> list[str]:
    """Modules with a hook of ours."""
    return [
        n
        for n, m in model.named_modules()
        if any(isinstance(h, Hook) for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    ]


@pytest.mark.parametrize("order", ["before", "after", "after a run"])
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits(family: str, quantize: Callable[[Any], Any], order: str) -> None:
    """In any order the same; near the merging model in full precision; unpatched bitwise the quantized one."""
    plain = patched(family)
    inputs = single(plain, IMAGES)
    expected, lengths = run(plain, inputs)
    stock, whole = run(quantize(tiny_model(family)), inputs)
    assert_differ(stock, run(tiny_model(family), inputs)[0], by=1e-2)
    model = tiny_model(family)
    if order == "before":
        model = quantize(model)
    patch(model, **SETTINGS[family])
    if order == "after a run":
        run(model, inputs)
    if order != "before":
        model = quantize(model)
    found, kept = run(model, inputs)
    assert kept < whole
    if not family_of(family).fragile_choice:
        assert kept == lengths
        assert session_of(model).report.visuals == session_of(plain).report.visuals
    assert_nearer(found, expected, stock, family)
    assert_differ(found, expected, by=1e-6)
    with merging(model, False):
        torch.testing.assert_close(run(model, inputs)[0], stock, atol=0, rtol=0)
    unpatch(model)
    assert not left(model) and session_of(model) is None
    torch.testing.assert_close(run(model, inputs)[0], stock, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_eight_bits_are_their_values(family: str) -> None:
    """The same as a model in full precision with the values that the eight bits stand for."""
    model = torchao_weights(tiny_model(family))
    twin = tiny_model(family)
    for (name, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        if isinstance(module, nn.Linear):
            values = module.weight.dequantize()
            assert not torch.equal(values, other.weight), name
            other.weight = nn.Parameter(values)
    inputs = single(twin, IMAGES)
    for one in (model, twin):
        patch(one, **SETTINGS[family])
    (found, kept), (expected, lengths) = run(model, inputs), run(twin, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert kept == lengths
    ids = [one.generate(**inputs, max_new_tokens=4) for one in (model, twin)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_bitsandbytes(family: str, tmp_path: Path) -> None:
    """As transformers loads it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = tiny_model(family)
    plain.save_pretrained(tmp_path)
    model = (
        type(plain)
        .from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu", dtype=torch.float32
        )
        .eval()
    )
    assert family_of(family).language(model).layers[0].self_attn.q_proj.weight.dtype == torch.int8
    inputs = single(plain, IMAGES)
    stock, whole = run(model, inputs)
    patch(plain, **SETTINGS[family])
    expected, lengths = run(plain, inputs)
    session = patch(model, **SETTINGS[family])
    found, kept = run(model, inputs)
    assert kept < whole and session.report.kept_fraction < 0.5
    assert kept == lengths or family_of(family).fragile_choice
    assert_nearer(found, expected, stock, family)
    model.generate(**inputs, max_new_tokens=3)
    unpatch(model)
    assert not left(model)
    torch.testing.assert_close(run(model, inputs)[0], stock, atol=0, rtol=0)
