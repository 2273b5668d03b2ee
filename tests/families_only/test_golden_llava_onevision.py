"""The published numbers of LLaVA-OneVision's encoder (A1, A3) and of its compact layout (E1, E10)."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import golden as gold
from families import _llava_onevision_golden as own
from golden_checks import assert_provenance, patched
from illava_hooks.patchers import llava_onevision as packing

pytestmark = pytest.mark.usefixtures("no_grad", "golden_limit")


def test_stock_siglip_carries_the_published_weights() -> None:
    """The tower's first layer, stock, and all layers with the recorded merges give the published states."""
    model, num_tiles = own.encoder_model("A1"), gold.cases()["A1"]["tiles"]
    tower, merge_layers = model.model.vision_tower, gold.cases()["A1"]["settings"]["vit_layers"]
    merges = gold.encoder_merges("A1", num_tiles)
    hidden_states = tower.embeddings(own.encoder_inputs("A1")["pixel_values"][0])
    for index, layer in enumerate(tower.encoder.layers):
        hidden_states = hidden_states + layer.self_attn(layer.layer_norm1(hidden_states))[0]
        if index in merge_layers:
            step, num_tokens = merge_layers.index(index), hidden_states.shape[1]
            hidden_states = torch.stack([merges[t][step].matrix(num_tokens) for t in range(num_tiles)]) @ hidden_states
        hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        if index in (0, 1, 5):
            expected = gold.golden("A1", f"hidden.{index + 1}")
            gold.assert_near(f"stock A1 hidden.{index + 1}", hidden_states, expected, 2e-5)


def test_encoder() -> None:
    """A1: three tiles, three merging layers: the states, the survivors and what they hold."""
    model, num_tiles = own.encoder_model("A1"), gold.cases()["A1"]["tiles"]
    base, merges = model.model, gold.encoder_merges("A1", num_tiles)
    num_tokens = gold.cases()["A1"]["tokens_before_layer"][0]
    third_layer = base.vision_tower.encoder.layers[2].layer_norm1
    with patched(model, "A1") as session, gold.inputs_of(third_layer, base.multi_modal_projector) as seen:
        model.get_image_features(**own.encoder_inputs("A1"))
        vision = [session.provenance.at("vision", layer).images for layer in (1, 2, 3)]
    gold.assert_near("A1 hidden.2", seen[0], gold.golden("A1", "hidden.2"), 2e-5)
    gold.assert_near("A1 hidden.6", seen[1], gold.golden("A1", "hidden.6"), 2e-5)
    for step, images in enumerate(vision):
        tiles = [gold.chained(merges[tile][: step + 1], num_tokens) for tile in range(num_tiles)]
        published = gold.golden("A1", f"kept_source.{step + 1}")
        assert torch.equal(torch.stack([seats for seats, _ in tiles]), published)
        seats = published + torch.arange(num_tiles)[:, None] * num_tokens
        (image,) = images
        assert_provenance(f"A1 layer {step + 1}", image, seats.flatten(), torch.block_diag(*(s for _, s in tiles)))


def test_encoder_with_exactly_tied_scores() -> None:
    """A3: every patch occurs twice; whichever twin goes, the same rows remain."""
    model = own.encoder_model("A3")
    with patched(model, "A3"), gold.inputs_of(model.model.multi_modal_projector) as seen:
        model.get_image_features(**own.encoder_inputs("A3"))
    for tile, (rows, expected) in enumerate(zip(seen[0], gold.golden("A3", "hidden.4"), strict=True)):
        gold.assert_same_rows(f"A3 hidden.4 tile {tile}", rows, expected, 2e-5)


# ---------------------------------------------------------------------------------- the compact layout


def layout_model() -> PreTrainedModel:
    """Builds a LLaVA-OneVision with the geometry of the cases E: tiles of 384 pixels, 4 channels."""
    vision = own.TINY_VISION | {"image_size": 384, "patch_size": 14}
    return own.stock_model(vision, own.TINY_TEXT | {"hidden_size": 4}, image_grid_pinpoints=[[384, 768]])


def test_compact_grid() -> None:
    """E1: base and two tiles of 19 x 19 survivors, unpadded, with a newline after every row."""
    tile, row, column = torch.meshgrid(torch.arange(3), torch.arange(19), torch.arange(19), indexing="ij")
    kept = torch.stack([tile, row, column, torch.ones_like(tile)], dim=-1).float().view(3, 19 * 19, 4)
    image_sizes = torch.tensor([gold.cases()["E1"]["image_size_hw"]])
    (packed,) = packing.compact_grid(layout_model().model, [kept], image_sizes, torch.full((4,), -1.0))
    start, stop = gold.cases()["E1"]["span"]
    assert torch.equal(packed, gold.golden("E1", "inputs_embeds")[start:stop])


def test_compact_pool() -> None:
    """E10: three frames of 19 x 19 survivors become 10 x 10 each, with one newline after all of them."""
    pooled = packing.compact_pool(layout_model().model, gold.golden("E10", "features_19"))
    gold.assert_near("E10 pooled", pooled, gold.golden("E10", "pooled"), 1e-5)
    packed = torch.cat([pooled.flatten(0, 1), torch.full((1, 4), -1.0)])
    start, stop = gold.cases()["E10"]["span"]
    gold.assert_near("E10 inputs_embeds", packed, gold.golden("E10", "inputs_embeds")[start:stop], 1e-5)
