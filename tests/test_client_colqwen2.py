"""Late-interaction retrieval with transformers' own ColQwen2."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ColQwen2Config, ColQwen2ForRetrieval

from client_colqwen2 import STAGES, check_retriever, check_stages

NAMES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")


def make(config: Any) -> ColQwen2ForRetrieval:
    torch.manual_seed(1)
    return ColQwen2ForRetrieval(ColQwen2Config(vlm_config=config.to_dict(), embedding_dim=24))


def test_embeddings() -> None:
    check_retriever(make, NAMES)


@STAGES
def test_one_stage(stage: str) -> None:
    check_stages(make, NAMES, stage)
