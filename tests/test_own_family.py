"""A family of another package is all that a new kind of model needs: LLaVA-1.5, written in `own_family`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from decode_helpers import steps
from helpers import assert_differ, assert_same, assert_says, forward, generate, needs_ready_features
from illava_hooks import (
    MergeConfig,
    MergeConfigError,
    MergeSchedule,
    MergeSession,
    Method,
    PatchStateError,
    UnsupportedModelError,
    merging,
    patch,
    register_family,
    session_of,
    unpatch,
)
from illava_hooks.engine import finding as families
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.provenance import selection
from illava_hooks.engine.records import records_of
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from own_family import Llava
from test_no_trace import differences, snapshot
from tiny_models import FIRST_TEXT_ID, IMAGE_ID, ROPE, TEXT_CONFIG, VOCAB_SIZE, Inputs, build, padded

PATCHES = 64
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [1, 3], "llm_ratio": 0.6}
#: Text tokens before, between and behind the images of each row.
BATCHES: dict[str, list[tuple[int, ...]]] = {
    "image": [(5, 7)],
    "images": [(4, 3, 6)],
    "ragged": [(4, 3, 6), (12,), (2, 9)],
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is known while a test runs; the registry is put back behind it."""
    monkeypatch.setattr(families, "_registered", {})
    register_family(Llava())


def llava(attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny stock LLaVA-1.5: CLIP with 5 layers of which 4 count, and 64 patches; Llama with 4 layers."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        projection_dim=32,
    )
    special = {"bos_token_id": None, "eos_token_id": None}
    text = LlamaConfig(**TEXT_CONFIG, rope_parameters=dict(ROPE), **special)
    settings = {"image_token_index": IMAGE_ID, "image_seq_length": PATCHES, "vision_feature_layer": -2} | overrides
    config = LlavaConfig(vision_config=vision, text_config=text, **settings)
    return build(LlavaForConditionalGeneration, config, attn_implementation, 0, dtype)


def patched(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = llava(dtype=dtype)
    patch(model, **{**SETTINGS, **settings})
    return model


def row(index: int, texts: Sequence[int]) -> tuple[list[int], list[Tensor]]:
    """Ids and images of one row, which depend on its number only."""
    generator = torch.Generator().manual_seed(index)
    ids: list[int] = []
    for count in texts[:-1]:
        ids += torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (count,), generator=generator).tolist()
        ids += [IMAGE_ID] * PATCHES
    ids += torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (texts[-1],), generator=generator).tolist()
    return ids, [torch.randn(3, 32, 32, generator=generator) for _ in texts[:-1]]


def inputs_of(batch: str, only: int | None = None, side: Any = "left", dtype: torch.dtype = torch.float32) -> Inputs:
    """What the processor gives for a batch, or for one of its rows alone."""
    rows = [row(index, texts) for index, texts in enumerate(BATCHES[batch])]
    rows = rows if only is None else rows[only : only + 1]
    inputs = padded([ids for ids, _ in rows], side)
    if images := [image for _, own in rows for image in own]:
        inputs["pixel_values"] = torch.stack(images).to(dtype)
    return inputs


@torch.no_grad()
def features(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    return model.get_image_features(inputs["pixel_values"], **kwargs)


# ---------------------------------------------------------------------------- outside nothing changes


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("how", ["zero", "no layers", "switched off", "unpatched"])
def test_identity_is_bitwise_stock(how: str, batch: str, back_end: str) -> None:
    model, stock, inputs = llava(back_end), llava(back_end), inputs_of(batch)
    idle: dict[str, dict[str, Any]] = {
        "zero": {"vit_r": 0, "llm_ratio": 1.0},
        "no layers": {"vit_layers": [], "llm_layers": []},
    }
    patch(model, **{**SETTINGS, **idle.get(how, {})})
    if how == "unpatched":
        forward(model, inputs)
        unpatch(model)
    with merging(model, False) if how == "switched off" else torch.no_grad():
        assert_same(forward(model, inputs), forward(stock, inputs))
        assert_same(generate(model, inputs), generate(stock, inputs))
        ours, theirs = (features(m, inputs, output_hidden_states=True) for m in (model, stock))
    for one, other in zip(ours.pooler_output, theirs.pooler_output, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch", BATCHES)
def test_shapes_are_the_unpatched_ones(batch: str) -> None:
    model, stock, inputs = patched(), llava(), inputs_of(batch)
    found, expected = forward(model, inputs), forward(stock, inputs)
    logical = {name for name in expected if "keys" not in name and "values" not in name}
    assert {name: found[name].shape for name in logical} == {name: expected[name].shape for name in logical}
    assert_differ(found["forward.logits"], expected["forward.logits"])
    ours, theirs = (features(m, inputs, output_hidden_states=True) for m in (model, stock))
    assert [f.shape for f in ours.pooler_output] == [f.shape for f in theirs.pooler_output]
    assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]
    assert ours.last_hidden_state.shape == theirs.last_hidden_state.shape


# ---------------------------------------------------------------------------- inside there are fewer tokens


def test_both_stages_merge() -> None:
    model = patched()
    out = model(**inputs_of("ragged"))
    report = session_of(model).report
    assert [v.sample for v in report.visuals] == [0, 0, 2]
    for visual in report.visuals:
        assert visual.vision_tokens == (64, 64, 50, 36, 36, 36) and visual.prompt_tokens == 64
        assert visual.language_tokens == (36, 22, 22, 13)
    assert report.prompt_tokens == (141, 12, 75)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [max(n) for n in report.sequence_tokens]
    for merged, whole in (report.encoder_flops, report.projector_flops, report.llm_flops, report.kv_bytes):
        assert 0 < merged < whole


def test_kept_tokens_are_known_from_shapes() -> None:
    model = patched()
    for record in records_of(features(model, inputs_of("ragged"))):
        assert record.keep.sum() == Llava().kept_tokens(model.model, session_of(model).config, "image", ()) == 36


@torch.no_grad()
def by_hand(tower: Any, pixels: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    """Output of the layer before the last of an eager tower that merges in plain loops, and the patches' seats."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    seats = list(range(PATCHES))
    for index, layer in enumerate(tower.encoder.layers[:-1]):
        mixed, paid = layer.self_attn(layer.layer_norm1(hidden[None]))
        hidden = hidden + mixed[0]
        if index in SETTINGS["vit_layers"]:
            received = paid[0].mean((0, 1))[1:]
            lowest = received.argsort()[: removed + 1].tolist()
            shares = torch.arange(removed + 1, 0, -1).to(hidden) / ((removed + 1) * (removed + 2) / 2)
            hidden[1 + lowest[-1]] = shares @ hidden[[1 + place for place in lowest]]
            stay = [place for place in range(len(seats)) if place not in lowest[:-1]]
            hidden, seats = hidden[[0, *(1 + place for place in stay)]], [seats[place] for place in stay]
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden, torch.tensor(seats)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_the_class_token_stays_in_front_and_never_merges(back_end: str) -> None:
    """It attends and is attended to in every layer; patches merge as if written out in plain loops."""
    model, stock = (llava(name, torch.float64) for name in (back_end, "eager"))
    patch(model, **SETTINGS)
    pixels = inputs_of("ragged", dtype=torch.float64)["pixel_values"]
    found = features(model, {"pixel_values": pixels}, output_hidden_states=True)
    for image, record in enumerate(records_of(found)):
        hidden, seats = by_hand(stock.model.vision_tower, pixels[image], removed=14)
        assert record.keep.nonzero().flatten().tolist() == seats.tolist()
        assert found.hidden_states[-2].shape[1:] == (1 + PATCHES, 32)
        torch.testing.assert_close(found.hidden_states[-2][image][0], hidden[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.hidden_states[-2][image][1 + seats], hidden[1:], atol=1e-6, rtol=0)
        projected = stock.model.multi_modal_projector(hidden[1:])
        torch.testing.assert_close(found.pooler_output[image][seats], projected, atol=1e-6, rtol=0)
        assert torch.equal(found.pooler_output[image], found.pooler_output[image][record.survivor_of])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["illava", "diverse", "tome"])
def test_a_batch_is_its_rows(method: str, side: str) -> None:
    """With explicit positions, since stock counts them over padding; in float64, where little is rounded."""
    model = patched(torch.float64, method=method)

    def run(inputs: Inputs) -> Tensor:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            return model(**inputs, position_ids=positions).logits

    inputs = inputs_of("ragged", side=side, dtype=torch.float64)
    found = run(inputs)
    for index, real in enumerate(inputs["attention_mask"].bool()):
        alone = run(inputs_of("ragged", index, dtype=torch.float64))
        torch.testing.assert_close(found[index][real], alone[0], atol=1e-6, rtol=0)


def test_a_batch_generates_as_its_rows() -> None:
    model = patched()
    ids, logits = steps(model, inputs_of("ragged"))
    for index in range(3):
        alone, steps_alone = steps(model, inputs_of("ragged", index))
        assert torch.equal(ids[index], alone[0])
        for ours, theirs in zip(logits, steps_alone, strict=True):
            torch.testing.assert_close(ours[index], theirs[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_language_score_is_the_attention_row(layer: int, back_end: str) -> None:
    """The kept tokens are those to which the last query of a stock model pays most in the layer in front."""
    model, inputs = llava(back_end), inputs_of("image")
    with torch.no_grad():
        row = llava("eager")(**inputs, output_attentions=True).attentions[layer - 1][0].mean(0)[-1]
    session = patch(model, [], 0, [layer], 0.5, method=Method("row", merge="drop"), track=True)
    forward(model, inputs)
    kept = torch.zeros(PATCHES, dtype=torch.bool)
    kept[session.provenance.at("language", layer).images[0].seats] = True
    paid = row[inputs["input_ids"][0] == IMAGE_ID]
    assert kept.sum() == 32 and paid[kept].min() > paid[~kept].max()


@pytest.mark.parametrize("method", ["illava", "nearest", "diverse", "tome"])
def test_provenance_accounts_for_every_patch(method: str) -> None:
    """Weights of merged tokens sum to one, of the unmerged ones are themselves, and no patch is lost."""
    model = patched(method=method, track=True)
    forward(model, inputs_of("images"))
    session = session_of(model)
    stage: Any
    for stage, layer in (("vision", 1), ("vision", 2), ("language", 0), ("language", 1), ("language", 3)):
        for index, image in enumerate(session.provenance.at(stage, layer).images):
            weights = image.weights.to_dense()
            visual = session.report.visuals[index]
            tokens = visual.vision_tokens[layer + 1] if stage == "vision" else visual.language_tokens[layer]
            assert weights.shape == (tokens, PATCHES) and (image.seats.diff() > 0).all()
            torch.testing.assert_close(weights.sum(1), torch.ones(tokens))
            assert (weights.sum(0) > 0).all()
            alone = (weights > 0).sum(1) == 1
            assert torch.equal(weights[alone].argmax(1), image.seats[alone])


# ---------------------------------------------------------------------------- and it can be taken back


def test_unpatch_leaves_no_trace() -> None:
    model, inputs = llava(), inputs_of("ragged")
    expected, _ = forward(model, inputs), generate(model, inputs)
    before = snapshot(model)
    patch(model, **SETTINGS, track=True)
    assert differences(before, snapshot(model)), "the snapshot sees a patch"
    assert_differ(forward(model, inputs)["forward.logits"], expected["forward.logits"])
    generate(model, inputs, num_beams=2)
    unpatch(model)
    assert differences(before, snapshot(model)) == [] and session_of(model) is None
    assert_same(forward(model, inputs), expected)


def test_a_copy_is_patched_too() -> None:
    model, inputs = patched(), inputs_of("ragged")
    expected, plain = forward(model, inputs), forward(llava(), inputs)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert_same(forward(twin, inputs), expected)
    assert_same(forward(model, inputs), plain)
    unpatch(twin)
    assert_same(forward(twin, inputs), plain)


def test_gradients_reach_the_encoder() -> None:
    model, inputs = patched().train(), inputs_of("ragged")
    model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] >= FIRST_TEXT_ID, -100)).loss.backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------- what is refused


class OwnKind(Llava):
    """The same under a name that nobody else has."""

    name = "own_llava"
    model_types = ("own_llava",)


def test_unknown_until_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})
    model = llava()
    model.config.model_type = "own_llava"
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, "LlavaForConditionalGeneration", "model_type 'own_llava'", r"supported are \[")
    assert "'own_llava'" not in str(caught.value).split("supported")[1]
    register_family(OwnKind())
    assert session_of(model) is None is not patch(model, **SETTINGS)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(llava().model.language_model, **SETTINGS)
    assert_says(caught.value, "LlamaModel", "supported are .*'own_llava', ")


def test_it_takes_the_place_of_a_family_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is registered goes first; without it there is the package's own."""
    model = llava()
    assert type(families.find_family(model)) is Llava
    monkeypatch.setattr(families, "_registered", {})
    own = families.find_family(model)
    assert own.name == "llava" and not isinstance(own, Llava) and own.presets and not Llava().presets


def test_the_published_method_is_refused() -> None:
    model = llava()
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS, method="illava-reference")
    assert_says(caught.value, "'illava-reference'", "published code", "none for llava", "use another")
    assert session_of(model) is None


def test_numbers_must_be_given_where_there_are_no_presets() -> None:
    model = llava()
    with pytest.raises(MergeConfigError) as caught:
        patch(model)
    assert_says(
        caught.value, "^vit_layers is None", "llava has no presets", "vit_layers, vit_r, llm_layers, llm_ratio$"
    )
    with pytest.raises(MergeConfigError) as caught:
        patch(model, **{**SETTINGS, "llm_ratio": None})
    assert_says(caught.value, "^llm_ratio is None", "give llm_ratio$")
    assert session_of(model) is None


def test_layers_whose_output_nobody_takes_are_refused() -> None:
    with pytest.raises(MergeConfigError, match=r"vit_layers contains 4; this model allows 0\.\.3"):
        patch(llava(), **{**SETTINGS, "vit_layers": [4]})


def test_what_the_family_does_not_do_is_refused_in_a_call() -> None:
    model = patched()
    with pytest.raises(UnsupportedModelError, match="strategy is 'full'; use 'default'"):
        features(model, inputs_of("image"), vision_feature_select_strategy="full")
    with pytest.raises(UnsupportedModelError, match="strategy is 'full'"):
        patch(llava(vision_feature_select_strategy="full"), **SETTINGS)


# ---------------------------------------------------------------------------- one stage only


class EncoderOnly(Llava):
    """Asks nothing of a decoder, and leaves it alone."""

    stages = frozenset({"vision"})

    def text_model(self, base: Any) -> Any:
        raise AssertionError("nobody needs to know where the decoder is")


ENCODER: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": []}


def test_a_stage_that_the_family_does_not_have_is_refused() -> None:
    register_family(EncoderOnly())
    model = llava()
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, r"llm_layers is \[1, 3\]", "llava merges in its vision stage only", r"llm_layers=\[\]")
    assert session_of(model) is None
    patch(model, **ENCODER)


@needs_ready_features
def test_an_encoder_alone_merges_and_the_decoder_sees_every_place() -> None:
    """The same features as with both stages, on a decoder that runs as stock runs it."""
    both, stock, inputs = patched(track=True), llava(), inputs_of("ragged")
    expected = features(both, inputs)
    register_family(EncoderOnly())
    model = llava()
    session = patch(model, **ENCODER, track=True)
    found = features(model, inputs)
    for ours, theirs in zip(found.pooler_output, expected.pooler_output, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(records_of(found), records_of(expected), strict=True):
        assert torch.equal(ours.keep, theirs.keep) and ours.segments == theirs.segments
    assert list(found) == list(features(stock, inputs)), "stock's keys"
    assert_same(decoded(forward(model, inputs)), decoded(forward_with(stock, inputs, found)))
    assert list(session.provenance.merges) == [("vision", 1), ("vision", 2)]
    unpatch(model)
    assert_same(forward(model, inputs), forward(stock, inputs))


def decoded(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder made."""
    return {name: tensor for name, tensor in found.items() if "image_outputs" not in name}


def forward_with(stock: Any, inputs: Inputs, image_outputs: Any) -> dict[str, Tensor]:
    """A stock forward from ready-made features."""
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return forward(stock, rest, mm_encoder_outputs={"image": image_outputs})


def test_an_encoder_alone_has_a_report_without_a_language_model() -> None:
    register_family(EncoderOnly())
    model = llava()
    session = patch(model, **ENCODER)
    with pytest.raises(PatchStateError, match="^no report yet"):
        _ = session.report.visuals
    forward(model, inputs_of("image"))
    (visual,) = session.report.visuals
    assert visual.vision_tokens[-1] < visual.vision_tokens[0] and visual.language_tokens == ()
    assert session.report.kept_fraction == 1  # the language model sees them all
    assert session.report.llm_flops == session.report.kv_bytes == (0, 0)
    assert 0 < session.report.encoder_flops[0] < session.report.encoder_flops[1]
    lines = str(session.report).splitlines()
    assert not any(line.startswith(("language model", "prefill", "KV")) for line in lines)


def test_nothing_of_ours_reaches_a_decoder_that_is_left_alone() -> None:
    """It may refuse what it does not know."""
    register_family(EncoderOnly())
    model = llava()
    seen: set[str] = set()

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    model.model.language_model.layers[0].self_attn.register_forward_pre_hook(listen, with_kwargs=True)
    patch(model, **ENCODER)
    forward(model, inputs_of("image"))
    generate(model, inputs_of("image"), num_beams=2)
    assert seen and not {name for name in seen if "illava" in name}


def test_a_decoder_alone_merges() -> None:
    class DecoderOnly(Llava):
        stages = frozenset({"language"})

    register_family(DecoderOnly())
    model = llava()
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, r"vit_layers is \[1, 2\]", "llava merges in its language stage only", r"vit_layers=\[\]")
    patch(model, vit_layers=[], llm_layers=[1, 3], llm_ratio=0.6)
    forward(model, inputs_of("ragged"))
    assert {v.language_tokens for v in session_of(model).report.visuals} == {(64, 38, 38, 23)}


def test_an_amount_of_a_stage_without_layers_need_not_be_given() -> None:
    """Nor layers of one that removes nothing."""
    idle: dict[str, Any]
    for idle in ({"llm_layers": []}, {"llm_ratio": 1.0}):
        session = patch(llava(), vit_layers=[1], vit_r=9, **idle)
        assert session.config.image == MergeSchedule((1,), 9, (), 1.0)
    for idle in ({"vit_layers": []}, {"vit_r": 0}):
        session = patch(llava(), llm_layers=[1], llm_ratio=0.5, **idle)
        assert session.config.image == MergeSchedule((), 0, (1,), 0.5)
    with pytest.raises(MergeConfigError, match="^vit_r is None.*; give vit_r, llm_layers, llm_ratio$"):
        patch(llava(), vit_layers=[1])


# ---------------------------------------------------------------------------- rows that are permuted

ORDER = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(3))


def permuted() -> Any:
    """A LLaVA whose tower has the patches in another order: at place i of the row that of place ORDER[i]."""
    model = llava(dtype=torch.float64)
    front = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + ORDER])
    model.model.vision_tower.pre_layrnorm.register_forward_hook(lambda module, args, hidden: hidden[:, front])
    return model


@pytest.mark.parametrize("score", ["received_attention", "query_lse", "random", "uniform"])
@pytest.mark.parametrize("merge", ["recycle", "nearest", "diverse", "cluster", "drop"])
def test_a_permuted_row_merges_as_the_picture(merge: str, score: str) -> None:
    """The same patches into the same tokens: scores by attention and by place, records and provenance.

    Who shows at the place of a token that is lost is its neighbour in the row, which is another one. ``bipartite``
    pairs such neighbours, and is left out.
    """
    method = Method("own", score, merge=merge, proportional=merge == "diverse")
    inputs, settings = inputs_of("images", dtype=torch.float64), {**ENCODER, "method": method, "track": True}
    expected = features(patched(torch.float64, **settings), inputs)
    family = Llava()
    family.traits = EncoderTraits(prefix=1, order=ORDER)
    register_family(family)
    model = permuted()
    patch(model, **settings)
    found, back = features(model, inputs), ORDER.argsort()
    for image, (ours, theirs) in enumerate(zip(records_of(found), records_of(expected), strict=True)):
        assert torch.equal(ours.keep[back], theirs.keep)
        known = theirs.keep if merge in ("cluster", "drop") else slice(None)
        assert torch.equal(ORDER[ours.survivor_of[back]][known], theirs.survivor_of[known])
        torch.testing.assert_close(ours.sources.to_dense()[back][known], theirs.sources.to_dense()[known])
        assert_same_tracks(ours.vision, theirs.vision)
        shown, wanted = found.pooler_output[image][back], expected.pooler_output[image]
        torch.testing.assert_close(shown[known], wanted[known], atol=1e-6, rtol=0)


def assert_same_tracks(ours: dict[int, tuple[Tensor, Tensor]], theirs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """The same weights in the same seats of the picture, in whatever order the row has them."""
    assert list(ours) == list(theirs)
    for layer, (seats, weights) in ours.items():
        other, expected = theirs[layer]
        assert torch.equal(seats.sort().values, other.sort().values)
        torch.testing.assert_close(weights.to_dense()[seats.argsort()], expected.to_dense()[other.argsort()])


@pytest.mark.parametrize("score", ["received_attention", "random", "uniform"])
@pytest.mark.parametrize("lengths", [(16, 24), (20, 20)], ids=["ragged", "even"])
def test_units_of_a_permuted_row_merge_as_the_picture(lengths: tuple[int, ...], score: str) -> None:
    """One packed row of two segments, in units of four patches; each segment stays where it is."""
    first, second = (torch.randperm(n // 4, generator=torch.Generator().manual_seed(n)) for n in lengths)
    units = torch.cat([first, second + lengths[0] // 4])
    order = (4 * units[:, None] + torch.arange(4)).flatten()
    method = Method("own", score, merge="recycle")
    tables = [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)]
    stays, moves = (packed_run(lengths, method, o, tables) for o in (None, order))
    start = 0
    for segment, length in enumerate(lengths):
        mine = slice(start, start + length)
        places = [run.places(0)[mine] for run in (stays, moves)]
        assert torch.equal(places[1], order[mine] - start) and torch.equal(places[0], torch.arange(length))
        ours, theirs = (vision_tracks(run, segment, segment + 1) for run in (moves, stays))
        assert_same_tracks(ours, theirs)
        found, expected = (sources_of(run, segment, mine) for run in (moves, stays))
        torch.testing.assert_close(found[units[start // 4 : (start + length) // 4].argsort()], expected)
        start += length


def packed_run(lengths: tuple[int, ...], method: Method, order: Tensor | None, tables: list[Tensor]) -> EncoderRun:
    """A finished run of two merging layers over queries, keys and values ``(1, H, P, D)`` in picture order."""
    schedule = MergeSchedule((0, 1), 0.3)
    session = MergeSession(MergeConfig(schedule, schedule, method, track=True), None)
    traits = EncoderTraits(patches_per_unit=4, granularity=4, order=order)
    run = EncoderRun(session, "image", traits, lengths, 1, torch.device("cpu"))
    query, key, value = tables if order is None else (table[:, :, order] for table in tables)
    hidden = value[0].transpose(0, 1).flatten(1)
    for layer in run.layers:
        here, tap = run.patch_origins(run.merges_before(layer))[0], run.tap(layer)
        heads = query[:, :, here], key[:, :, here], value[:, :, here]
        if tap is not None:  # scores by place ask for nothing
            tap.attend(lambda *_, **__: (None, None), nn.Identity(), *heads)
        hidden = run.merge(layer, hidden, tap)
    run.check_finished()
    return run


def sources_of(run: EncoderRun, segment: int, patches: slice) -> Tensor:
    """Source patches of the units of one segment, each a visual token: ``(units, patches)``."""
    kept = run.final.kept_at[0][patches.start // 4 : patches.stop // 4]
    tokens = selection(kept - kept.min(), run.lengths[segment][-1])
    return token_sources(run, segment, segment + 1, tokens).to_dense()
