"""SmolVLM and Idefics3: the tower again, block by block, padding and all; tiles in samples; what never merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from families.smolvlm import SmolVLM
from helpers import TAKES_READY_FEATURES, assert_says, needs_ready_features
from illava_hooks import MergeConfigError, Method, merging, patch
from illava_hooks.engine import encoder_scores, padding
from illava_hooks.engine.records import records_of
from illava_hooks.patchers import smolvlm
from kind_helpers import said
from tiny_models import FIRST_TEXT_ID, IMAGE_ID, Sample, inputs_for, padded, tiny_model
from unit_oracle import merged

KINDS: dict[str, Any] = {"smolvlm": SmolVLMForConditionalGeneration, "idefics3": Idefics3ForConditionalGeneration}
SIDE, PATCH = 8, 4
LAYERS = (1, 3)
#: Rows and columns of patches that show something, tile by tile: whole tiles, whole blocks, and odd numbers.
FULL = ((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
SHOWN: dict[str, tuple[tuple[int, int], ...]] = {
    "full": FULL,
    "blocks": ((8, 8), (4, 8), (8, 4)),
    "odd": ((8, 8), (5, 8), (7, 7)),
    "small": ((8, 8), (8, 2), (4, 4)),
}


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both models, of which each has a tower with classes of its own."""
    monkeypatch.setattr(SmolVLM, "model_class", KINDS[request.param])
    return str(request.param)


def model_of(**kwargs: Any) -> Any:
    return tiny_model("smolvlm", **{"dtype": torch.float64} | kwargs)


def settings(rule: str = "drop", factor: int = 2, **kwargs: Any) -> dict[str, Any]:
    """Settings that take 4 of 16 blocks, or 1 of 4, at each of two layers."""
    method = Method("mine", encoder_score="received_attention", merge=rule, **kwargs)
    return {"vit_layers": list(LAYERS), "vit_r": 16, "llm_layers": [], "method": method}


def prompt(model: Any, shown: tuple[tuple[int, int], ...] = FULL) -> dict[str, Tensor]:
    """Two samples: two tiles and one; zeros stand where the second has no other."""
    found = inputs_for(model, [Sample(1, images=((32, 32), (32, 32))), Sample(2, images=((32, 32),))], side="right")
    mask = found["pixel_attention_mask"] = torch.zeros_like(found["pixel_attention_mask"])
    for (row, tile), (high, wide) in zip(((0, 0), (0, 1), (1, 0)), shown, strict=True):
        mask[row, tile, : PATCH * high, : PATCH * wide] = 1
    pixels = found["pixel_values"] if "half" in str(model.dtype) else found["pixel_values"].to(model.dtype)
    return {**found, "pixel_values": pixels}


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """At all tokens that are no padding of the text."""
    found: Tensor = model(**inputs).logits[inputs["attention_mask"] == 1]
    return found


def tiles_of(inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pixels and mask of each tile that is there."""
    pairs = zip(inputs["pixel_values"].flatten(0, 1), inputs["pixel_attention_mask"].flatten(0, 1), strict=True)
    return [(pixels, mask) for pixels, mask in pairs if pixels.any()]


def entries(output: Any, tokens: int) -> list[Tensor]:
    """The features of each tile; newer releases put those of a sample together."""
    return [tile for features in output.pooler_output for tile in features.reshape(-1, tokens, features.shape[-1])]


# ------------------------------------------------------------------------------------ the tower, by loops


def blocks(factor: int) -> list[list[int]]:
    """The patches of each token, from rows and columns of the picture."""
    return [
        [(factor * top + row) * SIDE + factor * left + column for row in range(factor) for column in range(factor)]
        for top in range(SIDE // factor)
        for left in range(SIDE // factor)
    ]


def embedded(tower: Any, pixels: Tensor, real: list[bool]) -> Tensor:
    """Patches with the positions of a picture that is stretched over the table; padding has position 0."""
    high = sum(real[row * SIDE] for row in range(SIDE))
    wide = sum(real[:SIDE])
    states = tower.embeddings.patch_embedding(pixels[None])[0].flatten(1).T
    rows = []
    for place in range(SIDE * SIDE):
        row, column = divmod(place, SIDE)
        position = (row * SIDE // high) * SIDE + column * SIDE // wide if real[place] else 0
        rows.append(states[place] + tower.embeddings.position_embedding.weight[position])
    return torch.stack(rows)


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, mask: Tensor, rule: str, factor: int) -> dict[int, Tensor]:
    """Projected feature of each surviving block that is not all padding."""
    tower, heads, unit = model.model.vision_model, model.config.vision_config.num_attention_heads, factor**2
    real = [bool(mask[PATCH * (p // SIDE), PATCH * (p % SIDE)]) for p in range(SIDE * SIDE)]
    states, members = embedded(tower, pixels, real), blocks(factor)
    units = {block: states[patches] for block, patches in enumerate(members)}
    whole = {block for block, patches in enumerate(members) if all(real[p] for p in patches)}
    empty = {block for block, patches in enumerate(members) if not any(real[p] for p in patches)}
    for index, layer in enumerate(tower.encoder.layers):
        rows, attention = torch.cat([*units.values()]), layer.self_attn
        seen = torch.tensor([real[p] for block in units for p in members[block]])
        normed = layer.layer_norm1(rows)
        q, k, v = (
            linear(normed).view(len(rows), heads, -1).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k[:, seen].transpose(1, 2) * q.shape[-1] ** -0.5
        weights = torch.zeros(heads, len(rows), len(rows), dtype=rows.dtype)
        weights[:, :, seen] = logits.softmax(-1)
        rows = rows + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        units = dict(zip(units, rows.split(unit), strict=True))
        if index in LAYERS:
            received = weights[:, seen].mean((0, 1)).split(unit)
            scores = {block: float(part.mean()) for block, part in zip(units, received, strict=True)}
            units = one_merge(rule, units, scores, 16 // unit, whole, empty)
        rows = torch.cat([*units.values()])
        rows = rows + layer.mlp(layer.layer_norm2(rows))
        units = dict(zip(units, rows.split(unit), strict=True))
    joined = torch.stack([tower.post_layernorm(rows).flatten() for rows in units.values()])
    features = dict(zip(units, model.model.connector.modality_projection(joined), strict=True))
    return {block: feature for block, feature in features.items() if block not in empty}


def one_merge(
    rule: str, units: dict[int, Tensor], scores: dict[int, float], removed: int, whole: set[int], empty: set[int]
) -> dict[int, Tensor]:
    """Empty blocks go first, as long as one is left; of the others only whole ones meet."""
    nothing = [block for block in units if block in empty]
    first = nothing[: min(removed, max(0, len(nothing) - 1))]
    left = merged(rule, {b: rows for b, rows in units.items() if b in whole}, scores, removed - len(first))
    return {
        block: left.get(block, rows)
        for block, rows in units.items()
        if block not in first and (block in left or block not in whole)
    }


def check_oracle(rule: str, factor: int, shown: str, **kwargs: Any) -> None:
    model = model_of(scale_factor=factor, **kwargs)
    inputs, tokens = prompt(model, SHOWN[shown]), SIDE * SIDE // factor**2
    expected = [tower_again(model, *tile, rule, factor) for tile in tiles_of(inputs)]
    patch(model, **settings(rule, factor))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # stock compiles masks of flex attention
        output = model.model.get_image_features(**arguments(inputs))
    records = records_of(output) or []
    for features, record, alone in zip(entries(output, tokens), records, expected, strict=True):
        assert record.keep is not None and record.survivor_of is not None
        assert record.keep.nonzero().flatten().tolist() == sorted(alone)
        assert len(alone) < tokens
        for block, survivor in enumerate(record.survivor_of.tolist()):
            assert record.keep[survivor]
            if record.keep[block] or rule == "drop":
                torch.testing.assert_close(features[survivor], alone[survivor], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # fused needs a compiler
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize("back_end", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(("factor", "shown"), [(4, "full"), *((2, shown) for shown in SHOWN)])
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_blocks(rule: str, factor: int, shown: str, back_end: str) -> None:
    check_oracle(rule, factor, shown, attn_implementation=back_end)


def blocks_in_rows(patches: int, factor: int) -> Any:
    """Patches that follow each other in a row of the picture: no block of the shuffle."""
    return replace(smolvlm_blocks(patches, factor), order=None)


def nothing_is_padding(*args: Any) -> Any:
    return sorted_units(*args)[0], None


def uncut(self: Any, kwargs: dict[str, Any], run: Any, merges: int) -> dict[str, Any]:
    """Masks of places in picture order, of as many as there are."""
    given = kwargs["attention_mask"]
    return kwargs if given is None else {**kwargs, "attention_mask": given[..., : run.patch_origins(merges).shape[1]]}


def mixed_as_whole(*args: Any) -> Any:
    """Blocks with a bit of padding merge as all others."""
    count, found = sorted_units(*args)
    assert found is not None
    kinds = torch.where(found.kinds == padding.MIXED, padding.WHOLE, found.kinds)
    counts = [replace(tile, whole=int((kinds[row] == padding.WHOLE).sum())) for row, tile in enumerate(found.counts)]
    return count, replace(found, kinds=kinds, counts=tuple(counts))


def empty_as_whole(*args: Any) -> Any:
    """Padding merges as if it showed something."""
    count, found = sorted_units(*args)
    assert found is not None
    units = found.kinds.shape[1]
    counts = [replace(tile, whole=units, empty=0, real=units * 4) for tile in found.counts]
    whole = replace(found, real=torch.ones_like(found.real), kinds=torch.zeros_like(found.kinds), counts=tuple(counts))
    return count, whole


def queries_of_padding(layer: Any, real: Tensor, tap: Any) -> Tensor:
    """Padding has a say in what matters."""
    return unit_scores(replace(layer, real=None), tap)


smolvlm_blocks, sorted_units, unit_scores = smolvlm.blocks, padding.Padding.of, encoder_scores.unit_scores


@pytest.mark.parametrize(
    ("shown", "where", "name", "wrong"),
    [
        ("full", smolvlm, "blocks", blocks_in_rows),
        ("odd", padding.Padding, "of", staticmethod(nothing_is_padding)),
        ("odd", padding.Padding, "of", staticmethod(mixed_as_whole)),
        ("small", padding.Padding, "of", staticmethod(empty_as_whole)),
        ("blocks", smolvlm.Masks, "__call__", uncut),
        ("odd", encoder_scores, "_padded_scores", queries_of_padding),
    ],
)
def test_the_oracle_sees(shown: str, where: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        check_oracle("drop", 2, shown)


# ------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("method", ["illava", "illava-v2", "diverse", "tome", "nearest", "random"])
def test_what_padding_shows_never_matters(method: str) -> None:
    """Other pixels under the mask, where it covers whole blocks: text gets to see no difference."""
    model = model_of()
    inputs = prompt(model, ((8, 8), (4, 8), (6, 4)))
    text = inputs["input_ids"] >= FIRST_TEXT_ID
    patch(model, [1, 2], 0.25, [2], 0.5, method=method)
    hidden = inputs["pixel_attention_mask"][:, :, None] == 0
    others = torch.where(hidden & (inputs["pixel_values"] != 0), 3.0, inputs["pixel_values"])
    with torch.no_grad():
        expected, found = (model(**{**inputs, "pixel_values": p}).logits for p in (inputs["pixel_values"], others))
    assert not torch.equal(inputs["pixel_values"], others)
    torch.testing.assert_close(found[text], expected[text], rtol=0, atol=1e-9)


@pytest.mark.parametrize("vit_r", [0, 0.01])
def test_padding_stays_where_nothing_is_removed(vit_r: float) -> None:
    model = model_of()
    inputs = prompt(model, SHOWN["odd"])
    with torch.no_grad():
        expected = logits_of(model, inputs)
        patch(model, [1, 2], vit_r, [], 1.0)
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=0 if vit_r == 0 else 1e-12)


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
def test_tokens_weigh_by_their_size_beside_a_mask(back_end: str) -> None:
    """The logarithm of its size stands beside the mask of each key: both back-ends answer as one."""
    outputs = []
    for name in (back_end, "eager"):
        model = model_of(attn_implementation=name)
        inputs = prompt(model, SHOWN["odd"])
        patch(model, **settings("nearest", proportional=True))
        with torch.no_grad():
            outputs.append(model.model.get_image_features(**arguments(inputs)).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    patch(model, **settings("nearest"))
    with torch.no_grad():
        plain = model.model.get_image_features(**arguments(inputs)).last_hidden_state
    assert (plain - outputs[0]).abs().max() > 1e-3


def test_a_tile_that_cannot_give_so_much_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """All tiles of a batch give up what the one can that has least: here 3 of 16 blocks, and not 8."""
    model = model_of()
    inputs = prompt(model, ((8, 8), (7, 7), (1, 7)))
    session = patch(model, [1], 32, [], 1.0)
    with torch.no_grad():
        model(**inputs)
    assert [visual.vision_tokens[-1] for visual in session.report.visuals] == [64 - 32] * 3
    assert not said(caplog)
    patch(model, [1], 40, [], 1.0)
    with torch.no_grad():
        model(**prompt(model, ((8, 8), (7, 7), (8, 8))))
    (message,) = said(caplog, "without padding")
    assert "9 of 16 units" in message and "vit_r 40" in message and "\n" not in message


def test_a_tile_of_mixed_blocks_alone_gives_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An odd number of columns in blocks of 8 x 8: nothing is whole, and nothing is empty."""
    model = model_of(scale_factor=4)
    inputs = prompt(model, ((7, 7), (7, 7), (7, 7)))
    with torch.no_grad():
        expected = logits_of(model, inputs)
        patch(model, [1], 0.5, [], 1.0)
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=1e-12)
    assert said(caplog, "1 of 4 units")


# ------------------------------------------------------------------------------------ samples and tiles


def test_each_tile_is_an_image() -> None:
    """Whichever entry of the features it stands in; a sample without images has none."""
    model = model_of()
    samples = [Sample(1, images=((32, 32), (32, 32))), Sample(5, text=(9,)), Sample(2, images=((32, 32),))]
    inputs = inputs_for(model, samples)
    session = patch(model, [1], 16, [2], 0.5)
    with torch.no_grad():
        model(**inputs)
    assert [(v.sample, v.prompt_tokens, v.left) for v in session.report.visuals] == [
        (0, 16, 6),
        (0, 16, 6),
        (2, 16, 6),
    ]


def test_beams_of_samples_with_tiles_and_without() -> None:
    """Each row of a batch generates as it does alone, however many tiles stand in its entry."""
    model = model_of()
    samples = [Sample(1, images=((32, 32), (32, 32))), Sample(5, text=(9,)), Sample(2, images=((32, 32),))]
    patch(model, [1], 16, [2], 0.5)
    wanted = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    batch = inputs_for(model, samples)
    found = model.generate(**batch, **wanted)[:, batch["input_ids"].shape[1] :]
    for row, sample in enumerate(samples):
        alone = inputs_for(model, [sample])
        expected = model.generate(**alone, **wanted)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(found[2 * row : 2 * row + 2], expected)


@needs_ready_features
def test_ready_made_features_know_their_tiles() -> None:
    model = model_of()
    inputs = prompt(model)
    session = patch(model, [1], 16, [2], 0.5)
    with torch.no_grad():
        expected, report = model(**inputs).logits, session.report
        ready = model.get_image_features(**arguments(inputs), return_dict=True)
        rest = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
        torch.testing.assert_close(model(**rest, mm_encoder_outputs={"image": ready}).logits, expected, rtol=0, atol=0)
    assert [v.left for v in session.report.visuals] == [v.left for v in report.visuals]
    stock = model_of()
    with torch.no_grad():
        ready = stock.get_image_features(**arguments(inputs), return_dict=True)
        model(**rest, mm_encoder_outputs={"image": ready})
    assert [(v.prompt_tokens, v.left) for v in session.report.visuals] == [(16, 8)] * 3


@pytest.mark.skipif(TAKES_READY_FEATURES, reason="this release takes outputs of feature methods")
def test_bare_features_of_older_releases_merge_in_the_language_model() -> None:
    model = model_of()
    inputs = prompt(model)
    with torch.no_grad():
        ready = model.get_image_features(**arguments(inputs), return_dict=True).pooler_output
        session = patch(model, [1], 16, [2], 0.5)
        rest = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
        model(**rest, image_hidden_states=ready)
    assert [(v.prompt_tokens, v.left) for v in session.report.visuals] == [(16, 8)] * 3


def test_pixels_of_nothing_but_zeros(kind: str) -> None:
    """A batch of text whose images are all filling: as stock, an error of stock's included."""
    inputs = inputs_for(model_of(), [Sample(5, text=(9,)), Sample(6, text=(4,))])
    inputs["pixel_values"] = torch.zeros(2, 1, 3, 32, 32, dtype=torch.float64)

    def run(model: Any) -> Any:
        try:
            with torch.no_grad():
                return logits_of(model, inputs)
        except Exception as error:
            return str(error)

    model = model_of()
    expected = run(model)
    patch(model, [1], 16, [2], 0.5)
    found = run(model)
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_embeddings_in_place_of_ids() -> None:
    model = model_of()
    inputs = prompt(model)
    session = patch(model, [1], 16, [2], 0.5)
    with torch.no_grad():
        expected, report = model(**inputs).logits, session.report
        ids = inputs.pop("input_ids")
        found = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert session.report == report and (ids == IMAGE_ID).any()


# ------------------------------------------------------------------------------------ report and settings


@pytest.mark.parametrize("factor", [2, 4])
def test_the_report_counts_as_torch_does(factor: int) -> None:
    model = tiny_model("smolvlm", attn_implementation="eager", scale_factor=factor, text={"num_hidden_layers": 2})
    inputs = prompt(model)
    method = Method("mine", encoder_score="uniform", merge="drop")
    session = patch(model, vit_layers=[1, 3], vit_r=16, llm_layers=[], method=method)
    for index, enabled in enumerate((True, False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, merging(model, enabled):
            model(**inputs)
        counts = counter.get_flop_counts()
        encoded = next(sum(n.values()) for name, n in counts.items() if name.endswith("vision_model.encoder"))
        projected = next(sum(n.values()) for name, n in counts.items() if name.endswith("connector"))
        assert session.report.encoder_flops[index] == pytest.approx(encoded, rel=0.01)
        assert session.report.projector_flops[index] == pytest.approx(projected, rel=0.01)


def test_presets_go_with_the_depth_of_the_tower() -> None:
    for depth, layers in ((27, (5, 6, 7, 8)), (12, (2, 3, 4))):
        model = model_of(vision={"num_hidden_layers": depth}, text={"num_hidden_layers": 9})
        session = patch(model)
        schedule = session.config.image
        assert schedule.vit_layers == layers and schedule.llm_layers == (8,)
        with torch.no_grad():
            model(**prompt(model))
        shares = [visual.vision_tokens[-1] / 64 for visual in session.report.visuals]
        assert shares == [pytest.approx(0.5, abs=0.16)] * 3


def test_the_tower_of_each_published_size() -> None:
    sizes = {"smolvlm-256m": 64, "smolvlm-500m": 64, "smolvlm-2.2b": 81, "idefics3-8b": 169}
    for name, tokens in sizes.items():
        shape = smolvlm.FAMILY.shapes[name]
        text = {"hidden_size": shape.hidden, "num_hidden_layers": 1, "num_attention_heads": shape.heads}
        config = smolvlm.FAMILY.published_config(text | {"pad_token_id": 0}, {"image": IMAGE_ID}, narrow=False)
        assert smolvlm.tile_side(config) ** 2 // config.scale_factor**2 == tokens
        assert config.model_type == name.split("-")[0]


@pytest.mark.parametrize("page", ["docs/settings.md"])
def test_both_presets_stand_in_the_tables(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    for depth in (27, 12):
        preset = smolvlm.FAMILY.presets_of(model_of(vision={"num_hidden_layers": depth}))["image"]
        layers, llm_layers = list(preset.vit_layers), list(preset.llm_layers)
        assert f"| `{layers}` | `{preset.vit_r}` | `{llm_layers}` | `{preset.llm_ratio:.2f}` |" in text


def test_other_layers_are_refused() -> None:
    model = model_of()
    with pytest.raises(MergeConfigError) as caught:
        patch(model)
    assert_says(caught.value, "vit_layers", "4")


# ------------------------------------------------------------------------------------ as the processor gives it


PROCESSORS: dict[str, type] = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}


def test_what_the_stock_processor_gives(kind: str) -> None:
    """Tiles and the global image behind them, filled up with zeros; its mask covers whole tiles only."""
    processor = PROCESSORS[kind](size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    shades = [torch.rand(3, *size, generator=torch.Generator().manual_seed(7)) for size in ((50, 90), (40, 30))]
    images = [[Image.fromarray((255 * shade).byte().permute(1, 2, 0).numpy())] for shade in shades]
    batch = processor(images=images, return_tensors="pt")
    tiles = [2 * 3 + 1, 3 * 3 + 1]
    assert batch["pixel_values"].shape[1] == max(tiles)
    model = tiny_model("smolvlm")
    rows = [[FIRST_TEXT_ID, *([IMAGE_ID] * 16 + [FIRST_TEXT_ID]) * count] for count in tiles]
    session = patch(model, [1, 2], 0.25, [2], 0.5)
    with torch.no_grad():
        model(**padded(rows, "left"), **{name: batch[name] for name in ("pixel_values", "pixel_attention_mask")})
    found = [(v.sample, v.vision_tokens[-1], v.left) for v in session.report.visuals]
    assert found == [(0, 36, 5)] * 7 + [(1, 36, 5)] * 10
    alone = {name: batch[name][:1] for name in ("pixel_values", "pixel_attention_mask")}
    pictures = smolvlm.FAMILY.pictures(model, alone)
    assert len(pictures) == 7
    for picture, tile in zip(pictures, alone["pixel_values"][0], strict=False):
        ((view,),) = picture.frames
        assert torch.equal(view[:3], tile.double())
        assert view[3, ::PATCH, ::PATCH].flatten().tolist() == list(range(SIDE * SIDE))
