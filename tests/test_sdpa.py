"""cuDNN, which plans for every length, stays out while tokens merge, and only then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from families import FAMILIES, family_of
from helpers import MERGING
from illava_hooks import merging, patch, unpatch
from illava_hooks.engine import decoder_hooks, encoder_layers, sdpa
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.sdpa import WithoutPlans, without_plans
from tiny_models import Sample, inputs_for, tiny_model

ONE = [Sample(1, images=((64, 64),))]


def allowed() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The switch is there on every machine; on a CPU nothing turns it."""
    assert allowed()
    for module in (decoder_hooks, encoder_layers):
        monkeypatch.setattr(module, "without_plans", lambda device, pairs=0: WithoutPlans())
    yield
    assert allowed() and not sdpa._open


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def seen_in(model: Any, layers: Any, call: Any) -> set[bool]:
    """Whether cuDNN might be taken in some layers of a call."""
    found: set[bool] = set()
    handles = [layer.register_forward_hook(lambda *_: found.add(allowed())) for layer in layers]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_out_while_merging_and_behind(model: Any) -> None:
    family = family_of(model)
    encoder, decoder = family.encoder_layers(model), family.language(model).layers
    inputs = inputs_for(model, ONE)
    patch(model, **MERGING)
    assert seen_in(model, encoder, lambda: model(**inputs)) == {False} and allowed()
    cache = DynamicCache(config=model.config.get_text_config())
    assert seen_in(model, decoder, lambda: model(**inputs, **{CACHE: cache})) == {False} and allowed()
    step = {"input_ids": inputs["input_ids"][:, -1:], CACHE: cache}
    assert seen_in(model, decoder, lambda: model(**step)) == {False} and allowed()
    assert seen_in(model, decoder, lambda: model.generate(**inputs, max_new_tokens=3)) == {False}


def test_in_where_nothing_merges(model: Any) -> None:
    family = family_of(model)
    layers = [*family.encoder_layers(model), *family.language(model).layers]
    inputs, text = inputs_for(model, ONE), {"input_ids": torch.tensor([[10, 11, 12]])}
    patch(model, **MERGING)
    with merging(model, False):
        assert seen_in(model, layers, lambda: model(**inputs)) == {True}
    assert seen_in(model, layers, lambda: model(**text)) == {True}
    assert seen_in(model, layers, lambda: model.generate(**text, max_new_tokens=3)) == {True}
    unpatch(model)
    patch(model, **{**MERGING, "vit_r": 0, "llm_ratio": 1.0})
    assert seen_in(model, layers, lambda: model(**inputs)) == {True}


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_in_again_behind_an_error(model: Any, where: str, error: type[BaseException]) -> None:
    family = family_of(model)
    layers = family.encoder_layers(model) if where == "encoder" else family.language(model).layers
    patch(model, **MERGING)

    def fail(*_: Any) -> None:
        assert not allowed()
        raise error

    handle = layers[-1].register_forward_hook(fail)
    with pytest.raises(error):
        model(**inputs_for(model, ONE))
    handle.remove()


def test_the_last_one_puts_it_back() -> None:
    first, second = WithoutPlans(), WithoutPlans()
    first.close()
    first.close()
    assert not allowed()
    second.close()
    assert allowed()


def test_threads_do_not_leave_it_out() -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with WithoutPlans():
                assert not allowed()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kind", ["cudnn", "flash", "mem_efficient"])
def test_a_choice_of_the_user_stands(kind: str) -> None:
    """Who forbade cuDNN, or what would take its place, finds it so."""
    switch = getattr(torch.backends.cuda, f"enable_{kind}_sdp")
    switch(False)
    try:
        before = allowed()
        with WithoutPlans():
            assert allowed() is before
        assert allowed() is before
    finally:
        switch(True)


def test_only_on_a_gpu() -> None:
    assert without_plans(torch.device("cpu")) is None
    with without_plans(torch.device("cuda")) or pytest.fail():
        assert not allowed()


def test_not_where_plans_pay() -> None:
    """Many patches that attend to each other, in one segment or in several."""
    device = torch.device("cuda")
    assert without_plans(device, 4096**2 + 1) is None
    with without_plans(device, 10 * 729**2) or pytest.fail():
        assert not allowed()


def test_pairs_are_those_of_patches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(encoder_layers, "without_plans", lambda device, pairs: told.append(pairs))
    patch(model, **MERGING)
    with torch.no_grad():
        model(**inputs_for(model, ONE))
        model(**inputs_for(model, [*ONE, *ONE]))
    one, two = told
    assert one >= 16 and two == 2 * one
