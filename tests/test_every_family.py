"""What shows that a family is understood: who is dropped, by stock attention maps; the decoder, by plain loops.

A score that is wrong is silent: identity, batches, generation and traces look right whoever is merged. And a decoder
that shortens its sequence has positions, masks and side inputs to shorten with it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import families_and, family_of
from helpers import PROMPTS, VISUAL, feature_outputs
from illava_hooks import Method, patch
from tiny_models import IMAGE_ID, VIDEO_ID, Inputs, inputs_for, tiny_model

#: FastV: the language stage alone, and who is dropped is lost.
DROP = Method("drop alone", encoder_score="uniform", llm_score="last_query_attention", merge="drop")
RATIO = 0.6
PLACEHOLDERS = {"image": IMAGE_ID, "video": VIDEO_ID}


def positions_given(model: Any, inputs: Inputs) -> Inputs:
    """The inputs with positions that do not count padding: a row of a batch has those that it has alone."""
    return {**inputs, "position_ids": family_of(model).positions(model, inputs)}


def spans_of(model: Any, inputs: Inputs) -> list[tuple[int, list[int]]]:
    """Row and columns of every visual, images first, as long as the features of the stock model."""
    found = []
    for kind, output in feature_outputs(model, inputs, return_dict=True).items():
        more = family_of(model).beyond_features(kind)
        places = (inputs["input_ids"] == PLACEHOLDERS[kind]).nonzero().tolist()
        for features in family_of(model).visual_features(output):
            count = features[..., 0].numel() + more  # older releases keep a video's frames apart
            mine, places = places[:count], places[count:]
            (row,) = {row for row, _ in mine}
            found.append((row, [column for _, column in mine]))
        assert not places
    return found


def patched_run(model: Any, inputs: Inputs, llm_layers: list[int]) -> tuple[Tensor, dict[int, list[list[int]]]]:
    """Logits, and which tokens of every visual are left behind each merging layer, by their place in it."""
    session = patch(model, [], 0, llm_layers, RATIO, method=DROP, track=True)
    logits: Tensor = model(**inputs).logits
    return logits, {k: [i.seats.tolist() for i in session.provenance.at("language", k).images] for k in llm_layers}


# ----------------------------------------------------------------------- the score is the attention row


def left_by_attention(scores: list[float]) -> list[int]:
    """The places that stay when those with the lowest scores are dropped; the scores must tell who goes."""
    count = max(0, min(round(len(scores) * (1 - RATIO)), len(scores) - 1))
    order = sorted(range(len(scores)), key=scores.__getitem__)
    if count:
        assert scores[order[count]] - scores[order[count - 1]] > 1e-7, "too near: take another prompt"
    return sorted(order[count:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(("family", "kind"), families_and(VISUAL, PROMPTS))
@torch.no_grad()
def test_the_score_is_the_row_of_the_eager_attention(family: str, kind: str, layer: int, side: Any) -> None:
    """On entry to a layer those are dropped that the last real token looks at least in the layer before."""
    model = tiny_model(family, attn_implementation="eager")
    inputs = positions_given(model, inputs_for(model, PROMPTS[kind], side))
    spans = spans_of(model, inputs)
    maps = model(**inputs, output_attentions=True).attentions[family_of(family).attending(model).index(layer - 1)]
    assert maps.shape[2:] == (inputs["input_ids"].shape[1],) * 2
    expected = []
    for row, columns in spans:
        query = int(inputs["attention_mask"][row].nonzero().max())
        expected.append(left_by_attention(maps[row, :, query, columns].mean(0).tolist()))
    _, left = patched_run(model, inputs, [layer])
    assert left[layer] == expected
    assert all(len(seats) < len(columns) for seats, (_, columns) in zip(expected, spans, strict=True))


# ------------------------------------------------------------------------------- the decoder, replayed


class GivenTo:
    """Remembers the keyword arguments of the last call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.kwargs: dict[str, Any] = {}
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


def causal_mask(count: int, dtype: torch.dtype) -> Tensor:
    """``(1, 1, N, N)``: nobody sees what comes later."""
    mask = torch.zeros(1, 1, count, count, dtype=dtype)
    for row in range(count):
        mask[..., row, row + 1 :] = torch.finfo(dtype).min
    return mask


def replayed(model: Any, given: dict[str, Any], row: int, real: list[int], dropped: dict[int, set[int]]) -> Any:
    """One row through the stock decoder layers, one by one.

    Args:
        model: A stock model.
        given: Arguments of its language model for the whole batch, without merging.
        row: The row.
        real: Its columns that are no padding.
        dropped: For each layer, the columns that are dropped on entry to it.

    Returns:
        Logits of what is left behind the last layer, and its columns.
    """
    known = family_of(model)
    language = known.language(model)
    columns = list(real)
    hidden = given["inputs_embeds"][row : row + 1, columns]
    positions = given["position_ids"][..., row : row + 1, :]
    tables = language.rotary_emb(hidden, positions)  # of all columns, padding too
    for index, layer in enumerate(language.layers):
        stay = [place for place, column in enumerate(columns) if column not in dropped.get(index, ())]
        hidden, columns = hidden[:, stay], [columns[place] for place in stay]
        cos, sin = (table[..., columns, :] for table in tables)
        mask = causal_mask(len(columns), hidden.dtype) if index in known.attending(model) else None
        output = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = known.behind_layer(index, hidden, row, columns, given)
    return model.lm_head(language.norm(hidden))[0], columns


BACK_ENDS = {"eager": (torch.float32, 1e-5), "sdpa": (torch.float64, 1e-10)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize(("family", "kind"), families_and(VISUAL, PROMPTS))
@torch.no_grad()
def test_the_decoder_is_its_layers_one_by_one(
    family: str, kind: str, back_end: str, layers: list[int], side: Any
) -> None:
    """Row by row, with the same tokens dropped by a list, the logits of all that is left are the patched model's."""
    dtype, tolerance = BACK_ENDS[back_end]
    model = tiny_model(family, attn_implementation=back_end, dtype=dtype)
    inputs = positions_given(model, inputs_for(model, PROMPTS[kind], side))
    spans = spans_of(model, inputs)
    stock = GivenTo(family_of(family).language(model))
    model(**inputs)
    given = dict(stock.kwargs)
    stock.handle.remove()
    logits, left = patched_run(model, inputs, layers)
    replay = tiny_model(family, attn_implementation=back_end, dtype=dtype)
    rows = len(inputs["input_ids"])
    dropped: list[dict[int, set[int]]] = [{layer: set() for layer in layers} for _ in range(rows)]
    for layer, seats in left.items():
        for (row, columns), mine in zip(spans, seats, strict=True):
            dropped[row][layer] |= {column for place, column in enumerate(columns) if place not in mine}
    for row in range(rows):
        real = inputs["attention_mask"][row].nonzero().flatten().tolist()
        expected, columns = replayed(replay, given, row, real, dropped[row])
        assert columns[-1] == real[-1] and (len(columns) < len(real)) == any(r == row for r, _ in spans)
        tolerance = max(tolerance, family_of(family).closest)
        torch.testing.assert_close(logits[row, columns], expected, atol=tolerance, rtol=0)
