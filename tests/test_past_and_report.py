"""What the keys of earlier turns cost, what a step pays where nothing merged, and back-ends that `patch` must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decode_helpers import IMAGE, IMAGES, RICHEST, SETTINGS, TEXT, patched, single
from families import family_of
from helpers import assert_says, keyed, needs_ready_features, query_width
from illava_hooks import METHODS, IllavaHooksError, Method, merging, patch, session_of
from kind_helpers import CACHE, feed, prefill, prompt_positions
from test_backends import FlashKernel, generated
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

SECOND = Sample(text_seed=8, images=((40, 40),), text=(4, 6))


def bytes_of(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed(cache))


def lengths(cache: Any) -> list[int]:
    """Keys of each layer; none where it carries a state along."""
    return [layer.keys.shape[-2] if hasattr(layer, "keys") else 0 for layer in cache.layers]


def turn(model: Any, cache: Any, start: Tensor, inputs: Inputs) -> tuple[Any, Tensor]:
    """A turn that brings an image, behind a cache; the cache and the next position."""
    where = prompt_positions(model, inputs) + start[:, None]
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        out = model(**rest, position_ids=where, **{CACHE: cache})
    return out.past_key_values, where.amax(-1).reshape(-1, 1).amax(0) + 1


#: What the cache holds before the turn that is reported.
PASTS: dict[str, list[Sample]] = {
    "an image": [IMAGE],
    "text": [TEXT],
    "two turns": [IMAGE, IMAGES],
    "text and images": [TEXT, IMAGES],
}


def conversation(model: Any, past: str) -> tuple[Any, list[int]]:
    """The cache behind all turns and the last one, and the keys of each layer before that."""
    first, *others = PASTS[past]
    cache, start = prefill(model, single(model, first), DynamicCache(config=model.config.text_config))
    for sample in others:
        cache, start = turn(model, cache, start, single(model, sample))
    before = lengths(cache)
    return turn(model, cache, start, single(model, SECOND))[0], before


@needs_ready_features
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_the_whole_cache(family: str, past: str) -> None:
    """Merged: what the cache holds; unmerged: what it would hold without the library."""
    model, stock = patched(family), tiny_model(family)
    cache, _ = conversation(model, past)
    assert session_of(model).report.kv_bytes == (bytes_of(cache), bytes_of(conversation(stock, past)[0]))


@needs_ready_features
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_count_the_keys_of_the_past(family: str, past: str) -> None:
    """By hand: new tokens times old keys, beside what a prompt of that length costs alone."""
    model, stock = patched(family), tiny_model(family)
    _, before = conversation(model, past)
    report = session_of(model).report
    _, before_stock = conversation(stock, past)
    with torch.no_grad():
        alone = patched(family)
        alone(**single(alone, SECOND))
    first = session_of(alone).report
    assert report.encoder_flops == first.encoder_flops and report.projector_flops == first.projector_flops
    width = query_width(model)
    new = [sum(tokens) for tokens in report.sequence_tokens]
    assert report.sequence_tokens == first.sequence_tokens and report.prompt_tokens == first.prompt_tokens
    merged = sum(4 * n * old * width for n, old in zip(new, before, strict=True))
    whole = sum(4 * sum(report.prompt_tokens) * old * width for old in before_stock)
    assert report.llm_flops == (first.llm_flops[0] + merged, first.llm_flops[1] + whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_turn_has_no_past(family: str) -> None:
    """Empty caches of both kinds, one that was reset, and none: the same report."""
    model = patched(family)
    inputs, config = single(model, IMAGE), model.config.text_config
    reports = []
    with torch.no_grad():
        for cache in (None, DynamicCache(config=config), StaticCache(config=config, max_cache_len=400)):
            model(**inputs, **({} if cache is None else {CACHE: cache}))
            reports.append(session_of(model).report)
    assert reports[0] == reports[1] == reports[2]


@needs_ready_features
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_past_counts_its_real_keys(family: str) -> None:
    """Padding is in the tensors and in nobody's account, as in a first turn."""
    model = patched(family)
    together = inputs_for(model, [IMAGE, TEXT])
    second = inputs_for(model, [SECOND, SECOND])
    cache, start = prefill(model, together)
    mask = torch.cat([together["attention_mask"], second["attention_mask"]], dim=1)
    where = prompt_positions(model, second) + start[:, None]
    with torch.no_grad():
        model(**{**second, "attention_mask": mask}, position_ids=where, **{CACHE: cache})
    found = session_of(model).report
    merged, whole = 0, 0
    for sample in (IMAGE, TEXT):
        alone, at = prefill(model, single(model, sample))
        turn(model, alone, at, single(model, SECOND))
        kv = session_of(model).report.kv_bytes
        merged, whole = merged + kv[0], whole + kv[1]
    assert found.kv_bytes == (merged, whole)


# ---------------------------------------------------------------------------- steps where nothing merged


class Operators(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def identity(model: Any) -> None:
    patch(model, **{**SETTINGS[family_of(model).name], "vit_r": 0, "llm_ratio": 1.0})


def too_little(model: Any) -> None:
    """A fraction that takes no whole token of a small image."""
    patch(model, vit_layers=[1], vit_r=0.01, llm_layers=[2], llm_ratio=0.999)


def as_ever(model: Any) -> None:
    patch(model, **SETTINGS[family_of(model).name])


#: Prefills that merge nothing: how the model is patched, what it is given, and whether merging is on.
UNMERGED: dict[str, tuple[Callable[[Any], Any], list[Sample], bool]] = {
    "text": (as_ever, [TEXT], True),
    "padded text": (as_ever, [TEXT, Sample(text_seed=9, text=(5,))], True),
    "identity": (identity, [IMAGE], True),
    "nothing to take": (too_little, [Sample(text_seed=3, images=((16, 16),))], True),
    "nothing to take, padded": (too_little, [Sample(text_seed=3, images=((16, 16),)), TEXT], True),
    "switched off": (as_ever, [IMAGE, TEXT], False),
}


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("case", UNMERGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_behind_an_unmerged_prompt_are_stock(family: str, case: str, new: int) -> None:
    """Bitwise, and not one operator more."""
    patches, samples, on = UNMERGED[case]
    model, stock = tiny_model(family), tiny_model(family)
    patches(model)
    inputs = inputs_for(stock, samples)
    ids = torch.randint(20, 100, (len(samples), new), generator=torch.Generator().manual_seed(1))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    found = []
    for each in (stock, model):
        if each is model:
            with merging(model, on):
                cache, start = prefill(each, inputs)
        else:
            cache, start = prefill(each, inputs)
        with Operators() as operators:
            logits = feed(each, cache, ids, start, mask if len(samples) > 1 else None)
        found.append((logits, operators.seen, lengths(cache)))
    (expected, theirs, held), (logits, ours, holds) = found
    assert torch.equal(logits, expected) and holds == held
    assert ours == theirs, ours - theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_behind_a_merged_prompt_are_not_stock(family: str) -> None:
    """The test above could fail."""
    model, stock = patched(family), tiny_model(family)
    inputs = single(model, IMAGE)
    ids = torch.tensor([[30]])
    ours, theirs = (feed(m, *(lambda c: (c[0], ids, c[1]))(prefill(m, inputs))) for m in (model, stock))
    assert not torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------- sizes beside flash kernels


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], FlashKernel]:
    """Puts a simulated kernel under a name and gives a model that back-end."""

    def use(model: Any, name: str) -> FlashKernel:
        kernel = FlashKernel(has_windows=family_of(model).has_windows)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, kernel)
        for config in (model.config, model.config.text_config, model.config.vision_config):
            monkeypatch.setattr(config, "_attn_implementation_internal", name)
        return kernel

    return use


WEIGHED: dict[str, Any] = {
    "diverse": "diverse",
    "nearest, weighed": Method("nearest, weighed", merge="nearest", proportional=True),
    "recycle, weighed": Method("recycle, weighed", proportional=True),
    "tome, weighed": Method("tome, weighed", "uniform", "uniform", merge="bipartite", proportional=True),
}


@pytest.mark.parametrize("rows", ["ragged", "single"])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("method", WEIGHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_weighed_tokens_beside_flash_attention(
    family: str, method: str, kernel: str, rows: str, flash: Callable[[Any, str], FlashKernel]
) -> None:
    """Equal to SDPA, or refused by `patch` in one line that names the method and the back-end."""
    samples = {"ragged": [IMAGES, TEXT, RICHEST[family]], "single": [IMAGE]}[rows]
    reference, model = tiny_model(family), tiny_model(family)
    simulated = flash(model, kernel)
    patch(reference, **SETTINGS[family], method=WEIGHED[method])
    try:
        patch(model, **SETTINGS[family], method=WEIGHED[method])
    except IllavaHooksError as error:
        assert_says(error, kernel, r"method|proportional")
        assert session_of(model) is None
        return
    for ours, expected in zip(generated(model, samples), generated(reference, samples), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert simulated.masks, "the simulated kernel ran"


@pytest.mark.parametrize("method", [name for name in METHODS if name != "illava-reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_beside_flash_attention(
    family: str, method: str, flash: Callable[[Any, str], FlashKernel]
) -> None:
    """No method is found out to be impossible by its first forward."""
    reference, model = tiny_model(family), tiny_model(family)
    flash(model, "flash_attention_2")
    patch(reference, **SETTINGS[family], method=method)
    try:
        patch(model, **SETTINGS[family], method=method)
    except IllavaHooksError as error:
        assert_says(error, "flash_attention_2")
        return
    torch.manual_seed(4)
    ours = generated(model, [IMAGE])
    torch.manual_seed(4)
    for found, expected in zip(ours, generated(reference, [IMAGE]), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
