"""PEFT with `task_type="CAUSAL_LM"`, whose older releases call the `forward` of the model inside.

`make test` runs it with the PEFT of the project's environment, `make test-clients` with older ones.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from client_helpers import (
    CLOSE,
    assert_release,
    assert_same_gradients,
    assert_same_prompt,
    gradients,
    labelled,
    with_other_answer,
)
from decode_helpers import IMAGE, IMAGES, RAGGED, RICHEST, SETTINGS, patched, single, steps
from families import family_of
from helpers import assert_differ, assert_near, assert_same, forward
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, inputs_for, tiny_model

# PEFT asks the model for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ORDERS = ("adapter first", "patch first")
EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}
TOWER = {name: family_of(name).tower_name for name in FAMILIES}


def adapted(family: str, order: str, *, identity: bool, task: str | None = "CAUSAL_LM", **settings: Any) -> Any:
    """A merging tiny model with adapters, at first without effect or with one."""
    model = tiny_model(family)
    if order == "patch first":
        patch(model, **SETTINGS[family])
    targets = [*family_of(family).adapter_targets, family_of(family).encoder_mlp]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=identity, task_type=task, **settings
    )
    torch.manual_seed(5)
    wrapper = peft.get_peft_model(model, config).eval()
    if order == "adapter first":
        patch(wrapper, **SETTINGS[family])
    return wrapper


def test_this_is_the_release_that_is_asked_for() -> None:
    assert_release(peft)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_without_effect_is_the_plain_model(family: str, order: str) -> None:
    wrapper, plain = adapted(family, order, identity=True), patched(family)
    for inputs in (single(plain, RICHEST[family]), inputs_for(plain, RAGGED)):
        for asked in ({"logits_to_keep": 4}, {"logits_to_keep": 1}, {"labels": labelled(inputs)["labels"]}, {}):
            assert_near(forward(wrapper, inputs, **asked), forward(plain, inputs, **asked), **EXACT)
            assert session_of(wrapper).report == session_of(plain).report
    assert session_of(plain).report.kept_fraction < 0.5
    inputs = single(plain, IMAGE)
    expected, found = steps(plain, inputs), steps(wrapper, inputs)
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(expected[1]), **EXACT)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_ranks_its_own_prompt(family: str, order: str) -> None:
    wrapper = adapted(family, order, identity=False)
    inputs = labelled(single(tiny_model(family), RICHEST[family]))
    with torch.no_grad():
        ours, theirs = (wrapper(**x).logits for x in (inputs, with_other_answer(inputs)))
        assert_same_prompt(ours, theirs)
        for given in (inputs, with_other_answer(inputs)):  # the token before the labels is the first that is kept
            del given["labels"]
        ours, theirs = (wrapper(**x, logits_to_keep=4).logits for x in (inputs, with_other_answer(inputs)))
        assert_same_prompt(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_adapters(family: str) -> None:
    """As those of a wrapper that knows no task, and those are a plain call's."""
    found, expected = (adapted(family, "adapter first", identity=False, task=t).train() for t in ("CAUSAL_LM", None))
    inputs = labelled(single(tiny_model(family), RICHEST[family]))
    losses = found(**inputs).loss, expected.get_base_model()(**inputs).loss
    torch.testing.assert_close(*losses, **EXACT)
    assert_same_gradients(gradients(found, losses[0]), gradients(expected, losses[1]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_in(family: str, order: str) -> None:
    wrapper = adapted(family, order, identity=False)
    inputs = labelled(single(tiny_model(family), IMAGES))
    expected = forward(wrapper, inputs)
    assert_differ(expected["forward.logits"], forward(patched(family), inputs)["forward.logits"])
    session = session_of(wrapper)
    folded = wrapper.merge_and_unload()
    assert session_of(folded) is session
    found = forward(folded, inputs)
    torch.testing.assert_close(found["forward.logits"], expected["forward.logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["forward.loss"], expected["forward.loss"], **CLOSE)
    fresh = tiny_model(family)
    fresh.load_state_dict(folded.state_dict())
    unpatch(folded)
    assert_same(forward(folded, inputs), forward(fresh, inputs))
    patch(fresh, **SETTINGS[family])
    assert_same(forward(fresh, inputs), found)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_that_is_trained_whole(family: str, order: str) -> None:
    """`modules_to_save` keeps two towers: the adapter's and the one that there was; both merge."""
    wrapper = adapted(family, order, identity=True, modules_to_save=[TOWER[family]])
    plain = patched(family)
    inputs = labelled(single(plain, IMAGES))
    expected = forward(plain, inputs)
    assert_near(forward(wrapper, inputs), expected, **EXACT)
    assert session_of(wrapper).report == session_of(plain).report
    other = tiny_model(family)  # the same as the adapter's tower will be
    for name, weight in wrapper.named_parameters():
        if ".modules_to_save." in name and name.endswith("weight") and weight.dim() > 1:
            inner = name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
            with torch.no_grad():
                weight *= 1.1
                other.get_parameter(inner).copy_(weight)
    patch(other, **SETTINGS[family])
    trained = forward(other, inputs)
    assert_differ(trained["forward.logits"], expected["forward.logits"])
    assert_near(forward(wrapper, inputs), trained, **EXACT)
    with wrapper.disable_adapter():
        assert_near(forward(wrapper, inputs), expected, **EXACT)
        assert session_of(wrapper).report == session_of(plain).report
        with merging(wrapper, False):
            assert_near(forward(wrapper, inputs), forward(tiny_model(family), inputs), **EXACT)
    wrapper.add_adapter("second", wrapper.peft_config["default"])
    wrapper.set_adapter("second")
    assert_near(forward(wrapper, inputs), expected, **EXACT)
    wrapper.set_adapter("default")
    assert_near(forward(wrapper, inputs), trained, **EXACT)
    folded = wrapper.merge_and_unload()
    assert_near(forward(folded, inputs), trained, **EXACT)
