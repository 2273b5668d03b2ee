"""`forward` called directly is the call: whoever goes around `__call__` gets the same merges, or is told."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor

from decode_helpers import BOTH, IMAGE, IMAGES, RICHEST, SETTINGS, TEXT, patched, single
from families import families, families_and, family_of
from helpers import assert_differ, assert_same, assert_says, forward, keyed, needs_tracing, tensors_of
from illava_hooks import PatchStateError, merging, patch, session_of, unpatch
from kind_helpers import CACHE, CLOSE, said
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model


def labels(inputs: Inputs) -> Tensor:
    """Labels on the last four tokens."""
    found = inputs["input_ids"].clone()
    found[:, :-4] = -100
    return found


SAMPLES = {"image": IMAGE, "both": BOTH}
#: What a call is given beside its inputs.
GIVEN: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "nothing more": lambda inputs: {},
    "labels": lambda inputs: {"labels": labels(inputs)},
    "a number of logits": lambda inputs: {"logits_to_keep": 5},
    "columns of logits": lambda inputs: {"logits_to_keep": torch.arange(-5, 0)},
    "no cache": lambda inputs: {"use_cache": False},
}


@torch.no_grad()
def everything(call: Callable[..., Any], inputs: Inputs, **kwargs: Any) -> dict[str, Tensor]:
    """Loss, logits, hidden states and cache."""
    return dict(tensors_of(call(**inputs, output_hidden_states=True, **kwargs), "out"))


def positional(model: Any, inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """The inputs by position as far as stock takes them so: it fills in `vision_feature_layer` by name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    names = names[: names.index("vision_feature_layer")] if "vision_feature_layer" in names else names
    last = max(index for index, name in enumerate(names) if name in inputs) + 1
    rest = {name: value for name, value in inputs.items() if name not in names}
    return [inputs.get(name) for name in names[:last]], rest


# ------------------------------------------------------------------------------------------- equal calls


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_forward_is_the_call(family: str, kind: str, given: str) -> None:
    model = patched(family)
    inputs = single(model, SAMPLES[kind])
    more = GIVEN[given](inputs)
    expected = everything(model, inputs, **more)
    report = session_of(model).report
    assert_same(everything(model.forward, inputs, **more), expected)
    assert session_of(model).report == report
    with merging(model, False):
        stock = everything(model, inputs, **more)
        assert_same(everything(model.forward, inputs, **more), stock)
    assert_differ(expected["out.logits"], stock["out.logits"])


@pytest.mark.parametrize("around", ["whole", "bare"])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_forward_of_the_base_model_is_its_call(family: str, kind: str, around: str) -> None:
    """Whether the model around it was patched, or it alone."""
    model = tiny_model(family)
    patch(model if around == "whole" else model.model, **SETTINGS[family])
    inputs = single(model, SAMPLES[kind])
    expected = everything(model.model, inputs)
    assert_same(everything(model.model.forward, inputs), expected)
    assert max(layer.shape[-2] for name, layer in expected.items() if "keys" in name) < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_by_position(family: str, part: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    called = model if part == "head" else model.model
    args, rest = positional(called, inputs)
    assert len(args) > 2
    expected = everything(called, inputs)
    assert_same(everything(functools.partial(called, *args), rest), expected)
    assert_same(everything(functools.partial(called.forward, *args), rest), expected)


@pytest.mark.parametrize("family", families(takes_labels_by_position=True))
def test_labels_by_position(family: str) -> None:
    """They rank as named ones do; not every stock model takes labels by position."""
    model = patched(family)
    inputs = single(model, IMAGE)
    named = {**inputs, "labels": labels(inputs)}
    args, rest = positional(model, named)
    expected = everything(model, named)
    assert_same(everything(functools.partial(model, *args), rest), expected)
    assert_same(everything(functools.partial(model.forward, *args), rest), expected)
    assert_differ(everything(model, inputs)["out.hidden_states.4"], expected["out.hidden_states.4"])


@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_behind_a_cache(family: str, part: str) -> None:
    """A prefill by `forward`, then steps by either."""
    model = patched(family)
    inputs, token = single(model, IMAGE), torch.tensor([[30]])
    called = model if part == "head" else model.model
    at = torch.tensor([[inputs["input_ids"].shape[1]]])
    where = {"position_ids": family_of(family).spread(at)}
    with torch.no_grad():
        found = [
            step(input_ids=token, **{CACHE: prefill(**inputs).past_key_values}, **where)[0]
            for prefill in (called, called.forward)
            for step in (called, called.forward)
        ]
    for ours in found[1:]:
        assert torch.equal(ours, found[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_rank_its_prompt_by_forward(family: str) -> None:
    """What adapters' forwards do inside: `labels` go to `forward`, and must be seen."""
    model = patched(family)
    inputs = single(model, IMAGE)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -4:] = torch.tensor([40, 51, 62, 73])
    found, expected = (everything(model.forward, x, labels=labels(x))["out.logits"] for x in (other, inputs))
    torch.testing.assert_close(found[:, :-4], expected[:, :-4], **CLOSE)
    found, expected = (everything(model.forward, x)["out.logits"] for x in (other, inputs))
    assert_differ(found[:, :-4], expected[:, :-4])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_forward(family: str) -> None:
    grads = []
    for name in ("__call__", "forward"):
        model = patched(family).train()
        inputs = single(model, IMAGE)
        getattr(model, name)(**inputs, labels=labels(inputs)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(grads[1], grads[0])


# ---------------------------------------------------------------------------------------- no trace of it


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_stay(family: str) -> None:
    """`generate`, PEFT and the Trainer choose their arguments by them."""
    model, stock = tiny_model(family), tiny_model(family)
    before = [part.forward for part in (model, model.model)]
    patch(model, **SETTINGS[family])
    for part, theirs, old in zip((model, model.model), (stock, stock.model), before, strict=True):
        assert inspect.signature(part.forward) == inspect.signature(theirs.forward) == inspect.signature(old)
        assert part.forward.__name__ == "forward" and part.forward.__doc__ == theirs.forward.__doc__
        assert callable(part.forward)


@pytest.mark.parametrize("how", ["head", "base", "twice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_forward_is_left(family: str, how: str) -> None:
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    stock = forward(model, inputs)
    patch(model.model if how == "base" else model, **SETTINGS[family])
    if how == "twice":
        patch(model, **SETTINGS[family])
    model.forward(**inputs)
    unpatch(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert_same(dict(tensors_of(model.forward(**inputs, output_hidden_states=True), "forward")), stock)


@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("taken", ["from the instance", "from the class"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_out_of_reach_is_not_silent(
    family: str, taken: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bound before `patch`, or taken from the class: it merges all the same, or refuses, or says so once."""
    model = tiny_model(family)
    called = model if part == "head" else model.model
    inputs = single(model, IMAGE)
    out_of_reach = called.forward if taken == "from the instance" else functools.partial(type(called).forward, called)
    patch(model, **SETTINGS[family])
    expected = everything(called, inputs)
    try:
        found = [everything(out_of_reach, inputs) for _ in range(2)][-1]
    except PatchStateError as error:
        assert_says(error, "forward")
        return
    if list(found) != list(expected) or any(not torch.equal(found[name], expected[name]) for name in expected):
        assert len(said(caplog, "forward")) == 1


# ------------------------------------------------------------------------------------------ among others


@pytest.mark.parametrize("order", ["hooks first", "patch first"])
@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("off_first", ["hooks", "patch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_accelerate(family: str, off_first: str, part: str, order: str) -> None:
    """Its hooks replace `forward` on the instance."""
    model = tiny_model(family)
    hooked = model if part == "head" else model.model
    inputs, merged = single(model, IMAGE), patched(family)
    more = {"labels": labels(inputs)}
    expected, stock = everything(merged, inputs, **more), everything(tiny_model(family), inputs, **more)
    steps = [lambda: add_hook_to_module(hooked, ModelHook()), lambda: patch(model, **SETTINGS[family])]
    for put in steps if order == "hooks first" else reversed(steps):
        put()
    assert_same(everything(model, inputs, **more), expected)
    assert_same(everything(model.forward, inputs, **more), expected)
    with merging(model, False):
        assert_same(everything(model.forward, inputs, **more), stock)
    off = [lambda: remove_hook_from_module(hooked), lambda: unpatch(model)]
    first, second = off if off_first == "hooks" else reversed(off)
    first()
    assert_same(everything(model.forward, inputs, **more), expected if off_first == "hooks" else stock)
    second()
    assert_same(everything(model, inputs, **more), stock)
    assert_same(everything(model.forward, inputs, **more), stock)
    left = vars(hooked).get("forward")
    assert left is None or "illava" not in repr(left)


@pytest.mark.parametrize("order", ["prepared first", "patch first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_for_mixed_precision(family: str, order: str) -> None:
    """Accelerate puts autocast and a conversion around the instance's `forward`."""
    model, by_hand = tiny_model(family), patched(family)
    inputs = single(model, IMAGE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(**inputs, labels=labels(inputs))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    if order == "patch first":
        patch(model, **SETTINGS[family])
    model = accelerator.prepare_model(model, evaluation_mode=True)
    if order == "prepared first":
        patch(model, **SETTINGS[family])
    for call in (model, model.forward):
        with torch.no_grad():
            found = call(**inputs, labels=labels(inputs))
        assert found.logits.dtype == torch.float32
        torch.testing.assert_close(found.logits, expected.logits.float(), atol=1e-6, rtol=0)
    assert session_of(model).report.kept_fraction < 0.5


@pytest.mark.parametrize("order", ["wrapper first", "patch first"])
@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_somebody_else_wraps_forward(family: str, part: str, order: str) -> None:
    """Around ours or under it; called once per call; and `unpatch` leaves theirs working."""
    model = tiny_model(family)
    inputs, stock = single(model, IMAGE), everything(tiny_model(family), single(tiny_model(family), IMAGE))
    expected = everything(patched(family), inputs)
    wrapped, calls = model if part == "head" else model.model, []

    def wrap() -> None:
        old = wrapped.forward

        @functools.wraps(old)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return old(*args, **kwargs)

        wrapped.forward = theirs

    steps = [wrap, lambda: patch(model, **SETTINGS[family])]
    for put in steps if order == "wrapper first" else reversed(steps):
        put()
    for call in (model, model.forward):
        assert_same(everything(call, inputs), expected)
        assert calls == [1]
        calls.clear()
    unpatch(model)
    for call in (model, model.forward):
        assert_same(everything(call, inputs), stock)
        assert calls == [1]
        calls.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_of_a_copy(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    merged = everything(model, inputs)
    with merging(model, False):
        stock = everything(model, inputs)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert_same(everything(twin.forward, inputs), merged)
    assert_same(everything(twin.model.forward, inputs), everything(twin.model, inputs))
    assert_same(everything(model.forward, inputs), stock)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert everything(twin.forward, inputs)["out.logits"].abs().max() == 0
    assert_same(everything(model.forward, inputs), stock)
    unpatch(twin)
    assert "forward" not in vars(twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_in_threads(family: str) -> None:
    """Each thread has its own query, labels and switch."""
    model = patched(family)
    work: list[tuple[Inputs, dict[str, Any], bool]] = [
        (single(model, IMAGE), {"logits_to_keep": 5}, True),
        (inputs_for(model, [IMAGES, TEXT]), {}, True),
        (single(model, RICHEST[family]), {}, False),
        (single(model, IMAGES), {"labels": labels(single(model, IMAGES))}, True),
    ]

    def run(inputs: Inputs, more: dict[str, Any], on: bool) -> dict[str, Tensor]:
        with merging(model, on):
            return everything(model.forward, inputs, **more)

    expected = [everything(model, inputs, **more) if on else run(inputs, more, on) for inputs, more, on in work]
    found: dict[int, dict[str, Tensor]] = {}
    threads = [
        Thread(target=lambda i=i: found.update({i: [run(*work[i]) for _ in range(3)][-1]})) for i in range(len(work))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, theirs in enumerate(expected):
        names = [name for name in theirs if "rope_deltas" not in name]
        assert_same({n: found[index][n] for n in names}, {n: theirs[n] for n in names})


@needs_tracing
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES[1:])]
)
def test_forward_compiled(family: str) -> None:
    model = tiny_model(family, vision=family_of(family).shallow(1), text={"num_hidden_layers": 2})
    patch(model, vit_layers=[0], vit_r=0.25, llm_layers=[1], llm_ratio=0.5)
    inputs = single(model, IMAGE)
    more = {"logits_to_keep": 5}
    with torch.no_grad():
        expected = model(**inputs, **more)
        found = torch.compile(model.forward, backend="eager")(**inputs, **more)
    torch._dynamo.reset()
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    shapes = [[layer.keys.shape for layer in keyed(out.past_key_values)] for out in (found, expected)]
    assert shapes[0] == shapes[1]


# ------------------------------------------------------------------------------------- subclasses' forwards


def of_class(family: str, forward: Callable[[type], Callable[..., Any]], part: str = "head") -> Any:
    """A tiny model of a subclass with another `forward`, as retrievers and rewards are made."""
    model = tiny_model(family)
    changed = model if part == "head" else model.model
    kind = type(changed)
    names = {"forward": forward(kind), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    changed.__class__ = type(kind.__name__, (kind,), names)
    return model


def any_arguments(stock: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock.forward(self, *args, **kwargs)

    return forward


def named_arguments(stock: Any) -> Callable[..., Any]:
    def forward(self: Any, **kwargs: Any) -> Any:
        return stock.forward(self, **kwargs)

    return forward


def ids_and_any(stock: Any) -> Callable[..., Any]:
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        return stock.forward(self, input_ids, *args, **kwargs)

    return forward


def renamed(stock: Any) -> Callable[..., Any]:
    def forward(self: Any, *ids_and_more: Any, mask: Any = None, **others: Any) -> Any:
        given = others if mask is None else {"attention_mask": mask, **others}
        return stock.forward(self, *ids_and_more, **given)

    return forward


SUBCLASSES = {
    "(*args, **kwargs)": any_arguments,
    "(**kwargs)": named_arguments,
    "(input_ids, *args, **kwargs)": ids_and_any,
    "(*ids_and_more, mask, **others)": renamed,
}


@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (kind, call)
        for kind in SUBCLASSES
        for call in ("by name", "by position")
        if (kind, call) != ("(**kwargs)", "by position")
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_subclasses(family: str, kind: str, part: str, call: str) -> None:
    """Whatever the signature of `forward` tells, arguments arrive as they do in stock."""
    model = of_class(family, SUBCLASSES[kind], part)
    inputs = single(model, IMAGE)
    called, plain = (m if part == "head" else m.model for m in (model, tiny_model(family)))
    args, rest = positional(plain, inputs) if call == "by position" else ([], inputs)
    with torch.no_grad():
        stock = called(*args, **rest)[0]
        assert torch.equal(stock, plain(**inputs)[0])
        patch(model, **SETTINGS[family])
        patch(whole := tiny_model(family), **SETTINGS[family])
        expected = (whole if part == "head" else whole.model)(**inputs)[0]
        for entry in (called, called.forward):
            torch.testing.assert_close(entry(*args, **rest)[0], expected, **CLOSE)
        assert_differ(expected, stock)
        unpatch(model)
        assert torch.equal(called(*args, **rest)[0], stock)


@pytest.mark.parametrize("given", ["labels", "a number of logits", "columns of logits"])
@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_subclasses_that_are_told_what_is_asked(family: str, kind: str, given: str) -> None:
    model = of_class(family, SUBCLASSES[kind])
    patch(model, **SETTINGS[family])
    inputs = single(model, IMAGE)
    more = GIVEN[given](inputs)
    expected = everything(patched(family), inputs, **more)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    for call in (model, model.forward):
        assert_same(everything(call, inputs, **more), expected)
        if kind != "(**kwargs)":
            assert_same(everything(functools.partial(call, inputs["input_ids"]), rest, **more), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subclass_that_asks_for_the_base_model_itself(family: str) -> None:
    """An encoder of whole sequences: it calls `self.model.forward` and never the head."""

    def embedder(stock: Any) -> Callable[..., Any]:
        return lambda self, **kwargs: self.model.forward(**kwargs)

    model = of_class(family, embedder)
    patch(model, **SETTINGS[family])
    inputs = single(model, IMAGE)
    with torch.no_grad():
        expected = patched(family).model(**inputs)[0]
        torch.testing.assert_close(model(**inputs)[0], expected, **CLOSE)
        torch.testing.assert_close(model.forward(**inputs)[0], expected, **CLOSE)
    assert session_of(model).report.kept_fraction < 0.5
