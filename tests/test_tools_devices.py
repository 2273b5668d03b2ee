"""A patched model in the hands of accelerate: weights in memory or on disk until they are used, `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.state import AcceleratorState

from decode_helpers import IMAGES, RAGGED, SETTINGS, patched, single
from families import family_of
from helpers import assert_differ, assert_same, forward, generate, under
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, inputs_for, tiny_model

CPU = torch.device("cpu")


def dispatched(model: Any, folder: Path) -> None:
    """Parts and layers in turn in memory and on disk."""
    known = family_of(model)
    parts = [name for name, _ in model.model.named_children() if name != known.language_name]
    text, path = known.language(model), f"model.{known.language_name}"
    places = {f"model.{name}": "disk" for name in parts} | {"lm_head": "disk"}
    places |= {f"{path}.{name}": "cpu" for name, _ in text.named_children() if name != "layers"}
    places |= {f"{path}.layers.{i}": ("cpu", "disk")[i % 2] for i in range(len(text.layers))}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk offload": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "device map": dispatched,
}


def stock_generates(family: str, way: str, inputs: Any, folder: Path) -> bool:
    """Whether the stock model can generate there at all."""
    model = tiny_model(family)
    WAYS[way](model, folder)
    try:
        model.generate(**inputs, max_new_tokens=2)
    except NotImplementedError as error:
        assert "meta tensor" in str(error)  # a parameter of the base model, read outside of its parts' forwards
        return False
    return True


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # the newline
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")  # meta
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights(family: str, way: str, order: str, tmp_path: Path) -> None:
    if not family_of(family).offloads:
        stock = tiny_model(family)
        WAYS[way](stock, tmp_path / "weights")
        with pytest.raises(RuntimeError, match="meta"):
            forward(stock, inputs_for(stock, RAGGED))
        pytest.skip("stock: its tower reads the weights of a module that does not run")
    plain, model = patched(family), tiny_model(family)
    inputs, stock = inputs_for(model, RAGGED), forward(tiny_model(family), inputs_for(model, RAGGED))
    expected = forward(plain, inputs)
    if order == "after":
        patch(model, **SETTINGS[family])
    WAYS[way](model, tmp_path / "weights")
    assert any(weight.is_meta for weight in model.parameters()), "nothing was moved away"
    if order == "before":
        patch(model, **SETTINGS[family])
    assert_same(forward(model, inputs), expected)
    assert_differ(expected["forward.logits"], stock["forward.logits"])
    assert session_of(model).report == session_of(plain).report
    if stock_generates(family, way, inputs, tmp_path / "stock"):
        assert_same(generate(model, inputs), generate(plain, inputs))
    with merging(model, False):
        assert_same(forward(model, inputs), stock)
    unpatch(model)
    assert_same(forward(model, inputs), stock)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerators_prepare(family: str, precision: str, order: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one per process, whatever its settings
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    plain, model = patched(family), tiny_model(family)
    if order == "after":
        patch(model, **SETTINGS[family])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if order == "before":
        patch(model, **SETTINGS[family])
    inputs = single(plain, IMAGES)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = forward(plain, inputs)
    found = forward(model, inputs)
    assert found["forward.logits"].dtype == torch.float32
    torch.testing.assert_close(found["forward.logits"], expected["forward.logits"].float())
    assert session_of(model).report == session_of(plain).report
    labels = {"labels": inputs["input_ids"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = plain(**inputs, **labels).loss
    loss.backward()
    accelerator.backward(model(**inputs, **labels).loss)
    gradients = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], msg=under(name))
    optimizer.step()
    assert session_of(accelerator.unwrap_model(model)) is session_of(model)
    unpatch(model)
    assert session_of(model) is None
    AcceleratorState._reset_state(reset_partial_state=True)
