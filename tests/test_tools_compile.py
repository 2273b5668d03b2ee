"""`torch.compile` around patched models, without a compiler: back-end "eager" traces, guards and breaks graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from decode_helpers import IMAGE, single
from families import family_of
from helpers import assert_differ, forward, key_lengths, keyed
from illava_hooks import merging, patch, session_of
from tiny_models import FAMILIES, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
NEW = 4
SETTINGS: dict[str, Any] = {"vit_layers": [0], "vit_r": 0.25, "llm_layers": [1], "llm_ratio": 0.5}


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def shallow(family: str) -> Any:
    """A patched model as shallow as can be: tracing takes time by the layer."""
    model = tiny_model(family, vision=family_of(family).shallow(1), text={"num_hidden_layers": 2})
    patch(model, **SETTINGS)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_merges(family: str) -> None:
    """With graph breaks, as stock has them too; compiled before or after `patch` is the same object."""
    model = shallow(family)
    inputs = single(model, IMAGE)
    expected = forward(model, inputs)
    report = session_of(model).report
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        out = compiled(**inputs)
    torch.testing.assert_close(out.logits, expected["forward.logits"], **CLOSE)
    lengths = key_lengths(out.past_key_values)
    assert lengths[0] < inputs["input_ids"].shape[1] and lengths == sorted(set(lengths), reverse=True)
    assert session_of(compiled).report == report
    with merging(compiled, False):
        assert_differ(out.logits, forward(model, inputs)["forward.logits"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_by_place_in_one_graph(family: str) -> None:
    """Some stock models hand ids to their base by place.

    Where something is remembered on the way, what a class has is closed to a compiler.
    """
    model = shallow(family)
    ids, remembered = torch.tensor([[5, 6, 7]]), {"calls": 0}

    def step(ids: torch.Tensor) -> torch.Tensor:
        remembered["calls"] += 1
        states: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
        return states

    with torch.no_grad():
        found = torch.compile(step, backend="eager", fullgraph=True)(ids)
        torch.testing.assert_close(found, step(ids))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_compiles_its_decode_step(family: str) -> None:
    """What `generate` does by itself on a GPU: the steps behind the prompt, in one graph."""
    model = shallow(family)
    inputs = single(model, IMAGE)
    wanted = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    expected = model.generate(**inputs, **wanted)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    found = model.generate(**inputs, cache_implementation="static", compile_config=config, **wanted)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    merged = [layer.ledger.num_merged for layer in keyed(found.past_key_values)]
    assert merged[0] > 0 and merged == sorted(set(merged))
