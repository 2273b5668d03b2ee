"""Patching can be taken back, repeated, interrupted and copied without a trace."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from decode_helpers import IMAGE, IMAGES, SETTINGS, patched, single
from families import family_of
from illava_hooks import PatchStateError, merging, patch, session_of, unpatch
from illava_hooks.engine.hookset import HookSet
from tiny_models import FAMILIES, Inputs, tiny_model

OTHER: dict[str, Any] = {"vit_layers": [2], "vit_r": 0.5, "llm_layers": [2], "llm_ratio": 0.3}


def logits(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def warm(family: str) -> tuple[Any, Inputs]:
    """A model that has run once: transformers itself leaves hooks behind when hidden states are asked for."""
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        model(**inputs, output_hidden_states=True, output_attentions=False)
        model.generate(**inputs, max_new_tokens=2)
    return model, inputs


def snapshot(model: Any) -> dict[str, Any]:
    """Class, attributes (by identity) and hooks of every module, parameter names, configs, global registries."""
    found: dict[str, Any] = {"state": list(model.state_dict()), "records": dict(_CAN_RECORD_REGISTRY)}
    found["layers"] = (dict(DYNAMIC_LAYER_TYPE_MAPPING), dict(STATIC_LAYER_TYPE_MAPPING))
    for kind, registry in (("attention", ALL_ATTENTION_FUNCTIONS), ("masks", ALL_MASK_ATTENTION_FUNCTIONS)):
        found[kind] = {name: id(registry[name]) for name in registry.keys()}  # noqa: SIM118  # not a plain dict
    found["config"] = (model.config.to_json_string(), model.generation_config.to_json_string())
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if key != "rope_deltas"}
        hooks = {
            key: list(value) for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)
        }
        found[name] = (type(module), attributes, hooks)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before | after if before.get(name) != after.get(name)]


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_leaves_nothing(family: str) -> None:
    model, inputs = warm(family)
    before, expected = snapshot(model), logits(model, inputs)
    session = patch(model, **SETTINGS[family], track=True)
    assert differences(before, snapshot(model)), "the snapshot sees a patch"
    assert not torch.equal(logits(model, inputs), expected)
    model.generate(**inputs, max_new_tokens=3, num_beams=2)
    assert list(model.state_dict()) == before["state"]
    assert snapshot(model)["records"] == before["records"] and snapshot(model)["layers"] == before["layers"]
    unpatch(model)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model, inputs), expected)
    unpatch(model)
    assert differences(before, snapshot(model)) == []
    assert session_of(model) is None and session.config.track


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_again_replaces(family: str) -> None:
    model, inputs = warm(family)
    before = snapshot(model)
    first = patch(model, **SETTINGS[family])
    merged = logits(model, inputs)
    again = patch(model, **SETTINGS[family])
    assert torch.equal(logits(model, inputs), merged) and session_of(model) is again is not first
    patch(model, **OTHER)
    other = tiny_model(family)
    patch(other, **OTHER)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    unpatch(model)
    assert differences(before, snapshot(model)) == []


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Makes the hook set raise at its `step`-th change; returns how many changes there were."""
    count = 0
    for name in ("before", "after", "swap", "swap_class"):
        original = getattr(HookSet, name)

        def change(self: HookSet, *args: Any, original: Any = original, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == step:
                raise KeyboardInterrupt
            original(self, *args, **kwargs)

        monkeypatch.setattr(HookSet, name, change)
    return lambda: count


@pytest.mark.parametrize("family", FAMILIES)
def test_failing_half_way_leaves_the_model_as_it_was(family: str) -> None:
    model, inputs = warm(family)
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        steps = fail_at(monkeypatch, -1)
        patch(model, **SETTINGS[family])
        total = steps()
    unpatch(model)
    assert total > 20
    for step in range(1, total + 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, step)
            with pytest.raises(KeyboardInterrupt):
                patch(model, **SETTINGS[family])
        assert differences(before, snapshot(model)) == [], step
        assert session_of(model) is None
    patch(model, **SETTINGS[family]).enabled = False
    merged = logits(tiny_patched := patched(family), inputs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        steps = fail_at(monkeypatch, -1)
        patch(tiny_model(family), **OTHER)
        total = steps()
    for step in (1, total // 2, total):
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, step)
            with pytest.raises(KeyboardInterrupt):
                patch(model, **OTHER)
        session = session_of(model)
        assert session is not None and not session.enabled
        with merging(model, True):
            assert torch.equal(logits(model, inputs), merged)
    unpatch(model)
    unpatch(tiny_patched)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_failing_half_way_over_a_bare_patch_leaves_it_where_it_was(family: str) -> None:
    """The model inside stays patched, and the one around it gets nothing."""
    model, inputs = warm(family)
    before = snapshot(model)
    patch(model.model, **SETTINGS[family]).enabled = False
    around = snapshot(model)[""]
    assert around == before[""] and "_illava_session" in vars(model.model)
    merged = logits(twin := patched(family), inputs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        steps = fail_at(monkeypatch, -1)
        patch(twin, **OTHER)
        total = steps()
    for step in range(1, total + 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, step)
            with pytest.raises(KeyboardInterrupt):
                patch(model, **OTHER)
        assert snapshot(model)[""] == around, step
        session = session_of(model)
        assert session is session_of(model.model) is not None and not session.enabled
    with merging(model, True):
        assert torch.equal(logits(model, inputs), merged)
    unpatch(model.model)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_settings_keep_the_old_ones(family: str) -> None:
    model, inputs = warm(family)
    session = patch(model, **SETTINGS[family])
    merged = logits(model, inputs)
    with pytest.raises(ValueError, match="llm_ratio is 7"):
        patch(model, **{**OTHER, "llm_ratio": 7})
    assert session_of(model) is session and torch.equal(logits(model, inputs), merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_is_an_independent_patched_model(family: str) -> None:
    model, inputs = warm(family)
    stock = logits(model, inputs)
    session = patch(model, **SETTINGS[family], track=True)
    merged = logits(model, inputs)
    twin = copy.deepcopy(model)
    other = session_of(twin)
    assert other is not None and other is not session
    assert torch.equal(logits(twin, inputs), merged)
    assert other.report == session.report and other.report is not session.report
    other.enabled = False
    assert torch.equal(logits(twin, inputs), stock) and torch.equal(logits(model, inputs), merged)
    other.enabled = True
    with merging(model, False):
        assert torch.equal(logits(twin, inputs), merged) and torch.equal(logits(model, inputs), stock)
    unpatch(model)
    assert torch.equal(logits(twin, inputs), merged) and torch.equal(logits(model, inputs), stock)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(logits(model, inputs), stock)
    unpatch(twin)
    assert session_of(twin) is None and not [k for k in vars(twin) if "illava" in k]


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_while_patched(family: str, tmp_path: Any) -> None:
    model, inputs = warm(family)
    stock = logits(model, inputs)
    patch(model, **SETTINGS[family])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert session_of(loaded) is None
    torch.testing.assert_close(logits(loaded, inputs), stock, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_switches_nest_and_survive_exceptions(family: str) -> None:
    model = patched(family)
    session = session_of(model)
    assert session is not None and session.active
    with merging(model, False):
        assert not session.active
        with merging(model, True):
            assert session.active
        with pytest.raises(KeyError), merging(model, True):
            raise KeyError
        assert not session.active
        session.enabled = False
        with merging(model):
            assert session.active
    assert not session.active
    session.enabled = True
    unpatch(model)
    with pytest.raises(PatchStateError), merging(model):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_switches_are_local_to_thread_and_task(family: str) -> None:
    model = patched(family)
    session = session_of(model)
    assert session is not None
    seen: list[bool] = []
    with merging(model, False):
        thread = Thread(target=lambda: seen.append(session.active))
        thread.start()
        thread.join()
        assert seen == [True] and not session.active

    async def off(inside: asyncio.Event, done: asyncio.Event) -> bool:
        with merging(model, False):
            inside.set()
            await done.wait()
            return session.active

    async def main() -> tuple[bool, bool]:
        inside, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(off(inside, done))
        await inside.wait()
        elsewhere = session.active
        done.set()
        return elsewhere, await task

    assert asyncio.run(main()) == (True, False)


def hooked(model: Any, family: str) -> list[nn.Module]:
    vision, language = family_of(family).encoder_layers(model), family_of(family).language(model)
    return [*vision, *language.layers, language, model.model, vision[1].mlp]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("taken_off_first", ["hooks", "patch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_hooks(family: str, order: str, taken_off_first: str) -> None:
    """Accelerate replaces `forward` on the instance; in any order both work, and both go."""
    model, inputs = warm(family)
    before, stock = snapshot(model), logits(model, inputs)
    merged = logits(patched(family), inputs)

    def add() -> None:
        for module in hooked(model, family):
            add_hook_to_module(module, ModelHook())

    def remove() -> None:
        for module in hooked(model, family):
            remove_hook_from_module(module)

    if order == "before":
        add()
    patch(model, **SETTINGS[family])
    if order == "after":
        add()
    assert torch.equal(logits(model, inputs), merged)
    with merging(model, False):
        assert torch.equal(logits(model, inputs), stock)
    if taken_off_first == "hooks":
        remove()
        assert torch.equal(logits(model, inputs), merged)
        unpatch(model)
    else:
        unpatch(model)
        assert torch.equal(logits(model, inputs), stock)
        remove()
    assert torch.equal(logits(model, inputs), stock)
    left = {
        name: vars(m)
        for name, m in model.named_modules()
        if any("illava" in repr(v) for v in vars(m).values() if callable(v))
    }
    assert not left
    assert [type(m) for m in model.modules()] == [before[name][0] for name, _ in model.named_modules()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for the old name
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_after_patch_are_seen_by_the_scores(family: str) -> None:
    targets = list(family_of(family).adapter_targets)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)

    def adapted(patch_first: bool) -> Any:
        model = tiny_model(family, dtype=torch.float64)
        if patch_first:
            patch(model, **SETTINGS[family])
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, config).eval()
        if not patch_first:
            patch(model, **SETTINGS[family])
        return wrapped

    inputs = single(tiny_model(family, dtype=torch.float64), IMAGES)
    first, second = adapted(True), adapted(False)
    merged_in = tiny_model(family, dtype=torch.float64)
    torch.manual_seed(5)
    merged_in = peft.get_peft_model(merged_in, config).eval().merge_and_unload()
    patch(merged_in, **SETTINGS[family])
    expected = logits(merged_in, inputs)
    assert (expected - logits(patched(family, dtype=torch.float64), inputs)).abs().max() > 0.01
    torch.testing.assert_close(logits(first, inputs), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(second, inputs), expected, atol=1e-6, rtol=0)
