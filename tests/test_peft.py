"""A model inside a PEFT wrapper is the model: the four verbs take the wrapper and act on what is inside."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from decode_helpers import IMAGE, IMAGES, SETTINGS, TEXT, single, steps, stock_keeps_images_apart
from families import family_of
from helpers import assert_differ, assert_same, forward, generate
from illava_hooks import PatchStateError, merging, patch, session_of, unpatch
from tiny_models import FAMILIES, inputs_for, tiny_model

# PEFT asks the model for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

OTHER: dict[str, Any] = {"vit_layers": [2], "vit_r": 0.5, "llm_layers": [2], "llm_ratio": 0.3}
TASKS = (None, "CAUSAL_LM")


def adapted(family: str, task: str | None = None) -> Any:
    """A tiny model with adapters that matter, in evaluation mode."""
    targets = list(family_of(family).adapter_targets)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type=task)
    torch.manual_seed(5)
    return peft.get_peft_model(tiny_model(family), config).eval()


def attributes(model: Any) -> dict[str, list[str]]:
    """The names in the `__dict__` of every module, hooks by number."""
    return {
        name: sorted(vars(module)) + [f"{len(module._forward_pre_hooks)} and {len(module._forward_hooks)} hooks"]
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_patching_the_wrapper_is_patching_the_model_inside(family: str, task: str | None) -> None:
    wrapper, other = adapted(family, task), adapted(family, task)
    inputs = inputs_for(tiny_model(family), [IMAGES, TEXT])
    stock = forward(wrapper, inputs)
    session = patch(wrapper, **SETTINGS[family])
    expected_session = patch(other.get_base_model(), **SETTINGS[family])
    found, expected = forward(wrapper, inputs), forward(other, inputs)
    assert_same(found, expected)
    assert_differ(found["forward.logits"], stock["forward.logits"])
    assert session.report == expected_session.report and session.report.kept_fraction < 0.5
    assert_same(generate(wrapper, inputs), generate(other, inputs))
    if stock_keeps_images_apart(family):
        assert_same(generate(wrapper, inputs, num_beams=2), generate(other, inputs, num_beams=2))


@pytest.mark.parametrize("patched_model", ["wrapper", "inside"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_verbs_take_the_wrapper(family: str, task: str | None, patched_model: str) -> None:
    wrapper = adapted(family, task)
    inside = wrapper.get_base_model()
    inputs = single(inside, IMAGE)
    stock = forward(wrapper, inputs)  # once: transformers leaves hooks when hidden states are asked for
    before = attributes(wrapper)
    assert session_of(wrapper) is None
    with pytest.raises(PatchStateError, match="is not patched"), merging(wrapper, False):
        pass
    session = patch(wrapper if patched_model == "wrapper" else inside, **SETTINGS[family], track=True)
    assert session_of(wrapper) is session_of(inside) is session
    merged = forward(wrapper, inputs)
    assert_differ(merged["forward.logits"], stock["forward.logits"])
    assert len(session.provenance.at("language", 3).images) == 1
    with merging(wrapper, False) as yielded:
        assert yielded is wrapper and not session.active
        assert_same(forward(wrapper, inputs), stock)
    again = patch(wrapper, **OTHER)
    assert session_of(inside) is again is not session
    assert_differ(forward(wrapper, inputs)["forward.logits"], merged["forward.logits"])
    unpatch(wrapper)
    assert session_of(wrapper) is None is session_of(inside)
    assert attributes(wrapper) == before
    assert_same(forward(wrapper, inputs), stock)
    unpatch(wrapper)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_and_the_patch_stays(family: str) -> None:
    wrapper = adapted(family)
    inputs = single(wrapper.get_base_model(), IMAGE)
    patch(wrapper, **SETTINGS[family])
    with_adapters = forward(wrapper, inputs)["forward.logits"]
    with wrapper.disable_adapter():
        without = forward(wrapper, inputs)["forward.logits"]
    plain = tiny_model(family)
    patch(plain, **SETTINGS[family])
    expected = forward(plain, inputs)["forward.logits"]
    torch.testing.assert_close(without, expected, atol=1e-6, rtol=1e-6)
    assert_differ(with_adapters, expected)
    taken_out = wrapper.unload()
    assert session_of(taken_out) is session_of(wrapper)
    torch.testing.assert_close(forward(taken_out, inputs)["forward.logits"], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        torch.stack(steps(taken_out, inputs)[1]), torch.stack(steps(plain, inputs)[1]), atol=1e-6, rtol=1e-6
    )
