"""Gemma 3 merges in its tower only: whole pooled blocks, in a tower that keeps picture order, and a report of that."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from helpers import assert_says
from illava_hooks import (
    METHODS,
    MergeConfigError,
    Method,
    UnsupportedModelError,
    merging,
    patch,
    session_of,
    unpatch,
)
from illava_hooks.engine.records import records_of
from illava_hooks.patchers import gemma3
from test_no_trace import snapshot
from unit_oracle import merged

SIDE, POOL, DEPTH = 8, 2, 5
BLOCKS = (SIDE // POOL) ** 2
IMAGE_ID, PAD = 90, 0
SETTINGS: dict[str, Any] = {"vit_layers": [1, 3], "vit_r": 16}
NAMES = sorted(set(METHODS) - {"illava-reference"})


def gemma(back_end: str = "sdpa", dtype: torch.dtype = torch.float64, **vision: Any) -> Any:
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 99,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
    }
    tower = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "image_size": 4 * SIDE,
        "patch_size": 4,
        "vision_use_head": False,
        **vision,
    }
    ids = {"image_token_index": IMAGE_ID, "boi_token_index": 91, "eoi_token_index": 92}
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=BLOCKS, **ids)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=back_end, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(images: list[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Samples with so many images each, padded on the left."""
    rows = [[5 + n, *([91, *([IMAGE_ID] * BLOCKS), 92, 7 + n] * n), 11, 12] for n in images]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    pixels = torch.cat(
        [
            torch.randn(1, 3, 4 * SIDE, 4 * SIDE, dtype=dtype, generator=torch.Generator().manual_seed(seed + index))
            for index in range(sum(images))
        ]
    )
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": pixels,
    }


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


# ---------------------------------------------------------------------- the tower again, block by block, in loops


def blocks_of(side: int = SIDE, pool: int = POOL) -> list[list[int]]:
    """The patches of each pooled token, from rows and columns of the picture."""
    return [
        [(top * pool + row) * side + left * pool + column for row in range(pool) for column in range(pool)]
        for top in range(side // pool)
        for left in range(side // pool)
    ]


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, rule: str) -> dict[int, Tensor]:
    """Projected feature of each surviving block of one tile."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    states = tower.embeddings(pixels[None])[0]
    units = {block: states[patches] for block, patches in enumerate(blocks_of())}
    for index, layer in enumerate(tower.encoder.layers):
        names, rows = list(units), torch.cat(list(units.values()))
        attention, heads = layer.self_attn, tower.config.num_attention_heads
        normed = layer.layer_norm1(rows)
        q, k, v = (
            getattr(attention, name)(normed).view(len(rows), heads, -1).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        rows = rows + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        units = dict(zip(names, rows.split(POOL**2), strict=True))
        if index in SETTINGS["vit_layers"]:
            received = weights.mean((0, 1)).split(POOL**2)
            scores = {name: float(part.mean()) for name, part in zip(names, received, strict=True)}
            units = merged(rule, units, scores, SETTINGS["vit_r"] // POOL**2)
        rows = torch.cat(list(units.values()))
        rows = rows + layer.mlp(layer.layer_norm2(rows))
        units = dict(zip(units, rows.split(POOL**2), strict=True))
    pooled = torch.stack([tower.post_layernorm(rows).mean(0) for rows in units.values()])
    found = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    return dict(zip(units, found, strict=True))


def check_oracle(rule: str) -> None:
    model = gemma()
    pixels = inputs_of([2])["pixel_values"]
    expected = [tower_again(model, tile, rule) for tile in pixels]
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge=rule))
    with torch.no_grad():
        output = model.model.get_image_features(pixels)
    for features, record, blocks in zip(output.pooler_output, records_of(output) or [], expected, strict=True):
        assert record.keep is not None and record.survivor_of is not None
        assert record.keep.nonzero().flatten().tolist() == sorted(blocks)
        for block, survivor in enumerate(record.survivor_of.tolist()):  # what merged away shows its survivor
            # Gemma's norms compute in float32, whatever the model is in.
            torch.testing.assert_close(features[block], blocks[survivor], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_blocks(rule: str) -> None:
    check_oracle(rule)


@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_oracle_sees_blocks_of_other_patches(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = gemma3.block_traits
    monkeypatch.setattr(gemma3, "block_traits", lambda config: replace(stock(config), order=None))
    with pytest.raises(AssertionError):
        check_oracle(rule)


# ---------------------------------------------------------------------- as for every family


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("method", NAMES)
def test_idle_is_bitwise_stock(method: str, back_end: str) -> None:
    model, inputs = gemma(back_end, torch.float32), inputs_of([1, 2], torch.float32)
    expected = logits(model, inputs)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        ids = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    for idle in ({"vit_layers": [1, 3], "vit_r": 0}, {"vit_layers": [], "vit_r": 16}, SETTINGS):
        session = patch(model, **idle, method=method)
        with merging(model, idle is not SETTINGS), torch.no_grad():
            assert torch.equal(logits(model, inputs), expected)
            found = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False), ids)
        assert torch.equal(found.pooler_output, features.pooler_output)
        assert all(map(torch.equal, found.hidden_states, features.hidden_states))
        assert session is session_of(model)
        unpatch(model)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_a_batch_is_its_samples(method: str, back_end: str) -> None:
    model = gemma(back_end)
    images = [1, 3, 2] if back_end == "sdpa" else [2, 2, 2]  # stock's eager attention gives NaN on padded rows
    stock = logits(model, inputs_of(images))
    patch(model, **SETTINGS, method=method)
    together = logits(model, inputs_of(images))
    assert not torch.allclose(stock, together)
    for row, num in enumerate(images):
        alone = logits(model, inputs_of([num], seed=sum(images[:row])))
        # Stock's own rows differ by 8e-7 from the single ones: its norms compute in float32.
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], rtol=1e-3, atol=5e-6)


def takes_static_caches(inputs: dict[str, Tensor]) -> bool:
    """Whether stock generates with one: in 5.15 its masks end in front of the last new token."""
    try:
        gemma().generate(**inputs, max_new_tokens=6, cache_implementation="static", do_sample=False)
    except IndexError:
        return False
    return True


def test_generate_is_forward() -> None:
    model, inputs = gemma(), inputs_of([1, 2])
    patch(model, **SETTINGS)
    found = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(found.logits[0], logits(model, inputs)[:, -1].float(), rtol=1e-5, atol=1e-5)
    if takes_static_caches(inputs):
        model.generate(**inputs, max_new_tokens=6, cache_implementation="static", do_sample=False)
    model.generate(**inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)


def test_hidden_states_stay_in_picture_order() -> None:
    """In front of the first merge they are stock's; behind it each patch shows who stands for it."""
    model, pixels = gemma(), inputs_of([1])["pixel_values"]
    with torch.no_grad():
        stock = model.get_image_features(pixels, output_hidden_states=True).hidden_states
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge="drop"))
    with torch.no_grad():
        output = model.get_image_features(pixels, output_hidden_states=True)
    (record,) = records_of(output) or []
    assert record.keep is not None and record.survivor_of is not None
    for found, expected in zip(output.hidden_states[:2], stock[:2], strict=True):
        assert torch.equal(found, expected)
    blocks = blocks_of()
    last = output.hidden_states[-1][0]
    for block, survivor in enumerate(record.survivor_of.tolist()):
        assert torch.equal(last[blocks[block]], last[blocks[survivor]])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # newer releases rename it
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_replay_the_merge(reentrant: bool) -> None:
    model, inputs = gemma(), inputs_of([1, 2])
    patch(model, **SETTINGS)
    model.train()
    losses = []
    for checkpoints in (False, True):
        model.zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        weight = model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
        losses.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0][1].abs().sum() > 0


def test_it_is_taken_back_without_a_trace() -> None:
    model, inputs = gemma(), inputs_of([1])
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
        model.generate(**inputs, max_new_tokens=2)
    before, expected = snapshot(model), logits(model, inputs)
    patch(model, **SETTINGS)
    logits(model, inputs)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, inputs), logits(model, inputs), rtol=0, atol=0)
    unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected)


def test_a_pickle_merges_too() -> None:
    model, inputs = gemma(), inputs_of([1])
    patch(model, **SETTINGS)
    torch.testing.assert_close(
        logits(pickle.loads(pickle.dumps(model)), inputs), logits(model, inputs), rtol=0, atol=0
    )


def test_the_report_counts_the_tower() -> None:
    model, pixels = gemma("eager", torch.float32), inputs_of([2], torch.float32)["pixel_values"]
    names = ("Gemma3ForConditionalGeneration.model.vision_tower.encoder", "SiglipVisionModel.encoder")
    session = patch(model, **SETTINGS, method=Method("mine", encoder_score="uniform", merge="drop"))
    for index, enabled in enumerate((True, False)):
        with torch.no_grad(), merging(model, enabled), FlopCounterMode(display=False) as counter:
            model.model.get_image_features(pixels)
        counts = counter.get_flop_counts()
        measured = next(sum(counts[name].values()) for name in counts if name in names or name.endswith(".encoder"))
        assert session.report.encoder_flops[index] == pytest.approx(measured, rel=0.01)
    assert session.report.projector_flops[0] == session.report.projector_flops[1]
    assert session.report.visuals[0].vision_tokens == (64, 64, 48, 48, 32, 32)


def test_provenance_has_places_of_the_picture() -> None:
    """Every block's weights lie on its own patches before it merges, whatever order the rows had inside."""
    model, pixels = gemma(), inputs_of([1])["pixel_values"]
    session = patch(model, **SETTINGS, track=True)
    with torch.no_grad():
        (record,) = records_of(model.model.get_image_features(pixels)) or []
    assert record.keep is not None and record.survivor_of is not None and record.sources is not None
    shares, blocks = record.sources.to_dense(), blocks_of()
    torch.testing.assert_close(shares.sum(1), torch.ones(BLOCKS))
    alone = [b for b in range(BLOCKS) if record.keep[b] and int((record.survivor_of == b).sum()) == 1]
    assert alone
    for block in alone:
        assert shares[block].nonzero().flatten().tolist() == sorted(blocks[block])
    assert session.provenance is not None


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {**SETTINGS, "llm_layers": [2], "llm_ratio": 0.5},
            UnsupportedModelError,
            ("llm_layers is", "gemma3 merges in its vision stage only", "llm_layers="),
        ),
        ({**SETTINGS, "method": "illava-reference"}, UnsupportedModelError, ("published code",)),
        ({"vit_layers": [9], "vit_r": 16}, MergeConfigError, ("vit_layers contains 9", "0..4")),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    model = gemma()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        patch(model, **settings)
    assert_says(caught.value, *says)
    assert snapshot(model) == before


def test_a_pool_that_cuts_blocks_is_refused() -> None:
    model = gemma()
    model.config.mm_tokens_per_image = 9
    with pytest.raises(UnsupportedModelError, match="9 tokens of an image are no pooled blocks of its 8 x 8 patches"):
        patch(model, **SETTINGS)


def test_the_preset_merges_where_nothing_is_given() -> None:
    model, inputs = gemma(num_hidden_layers=10), inputs_of([1])
    session = patch(model)
    logits(model, inputs)
    counts = session.report.visuals[0].vision_tokens
    assert counts[5] == 64 > counts[6] > counts[-1]


@pytest.mark.parametrize(("keep", "blocks", "is_said"), [(0.5, 8, False), (0.25, 4, False), (1 / 3, 5, True)])
def test_one_number_is_all_the_encoders(
    keep: float, blocks: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen blocks have no third: that is said, once."""
    model = gemma()
    session = patch(model, vit_layers=[1, 3], keep=keep)
    for _ in range(2):
        model(**inputs_of([1, 2]))
    assert {(v.vision_tokens[0], v.vision_tokens[-1]) for v in session.report.visuals} == {(64, blocks * POOL**2)}
    said = [record.getMessage() for record in caplog.records if record.name == "illava_hooks"]
    assert len(said) == is_said and all(line.startswith("keep is 0.3333, and of some images") for line in said)


def test_one_number_needs_layers_of_the_encoder() -> None:
    with pytest.raises(MergeConfigError) as caught:
        patch(gemma(), vit_layers=[], keep=0.5)
    assert_says(caught.value, "^keep is 0.5,", "neither vit_layers nor llm_layers", "keep=1")
