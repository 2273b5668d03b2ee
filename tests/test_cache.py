"""A cache with merged tokens goes where a stock cache goes: pickled, copied, to another process, back; not further."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from decode_helpers import IMAGES, KINDS, RAGGED, SETTINGS, next_positions, patched, single
from families import families_and, family_of
from helpers import assert_says, before, keyed
from illava_hooks import PatchStateError, merging, patch, unpatch
from illava_hooks.engine.compat import CACHE
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
SAMPLES = {"one": [IMAGES], "ragged": RAGGED, "both": KINDS["both"]}


def saved_and_loaded(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "oldest pickle": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "copy of a pickle": lambda cache: copy.deepcopy(pickle.loads(pickle.dumps(cache))),
}


def prefill(model: Any, inputs: Inputs, static: bool = False) -> Any:
    cache = (
        StaticCache(config=model.config.text_config, max_cache_len=400)
        if static
        else family_of(model).new_cache(model)
    )
    with torch.no_grad():
        return model(**inputs, **{CACHE: cache}).past_key_values


def turn(model: Any, inputs: Inputs, cache: Any, ids: Tensor, start: int = 0) -> Tensor:
    """Logits of text behind a prompt; explicit positions, where a model keeps those of its last prompt."""
    rows = len(inputs["input_ids"])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, start + ids.shape[1]), value=1)
    if rows == 1:
        where = next_positions(model, inputs, start + ids.shape[1])
    else:
        where = family_of(model).explicit(torch.arange(300, 300 + start + ids.shape[1]).expand(rows, -1))
    where = {name: positions[..., start:] for name, positions in where.items()}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **where).logits


def layers(cache: Any) -> list[tuple[int, ...]]:
    return [(*layer.keys.shape, int(layer.get_seq_length())) for layer in keyed(cache)]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("family", "samples"), families_and(SAMPLES))
def test_a_copy_goes_on_like_the_original(family: str, samples: str, how: str, static: bool) -> None:
    model, batch = patched(family), SAMPLES[samples]
    inputs = inputs_for(model, batch)
    cache = prefill(model, inputs, static)
    twin = COPIES[how](cache)
    assert type(twin) is type(cache) and [type(layer) for layer in twin.layers] == [type(x) for x in cache.layers]
    assert layers(twin) == layers(cache)
    first, second = torch.randint(20, 100, (len(batch), 3)), torch.randint(20, 100, (len(batch), 2))
    expected = turn(model, inputs, cache, first)
    torch.testing.assert_close(turn(model, inputs, twin, first), expected, **CLOSE)
    # Neither knows of the other: the original goes on, then a copy of the copy.
    expected = turn(model, inputs, cache, second, start=3)
    third = COPIES[how](twin)
    torch.testing.assert_close(turn(model, inputs, third, second, start=3), expected, **CLOSE)
    torch.testing.assert_close(turn(model, inputs, twin, second, start=3), expected, **CLOSE)
    assert layers(third) == layers(twin) == layers(cache)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_can_do_what_the_original_can(family: str, how: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, RAGGED)
    cache = prefill(model, inputs)
    twin = COPIES[how](cache)
    order, ids = torch.tensor([2, 0, 1]), torch.randint(20, 100, (3, 1))
    for one in (cache, twin):
        one.reorder_cache(order)
    swapped = {**inputs, "attention_mask": inputs["attention_mask"][order]}
    expected = turn(model, swapped, cache, ids)
    torch.testing.assert_close(turn(model, swapped, twin, ids), expected, **CLOSE)
    if not family_of(family).carries_state:
        twin.crop(-1)
        assert twin.get_seq_length() == cache.get_seq_length() - 1
        with pytest.raises(PatchStateError, match="^cannot crop 300 tokens"):
            twin.crop(-300)
    twin.reset()
    left = 0 if not before("5.18") else keyed(twin)[0].keys.shape[2]  # stock zeroed the keys, which stayed
    assert twin.get_seq_length() == left and cache.get_seq_length() > left


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_travels_to_another_process(family: str, tmp_path: Path) -> None:
    """The other process has not merged anything yet, and imports nothing of ours by itself."""
    model = patched(family)
    cache = prefill(model, single(model, IMAGES))
    (tmp_path / "cache").write_bytes(pickle.dumps(cache))
    code = """
        import pickle, sys
        cache = pickle.load(open(sys.argv[1], "rb"))
        print([(*layer.keys.shape, int(layer.get_seq_length())) for layer in cache.layers if hasattr(layer, "keys")])
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(layers(cache))


STAGES: dict[str, dict[str, Any]] = {
    "both": {},
    "encoder": {"llm_layers": []},
    "language model": {"vit_layers": []},  # the first cache layers are then whole
}


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("samples", ["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpatched_model_refuses_a_merged_cache(family: str, samples: str, stage: str, num_new: int) -> None:
    """Its masks would be those of the logical length: better no answer than a wrong one."""
    model, again, stock = tiny_model(family), tiny_model(family), tiny_model(family)
    for one in (model, again):
        patch(one, **{**SETTINGS[family], **STAGES[stage]})
    inputs = inputs_for(model, SAMPLES[samples])
    ids = torch.randint(20, 100, (len(inputs["input_ids"]), num_new))
    cache, spare = prefill(model, inputs), prefill(model, inputs)
    before = layers(cache)
    unpatch(model)
    for unpatched in (stock, model):
        with pytest.raises(PatchStateError) as caught:
            turn(unpatched, inputs, cache, ids)
        assert_says(caught.value, "patched model")
        assert layers(cache) == before
    # Nothing was lost: a patched model goes on with it.
    expected = turn(again, inputs, spare, ids)
    torch.testing.assert_close(turn(again, inputs, cache, ids), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("samples", ["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_goes_on_with_merging_off(family: str, samples: str) -> None:
    """Text merges nothing anyway; only the masks have to know what the cache holds."""
    model = patched(family)
    inputs = inputs_for(model, SAMPLES[samples])
    ids = torch.randint(20, 100, (len(inputs["input_ids"]), 2))
    expected = turn(model, inputs, prefill(model, inputs), ids)
    cache = prefill(model, inputs)
    with merging(model, False):
        torch.testing.assert_close(turn(model, inputs, cache, ids), expected, atol=1e-6, rtol=1e-6)
