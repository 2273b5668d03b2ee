"""Whatever goes wrong inside a call, the next one is right and nothing of the broken one is left behind."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import DynamicCache, StaticCache

from decode_helpers import IMAGE, KINDS, RICHEST, TEXT, patched, single
from families import family_of
from illava_hooks import merging, session_of
from illava_hooks.engine import attention_tap, transport
from illava_hooks.engine import session as sessions
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.transport import ForwardState
from tiny_models import FAMILIES, Inputs, inputs_for


class Failure(RuntimeError):
    """What the tests raise."""


def left_behind() -> dict[str, Any]:
    """What is still open in this context; nothing when all is well."""
    found = {
        "forward": transport.running_forward(),
        "generation": transport.current_generation(),
        "encoder": transport.in_features(),
        "tap": attention_tap.current_tap(),
        "switches": sessions._switched.get(),
        "modes": _get_current_function_mode_stack(),
    }
    return {name: value for name, value in found.items() if value}


def open_forwards() -> int:
    """Forwards whose state is in memory."""
    gc.collect()
    return sum(type(thing) is ForwardState for thing in gc.get_objects())


@torch.no_grad()
def answer(model: Any, inputs: Inputs) -> Tensor:
    """Logits of a forward."""
    logits: Tensor = model(**inputs).logits
    return logits


def generated(model: Any, inputs: Inputs) -> Tensor:
    """Logits of two steps."""
    done = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    return torch.stack(done.logits)


class RaiseOnce:
    """A hook that raises in its first call, if it is told what."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.error is not None and self.calls == 1:
            raise self.error("by the test")


def modules_that_run(model: Any, inputs: Inputs) -> dict[str, nn.Module]:
    """The modules that a generation calls, by name."""
    counters = {name: RaiseOnce() for name, _ in model.named_modules()}
    handles = [module.register_forward_pre_hook(counters[name]) for name, module in model.named_modules()]
    generated(model, inputs)
    for handle in handles:
        handle.remove()
    return {name: module for name, module in model.named_modules() if counters[name].calls}


#: Where the error comes, and which; Ctrl-C is no ``Exception``: PyTorch runs no hooks after it.
PLACES: dict[str, tuple[Callable[[nn.Module, RaiseOnce], Any], type[BaseException]]] = {
    "before it": (lambda module, hook: module.register_forward_pre_hook(hook), KeyboardInterrupt),
    "behind it": (lambda module, hook: module.register_forward_hook(hook, prepend=True), Failure),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_any_module(family: str, place: str) -> None:
    """Raised once in each module in turn, the head and the whole model included; in a forward or a generation."""
    model = patched(family)
    inputs, (register, error) = single(model, RICHEST[family]), PLACES[place]
    expected = answer(model, inputs)
    names = modules_that_run(model, inputs)
    assert len(names) > 60 and "lm_head" in names and f"model.{family_of(family).language_name}.layers.3.mlp" in names
    for name, module in names.items():
        hook = RaiseOnce(error)
        handle = register(module, hook)
        with pytest.raises(error, match="by the test"):
            answer(model, inputs) if len(name) % 2 else generated(model, inputs)
        handle.remove()
        assert not left_behind(), name
        assert torch.equal(answer(model, inputs), expected), name
    assert open_forwards() == 0


#: Functions of the library, each named as the module that calls it sees it.
INSIDE = [
    "engine.encoder.apply_merge",
    "engine.encoder.build_plan",
    "engine.encoder.unit_scores",
    "engine.encoder.take_kept",
    "engine.encoder.scatter_back",
    "engine.encoder_layers.attach",
    "engine.decoder.apply_merge",
    "engine.decoder.build_plan",
    "engine.decoder.scatter_back",
    "engine.decoder.checked_scores",
    "engine.decoder_hooks.compact_prompt",
    "engine.decoder_hooks.masks_of_prefill",
    "engine.decoder_hooks.cache_layer",
    "engine.trace.kv_bytes",
    "engine.model_hooks.named_arguments",
]


@pytest.fixture
def at(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[type[BaseException] | None], RaiseOnce]]:
    """Makes the function named by the parameter raise once."""
    module_name, name = request.param.rsplit(".", 1)
    module = importlib.import_module(f"illava_hooks.{module_name}")
    original = getattr(module, name)

    def arm(error: type[BaseException] | None) -> RaiseOnce:
        hook = RaiseOnce(error)

        def instead(*args: Any, **kwargs: Any) -> Any:
            hook()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, instead)
        return hook

    yield arm


@pytest.mark.parametrize("at", INSIDE, indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_the_merging_itself(family: str, at: Callable[[type[BaseException] | None], RaiseOnce]) -> None:
    """Memory runs out at the merge, or somebody presses Ctrl-C there."""
    model = patched(family, track=True)
    inputs = inputs_for(model, KINDS["ragged"])
    never = at(None)
    answer(model, inputs)
    if not never.calls:
        assert family_of(family).embedded is None
        pytest.skip("not called by this family")
    expected, alone = generated(model, inputs), answer(model, single(model, IMAGE))
    session = session_of(model)
    assert session is not None
    report = session.report
    for error, call in ((torch.OutOfMemoryError, answer), (KeyboardInterrupt, generated)):
        hook = at(error)
        with pytest.raises(error, match="by the test"):
            call(model, inputs)
        assert hook.calls == 1 and not left_behind()
        assert session.report == report, "of the last forward that ended"
        assert torch.equal(answer(model, single(model, IMAGE)), alone)
        with merging(model, False):
            stock = answer(model, single(model, TEXT))
        assert torch.equal(answer(model, single(model, TEXT)), stock)
    assert torch.equal(generated(model, inputs), expected)
    assert open_forwards() == 0


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_a_broken_call_can_be_reset(family: str, static: bool) -> None:
    """Layers in front of the error hold keys already, and the one with the error has announced its own."""
    model = patched(family)
    inputs, config = inputs_for(model, KINDS["ragged"]), model.config.text_config

    def empty() -> Any:
        return StaticCache(config=config, max_cache_len=500) if static else DynamicCache(config=config)

    cache = empty()
    expected = answer(model, {**inputs, CACHE: cache})
    cache.reset()
    if int(cache.get_seq_length()):
        pytest.skip("this release of transformers fills a DynamicCache with zeros instead of emptying it")
    for index in family_of(model).attending(model):
        cache = empty()
        layer = family_of(model).language(model).layers[index]
        handle = layer.self_attn.v_proj.register_forward_pre_hook(RaiseOnce(Failure))
        with pytest.raises(Failure):
            answer(model, {**inputs, CACHE: cache})
        handle.remove()
        cache.reset()
        assert torch.equal(answer(model, {**inputs, CACHE: cache}), expected)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]
