"""The library against the slow reference: what the tests of all families and of single ones share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import reference as ref
from families import family_of
from helpers import key_lengths
from illava_hooks import patch
from illava_hooks.methods import Method
from tiny_models import Sample, inputs_for, real_positions, tiny_model

RULES = ("recycle", "cluster", "nearest", "diverse", "selective", "bipartite", "drop")
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [1, 3], "llm_ratio": 0.6}

SAMPLES = {
    "image": Sample(1, images=((48, 30),)),
    "two images": Sample(2, images=((48, 30), (64, 64))),
    "video": Sample(3, videos=(4,)),
    "video, image": Sample(4, images=((60, 40),), videos=(2,), order="vi", text=(2, 1, 5)),
    "text": Sample(5, text=(9,)),
}
MERGED = ("image", "two images", "video")
TOLERANCE = 1e-6


def check_forward(
    family: str,
    samples: Any,
    rule: str,
    settings: dict[str, Any],
    encoder_score: str = "received_attention",
    llm_score: str = "last_query_attention",
    side: Any = "left",
    tolerance: float | None = None,
    **overrides: Any,
) -> None:
    """Every row of a patched forward, and its cache lengths, against the reference."""
    tolerance = tolerance_of(family) if tolerance is None else tolerance
    model = tiny_model(family, dtype=torch.float64, **overrides)
    method = ref.ReferenceMethod(rule, encoder_score, llm_score)
    expected = [
        ref.reference_forward(model, inputs_for(model, [sample]), method=method, **settings) for sample in samples
    ]
    patch(model, **settings, method=library_method(rule, encoder_score, llm_score))
    inputs = inputs_for(model, samples, side)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    longest = [max(lengths) for lengths in zip(*(theirs.kv_lengths for theirs in expected), strict=True)]
    assert key_lengths(out.past_key_values) == longest
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    for row, theirs in enumerate(expected):
        logits = out.logits[row, real_positions(inputs, row)]
        seen = theirs.kept[-1]
        assert_close(logits[seen], theirs.logits[seen], tolerance, "survivors")
        assert_close(logits, theirs.logits, tolerance, "merged-away positions")


def tolerance_of(family: str) -> float:
    """How far the library in float64 may be from the reference, after many layers that round to float32."""
    return TOLERANCE * family_of(family).rounding


def library_method(
    rule: str, encoder_score: str = "received_attention", llm_score: str = "last_query_attention"
) -> Method:
    """The method of the library that does what `ReferenceMethod` says."""
    return Method(name=f"test-{rule}", encoder_score=encoder_score, llm_score=llm_score, merge=rule, layout="aligned")


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    torch.testing.assert_close(
        ours, expected.to(ours.dtype), atol=tolerance, rtol=0, msg=lambda message: f"{what}\n{message}"
    )
