"""Outside nothing changes shape; training works; threads do not meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import BOTH, IMAGE, IMAGES, KINDS, RICHEST, SETTINGS, VIDEO, patched, single
from families import families_and, family_of
from helpers import OLD_TORCH, RECORDS, feature_outputs, keyed
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model


def shapes(value: Any) -> Any:
    """The nesting and the shapes of an output, without the records that features carry."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(item) for key, item in value.items() if key != RECORDS}
    if isinstance(value, list | tuple):
        return [shapes(item) for item in value]
    return value.get_seq_length() if hasattr(value, "get_seq_length") else value


@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_outputs_have_the_unpatched_shapes(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    with torch.no_grad():
        merged = shapes(model(**inputs, output_hidden_states=True))
        as_tuple = shapes(model(**inputs, output_hidden_states=True, return_dict=False))
        with merging(model, False):
            assert merged == shapes(model(**inputs, output_hidden_states=True))
            assert as_tuple == shapes(model(**inputs, output_hidden_states=True, return_dict=False))


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_features_have_the_unpatched_shapes(family: str, kind: str, return_dict: bool) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    with torch.no_grad():
        merging_outputs = feature_outputs(model, inputs, return_dict=return_dict, output_hidden_states=True)
        with merging(model, False):
            stock_outputs = feature_outputs(model, inputs, return_dict=return_dict, output_hidden_states=True)
    for modality, merged in merging_outputs.items():
        stock = stock_outputs[modality]
        assert shapes(merged) == shapes(stock)
        assert not torch.equal(merged[0], stock[0]), "nothing was merged"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_positions_show_what_absorbed_them(family: str) -> None:
    """The last hidden state repeats survivors: as many distinct rows as the last layer has tokens."""
    model = patched(family)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    lengths = [lengths[0] for lengths in session_of(model).report.sequence_tokens]
    for index, state in enumerate(hidden[1:]):  # newlines are equal until they are rotated
        assert len(state[0].unique(dim=0)) == lengths[index]


def with_labels(model: Any, sample: Any, count: int = 3) -> Inputs:
    inputs = single(model, sample)
    labels = inputs["input_ids"].clone()
    labels[:, :-count] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize(("family", "kind"), families_and(["image", "both"], KINDS))
def test_loss_and_gradients(family: str, kind: str) -> None:
    model = patched(family)
    loss = model(**with_labels(model, KINDS[kind][0])).loss
    loss.backward()
    assert loss.isfinite()
    known = family_of(family)
    idle = known.idle_weights(model)
    layers = [*known.encoder_layers(model), *known.language(model).layers]
    for module in [*layers, known.projector(model), model.lm_head]:
        trained = {name: weight for name, weight in module.named_parameters() if id(weight) not in idle}
        for name, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not trained or any(parameter.grad.abs().max() > 0 for parameter in trained.values())


class CallCounter:
    """Counts the calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # newer releases rename it
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = patched(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            language = family_of(family).language(model)
            assert language.gradient_checkpointing
            counter = CallCounter(language.layers[2].input_layernorm)
        loss = model(**with_labels(model, RICHEST[family])).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert counter.calls == 2, "the layer was not run again for its gradients"
    (plain_loss, plain), (loss, gradients) = found
    rtol = 1e-6 if OLD_TORCH else 0  # without a graph, old releases run other kernels
    torch.testing.assert_close(loss, plain_loss, atol=0, rtol=rtol)
    assert plain.keys() == gradients.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_leak(family: str) -> None:
    """What stands behind the first label changes no logits before it, and not who is merged."""
    model = patched(family, track=True)
    inputs = with_labels(model, IMAGES)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -2:] = torch.tensor([33, 44])
    other["labels"] = torch.where(inputs["labels"] == -100, -100, other["input_ids"])
    found = []
    for given in (inputs, other):
        with torch.no_grad():
            logits = model(**given).logits
        seats = [image.seats for image in session_of(model).provenance.at("language", 3).images]
        found.append((logits, seats))
    (first, seats), (second, again) = found
    torch.testing.assert_close(first[:, :-2], second[:, :-2], atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(seats, again, strict=True))
    unlabelled = {name: value for name, value in other.items() if name != "labels"}
    with torch.no_grad():
        assert (model(**unlabelled).logits[:, :-2] - second[:, :-2]).abs().max() > 1e-3, "the query mattered"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_to_keep_ranks_like_labels(family: str) -> None:
    model = patched(family)
    inputs = with_labels(model, IMAGES)
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = model(**inputs, labels=labels).logits[:, -4:]
        torch.testing.assert_close(model(**inputs, logits_to_keep=4).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_do_not_meet(family: str) -> None:
    model = patched(family)
    prompts = [single(model, sample) for sample in (IMAGE, IMAGES, BOTH, VIDEO) if family_of(family).takes(sample)]

    def run(inputs: Inputs, enabled: bool) -> Tensor:
        with torch.no_grad(), merging(model, enabled):
            where = family_of(family).explicit_positions(model, inputs)
            return model(**inputs, **where).logits

    jobs = [(inputs, enabled) for inputs in prompts for enabled in (True, False, True)]
    expected = [run(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(*job), jobs * 3))
    for ours, serial in zip(found, expected * 3, strict=True):
        assert torch.equal(ours, serial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = patched(family, dtype=dtype)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs_for(model, KINDS["ragged"]).items()}
    with torch.no_grad():
        out = model(**inputs)
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    assert keyed(out.past_key_values)[-1].keys.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS["ragged"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_model(family: str) -> None:
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    session = patch(model.model, **SETTINGS[family])
    with torch.no_grad():
        merged = model.model(**inputs)
        unpatch(model.model)
        stock = model.model(**inputs)
    assert shapes(merged) == shapes(stock)
    assert session.report.kept_fraction < 0.5
    assert not torch.equal(merged.last_hidden_state, stock.last_hidden_state)
