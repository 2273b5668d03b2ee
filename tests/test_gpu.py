"""What only a device can show; `make gpu` runs this file there. ``ILLAVA_GPU_DEVICE=cpu`` rehearses it on a CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernel_oracles as oracle
from families import FAMILIES, family_of
from helpers import MERGING
from illava_hooks import Method, merging, patch
from illava_hooks.engine import attention_tap
from illava_hooks.engine.attention_tap import EncoderTap
from illava_hooks.merge.attention import as_mask, attend_with_lse
from illava_hooks.merge.kernels.ops import closest_behind, match_behind, received_attention_varlen, row_lse_varlen
from tiny_models import Sample, inputs_for, tiny_model

DEVICE = torch.device(os.environ.get("ILLAVA_GPU_DEVICE", "cuda"))
pytestmark = pytest.mark.gpu

SCALE = 0.1
#: One token, one less and one more than a tile, and many.
LENGTHS = [1, 63, 65, 700, 4097] if DEVICE.type == "cuda" else [1, 7, 65]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 72, 80, 128])
@pytest.mark.parametrize("groups", [4, 2])
def test_scores_against_float64(width: int, groups: int, dtype: torch.dtype) -> None:
    query = torch.randn(sum(LENGTHS), 4, width).to(dtype)
    key = torch.randn(sum(LENGTHS), groups, width).to(dtype)
    bias = torch.randn(sum(LENGTHS))
    borders = oracle.borders_of(LENGTHS).to(DEVICE)
    for given in (None, bias):
        there = (query.to(DEVICE), key.to(DEVICE), borders, SCALE, None if given is None else given.to(DEVICE))
        lse = row_lse_varlen(*there, lengths=LENGTHS)
        received = received_attention_varlen(*there, lengths=LENGTHS)
        expected = oracle.lse(query, key, LENGTHS, SCALE, given)
        torch.testing.assert_close(lse.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        expected = oracle.received(query, key, LENGTHS, SCALE, given)
        torch.testing.assert_close(received.cpu().double(), expected, atol=1e-6, rtol=10 * TOLERANCE[dtype])


#: What SDPA chooses among, on each kind of device; None: it chooses.
OPERATORS = {
    "cuda": [None, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"],
    "cpu": [None, "FLASH_ATTENTION"],
}[DEVICE.type]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 72, 80, 128])
@pytest.mark.parametrize("kind", OPERATORS)
def test_an_attention_lends_its_lse(kind: str | None, width: int, dtype: torch.dtype) -> None:
    """Bitwise SDPA's output, whichever operator it takes; the LSE against float64; and scores that are made of it."""
    for num in (LENGTHS[1], 96, LENGTHS[3] if DEVICE.type == "cuda" else 33):
        tables = [torch.randn(2, num, 4, width).to(dtype).transpose(1, 2) for _ in range(3)]
        first, second, third = (table.to(DEVICE) for table in tables)
        for bias in (None, torch.randn(2, num).to(dtype)):
            given = None if bias is None else bias.to(DEVICE)
            mask = None if given is None else as_mask(given)
            with sdpa_kernel(getattr(SDPBackend, kind)) if kind else nullcontext():
                try:
                    stock = torch.nn.functional.scaled_dot_product_attention(first, second, third, mask, scale=SCALE)
                except RuntimeError as error:  # "No available kernel"
                    if kind is None or "ernel" not in str(error):
                        raise
                    if bias is None and num == 96:
                        pytest.skip(f"{kind} has no kernel for {dtype} of width {width}")
                    continue
                found = attend_with_lse(first, second, third, SCALE, given)
            assert found is not None, "SDPA takes an operator whose LSE is not known"
            mixed, lse = found
            if kind == "CUDNN_ATTENTION" or kind is None:  # cuDNN plans anew for an LSE
                torch.testing.assert_close(mixed, stock, atol=2e-2, rtol=2e-2)
            else:
                assert torch.equal(mixed, stock)
            query, key = (table.transpose(1, 2).flatten(0, 1) for table in tables[:2])
            added = None if bias is None else bias.flatten()
            expected = oracle.lse(query, key, [num, num], SCALE, added)
            lent = lse.transpose(0, 1).flatten(1).contiguous()
            torch.testing.assert_close(lent.cpu().double(), expected, atol=2e-3, rtol=2e-3)
            if num != 96:  # kernels are tuned anew for other lengths, and that takes its time
                continue
            borders = oracle.borders_of([num, num]).to(DEVICE)
            of_kernel = None if added is None else added.to(DEVICE)
            received = received_attention_varlen(
                query.to(DEVICE), key.to(DEVICE), borders, SCALE, of_kernel, lent, lengths=[num, num]
            )
            expected = oracle.received(query, key, [num, num], SCALE, added)
            torch.testing.assert_close(received.cpu().double(), expected, atol=1e-6, rtol=2e-2)


@pytest.mark.parametrize("method", ["illava", "diverse", Method("lse", encoder_score="query_lse")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lent_lse_changes_nobody_who_stays(
    family: str, method: str | Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the LSE of the attention that ran and with that of a kernel the same tokens merge."""
    model = tiny_model(family).to(DEVICE)
    session = patch(model, **MERGING, method=method, track=True)
    inputs = on_device(inputs_for(model, [Sample(1, images=((64, 64), (48, 30)))]), torch.float32)
    lent: list[bool] = []
    inner = EncoderTap.row_lse
    monkeypatch.setattr(EncoderTap, "row_lse", lambda tap: lent.append(inner(tap) is not None) or inner(tap))
    found = []
    for lends in (True, False):
        if not lends:
            monkeypatch.setattr(attention_tap, "_is_plain", lambda *_, **__: False)
        with torch.no_grad():
            found.append((model(**inputs).logits, session.provenance.merges))
    if DEVICE.type == "cuda":  # a CPU has no use for it where received attention is the score
        assert any(lent) and not all(lent)
    torch.testing.assert_close(found[0][0], found[1][0], atol=5e-4, rtol=1e-3)
    for step, merged in found[0][1].items():
        for one, other in zip(merged.images, found[1][1][step].images, strict=True):
            assert torch.equal(one.seats, other.seats)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_searches_against_float64(dtype: torch.dtype) -> None:
    lengths = [1, 40, 129]
    longest, total = max(lengths), sum(lengths)
    features = torch.randn(total, 200).to(dtype)
    orders = [torch.randperm(n) for n in lengths]
    order = torch.stack([torch.cat([o, torch.arange(len(o), longest)]) for o in orders])
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1, None]
    counts = torch.tensor(lengths)
    rows = first + torch.minimum(torch.arange(longest).expand(3, -1), counts[:, None] - 1)
    there = (features.to(DEVICE), rows.to(DEVICE), order.to(DEVICE), counts.to(DEVICE))
    found = closest_behind(*there, torch.zeros(order.shape, device=DEVICE)).cpu()
    splits = [n // 2 for n in lengths]
    match, cosines = (t.cpu() for t in match_behind(*there, torch.tensor(splits, device=DEVICE)))
    flat = torch.cat(orders)
    expected, _ = oracle.closest(features, flat, lengths, None)
    most, _ = oracle.closest(features, flat, lengths, splits)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    start = 0
    for s, n in enumerate(lengths):
        mine = found[s, orders[s]].double()
        torch.testing.assert_close(mine, expected[start : start + n], atol=TOLERANCE[dtype], rtol=0)
        for place in range(splits[s]):  # of almost equals another may be found: as close it must be
            cosine = unit[match[0, s, place]] @ unit[match[1, s, place]]
            torch.testing.assert_close(cosine, most[start + place], atol=TOLERANCE[dtype], rtol=0)
            torch.testing.assert_close(cosines[s, place].double(), cosine, atol=TOLERANCE[dtype], rtol=0)
        start += n


@contextmanager
def counted_waits(model: Any) -> Iterator[list[int]]:
    """How often the device is waited for in each encoder and decoder layer, in the order in which they run."""
    waits: list[int] = []
    seen: list[warnings.WarningMessage] = []

    def enter(*_: Any) -> None:
        seen.clear()
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")

    def leave(*_: Any) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in seen))

    layers = [*family_of(model).encoder_layers(model), *family_of(model).language(model).layers]
    handles = [layer.register_forward_pre_hook(enter, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield waits
    finally:
        for handle in handles:
            handle.remove()


def on_device(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(DEVICE, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


@pytest.mark.parametrize("method", ["illava", "diverse", "nearest", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_waits_for_the_device(family: str, method: str) -> None:
    model = tiny_model(family).to(DEVICE)
    patch(model, **MERGING, method=method)
    inputs = on_device(inputs_for(model, [Sample(1, images=((64, 64), (48, 30)))]), torch.float32)
    with torch.no_grad():
        model(**inputs)  # tables that are made once, kernels that are compiled and tuned
        with merging(model, False), counted_waits(model) as waits_of_stock:
            stock = model(**inputs).logits
        with counted_waits(model) as waits:
            merged = model(**inputs).logits
    assert merged.shape == stock.shape and not torch.equal(merged, stock)
    assert len(waits) == len(waits_of_stock) > 4
    assert not any(waits), waits  # nor does it wait where some of stock's blocks do, for their segments' borders


@pytest.mark.parametrize("method", ["illava", "diverse", "nearest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_merges_as_a_cpu_does(family: str, method: str) -> None:
    model = tiny_model(family)
    patch(model, **MERGING, method=method)
    inputs = inputs_for(model, [Sample(1, images=((64, 64), (48, 30)))])
    with torch.no_grad():
        expected = model(**inputs).logits
        # By default cuDNN convolves float32 pixels in TF32, which a CPU does not.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = model.to(DEVICE)(**on_device(inputs, torch.float32)).logits.cpu()
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_generates(family: str) -> None:
    model = tiny_model(family).to(DEVICE, torch.bfloat16)
    patch(model, **MERGING, method="diverse")
    inputs = on_device(inputs_for(model, [Sample(1, images=((64, 64),))]), torch.bfloat16)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 4
