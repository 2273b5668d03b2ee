"""ColQwen2 of transformers: one vector per token of a page, from fewer tokens inside."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ColQwen2Config, ColQwen2ForRetrieval

from decode_helpers import IMAGE, SETTINGS, TEXT
from helpers import assert_differ
from illava_hooks import merging, patch, session_of, unpatch
from illava_hooks.errors import InputError
from illava_hooks.tools.bench import Workload, build_workload
from illava_hooks.tools.draw import merge_maps
from kind_helpers import CLOSE, PADDED, said
from tiny_models import Inputs, Sample, inputs_for, tiny_model

PAGE = Sample(text_seed=7, images=((64, 64),), text=(3, 6))
SMALL = Sample(text_seed=8, images=((40, 24),), text=(3, 6))
BATCHES = {
    "pages": [PAGE, IMAGE],
    "three pages": [SMALL, PAGE, IMAGE],
    "one page": [PAGE],
}
MERGING = SETTINGS["qwen2_vl"]


def colqwen2(attn_implementation: str = "sdpa") -> Any:
    """A tiny retriever around the tiny Qwen2-VL."""
    inside = tiny_model("qwen2_vl", attn_implementation=attn_implementation)
    config = ColQwen2Config(vlm_config=inside.config.to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    model = ColQwen2ForRetrieval._from_config(config, attn_implementation=attn_implementation).eval()
    model.vlm.load_state_dict(inside.model.state_dict())
    return model


def pages(samples: list[Sample], side: Any = "left") -> Inputs:
    """What the processor gives: patches padded to those of the largest page."""
    inputs = dict(inputs_for(tiny_model("qwen2_vl"), samples, side=side))
    del inputs["mm_token_type_ids"]
    if "pixel_values" in inputs:
        patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
    return inputs


@torch.no_grad()
def embeddings(model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).embeddings


def distinct(vectors: Tensor) -> Tensor:
    """The vectors without those that an earlier one equals."""
    near = torch.cdist(vectors.double(), vectors.double()) < 1e-5
    return vectors[~near.tril(-1).any(1)]


def patched_colqwen2(**kwargs: Any) -> Any:
    model = colqwen2()
    patch(model, **{**MERGING, **kwargs})
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", BATCHES)
def test_embeddings_keep_their_shape(batch: str, side: str) -> None:
    """As many vectors as stock gives; each of length one, and zeros on padding."""
    model, stock = patched_colqwen2(), colqwen2()
    inputs = pages(BATCHES[batch], side)
    found, expected = embeddings(model, inputs), embeddings(stock, inputs)
    assert_differ(found, expected)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.norm(dim=-1), real.float(), atol=1e-5, rtol=0)
    for row in range(len(real)):
        vectors = found[row][inputs["input_ids"][row] == 5]
        assert len(distinct(vectors)) < len(vectors), "merged tokens share a vector"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", ["pages", "three pages"])
def test_a_batch_embeds_as_its_pages(batch: str, side: str) -> None:
    model = patched_colqwen2()
    inputs = pages(BATCHES[batch], side)
    found = embeddings(model, inputs)
    for row, sample in enumerate(BATCHES[batch]):
        alone = embeddings(model, pages([sample]))[0]
        torch.testing.assert_close(found[row][inputs["attention_mask"][row].bool()], alone, **PADDED)


@pytest.mark.parametrize("settings", [{}, {"llm_layers": []}, {"vit_layers": []}], ids=["both", "encoder", "decoder"])
def test_the_report_shows_fewer_tokens(settings: dict[str, Any]) -> None:
    model = patched_colqwen2(**settings)
    inputs = pages(BATCHES["pages"])
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    report = session_of(model).report
    assert len(report.visuals) == 2 and {v.modality for v in report.visuals} == {"image"}
    assert [v.prompt_tokens for v in report.visuals] == (inputs["input_ids"] == 5).sum(1).tolist()
    assert report.kept_fraction < 0.8
    assert report.flops[0] < report.flops[1] and report.kv_bytes[0] < report.kv_bytes[1]
    held = out["cache"] if "cache" in out else out["past_key_values"]  # as older releases call it
    physical = [layer.keys.shape[-2] for layer in held.layers]
    assert physical == [max(lengths) for lengths in report.sequence_tokens]
    assert physical[-1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["switched off", "identity", "text"])
def test_merging_off_is_stock(how: str, back_end: str) -> None:
    model, stock = colqwen2(back_end), colqwen2(back_end)
    patch(model, **({**MERGING, "vit_r": 0, "llm_ratio": 1.0} if how == "identity" else MERGING))
    inputs = pages([TEXT, TEXT]) if how == "text" else pages(BATCHES["pages"])
    with merging(model, how != "switched off"), torch.no_grad():
        found, expected = (m(**inputs, output_hidden_states=True) for m in (model, stock))
    assert torch.equal(found.embeddings, expected.embeddings)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("patched_part", ["retriever", "model inside"])
def test_unpatch_leaves_no_trace(patched_part: str) -> None:
    model, stock = colqwen2(), colqwen2()
    inputs = pages(BATCHES["pages"])
    embeddings(model, inputs), embeddings(stock, inputs)
    patch(model if patched_part == "retriever" else model.vlm, **MERGING)
    if patched_part == "retriever":
        assert_differ(embeddings(model, inputs), embeddings(stock, inputs))
    unpatch(model)
    assert session_of(model) is None is session_of(model.vlm)
    assert torch.equal(embeddings(model, inputs), embeddings(stock, inputs))
    for (name, ours), theirs in zip(model.named_modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and sorted(vars(ours)) == sorted(vars(theirs)), name
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks), name
        assert len(ours._forward_hooks) == len(theirs._forward_hooks), name


@pytest.mark.parametrize("batch", BATCHES)
def test_the_model_inside_patched_is_the_retriever_patched(batch: str, caplog: pytest.LogCaptureFixture) -> None:
    """Or it is said once that nothing merges there."""
    model, whole = colqwen2(), patched_colqwen2()
    patch(model.vlm, **MERGING)
    inputs = pages(BATCHES[batch])
    for _ in range(2):
        found = embeddings(model, inputs)
    if not said(caplog, "merge"):
        torch.testing.assert_close(found, embeddings(whole, inputs), **CLOSE)
    assert len(said(caplog, "merge")) < 2


def test_forward_called_directly() -> None:
    model = patched_colqwen2()
    inputs = pages(BATCHES["pages"])
    expected = embeddings(model, inputs)
    with torch.no_grad():
        assert torch.equal(model.forward(**inputs).embeddings, expected)
        assert torch.equal(model(inputs.pop("input_ids"), **inputs).embeddings, expected)
    assert inspect.signature(model.forward) == inspect.signature(colqwen2().forward)


def test_the_query_that_ranks_is_the_last_token() -> None:
    """What is asked behind the page changes which tokens stay; what stands in front of it hardly could."""
    model = patched_colqwen2()
    inputs = pages([PAGE])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 99
    found, expected = embeddings(model, other), embeddings(model, inputs)
    assert_differ(found[:, :-1], expected[:, :-1])
    with merging(model, False):
        torch.testing.assert_close(embeddings(model, other)[:, :-1], embeddings(model, inputs)[:, :-1], **CLOSE)


def test_a_copy_is_patched_too() -> None:
    model = patched_colqwen2()
    inputs = pages(BATCHES["pages"])
    expected = embeddings(model, inputs)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert torch.equal(embeddings(twin, inputs), expected)
    assert_differ(embeddings(model, inputs), expected)


def test_embedding_queries_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Pages merge, queries have nothing to merge: neither is worth a warning."""
    model = patched_colqwen2()
    embeddings(model, pages([TEXT]))
    embeddings(model, pages(BATCHES["pages"]))
    assert said(caplog) == []


def test_gradients_reach_the_encoder() -> None:
    """Contrastive training: no labels, no head, and no answer that could rank."""
    model = patched_colqwen2().train()
    model(**pages(BATCHES["pages"])).embeddings.sum().backward()
    assert model.vlm.visual.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    assert model.embedding_proj_layer.weight.grad.abs().max() > 0


def test_late_interaction_needs_the_distinct_vectors_only() -> None:
    """A merged token's vector is that of another: the best match of a query is the same without doubles."""
    model = patched_colqwen2()
    inputs = pages([PAGE])
    page, query = embeddings(model, inputs)[0], embeddings(model, pages([TEXT]))[0]
    visual = page[inputs["input_ids"][0] == 5]
    whole, without = ((query @ vectors.T).amax(1).sum() for vectors in (visual, distinct(visual)))
    torch.testing.assert_close(whole, without, **CLOSE)
    assert len(distinct(visual)) == session_of(model).report.visuals[0].language_tokens[-1]


def test_what_is_not_for_a_retriever_is_refused() -> None:
    model = colqwen2()
    with pytest.raises(InputError, match="model is a ColQwen2, which cannot be drawn"):
        merge_maps(model, None, pages([PAGE]), **MERGING)
    with pytest.raises(InputError, match="model is a ColQwen2, which cannot be measured"):
        build_workload(model, Workload(patches=64))
