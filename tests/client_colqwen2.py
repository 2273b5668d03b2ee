"""What both forms of ColQwen2 must do: transformers' own class, and the one of the `colpali-engine` package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import SETTINGS
from families import families, family_of
from helpers import assert_differ
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import IMAGE_ID, Inputs, Sample, Side, inputs_for, real_positions, tiny_model

#: The family of the model inside.
(INSIDE,) = (name for name in families() if "colqwen2" in family_of(name).retrievers)
PAGE, LETTER = Sample(3, images=((64, 96),)), Sample(1, images=((48, 40),), text=(3, 9))
QUERY = Sample(2, text=(12,))
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def retrieval_inputs(samples: list[Sample], side: Side = "left") -> Inputs:
    """Inputs as ColQwen2's processors give them: the patches of each image in a row of their own, padded."""
    inputs = inputs_for(tiny_model(INSIDE), samples, side)
    if "pixel_values" in inputs:
        patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
        inputs["pixel_values"] = nn.utils.rnn.pad_sequence(list(patches), batch_first=True)
    return inputs


def tiny_retriever(make: Any) -> Any:
    """A model made from the config of the tiny Qwen2-VL, with its weights."""
    plain = tiny_model(INSIDE)
    model = make(plain.config).eval()
    (model.vlm if hasattr(model, "vlm") else model).load_state_dict(plain.model.state_dict(), strict=False)
    return model


@torch.no_grad()
def embeddings(model: Any, inputs: Inputs, names: tuple[str, ...]) -> Tensor:
    """One vector per position."""
    output = model(**{name: inputs[name] for name in names if name in inputs})
    result: Tensor = getattr(output, "embeddings", output)
    return result


@torch.no_grad()
def by_hand(model: Any, inputs: Inputs, names: tuple[str, ...], settings: dict[str, Any] | None) -> Tensor:
    """The same from a plain Qwen2-VL and the model's last layer."""
    plain = tiny_model(INSIDE)
    if settings:
        patch(plain, **settings)
    given = dict(inputs)
    if "mm_token_type_ids" not in names:  # positions are those of plain text
        length = inputs["input_ids"].shape[1]
        given["position_ids"] = torch.arange(length).expand(3, len(inputs["input_ids"]), -1)
    if "pixel_values" in inputs:
        counts = inputs["image_grid_thw"].prod(-1).tolist()
        rows = zip(inputs["pixel_values"], counts, strict=True)
        given["pixel_values"] = torch.cat([row[:count] for row, count in rows])
    states = plain.model(**given).last_hidden_state
    layer = model.embedding_proj_layer if hasattr(model, "embedding_proj_layer") else model.custom_text_proj
    return nn.functional.normalize(layer(states), dim=-1) * inputs["attention_mask"][..., None]


def check_retriever(make: Any, names: tuple[str, ...]) -> None:
    """Shapes stay; off is stock, bitwise; a batch is its samples; there are fewer vectors.

    Args:
        make: the model's class, as a function of the config of a Qwen2-VL.
        names: the inputs that the class takes.
    """
    model, settings = tiny_retriever(make), SETTINGS[INSIDE]
    samples = [PAGE, LETTER]
    inputs, query = retrieval_inputs(samples), retrieval_inputs([QUERY])
    stock, asked = embeddings(model, inputs, names), embeddings(model, query, names)
    torch.testing.assert_close(stock, by_hand(model, inputs, names, None), **CLOSE)
    session = patch(model, **settings)
    found = embeddings(model, inputs, names)
    assert found.shape == stock.shape
    assert_differ(found, stock)
    torch.testing.assert_close(found, by_hand(model, inputs, names, settings), **CLOSE)
    report = session.report
    assert report.kept_fraction < 0.5 and len(report.visuals) == 2

    for row, sample in enumerate(samples):
        image = inputs["input_ids"][row] == IMAGE_ID
        count = int(image.sum())
        distinct = len(found[row][image].unique(dim=0))
        assert distinct <= 0.6 * count and len(stock[row][image].unique(dim=0)) == count
        for batch in (inputs, retrieval_inputs(samples, "right")):
            alone = embeddings(model, retrieval_inputs([sample]), names)[0]
            in_batch = embeddings(model, batch, names)[row][real_positions(batch, row)]
            torch.testing.assert_close(in_batch, alone, **CLOSE)
    torch.testing.assert_close(embeddings(model, query, names), asked, atol=0, rtol=0)

    with merging(model, False):
        torch.testing.assert_close(embeddings(model, inputs, names), stock, atol=0, rtol=0)
    patch(model, vit_layers=[], llm_layers=[])
    torch.testing.assert_close(embeddings(model, inputs, names), stock, atol=0, rtol=0)
    unpatch(model)
    assert session_of(model) is None
    torch.testing.assert_close(embeddings(model, inputs, names), stock, atol=0, rtol=0)


def check_stages(make: Any, names: tuple[str, ...], stage: str) -> None:
    """One stage alone merges."""
    model = tiny_retriever(make)
    inputs = retrieval_inputs([PAGE])
    off: dict[str, Any] = {"llm_layers": []} if stage == "encoder" else {"vit_layers": []}
    settings = SETTINGS[INSIDE] | off
    stock = embeddings(model, inputs, names)
    patch(model, **settings)
    found = embeddings(model, inputs, names)
    assert_differ(found, stock)
    torch.testing.assert_close(found, by_hand(model, inputs, names, settings), **CLOSE)


STAGES = pytest.mark.parametrize("stage", ["encoder", "language model"])
