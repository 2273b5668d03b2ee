"""A float32 model answers the same whatever torch's default dtype is while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from decode_helpers import IMAGES, RICHEST, TEXT, patched, steps
from families import families_and_methods, family_of
from helpers import assert_differ, assert_near, forward
from illava_hooks import METHODS, merging, session_of
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def skip_where_stock_fails(family: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """Skips where what stock makes of places has the default dtype; that it fails is tried."""
    if dtype is torch.float64 and family_of(family).places_in_default_dtype:
        with default_dtype(dtype), pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
            forward(tiny_model(family), inputs)
        pytest.skip("stock: places of patches have torch's default dtype")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "method"), families_and_methods(METHODS))
def test_forward(family: str, method: str, dtype: torch.dtype) -> None:
    model = patched(family, method=method, track=True)
    inputs = inputs_for(model, [IMAGES, TEXT, RICHEST[family]])
    skip_where_stock_fails(family, inputs, dtype)
    expected = forward(model, inputs)
    report = session_of(model).report
    with default_dtype(dtype):
        found = forward(model, inputs)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert_near(found, expected, atol=2e-5, rtol=1e-5)
    assert session_of(model).report == report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, dtype: torch.dtype) -> None:
    model = patched(family)
    inputs = inputs_for(model, [IMAGES, TEXT])
    skip_where_stock_fails(family, inputs, dtype)
    _, expected = steps(model, inputs, 3)
    with default_dtype(dtype):
        _, found = steps(model, inputs, 3)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-5, rtol=1e-5)
    with merging(model, False):
        assert_differ(steps(model, inputs, 3)[1][0], expected[0])
