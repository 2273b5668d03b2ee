"""What the golden tests of all families and of single ones share: a case's settings, its limit, comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import golden as gold
from illava_hooks import MergeSession, patch, unpatch

LIMIT = 2e-5
"""What the largest error of every case has to stay below."""


@contextmanager
def patched(model: PreTrainedModel, case: str) -> Iterator[MergeSession]:
    """Patches a model with the settings of a case, and takes it back at the end."""
    session = patch(model, **gold.cases()[case]["settings"], track=True)
    try:
        yield session
    finally:
        unpatch(model)


def assert_rotary(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares rotary tables: equal positions give equal tables."""
    for table, expected_table in zip(actual, expected, strict=True):
        assert table.shape == expected_table.shape
        torch.testing.assert_close(table, expected_table, atol=1e-6, rtol=0)


def assert_provenance(label: str, image: Any, seats: Tensor, shares: Tensor) -> None:
    """Compares where the survivors of one image sit, and what each of them stands for."""
    assert torch.equal(image.seats, seats), f"{label}: other tokens survive"
    gold.assert_near(f"{label} weights", image.weights.to_dense(), shares, 1e-6)


def check_limit() -> None:
    """Prints the errors reached so far, and holds the largest of every case to the limit."""
    print(f"\nlargest error of every golden comparison\n{gold.report_reached()}")
    largest: dict[str, float] = {}
    for label, error in gold.reached.items():
        case = label.removeprefix("stock ").split()[0]
        largest[case] = max(error, largest.get(case, 0.0))
    print(f"by case: {', '.join(f'{case} {error:.1e}' for case, error in sorted(largest.items()))}")
    assert {case: error for case, error in largest.items() if not error <= LIMIT} == {}
