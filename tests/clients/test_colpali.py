"""Late-interaction retrieval with the ColQwen2 of `colpali-engine`, whose forward takes `*args, **kwargs`."""

from __future__ import annotations

from typing import Any

import torch

from client_colqwen2 import (
    INSIDE,
    LETTER,
    PAGE,
    STAGES,
    check_retriever,
    check_stages,
    retrieval_inputs,
    tiny_retriever,
)
from client_helpers import CLOSE, client
from decode_helpers import SETTINGS
from helpers import assert_differ
from illava_hooks import patch

colpali = client("colpali_engine.models")
NAMES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def make(config: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return colpali.ColQwen2(config, **kwargs)


def test_embeddings() -> None:
    check_retriever(make, NAMES)


@STAGES
def test_one_stage(stage: str) -> None:
    check_stages(make, NAMES, stage)


def test_positional_ids_and_direct_calls() -> None:
    model = tiny_retriever(make)
    inputs = retrieval_inputs([PAGE, LETTER])
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **inputs), model(input_ids=ids, **inputs), atol=0, rtol=0)
        patch(model, **SETTINGS[INSIDE])
        expected = model(input_ids=ids, **inputs)
        torch.testing.assert_close(model.forward(input_ids=ids, **inputs), expected, atol=0, rtol=0)
        torch.testing.assert_close(model(ids, **inputs), expected, atol=0, rtol=0)
        torch.testing.assert_close(model.forward(ids, **inputs), expected, atol=0, rtol=0)


def test_only_image_vectors() -> None:
    """`mask_non_image_embeddings` zeroes the vectors of text."""
    model = tiny_retriever(lambda config: make(config, mask_non_image_embeddings=True))
    inputs = retrieval_inputs([PAGE, LETTER])
    with torch.no_grad():
        stock = model(**inputs)
        patch(model, **SETTINGS[INSIDE])
        found = model(**inputs)
    torch.testing.assert_close(found.abs().sum(-1) > 0, stock.abs().sum(-1) > 0)
    assert_differ(found, stock)
    # The score of a query is that of the vectors that are left: copies add nothing to a maximum.
    query = torch.nn.functional.normalize(torch.randn(1, 5, found.shape[-1]), dim=-1)
    few = [row[row.abs().sum(-1) > 0].unique(dim=0) for row in found]
    scored = torch.stack([(query[0] @ row.T).amax(-1).sum() for row in few])
    everything = torch.stack([(query[0] @ row[row.abs().sum(-1) > 0].T).amax(-1).sum() for row in found])
    torch.testing.assert_close(scored, everything, **CLOSE)
    assert all(len(row) <= 0.6 * int((full.abs().sum(-1) > 0).sum()) for row, full in zip(few, stock, strict=True))
