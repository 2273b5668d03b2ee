"""`model.forward(...)`, as some libraries call it, gives what `model(...)` gives: for the head and the base model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from client_helpers import assert_same_gradients, assert_same_prompt, gradients, labelled, with_other_answer
from decode_helpers import KINDS, RICHEST, SETTINGS, patched, single
from families import families_and
from helpers import assert_differ, assert_same, tensors_of
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

#: A prompt that the others are not.
OTHER = Sample(text_seed=9, images=((32, 32),), text=(3, 4))

#: What is asked of the head beside its inputs.
ASKED: dict[str, dict[str, Any]] = {
    "all logits": {},
    "labels": {},
    "last logit": {"logits_to_keep": 1},
    "four logits": {"logits_to_keep": 4},
    "an index": {"logits_to_keep": torch.tensor([-1])},
    "a tuple": {"return_dict": False},
    "no cache": {"use_cache": False},
}


def given(inputs: Inputs, asked: str) -> dict[str, Any]:
    return {**(labelled(inputs) if asked == "labels" else inputs), **ASKED[asked], "output_hidden_states": True}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("family", "kind"), families_and(["image", "ragged", "both"], KINDS))
def test_head(family: str, kind: str, asked: str) -> None:
    model = patched(family)
    arguments = given(inputs_for(model, KINDS[kind]), asked)
    with torch.no_grad():
        expected = dict(tensors_of(model(**arguments)))
        report = session_of(model).report
        model(**single(model, OTHER))
        assert session_of(model).report != report
        found = dict(tensors_of(model.forward(**arguments)))
        assert_same(found, expected)
        assert session_of(model).report == report and report.kept_fraction < 0.5
        with merging(model, False):
            stock = dict(tensors_of(model.forward(**arguments)))
            assert_same(stock, dict(tensors_of(model(**arguments))))
            assert_same(stock, dict(tensors_of(tiny_model(family)(**arguments))))
    assert any(not torch.equal(found[name], stock[name]) for name in stock if found[name].shape == stock[name].shape)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_ranks_its_own_prompt(family: str, keep: bool) -> None:
    """Labels, or as many logits as the answer is long and one more, tell which tokens are the answer."""
    model = patched(family)
    inputs = single(model, RICHEST[family]) if keep else labelled(single(model, RICHEST[family]))
    asked = {"logits_to_keep": 4} if keep else {}
    with torch.no_grad():
        ours, theirs = (model.forward(**x, **asked).logits for x in (inputs, with_other_answer(inputs)))
    assert_same_prompt(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str) -> None:
    model = patched(family).train()
    inputs = labelled(single(model, RICHEST[family]))
    expected, found = model(**inputs).loss, model.forward(**inputs).loss
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert_same_gradients(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_base_model(family: str, kind: str) -> None:
    """Both stages merge, and the report says so."""
    for model in (patched(family), tiny_model(family)):
        if session_of(model) is None:
            patch(model.model, **SETTINGS[family])
        arguments = {**inputs_for(model, KINDS[kind]), "output_hidden_states": True}
        with torch.no_grad():
            expected = dict(tensors_of(model.model(**arguments)))
            report = session_of(model).report
            model.model(**single(model, OTHER))
            assert session_of(model).report != report
            found = dict(tensors_of(model.model.forward(**arguments)))
            with merging(model, False):
                stock = dict(tensors_of(model.model.forward(**arguments)))
        assert_same(found, expected)
        assert session_of(model).report == report and report.kept_fraction < 0.5
        assert_same(stock, dict(tensors_of(tiny_model(family).model(**arguments))))
        assert_differ(found[".last_hidden_state"], stock[".last_hidden_state"])


@pytest.mark.parametrize("family", FAMILIES)
def test_positional_ids(family: str) -> None:
    model = patched(family)
    inputs = single(model, RICHEST[family])
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        for called in (model, model.model):
            expected = dict(tensors_of(called(input_ids=ids, **inputs)))
            assert_same(dict(tensors_of(called.forward(ids, **inputs))), expected)
            assert_same(dict(tensors_of(called(ids, **inputs))), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_stays_and_nothing_is_left(family: str) -> None:
    """Libraries read which columns a model takes from its signature."""
    model, stock = patched(family), tiny_model(family)
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        assert ours.forward.__self__ is ours  # TRL 1.8 reads both
        assert inspect.signature(ours.forward.__func__) == inspect.signature(theirs.forward.__func__)
    unpatch(model)
    for module in model.modules():
        assert "forward" not in vars(module)
    inputs = single(model, RICHEST[family])
    with torch.no_grad():
        assert_same(dict(tensors_of(model.forward(**inputs))), dict(tensors_of(stock(**inputs))))


@pytest.mark.parametrize("order", ["patch first", "wrapper first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_on_the_instance(family: str, order: str) -> None:
    """TRL replaces `model.forward` by a function that calls the one it found there, or the base model itself."""
    model, plain = tiny_model(family), patched(family)
    inputs = labelled(single(model, RICHEST[family]))

    def wrap() -> None:
        original = model.forward

        def instead(*args: Any, around: bool = False, labels: Any = None, **kwargs: Any) -> Any:
            if around:
                return model.base_model(*args, **kwargs).last_hidden_state
            return original(*args, labels=labels, **kwargs)

        model.forward = instead

    if order == "wrapper first":
        wrap()
    patch(model, **SETTINGS[family])
    if order == "patch first":
        wrap()
    with torch.no_grad():
        expected = plain(**inputs, output_hidden_states=True)
        torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=0, rtol=0)
        torch.testing.assert_close(model.forward(**inputs).logits, expected.logits, atol=0, rtol=0)
        torch.testing.assert_close(model(**inputs, around=True), expected.hidden_states[-1], atol=0, rtol=0)
        unpatch(model)
        stock = tiny_model(family)(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, stock, atol=0, rtol=0)
        torch.testing.assert_close(model.forward(**inputs).logits, stock, atol=0, rtol=0)
        patch(model, **SETTINGS[family])
        torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=0, rtol=0)
