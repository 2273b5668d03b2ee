"""Gemma 4 merges in its tower only: blocks that are pooled together, in rows of images of many sizes."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import assert_says
from illava_hooks import (
    METHODS,
    InputError,
    MergeConfigError,
    Method,
    UnsupportedModelError,
    merging,
    patch,
    session_of,
    unpatch,
)
from illava_hooks.engine.records import records_of
from test_no_trace import snapshot
from unit_oracle import merged

gemma4 = pytest.importorskip("illava_hooks.patchers.gemma4")
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Model  # noqa: E402  # not in every release

POOL, PATCH, DEPTH, BUDGET = 3, 4, 5, 9  # at most nine pooled tokens of an image
UNIT = POOL * POOL
IMAGE_ID, VIDEO_ID, AUDIO_ID, PAD = 90, 91, 92, 0
SETTINGS: dict[str, Any] = {"vit_layers": [1, 3], "vit_r": 2 * UNIT}
NAMES = sorted(set(METHODS) - {"illava-reference"})
#: Pooled tokens along the height and the width of an image.
Size = tuple[int, int]
SQUARE, WIDE, TALL, WHOLE = (2, 2), (2, 4), (3, 2), (3, 3)


def gemma(back_end: str = "sdpa", dtype: torch.dtype = torch.float64, shared: int = 2, **vision: Any) -> Any:
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size": 99,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": shared,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "use_bidirectional_attention": "vision",
    }
    tower = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "patch_size": PATCH,
        "position_embedding_size": 32,
        "standardize": True,
        **vision,
    }
    ids = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "audio_token_id": AUDIO_ID}
    more = {"boi_token_id": 93, "eoi_token_id": 94, "boa_token_id": 95, "eoa_token_index": 96}
    config = Gemma4Config(text_config=text, vision_config=tower, audio_config=None, **ids, **more)
    model = Gemma4ForConditionalGeneration._from_config(config, attn_implementation=back_end, dtype=dtype).eval()
    for tensor in (*model.parameters(), model.model.vision_tower.std_bias, model.model.vision_tower.std_scale):
        torch.nn.init.normal_(tensor, std=0.2)
    return model


def row_of(size: Size, dtype: torch.dtype, seed: int, budget: int = BUDGET) -> tuple[Tensor, Tensor]:
    """Patches and positions of one image, padded as the stock processor pads them."""
    height, width = (side * POOL for side in size)
    places = torch.tensor([[x, y] for y in range(height) for x in range(width)])
    pixels = torch.rand(len(places), 3 * PATCH**2, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    missing = budget * UNIT - len(places)
    pad = torch.nn.functional.pad
    return pad(pixels, (0, 0, 0, missing)), pad(places, (0, 0, 0, missing), value=-1)


def rows_for(sizes: list[Size], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    pixels, places = zip(*(row_of(size, dtype, seed + i) for i, size in enumerate(sizes)), strict=True)
    return torch.stack(pixels), torch.stack(places)


def inputs_of(images: list[list[Size]], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Samples with images of such sizes each, padded on the left."""
    rows = []
    for sizes in images:
        visual = [id for h, w in sizes for id in (93, *([IMAGE_ID] * (h * w)), 94)]
        rows.append([5 + len(sizes), *visual, 11, 12])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    pixels, places = rows_for([size for sizes in images for size in sizes], dtype, seed)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": pixels,
        "image_position_ids": places,
    }


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


# ---------------------------------------------------------------------- the tower again, block by block, in loops


def blocks_of(size: Size) -> list[list[int]]:
    """The patches of each pooled token, from rows and columns of the picture."""
    height, width = size
    return [
        [(top * POOL + row) * width * POOL + left * POOL + column for row in range(POOL) for column in range(POOL)]
        for top in range(height)
        for left in range(width)
    ]


def turned(heads: Tensor, places: list[tuple[int, int]], theta: float) -> Tensor:
    """Each head ``(H, n, D)`` turned: its first half by the column of a patch, its second by the row."""
    quarter = heads.shape[-1] // 4
    parts = []
    for axis, half in enumerate(heads.split(2 * quarter, -1)):
        angles = torch.tensor([[place[axis] / theta ** (i / quarter) for i in range(quarter)] for place in places])
        # Stock's tables are made in float32, whatever the model is in.
        cos, sin = angles.float().cos().to(heads), angles.float().sin().to(heads)
        first, second = half.split(quarter, -1)
        parts += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(parts, -1)


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, size: Size, rule: str) -> dict[int, Tensor]:
    """Projected feature of each surviving block of one image, from its own patches alone."""
    tower, config = model.model.vision_tower, model.config.vision_config
    columns = size[1] * POOL
    places = [(patch % columns, patch // columns) for patch in range(size[0] * POOL * columns)]
    table = tower.patch_embedder.position_embedding_table
    states = torch.stack(
        [
            tower.patch_embedder.input_proj(2 * (pixels[patch] - 0.5)) + table[0, x] + table[1, y]
            for patch, (x, y) in enumerate(places)
        ]
    )
    blocks = blocks_of(size)
    units = {block: states[patches] for block, patches in enumerate(blocks)}
    for index, layer in enumerate(tower.encoder.layers):
        names, rows = list(units), torch.cat(list(units.values()))
        seats = [places[patch] for name in names for patch in blocks[name]]
        attention, normed = layer.self_attn, layer.input_layernorm(rows)
        q, k, v = (
            norm(project(normed).view(len(rows), config.num_attention_heads, -1)).transpose(0, 1)
            for project, norm in (
                (attention.q_proj, attention.q_norm),
                (attention.k_proj, attention.k_norm),
                (attention.v_proj, attention.v_norm),
            )
        )
        theta = config.rope_parameters["rope_theta"]
        weights = (turned(q, seats, theta) @ turned(k, seats, theta).transpose(1, 2)).softmax(-1)  # scaled by 1
        mixed = attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
        rows = rows + layer.post_attention_layernorm(mixed)
        units = dict(zip(names, rows.split(UNIT), strict=True))
        if index in SETTINGS["vit_layers"]:
            received = weights.mean((0, 1)).split(UNIT)
            scores = {name: float(part.mean()) for name, part in zip(names, received, strict=True)}
            units = merged(rule, units, scores, min(SETTINGS["vit_r"] // UNIT, len(units) - 1))
        rows = torch.cat(list(units.values()))
        rows = rows + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(rows)))
        units = dict(zip(units, rows.split(UNIT), strict=True))
    pooled = torch.stack([rows.mean(0) * config.hidden_size**0.5 for rows in units.values()])
    found = model.model.embed_vision((pooled - tower.std_bias) * tower.std_scale)
    return dict(zip(units, found, strict=True))


def check_oracle(rule: str, back_end: str, sizes: list[Size]) -> None:
    model = gemma(back_end)
    pixels, places = rows_for(sizes, torch.float64)
    expected = [tower_again(model, row, size, rule) for row, size in zip(pixels, sizes, strict=True)]
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge=rule))
    with torch.no_grad():
        output = model.model.get_image_features(pixels, places)
    for features, record, blocks in zip(output.pooler_output, records_of(output) or [], expected, strict=True):
        assert record.keep is not None and record.survivor_of is not None
        assert record.keep.nonzero().flatten().tolist() == sorted(blocks)
        for block, survivor in enumerate(record.survivor_of.tolist()):  # what merged away shows its survivor
            # Gemma's norms compute in float32, whatever the model is in.
            torch.testing.assert_close(features[block], blocks[survivor], rtol=1e-4, atol=2e-5)


RAGGED = [[WIDE], [WHOLE, WHOLE], [SQUARE, WIDE, TALL, WHOLE]]


@pytest.mark.parametrize("sizes", RAGGED)
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_blocks(rule: str, back_end: str, sizes: list[Size]) -> None:
    check_oracle(rule, back_end, sizes)


def unsorted_rows(positions: Tensor, pool: int) -> Any:
    """Patches in the processor's order: units are no blocks."""
    rows = gemma4_rows_of(positions, pool)
    return replace(rows, source=rows.source.sort(1).values)


def shown_padding(**kwargs: Any) -> None:
    """Survivors that see padding."""


gemma4_rows_of = gemma4.rows_of


@pytest.mark.parametrize("rule", ["drop", "recycle"])
@pytest.mark.parametrize(("name", "wrong"), [("rows_of", unsorted_rows), ("create_bidirectional_mask", shown_padding)])
def test_the_oracle_sees_other_blocks_and_padding(
    name: str, wrong: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma4, name, wrong)
    with pytest.raises(AssertionError):
        check_oracle(rule, "sdpa", RAGGED[-1])


# ---------------------------------------------------------------------- rows


def test_rows_lie_block_by_block() -> None:
    """Every size by itself and beside others: at each place the patch that the picture has there, padding behind."""
    for sizes in ([SQUARE], [TALL, TALL], [SQUARE, WIDE, WHOLE, (1, 1)]):
        rows = gemma4.rows_of(rows_for(sizes, torch.float32)[1], POOL)
        longest = max(h * w * UNIT for h, w in sizes)
        width = longest if len({h * w for h, w in sizes}) == 1 else longest + UNIT
        assert rows.source.shape == (len(sizes), width)
        for row, size in enumerate(sizes):
            expected = sum(blocks_of(size), [])
            assert rows.source[row].tolist() == expected + [BUDGET * UNIT] * (width - len(expected))
            assert (rows.order.view(len(sizes), -1)[row] - row * width).tolist() == [
                *expected,
                *range(len(expected), width),
            ]
        values = torch.randn(len(sizes), BUDGET * UNIT, 2)
        back = rows.put_back(rows.arrange(values, torch.nan), BUDGET * UNIT)
        for row, (height, width) in enumerate(sizes):
            real = height * width * UNIT
            assert torch.equal(back[row, :real], values[row, :real])
            assert not back[row, real:].any()


@pytest.mark.parametrize("ragged", [False, True])
def test_cut_blocks_are_refused(ragged: bool) -> None:
    """Stock pools them into one another; four times three patches are no blocks of three."""
    model, inputs = gemma(), inputs_of([[SQUARE, TALL if ragged else SQUARE]])
    patch(model, **SETTINGS)
    places = inputs["image_position_ids"]
    places[1] = torch.full_like(places[1], -1)
    places[1, :12] = torch.tensor([[x, y] for y in range(3) for x in range(4)])
    with pytest.raises(InputError) as caught:
        logits(model, inputs)
    assert_says(caught.value, "12 patches of image or frame 1", "3 x 3 blocks", r"vit_layers=\[\]")


# ---------------------------------------------------------------------- as for every family


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("method", NAMES)
def test_idle_is_bitwise_stock(method: str, back_end: str) -> None:
    model, inputs = gemma(back_end, torch.float32), inputs_of([[WIDE], [TALL, WHOLE]], torch.float32)
    expected = logits(model, inputs)
    rows = (inputs["pixel_values"], inputs["image_position_ids"])
    with torch.no_grad():
        features = model.get_image_features(*rows, output_hidden_states=True)
        ids = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    for idle in ({"vit_layers": [1, 3], "vit_r": 0}, {"vit_layers": [], "vit_r": 16}, SETTINGS):
        session = patch(model, **idle, method=method)
        with merging(model, idle is not SETTINGS), torch.no_grad():
            assert torch.equal(logits(model, inputs), expected)
            found = model.get_image_features(*rows, output_hidden_states=True)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False), ids)
        assert all(map(torch.equal, found.pooler_output, features.pooler_output))
        assert all(map(torch.equal, found.hidden_states, features.hidden_states))
        assert session is session_of(model)
        unpatch(model)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_a_batch_is_its_samples(method: str, back_end: str) -> None:
    """Also where images of other sizes make rows longer, and one image has none to give."""
    model = gemma(back_end)
    images = [[WIDE], [SQUARE, WHOLE, TALL], [(1, 1), TALL]]
    if back_end == "eager":
        images = [[WIDE, (1, 1)], [(1, 1), WIDE]]  # stock's eager attention gives NaN on padded rows of text
    stock = logits(model, inputs_of(images))
    patch(model, **SETTINGS, method=method)
    together = logits(model, inputs_of(images))
    assert not torch.allclose(stock, together)
    for row, sizes in enumerate(images):
        alone = logits(model, inputs_of([sizes], seed=sum(map(len, images[:row]))))
        # Gemma's norms and rotary tables compute in float32.
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_padding_is_nobodys_key(back_end: str) -> None:
    """An image alone has none, beside a larger one it has some: with sizes weighed in, too."""
    model = gemma(back_end)
    patch(model, **SETTINGS, method="diverse")
    with torch.no_grad():
        pixels, places = rows_for([SQUARE, WHOLE], torch.float64)
        together = model.model.get_image_features(pixels, places).pooler_output[0]
        alone = model.model.get_image_features(pixels[:1], places[:1]).pooler_output[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_generate_is_forward() -> None:
    model, inputs = gemma(), inputs_of([[WIDE], [SQUARE, WHOLE]])
    patch(model, **SETTINGS)
    found = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(found.logits[0], logits(model, inputs)[:, -1].float(), rtol=1e-5, atol=1e-5)
    model.generate(**inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)


def test_hidden_states_stay_in_picture_order() -> None:
    """In front of the first merge they are stock's; behind it each patch shows who stands for it."""
    model, sizes = gemma(), [WIDE, WHOLE]
    pixels, places = rows_for(sizes, torch.float64)
    with torch.no_grad():
        stock = model.get_image_features(pixels, places, output_hidden_states=True).hidden_states
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge="drop"))
    with torch.no_grad():
        output = model.get_image_features(pixels, places, output_hidden_states=True)
    for row, (size, record) in enumerate(zip(sizes, records_of(output) or [], strict=True)):
        real, blocks = size[0] * size[1] * UNIT, blocks_of(size)
        for found, expected in zip(output.hidden_states[:2], stock[:2], strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found[row, :real], expected[row, :real], rtol=1e-6, atol=1e-6)
        last = output.hidden_states[-2][row]  # stock puts the pooled tokens in place of the last
        assert record.survivor_of is not None
        for block, survivor in enumerate(record.survivor_of.tolist()):
            assert torch.equal(last[blocks[block]], last[blocks[survivor]])
        assert not last[real:].any()
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # newer releases rename it
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_replay_the_merge(reentrant: bool) -> None:
    # Stock's reentrant checkpoints lose the gradients of keys that layers share, merging or not.
    model, inputs = gemma(shared=0), inputs_of([[WIDE], [SQUARE, WHOLE]])
    patch(model, **SETTINGS)
    model.train()
    losses = []
    for checkpoints in (False, True):
        model.zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        weight = model.model.vision_tower.encoder.layers[0].self_attn.q_proj.linear.weight
        losses.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0][1].abs().sum() > 0


def test_it_is_taken_back_without_a_trace() -> None:
    model, inputs = gemma(), inputs_of([[WIDE, WHOLE]])
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
    model, inputs = gemma(), inputs_of([[WIDE]])
    patch(model, **SETTINGS)
    torch.testing.assert_close(
        logits(pickle.loads(pickle.dumps(model)), inputs), logits(model, inputs), rtol=0, atol=0
    )


@pytest.mark.parametrize("sizes", [[WHOLE], [WIDE, SQUARE]])
def test_the_report_counts_the_tower(sizes: list[Size]) -> None:
    """Of what images have of their own: padding costs as well, in stock more than here."""
    model = gemma("eager", torch.float32)
    pixels, places = rows_for(sizes, torch.float32)
    session = patch(model, **SETTINGS, method=Method("mine", encoder_score="uniform", merge="drop"))
    for index, enabled in enumerate((True, False)):
        measured = 0
        for row, (height, width) in enumerate(sizes):
            real = height * width * UNIT
            alone = (pixels[row : row + 1, :real], places[row : row + 1, :real])
            with torch.no_grad(), merging(model, enabled), FlopCounterMode(display=False) as counter:
                model.model.get_image_features(*alone)
            counts = counter.get_flop_counts()
            measured += next(sum(counts[name].values()) for name in counts if name.endswith(".encoder"))
        with torch.no_grad():
            model.model.get_image_features(pixels, places)
        assert session.report.encoder_flops[index] == pytest.approx(measured, rel=0.01)
    assert session.report.projector_flops[0] == session.report.projector_flops[1]
    height, width = sizes[0]
    units = height * width
    counts = (units, units, units - 2, units - 2, units - 4, units - 4)
    assert session.report.visuals[0].vision_tokens == tuple(n * UNIT for n in counts)


def test_provenance_has_places_of_the_picture() -> None:
    """Every block's weights lie on its own patches before it merges, whatever order the rows had inside."""
    model, sizes = gemma(), [SQUARE, WHOLE, WIDE]
    session = patch(model, **SETTINGS, track=True)
    with torch.no_grad():
        records = records_of(model.model.get_image_features(*rows_for(sizes, torch.float64))) or []
    lonely = 0
    for size, record in zip(sizes, records, strict=True):
        assert record.keep is not None and record.survivor_of is not None and record.sources is not None
        shares, blocks = record.sources.to_dense(), blocks_of(size)
        assert shares.shape == (len(blocks), len(blocks) * UNIT)
        torch.testing.assert_close(shares.sum(1), torch.ones(len(blocks)))
        for block in range(len(blocks)):
            if record.keep[block] and int((record.survivor_of == block).sum()) == 1:
                lonely += 1
                assert shares[block].nonzero().flatten().tolist() == sorted(blocks[block])
        places = session.provenance.at("vision", 1).images[records.index(record)].seats.tolist()
        assert {frozenset(places[i : i + UNIT]) for i in range(0, len(places), UNIT)} <= set(map(frozenset, blocks))
    assert lonely


def video_of(frames: list[Size], counts: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Videos as the installed release takes them: older ones have a dimension of frames."""
    pixels, places = rows_for(frames, dtype)
    if "num_frames_per_video" in inspect.signature(Gemma4Model.forward).parameters:
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": places,
            "num_frames_per_video": torch.tensor(counts),
        }
    assert len(set(counts)) == 1
    lead = (len(counts), counts[0])
    return {"pixel_values_videos": pixels.unflatten(0, lead), "video_position_ids": places.unflatten(0, lead)}


def test_frames_of_a_video_merge_as_images_do() -> None:
    """Each frame for itself; the video has one record and one provenance, counted through its frames."""
    model, frames, counts = gemma(), [WIDE, WIDE, SQUARE, SQUARE], [2, 2]
    session = patch(model, **SETTINGS, track=True)
    with torch.no_grad():
        as_images = model.model.get_image_features(*rows_for(frames, torch.float64))
        output = model.model.get_video_features(**video_of(frames, counts))
    images, videos = records_of(as_images) or [], records_of(output) or []
    assert [len(features) for features in output.pooler_output] == [16, 8] == [v.num_tokens for v in videos]
    torch.testing.assert_close(torch.cat(output.pooler_output), torch.cat(as_images.pooler_output))
    for video, parts in zip(videos, (images[:2], images[2:]), strict=True):
        assert video.modality == "video"
        keeps = [part.keep for part in parts if part.keep is not None]
        assert video.keep is not None and torch.equal(video.keep, torch.cat(keeps))
        assert video.segments == tuple(part.segments[0] for part in parts)
        dense = [part.sources.to_dense() for part in parts if part.sources is not None]
        assert video.sources is not None
        torch.testing.assert_close(video.sources.to_dense(), torch.block_diag(*dense))
        for layer, (places, weights) in video.vision.items():
            first = parts[0].vision[layer][0]
            second = parts[1].vision[layer][0] + parts[0].segments[0][0]
            assert places.tolist() == [*first.tolist(), *second.tolist()]
            torch.testing.assert_close(
                weights.to_dense(), torch.block_diag(*(part.vision[layer][1].to_dense() for part in parts))
            )
    assert len(session.provenance.at("vision", 3).images) == 2


def test_a_video_in_a_prompt() -> None:
    model, frames = gemma(), [WIDE, WIDE]
    ids = torch.tensor([[5, 93, *[VIDEO_ID] * 8, 94, 7, 93, *[VIDEO_ID] * 8, 94, 11]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == VIDEO_ID).int() * 2, **video_of(frames, [2])}
    try:
        stock = logits(model, inputs)
    except AttributeError:
        pytest.skip("stock of this release asks a tuple of features for its device: it takes no videos")
    session = patch(model, **SETTINGS)
    assert not torch.allclose(logits(model, inputs), stock)
    (video,) = session.report.videos
    assert video.prompt_tokens == 16 and video.vision_tokens == (144, 144, 108, 108, 72, 72)


def test_pictures_are_whole() -> None:
    """Patches laid out again: colours where they were cut, numbers in the order of the encoder's rows."""
    model, size = gemma(), TALL
    height, width = size[0] * POOL * PATCH, size[1] * POOL * PATCH
    image = torch.rand(height, width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cut = image.view(size[0] * POOL, PATCH, size[1] * POOL, PATCH, 3).transpose(1, 2).flatten(0, 1).flatten(1)
    missing = BUDGET * UNIT - len(cut)
    pixels = torch.nn.functional.pad(cut, (0, 0, 0, missing))[None]
    (picture,) = gemma4.FAMILY.pictures(
        model, {"pixel_values": pixels, "image_position_ids": row_of(size, torch.float64, 0)[1][None]}
    )
    ((view,),) = picture.frames
    torch.testing.assert_close(view[:3].permute(1, 2, 0), image)
    rows = torch.arange(height)[:, None] // PATCH
    expected = rows * size[1] * POOL + torch.arange(width) // PATCH
    assert torch.equal(view[3], expected.to(view))
    (film,) = gemma4.FAMILY.pictures(model, video_of([WIDE, SQUARE], [2]))
    numbers = [int(frame[0][3].amax()) for frame in film.frames]
    assert numbers == [8 * UNIT - 1, 12 * UNIT - 1]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {**SETTINGS, "llm_layers": [2], "llm_ratio": 0.5},
            UnsupportedModelError,
            ("llm_layers is", "gemma4 merges in its vision stage only", "llm_layers="),
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


def test_a_model_without_a_tower_is_refused() -> None:
    config = gemma().config
    config.vision_config = None
    with pytest.raises(UnsupportedModelError, match="vision_config=None"):
        patch(Gemma4ForConditionalGeneration(config), **SETTINGS)


def test_the_preset_merges_where_nothing_is_given() -> None:
    model, inputs = gemma(num_hidden_layers=10), inputs_of([[WHOLE]])
    session = patch(model)
    logits(model, inputs)
    counts = session.report.visuals[0].vision_tokens
    assert counts[5] == 81 > counts[6] > counts[-1]
