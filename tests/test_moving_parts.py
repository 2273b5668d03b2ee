"""Parts of a model that are wrapped, compiled, replaced or shared, before `patch` and behind it."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import illava_hooks
from decode_helpers import IMAGE, IMAGES, SETTINGS, patched, single, steps
from families import family_of
from helpers import assert_differ, assert_same, assert_says, forward, key_lengths, needs_tracing, under
from illava_hooks import IllavaHooksError, PatchStateError, UnsupportedModelError, merging, patch, session_of, unpatch
from kind_helpers import CLOSE, decoder_layers, tower, vision_layers
from tiny_models import FAMILIES, Inputs, tiny_model

# PEFT asks the model for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ORDERS = ["before patch", "after patch"]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Nothing compiled is left behind."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def changed_and_patched(model: Any, change: Callable[[Any], Any], order: str, **settings: Any) -> Any:
    """The model with both, in an order; what the change returns is the new model."""
    if order == "before patch":
        model = change(model) or model
        patch(model, **settings)
        return model
    patch(model, **settings)
    return change(model) or model


def assert_is_the_merged_model(model: Any, like: Any, stock: Any, inputs: Inputs) -> None:
    """Logits and cache of one that was patched as it came, and of one never patched where merging is off."""
    with torch.no_grad():
        found, expected, plain = model(**inputs), like(**inputs), stock(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        lengths = [key_lengths(out.past_key_values) for out in (found, expected)]
        assert lengths[0] == lengths[1] and lengths[0][-1] < inputs["input_ids"].shape[1]
        assert session_of(model).report == session_of(like).report
        with merging(model, False):
            torch.testing.assert_close(model(**inputs).logits, plain.logits, **CLOSE)
    assert_differ(expected.logits, plain.logits)


# -------------------------------------------------------------------------------------- compiled parts

#: Two layers on each side: one merges, and tracing takes time by the layer.
SHALLOW: dict[str, Any] = {"vit_layers": [0], "vit_r": 0.25, "llm_layers": [1], "llm_ratio": 0.5}
compiled = functools.partial(torch.compile, backend="eager")


def shallow(family: str) -> Any:
    return tiny_model(family, vision=family_of(family).shallow(2), text={"num_hidden_layers": 2})


def compile_language_model(model: Any) -> None:
    known = family_of(model)
    setattr(model.model, known.language_name, compiled(known.language(model)))


def compile_tower(model: Any) -> None:
    setattr(model.model, family_of(model).tower_name, compiled(tower(model)))


def compile_layers(model: Any) -> None:
    vision_layers(model)[0] = compiled(vision_layers(model)[0])
    decoder_layers(model)[1] = compiled(decoder_layers(model)[1])


def compile_in_place(model: Any) -> None:
    for layer in (*vision_layers(model), *decoder_layers(model)):
        layer.compile(backend="eager")


def compile_by_region(model: Any) -> Any:
    return compile_regions(model, backend="eager")


COMPILED = {
    "language model": compile_language_model,
    "tower": compile_tower,
    "layers": compile_layers,
    "layers in place": compile_in_place,
    "regions": compile_by_region,
}


def check_compiled(family: str, part: str, order: str) -> None:
    model, like, stock = shallow(family), shallow(family), shallow(family)
    patch(like, **SHALLOW)
    inputs = single(model, IMAGE)
    model = changed_and_patched(model, COMPILED[part], order, **SHALLOW)
    if (part, order) == ("regions", "after patch") and family_of(family).list_carries_run:
        with torch.no_grad(), pytest.raises(PatchStateError, match=r"call patch\(model, \.\.\.\) again"):
            model(**inputs)
        patch(model, **SHALLOW)
    assert_is_the_merged_model(model, like, stock, inputs)
    found, expected = (torch.stack(steps(m, inputs)[1]) for m in (model, like))
    torch.testing.assert_close(found, expected, **CLOSE)
    unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", COMPILED)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_parts(family: str, part: str, order: str) -> None:
    """Without tracing anything: which modules the model then consists of is what matters."""
    with torch.compiler.set_stance("force_eager"):
        check_compiled(family, part, order)


@needs_tracing
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part", "order"),
    [(name, *case) for name, case in zip(FAMILIES, cycle([("layers", "before patch"), ("regions", "after patch")]))],
)
def test_traced_parts(family: str, part: str, order: str) -> None:
    check_compiled(family, part, order)


# ------------------------------------------------------------------------------- adapters around whole parts


def part_names(family: str) -> list[str]:
    return [family_of(family).tower_name, family_of(family).language_name]


def saved_part(model: Any, part: str) -> Any:
    """A wrapper in which a whole part is trained, with weights of its own, and adapters in the other part."""
    known = family_of(model)
    other = known.encoder_mlp if part == known.language_name else "down_proj"
    config = peft.LoraConfig(r=4, target_modules=[other], modules_to_save=[part], init_lora_weights=False)
    torch.manual_seed(5)
    wrapper = peft.get_peft_model(model, config).eval()
    move(wrapper, "default")
    return wrapper


@torch.no_grad()
def move(wrapper: Any, adapter: str) -> None:
    """Moves what is trained away from what it was copied from."""
    generator = torch.Generator().manual_seed(len(adapter))
    for name, weight in wrapper.named_parameters():
        if f"modules_to_save.{adapter}" in name:
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_((0.05 * noise).to(weight))


def folded(wrapper: Any, family: str) -> Any:
    """A plain model with the weights of the active adapter, patched."""
    model = copy.deepcopy(wrapper).merge_and_unload()
    patch(model, **SETTINGS[family])
    return model


NEAR: dict[str, Any] = {"atol": 1e-6, "rtol": 0.0}


def assert_near_logits(ours: Any, theirs: Any, inputs: Inputs) -> None:
    found, expected = (forward(m, inputs) for m in (ours, theirs))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **NEAR, msg=under(name))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("index", [0, 1], ids=["tower", "language model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_an_adapter_trains(family: str, index: int, order: str) -> None:
    """The copy that runs is the one that merges: with the adapter, without it, with another one, and folded in."""
    part = part_names(family)[index]
    model = tiny_model(family, dtype=torch.float64)
    expected = folded(saved_part(tiny_model(family, dtype=torch.float64), part), family)
    if order == "after patch":
        patch(model, **SETTINGS[family])
    wrapper = saved_part(model, part)
    if order == "before patch":
        patch(wrapper, **SETTINGS[family])
    inputs = single(tiny_model(family), IMAGES)
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    assert_near_logits(wrapper, expected, inputs)
    plain = patched(family, dtype=torch.float64)
    with wrapper.disable_adapter():
        assert_near_logits(wrapper, plain, inputs)
    assert_near_logits(wrapper, expected, inputs)
    assert_differ(forward(expected, inputs)["forward.logits"], forward(plain, inputs)["forward.logits"])

    wrapper.add_adapter("second one", wrapper.peft_config["default"])
    wrapper.set_adapter("second one")
    move(wrapper.eval(), "second one")
    unpatch(stock := copy.deepcopy(wrapper))
    second = folded(stock, family)
    assert_near_logits(wrapper, second, inputs)
    assert_differ(forward(second, inputs)["forward.logits"], forward(expected, inputs)["forward.logits"])
    wrapper.set_adapter("default")
    assert_near_logits(wrapper, expected, inputs)
    taken_out = wrapper.merge_and_unload()
    assert_near_logits(taken_out, expected, inputs)
    unpatch(taken_out)
    unpatch(expected)
    assert_near_logits(taken_out, expected, inputs)


@pytest.mark.parametrize("index", [0, 1], ids=["tower", "language model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_while_the_adapter_is_off(family: str, index: int) -> None:
    """Then the copy comes back, and merges as well."""
    wrapper = saved_part(tiny_model(family, dtype=torch.float64), part_names(family)[index])
    expected = folded(wrapper, family)
    inputs = single(tiny_model(family), IMAGE)
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    with wrapper.disable_adapter():
        patch(wrapper, **SETTINGS[family])
        assert_near_logits(wrapper, patched(family, dtype=torch.float64), inputs)
    assert_near_logits(wrapper, expected, inputs)


# ------------------------------------------------------------------------------- other wrappers, and replaced parts


class Around(nn.Module):
    """A module that runs another one, and lets its attributes through, as many wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def wrap_layers(model: Any, layers: Callable[[Any], nn.ModuleList], wrap: Callable[[nn.Module], nn.Module]) -> None:
    for index, layer in enumerate(layers(model)):
        layers(model)[index] = wrap(layer)


def wrap_language_model(model: Any, wrap: Callable[[nn.Module], nn.Module]) -> None:
    known = family_of(model)
    setattr(model.model, known.language_name, wrap(known.language(model)))


def wrap_tower(model: Any, wrap: Callable[[nn.Module], nn.Module]) -> None:
    setattr(model.model, family_of(model).tower_name, wrap(tower(model)))


WRAPPED: dict[str, Callable[..., None]] = {
    "vision layers": lambda model, wrap: wrap_layers(model, vision_layers, wrap),
    "decoder layers": lambda model, wrap: wrap_layers(model, decoder_layers, wrap),
    "language model": wrap_language_model,
    "tower": wrap_tower,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"checkpoint": checkpoint_wrapper, "module around": Around}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("part", WRAPPED)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_parts(family: str, part: str, wrapper: str, order: str) -> None:
    model, like, stock = tiny_model(family), patched(family), tiny_model(family)
    wrap = functools.partial(WRAPPED[part], wrap=WRAPPERS[wrapper])
    WRAPPED[part](stock, WRAPPERS[wrapper])
    inputs = single(like, IMAGE)
    model = changed_and_patched(model, wrap, order, **SETTINGS[family])
    assert_is_the_merged_model(model, like, stock, inputs)
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("part", ["vision layers", "decoder layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_checkpointed_parts(family: str, part: str) -> None:
    """Loss and gradients are those without checkpointing."""
    grads = []
    for wrap in (None, checkpoint_wrapper):
        model = tiny_model(family).train()
        if wrap is not None:
            WRAPPED[part](model, wrap)
        patch(model, **SETTINGS[family])
        inputs = single(tiny_model(family), IMAGE)
        labels = inputs["input_ids"].clone()
        labels[:, :-4] = -100
        model(**inputs, labels=labels).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def fresh_layer(model: Any, layers: Callable[[Any], nn.ModuleList], index: int) -> None:
    layers(model)[index] = copy.deepcopy(layers(tiny_model(family_of(model).name))[index])


#: A part that is exchanged behind `patch` for one that was never patched, with the same weights.
REPLACED: dict[str, Callable[[Any], None]] = {
    "a vision layer": lambda model: fresh_layer(model, vision_layers, 1),
    "a decoder layer": lambda model: fresh_layer(model, decoder_layers, 3),
    "the tower": lambda model: setattr(
        model.model, family_of(model).tower_name, tower(tiny_model(family_of(model).name))
    ),
    "the language model": lambda model: setattr(
        model.model, family_of(model).language_name, family_of(model).language(tiny_model(family_of(model).name))
    ),
    "the base model": lambda model: setattr(model, "model", tiny_model(family_of(model).name).model),
}


@pytest.mark.parametrize("part", REPLACED)
@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_parts_merge_or_are_missed(family: str, part: str) -> None:
    """What was planned for the old part happens in the new one, or the forward says that it did not."""
    model, like = patched(family), patched(family)
    inputs = single(model, IMAGE)
    REPLACED[part](model)
    expected = forward(like, inputs)
    try:
        found = forward(model, inputs)
    except PatchStateError as error:
        assert_says(error, "patch")
    else:
        torch.testing.assert_close(found["forward.logits"], expected["forward.logits"], **CLOSE)
    unpatch(model)
    assert_same(forward(model, inputs), forward(tiny_model(family), inputs))


# ---------------------------------------------------------------------------------------- instance-level forwards


def traced(layer: nn.Module, calls: list[str], how: str) -> None:
    """Puts a `forward` of its own onto a module, as tracers and offloaders do."""
    old = layer.forward
    if how == "closure":

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append("call")
            return old(*args, **kwargs)

        layer.forward = forward
    elif how == "partial":
        layer.forward = functools.partial(
            lambda old, *args, **kwargs: (calls.append("call"), old(*args, **kwargs))[1], old
        )
    else:
        function = type(layer).forward

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append("call")
            return function(self, *args, **kwargs)

        layer.forward = method.__get__(layer)


PLACES: dict[str, Callable[[Any], list[nn.Module]]] = {
    "merging vision layer": lambda model: [vision_layers(model)[1]],
    "all vision layers": lambda model: list(vision_layers(model)),
    "merging decoder layer": lambda model: [decoder_layers(model)[1]],
    "all decoder layers": lambda model: list(decoder_layers(model)),
    "attention": lambda model: [decoder_layers(model)[0].self_attn, decoder_layers(model)[2].self_attn],
    "tower and language model": lambda model: [tower(model), family_of(model).language(model)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["closure", "method"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_of_instances(family: str, place: str, how: str, order: str) -> None:
    """They run, the merge runs too, and `unpatch` leaves them where they were; or one line names the module."""
    model, like, stock = tiny_model(family), patched(family), tiny_model(family)
    inputs = single(model, IMAGE)
    calls: list[Any] = []
    modules = PLACES[place](model)

    def trace(model: Any) -> None:
        for module in modules:
            traced(module, calls, how)

    try:
        changed_and_patched(model, trace, order, **SETTINGS[family])
        assert_is_the_merged_model(model, like, stock, inputs)
    except (UnsupportedModelError, PatchStateError) as error:
        assert_says(error, r"layer|forward", type(modules[0]).__name__.replace("Merging", "") + r"|\d")
    else:
        assert len(calls) == 2 * len(modules)
    calls.clear()
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert len(calls) == len(modules)
    left = [vars(module).pop("forward") for module in modules]
    assert len(left) == len(modules)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


# ------------------------------------------------------------------------------------------- shared parts


def pair(family: str, part: str) -> tuple[Any, Any]:
    """Two models that have a part in common; their weights differ elsewhere."""
    model = tiny_model(family)
    name = family_of(family).tower_name if "tower" in part else family_of(family).language_name
    shared = getattr(model.model, name)
    if part == "tower of a copy":  # as policy and reference of one training have it
        other = copy.deepcopy(model, {id(shared): shared})
        with torch.no_grad():
            decoder_layers(other)[0].mlp.down_proj.weight.mul_(1.5)
    else:
        other = tiny_model(family, seed=1)
        setattr(other.model, name, shared)
    return model, other


TOWER = "vision_tower|visual|encoder|tower"
SHARED = {"tower": TOWER, "tower of a copy": TOWER, "language model": "language"}


@pytest.mark.parametrize("part", SHARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_models_share_a_part(family: str, part: str) -> None:
    """The second `patch` works exactly, or is refused in a line that names the part; the first works on."""
    model, other = pair(family, part)
    like, like_other = patched(family), pair(family, part)[1]
    inputs = single(model, IMAGE)
    stock, stock_other = forward(model, inputs), forward(other, inputs)
    patch(like_other, **SETTINGS[family])
    expected, expected_other = forward(like, inputs), forward(like_other, inputs)
    patch(model, **SETTINGS[family])
    try:
        patch(other, **SETTINGS[family])
    except IllavaHooksError as error:
        assert isinstance(error, UnsupportedModelError | PatchStateError)
        assert_says(error, SHARED[part])
        assert session_of(other) is None
        refused = True
    else:
        assert_same(forward(other, inputs), expected_other)
        refused = False
    assert_same(forward(model, inputs), expected)
    if not refused:
        with merging(other, False):
            assert_same(forward(other, inputs), stock_other)
            assert_same(forward(model, inputs), expected)
        unpatch(other)
        assert_same(forward(model, inputs), expected)
    unpatch(model)
    assert_same(forward(model, inputs), stock)
    assert_same(forward(other, inputs), stock_other)
    patch(other, **SETTINGS[family])
    assert_same(forward(other, inputs), expected_other)


@pytest.mark.parametrize("part", SHARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpatched_model_that_shares_a_part(family: str, part: str) -> None:
    """It was never patched: its answers are stock's, or its forward says in one line why it cannot."""
    model, other = pair(family, part)
    inputs = single(model, IMAGE)
    stock_other = forward(other, inputs)
    patch(model, **SETTINGS[family])
    expected = forward(model, inputs)
    try:
        assert_same(forward(other, inputs), stock_other)
    except PatchStateError as error:
        assert_says(error, SHARED[part])
    assert_same(forward(model, inputs), expected)
    unpatch(model)
    assert_same(forward(other, inputs), stock_other)


# --------------------------------------------------------------------------------------- imported twice


@pytest.fixture
def import_again() -> Iterator[Callable[[], Any]]:
    """Imports the package a second time, as a notebook does that reloads everything."""
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "illava_hooks"}

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "illava_hooks"]:
            del sys.modules[name]

    def once_more() -> Any:
        forget()
        again = importlib.import_module("illava_hooks")
        assert again is not illava_hooks
        return again

    yield once_more
    forget()
    sys.modules.update(known)


OTHER: dict[str, Any] = {"vit_layers": [2], "vit_r": 0.5, "llm_layers": [2], "llm_ratio": 0.3}


@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_package_takes_the_old_patch_off(family: str, part: str, import_again: Callable[[], Any]) -> None:
    model, stock = tiny_model(family), tiny_model(family)
    inputs = single(model, IMAGE)
    forward(model, inputs), forward(stock, inputs)  # transformers leaves hooks when hidden states are asked for
    patch(model if part == "head" else model.model, **SETTINGS[family])
    forward(model, inputs)
    again = import_again()
    again.unpatch(model)
    assert again.session_of(model) is None is session_of(model)
    assert_same(forward(model, inputs), forward(stock, inputs))
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    for (name, ours), theirs in zip(model.named_modules(), stock.modules(), strict=True):
        assert sorted(vars(ours)) == sorted(vars(theirs)), name
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks), name
        assert len(ours._forward_hooks) == len(theirs._forward_hooks), name


@pytest.mark.parametrize("ran", ["unused", "used"])
@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_package_replaces_the_old_patch(
    family: str, part: str, ran: str, import_again: Callable[[], Any]
) -> None:
    model, like, stock = tiny_model(family), tiny_model(family), tiny_model(family)
    inputs = single(model, IMAGE)
    patch(model if part == "head" else model.model, **SETTINGS[family])
    if ran == "used":
        forward(model, inputs)
    again = import_again()
    session = again.patch(model, **OTHER)
    again.patch(like, **OTHER)
    assert_same(forward(model, inputs), forward(like, inputs))
    assert again.session_of(model) is session and session.report == again.session_of(like).report
    with again.merging(model, False):
        assert_same(forward(model, inputs), forward(stock, inputs))
    again.unpatch(model)
    assert_same(forward(model, inputs), forward(stock, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_old_package_takes_the_new_patch_off(family: str, import_again: Callable[[], Any]) -> None:
    """Functions that a notebook holds from before."""
    model, stock = tiny_model(family), tiny_model(family)
    inputs = single(model, IMAGE)
    again = import_again()
    again.patch(model, **SETTINGS[family])
    forward(model, inputs)
    unpatch(model)
    assert_same(forward(model, inputs), forward(stock, inputs))
    assert again.session_of(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_settings_of_the_new_package_keep_the_old_patch(family: str, import_again: Callable[[], Any]) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    expected = forward(model, inputs)
    again = import_again()
    with pytest.raises(ValueError, match="llm_ratio is 7"):
        again.patch(model, **{**OTHER, "llm_ratio": 7})
    assert_same(forward(model, inputs), expected)
