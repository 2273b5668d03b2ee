"""What only Qwen3.5 has: decoder layers that carry a state along instead of keys, between layers that pay attention.

The suite's tiny model has one such layer, behind all merges. Here they stand in front of, between and behind them, as
published and alternating; the shared tests are asked of those models too. The slow reference runs a gated delta net
token by token and head by head (`tests/reference.py`); each test against it has a mutation that makes it fail.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_vl import modeling_qwen3_vl

import reference as ref
import test_batching
import test_every_family
import test_generate
import test_no_trace
import test_past_and_report
import test_report
import test_shapes
from decode_helpers import BOTH, IMAGE, IMAGES, RAGGED, SETTINGS, TEXT, VIDEO, patched, single, steps
from families.qwen3_5 import Qwen35
from helpers import (
    PROMPTS,
    assert_same,
    assert_says,
    before,
    everything,
    feature_outputs,
    key_lengths,
    needs_ready_features,
    prompt,
)
from illava_hooks import METHODS, PatchStateError, UnsupportedModelError, merging, patch, session_of
from illava_hooks.engine import decoder_masks, encoder
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.proof import check_scores
from illava_hooks.merge.plan import take_kept
from illava_hooks.patchers import qwen3_5
from illava_hooks.tools.bench import SHAPES, Workload, build_shape, build_workload
from reference_checks import SAMPLES, assert_close, check_forward, library_method
from tiny_models import Sample, inputs_for, real_positions, tiny_model

NAME = "qwen3_5"
LINEAR, FULL = "linear_attention", "full_attention"

#: Kinds of layers, and where the language model merges in them.
ORDERS: dict[str, tuple[list[str], list[int]]] = {
    "published": ([LINEAR, LINEAR, LINEAR, FULL] * 2, [4]),
    "alternating": ([LINEAR, FULL] * 3, [2, 4]),
    "attention last": ([LINEAR, FULL, FULL, LINEAR, FULL], [2, 3]),
}
RULES = ("recycle", "diverse", "drop")
BATCHES = {
    "images": PROMPTS["ragged"],
    "image and video": (SAMPLES["video, image"], SAMPLES["text"], SAMPLES["image"]),
}
ENCODER: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25}
#: Stock's delta rule rounds to float32 inside, also in float64, on chunks that begin where a row's padding does, and
#: several layers make more of it. Stock alone, a batch beside its samples: up to 7.4e-5 in the published order.
CLOSE = 2e-4
#: Where all of it is computed in float64 (`exact`).
EXACT = 1e-9
#: And where tokens are summed by weights, which are float32.
WEIGHED = 2e-5

#: Older releases invert the triangular systems of the delta rule row by row, and multiply by what they gave.
SOLVES = "solve_triangular" in inspect.getsource(modeling_qwen3_5)
needs_solver = pytest.mark.skipif(not SOLVES, reason="this release's delta rule has two products more")


def text_of(order: str) -> dict[str, Any]:
    """Settings of a decoder with so many layers of those kinds."""
    kinds, _ = ORDERS[order]
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


def hybrid(order: str, **kwargs: Any) -> Any:
    """A tiny model of that order."""
    return tiny_model(NAME, text=text_of(order), **kwargs)


def settings_of(order: str) -> dict[str, Any]:
    """Settings that merge in both stages."""
    return ENCODER | {"llm_layers": ORDERS[order][1], "llm_ratio": 0.6}


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whoever asks for the family's tiny model, or for settings, gets those of an order."""
    build = Qwen35.build

    def built(known: Qwen35, *args: Any, text: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return build(known, *args, text=text_of(request.param) | (text or {}), **kwargs)

    monkeypatch.setattr(Qwen35, "build", built)
    monkeypatch.setattr(Qwen35, "closest", CLOSE)
    monkeypatch.setitem(SETTINGS, NAME, settings_of(request.param))
    found: str = request.param
    return found


class Double:
    """Stands for torch in a module: what it calls float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stock code of the model rounds to float32: what is equal in exact arithmetic is then equal to 1e-9."""
    modules = (modeling_qwen3_5, modeling_qwen3_vl)  # the reference rotates by the latter
    names = {module.__name__ for module in modules}
    single_precision = torch.Tensor.float

    def as_double(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        caller = sys._getframe(1).f_globals.get("__name__")
        return tensor.double() if caller in names else single_precision(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", as_double)
    for module in modules:
        monkeypatch.setattr(module, "torch", Double())


# ------------------------------------------------------------------------------------ where it may merge


@pytest.mark.parametrize(("order", "layer", "allowed"), [("published", 5, "[4]"), ("alternating", 3, "[2, 4]")])
def test_merging_behind_a_layer_without_attention_is_refused(order: str, layer: int, allowed: str) -> None:
    model = hybrid(order)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [], 0, [*ORDERS[order][1], layer], 0.5)
    assert_says(
        caught.value, f"^llm_layers contains {layer}, where the layer before is recurrent", "cannot rank tokens"
    )
    assert str(caught.value).endswith(f"; choose from {allowed}")
    assert session_of(model) is None
    patch(model, [1], 0.25, [layer], 1.0)  # nothing merges there


def test_a_decoder_without_attention_merges_nowhere() -> None:
    model = tiny_model(NAME, text={"layer_types": [LINEAR] * 4})
    with pytest.raises(UnsupportedModelError, match=r"use llm_layers=\[\]$"):
        patch(model, [1], 0.25, [2], 0.5)


def test_sliding_windows_between_are_refused() -> None:
    model = tiny_model(NAME)
    model.config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(UnsupportedModelError, match="^text_config has sliding-window layers"):
        patch(model, [], 0, [1], 0.5)


def test_presets_fit_the_published_sizes() -> None:
    """In the smallest model's tower at the same fractions of its depth."""
    for name, first in (("qwen3.5-0.8b", 3), ("qwen3.5-9b", 9)):
        model = build_shape(name, device="meta")
        session = patch(model)
        assert session.config.image.vit_layers == tuple(range(first, first + 4))
        assert session.config.llm_layers == (8,)
        kinds = model.config.text_config.layer_types
        assert kinds[7] == FULL and kinds[6] == LINEAR


# ----------------------------------------------------------------------------------------- the decoder


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("order", ORDERS)
def test_the_reference_is_stock(order: str) -> None:
    model = hybrid(order, dtype=torch.float64)
    for sample in (IMAGES, BOTH):
        inputs = single(model, sample)
        with torch.no_grad():
            expected = model(**inputs).logits[0]
        assert_close(ref.reference_forward(model, inputs).logits, expected, EXACT)


def check_order(order: str, batch: str, rule: str, side: str = "left") -> None:
    tolerance = EXACT if rule == "drop" else WEIGHED
    check_forward(NAME, BATCHES[batch], rule, settings_of(order), side=side, tolerance=tolerance, text=text_of(order))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("batch", "side"), [("images", "left"), ("image and video", "right")])
@pytest.mark.parametrize("order", ORDERS)
def test_both_stages_against_the_reference(order: str, batch: str, rule: str, side: str) -> None:
    check_order(order, batch, rule, side)


@pytest.mark.usefixtures("exact")
def test_padding_that_recurrent_layers_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths have copies of tokens in front, which a state would take in."""
    monkeypatch.setattr(decoder_masks, "_padding", lambda *args: None)
    with pytest.raises(AssertionError, match="not close"):
        check_order("published", "images", "drop")


@pytest.mark.usefixtures("exact")
def test_padding_as_in_front_of_the_first_merge_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of another stage, cut to the length of its own."""

    def first(run: Any, merges: int, past: Any, device: Any) -> Any:
        valid = run.counts[0].valid(device)
        return valid[:, -run.counts[merges].width :] if valid is not None else None

    monkeypatch.setattr(decoder_masks, "_padding", first)
    with pytest.raises(AssertionError, match="not close"):
        check_order("published", "images", "drop")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("part", ["fading", "replacing", "gate"])
def test_another_delta_net_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference says what stock does, and not something else."""
    delta_net = ref._delta_net

    def other(net: Any, hidden: Any, cache: Any) -> Any:
        net = copy.deepcopy(net)
        with torch.no_grad():
            if part == "fading":
                net.A_log -= 0.2
            else:
                (net.in_proj_b if part == "replacing" else net.in_proj_z).weight *= 0.8
        return delta_net(net, hidden, cache)

    monkeypatch.setattr(ref, "_delta_net", other)
    with pytest.raises(AssertionError, match="not close"):
        check_order("published", "images", "drop")


@pytest.mark.parametrize("kind", ["ragged", "image and video"])
def test_the_score_is_the_row_of_the_eager_attention(order: str, kind: str) -> None:
    for layer in ORDERS[order][1]:
        test_every_family.test_the_score_is_the_row_of_the_eager_attention(NAME, kind, layer, "left")


def test_a_layer_that_looks_otherwise_is_refused() -> None:
    """Queries share their projection with a gate: `patch` asks the layer itself what it looks at."""
    model = tiny_model(NAME)
    attention = model.model.language_model.layers[0].self_attn
    check_scores(model.model.language_model, [0])

    class Windowed(type(attention)):  # type: ignore[misc]
        """Does not look at the first token."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            mask = torch.zeros(1, 1, 6, 6)
            mask[..., :1] = torch.finfo(torch.float32).min
            return super().forward(*args, **kwargs | {"attention_mask": mask})

    attention.__class__ = Windowed
    with pytest.raises(UnsupportedModelError, match="pays an attention that its queries and keys do not explain"):
        check_scores(model.model.language_model, [0])


@pytest.mark.parametrize(("kind", "side"), [("ragged", "left"), ("image and video", "right")])
def test_the_decoder_is_its_layers_one_by_one(order: str, kind: str, side: Any) -> None:
    test_every_family.test_the_decoder_is_its_layers_one_by_one(NAME, kind, "sdpa", ORDERS[order][1], side)


# ------------------------------------------------------------------------------------------- the encoder


def check_features(kind: str, rule: str) -> None:
    """Every feature of every image and video against the reference."""
    model = tiny_model(NAME, dtype=torch.float64)
    expected = []
    for sample in PROMPTS[kind]:
        method = ref.ReferenceMethod(rule, "received_attention")
        settings = ref.ReferenceSettings(ENCODER["vit_layers"], ENCODER["vit_r"], method=method)
        expected += ref.vision_stage(model, inputs_for(model, [sample]), settings)
    patch(model, **ENCODER, llm_layers=[], llm_ratio=1.0, method=library_method(rule))
    for modality, output in feature_outputs(model, inputs_for(model, PROMPTS[kind]), return_dict=True).items():
        theirs = [visual for visual in expected if visual.kind == modality]
        assert len(theirs) == len(output.pooler_output) and theirs
        for ours, visual in zip(output.pooler_output, theirs, strict=True):
            assert not all(visual.kept)
            assert_close(ours, visual.values, 1e-6, "features")


@pytest.mark.parametrize("rule", ("recycle", "cluster", "nearest", "diverse", "bipartite", "drop"))
@pytest.mark.parametrize("kind", ["images", "video", "image and video"])
def test_features_against_the_reference(kind: str, rule: str) -> None:
    check_features(kind, rule)


@pytest.mark.parametrize("kind", ["images", "video"])
def test_taking_patches_in_the_encoder_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "apply_merge", lambda tokens, plan, *_: take_kept(tokens, plan))
    with pytest.raises(AssertionError, match="features"):
        check_features(kind, "recycle")


# ------------------------------------------------------------------------- what every family shows, by order


@pytest.mark.parametrize("kind", ["ragged", "image and video", "text"])
def test_stock_where_nothing_merges(order: str, kind: str) -> None:
    model, stock = tiny_model(NAME), tiny_model(NAME)
    inputs = prompt(model, kind)
    expected = everything(stock, inputs)
    patch(model, [1, 2], 0, ORDERS[order][1], 1.0)
    assert_same(everything(model, inputs), expected)
    patch(model, **settings_of(order))
    with merging(model, False):
        assert_same(everything(model, inputs), expected)


def apart(model: Any, batch: Any, side: Any) -> float:
    """How far the logits of a batch are from those of its samples alone."""
    inputs = inputs_for(model, batch, side)
    found = 0.0
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, sample in enumerate(batch):
            alone = model(**single(model, sample)).logits[0]
            found = max(found, float((logits[row, real_positions(inputs, row)] - alone).abs().max()))
    return found


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_samples(order: str, side: Any) -> None:
    """Exactly, as in stock; what is left otherwise is float32's rounding inside of stock's delta rule."""
    model, batch = tiny_model(NAME, dtype=torch.float64), [IMAGES, TEXT, IMAGE, VIDEO, BOTH]
    assert apart(model, batch, side) < EXACT
    patch(model, **settings_of(order), method="diverse")
    assert apart(model, batch, side) < EXACT
    assert session_of(model).report.kept_fraction < 0.6


@pytest.mark.usefixtures("exact")
def test_padding_that_recurrent_layers_read_parts_a_batch_from_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("published", dtype=torch.float64)
    patch(model, **settings_of("published"))
    monkeypatch.setattr(decoder_masks, "_padding", lambda *args: None)
    assert apart(model, [IMAGES, TEXT, IMAGE], "left") > 1e-3


def test_a_batch_answers_as_its_samples(order: str) -> None:
    test_batching.test_greedy(NAME, "ragged")
    test_batching.test_beam_search(NAME, "ragged")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "illava-reference"])
def test_every_method(method: str) -> None:
    model = hybrid("published", dtype=torch.float64)
    patch(model, **settings_of("published"), method=method)
    assert apart(model, RAGGED, "left") < EXACT


def test_a_second_turn(order: str) -> None:
    test_generate.test_a_second_turn_goes_on_with_the_cache(NAME, "with text")


def test_static_and_dynamic_caches_and_none(order: str) -> None:
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    for batch in ([IMAGE], [IMAGES, TEXT, IMAGE, BOTH]):
        inputs = inputs_for(model, batch)
        ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
        expected, *others = [steps(model, inputs, **way) for way in ways]
        for ids, logits in others:
            assert torch.equal(ids, expected[0])
            for ours, theirs in zip(logits, expected[1], strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@needs_solver
@pytest.mark.parametrize("merged", [False, True])
def test_flops_are_those_that_run(order: str, merged: bool) -> None:
    test_report.test_flops_are_those_that_run(NAME, merged)


def test_kv_bytes_are_those_of_the_layers_with_keys(order: str) -> None:
    test_report.test_kv_bytes_are_those_of_the_cache(NAME)


@needs_ready_features
@pytest.mark.parametrize("past", ["text", "two turns"])
def test_a_past_counts_in_the_layers_with_keys(order: str, past: str) -> None:
    test_past_and_report.test_kv_bytes_are_those_of_the_whole_cache(NAME, past)
    test_past_and_report.test_flops_count_the_keys_of_the_past(NAME, past)


def test_no_trace_is_left(order: str) -> None:
    test_no_trace.test_unpatch_leaves_nothing(NAME)
    test_no_trace.test_deepcopy_is_an_independent_patched_model(NAME)


@pytest.mark.usefixtures("exact")
def test_idle_machinery(order: str) -> None:
    model, stock = tiny_model(NAME, dtype=torch.float64), tiny_model(NAME, dtype=torch.float64)
    patch(model, [1, 2], 1e-9, ORDERS[order][1], 1 - 1e-9)
    inputs = inputs_for(model, [IMAGES, TEXT, BOTH])
    with torch.no_grad():
        found, expected = model(**inputs).logits, stock(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert session_of(model).report.kept_fraction == 1
    torch.testing.assert_close(found[real], expected[real], atol=EXACT, rtol=0)


# --------------------------------------------------------------------------------- caches that mix kinds


def test_layers_with_keys_shrink_and_the_others_are_stock(order: str) -> None:
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    inputs = inputs_for(model, RAGGED)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    kinds = ORDERS[order][0]
    tokens = session_of(model).report.sequence_tokens
    assert key_lengths(cache) == [max(tokens[index]) for index, kind in enumerate(kinds) if kind == FULL]
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == [{FULL: "MergedDynamicLayer", LINEAR: "LinearAttentionLayer"}[kind] for kind in kinds]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def continued(model: Any, cache: Any, inputs: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of tokens behind a prompt of one row."""
    start = int(Qwen35().positions(model, inputs).amax()) + 1
    where = (start + torch.arange(ids.shape[1])).expand(3, 1, -1)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, position_ids=where, **{CACHE: cache}).logits
    return logits


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_several_tokens_at_once_are_one_after_the_other(order: str, kind: str) -> None:
    """Behind a merged prompt, in a cache that the caller made."""
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    inputs, ids = single(model, IMAGE), torch.randint(20, 100, (1, 5))
    config = model.config.text_config

    def filled() -> Any:
        made = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=200)
        with torch.no_grad():
            model(**inputs, **{CACHE: made})
        return made

    whole, cache = continued(model, filled(), inputs, ids), filled()
    start = int(Qwen35().positions(model, inputs).amax()) + 1
    for index in range(ids.shape[1]):
        where = torch.full((3, 1, 1), start + index)
        with torch.no_grad():
            one = model(input_ids=ids[:, index : index + 1], position_ids=where, **{CACHE: cache}).logits
        torch.testing.assert_close(one[:, 0], whole[:, index], atol=2e-4, rtol=0)


def test_a_reset_cache_is_empty(order: str) -> None:
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    inputs = single(model, IMAGE)
    with torch.no_grad():
        first = model(**inputs)
        cache = first.past_key_values
        cache.reset()
        if not before("5.18"):  # older releases zero the keys, and keep them
            again = model(**inputs, **{CACHE: cache})
            torch.testing.assert_close(again.logits, first.logits, atol=1e-6, rtol=0)


SECOND = Sample(text_seed=8, images=((40, 40),), text=(4, 6))


def second_turn(model: Any, batch: list[Sample]) -> Any:
    """A turn that brings images to some rows, behind a prompt that filled a cache."""
    first = inputs_for(model, [IMAGE] * len(batch))
    cache = DynamicCache(config=model.config.text_config)
    known = Qwen35()
    with torch.no_grad():
        model(**first, **{CACHE: cache})
        inputs = inputs_for(model, batch)
        where = known.positions(model, inputs) + known.positions(model, first).amax() + 1
        mask = torch.cat([first["attention_mask"], inputs["attention_mask"]], 1)
        return model(**{**inputs, "attention_mask": mask}, position_ids=where, **{CACHE: cache}).logits


@needs_ready_features
def test_rows_of_other_lengths_behind_a_past_are_refused(order: str) -> None:
    """Padding between a state and the tokens that go on from it would fade it; equal rows are as they are alone."""
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    alone = second_turn(model, [SECOND])
    torch.testing.assert_close(second_turn(model, [SECOND, SECOND]), alone.expand(2, -1, -1), atol=2e-4, rtol=0)
    with pytest.raises(PatchStateError) as caught:
        second_turn(model, [SECOND, TEXT])
    assert_says(
        caught.value, f"^{CACHE} holds tokens, and the rows of this call keep different numbers", "fade the state"
    )
    assert str(caught.value).endswith(r"give one row at a time, or use merging(model, False)")


def test_assisted_decoding_is_refused_by_stock(order: str) -> None:
    """A state cannot go back to an earlier token: with or without merging the same error."""
    model, assistant = tiny_model(NAME), tiny_model(NAME, seed=1)
    inputs = single(model, IMAGE)
    errors = []
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            model.generate(**inputs, max_new_tokens=4, assistant_model=assistant)
        errors.append((type(caught.value), str(caught.value)))
        patch(model, **settings_of(order))
    assert errors[0] == errors[1]


def test_cropping_is_refused_by_stock(order: str) -> None:
    model = tiny_model(NAME)
    patch(model, **settings_of(order))
    with torch.no_grad():
        cache = model(**single(model, IMAGE)).past_key_values
    with pytest.raises(RuntimeError):
        cache.crop(-1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_replayed_layers(
    order: str, reentrant: bool, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_shapes, "patched", lambda family: patched(family, dtype=torch.float64))
    test_shapes.test_checkpointing_gives_the_same_gradients(NAME, reentrant)


# ---------------------------------------------------------------------------------------------- others


def test_foreign_blocks() -> None:
    model = tiny_model(NAME)
    model.model.visual.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 4, [1], 0.5)
    assert_says(caught.value, "^visual has Linear blocks", "use a stock Qwen3.5 model")
    assert session_of(model) is None


@needs_ready_features
def test_time_is_a_text_between_slices() -> None:
    """The workload of a benchmark has every slice in brackets of its own behind its time, as the processor does."""
    model = tiny_model(NAME, text={"vocab_size": 1024})
    inputs = build_workload(model, Workload(frames=4, patches=16, text=4))
    ids = inputs["input_ids"][0].tolist()
    token = model.config.video_token_id
    assert ids.count(token) == 2 * 4
    assert [each == token for each in ids] == [False] * 2 + 2 * ([False] * 7 + [True] * 4 + [False]) + [False] * 2
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("qwen3.5")])
def test_published_shapes_have_their_layers(name: str) -> None:
    config = build_shape(name, device="meta").config
    large = name == "qwen3.5-9b"
    vision, text = config.vision_config, config.text_config
    assert (vision.depth, vision.hidden_size, vision.num_heads) == ((27, 1152, 16) if large else (12, 768, 12))
    assert text.layer_types == [LINEAR, LINEAR, LINEAR, FULL] * (text.num_hidden_layers // 4)
    assert (text.head_dim, text.linear_num_value_heads) == (256, 32 if large else 16)
    assert qwen3_5.FAMILY.decoder_shape(build_shape(name, device="meta")).recurrent.layers == {
        layer for layer, kind in enumerate(text.layer_types) if kind == LINEAR
    }
