"""The published numbers of Qwen2-VL's encoder (C0, C1), and where it places its prompts (D1, D2p)."""

from __future__ import annotations

import pytest
import torch

import golden as gold
from families import _qwen2_vl_golden as own
from golden_checks import assert_provenance, assert_rotary, patched

pytestmark = pytest.mark.usefixtures("no_grad", "golden_limit")


def test_stock_encoder_gives_the_published_features() -> None:
    """C0: without merging, the stock vision encoder and patch merger give the published features."""
    model = own.stock_model()
    features = model.get_image_features(gold.golden("C0", "patches"), gold.golden("C0", "grid_thw")).pooler_output
    gold.assert_near("stock C0 merger_out", features[0], gold.golden("C0", "merger_out"), 1e-5)


def test_stock_encoder_with_recorded_merges() -> None:
    """C1: stock blocks and the recorded merges of single patches give the published states."""
    visual, (merges,) = own.stock_model().model.visual, gold.encoder_merges("C1")
    hidden_states, angles = (
        visual.patch_embed(gold.golden("C0", "patches")),
        gold.golden("C1", "rotary").repeat(1, 2),
    )
    cos, sin = angles.cos(), angles.sin()
    for index, block in enumerate(visual.blocks):
        cu_seqlens = torch.tensor([0, len(hidden_states)], dtype=torch.int32)
        attended = block.attn(
            block.norm1(hidden_states),
            cu_seqlens=cu_seqlens,
            max_seqlen=len(hidden_states),
            position_embeddings=(cos, sin),
        )
        hidden_states = hidden_states + attended
        if index in (1, 2):
            merge = merges[index - 1]
            hidden_states = merge.matrix(len(hidden_states)) @ hidden_states
            cos, sin = cos[merge.kept], sin[merge.kept]
        hidden_states = hidden_states + block.mlp(block.norm2(hidden_states))
        if index in (1, 4):
            expected = gold.golden("C1", f"block_out.{index}")
            gold.assert_near(f"stock C1 block_out.{index}", hidden_states, expected, 2e-5)
    gold.assert_near("stock C1 merger_out", visual.merger(hidden_states), gold.golden("C1", "merger_out"), 2e-5)


@pytest.mark.parametrize("case", ["D1", "D2p"])
def test_stock_positions(case: str) -> None:
    """The stock model places the prompt as published: rotary positions of the prompt and of the next token."""
    model, prompt = gold.prompt_of(case)
    with gold.traced(model) as trace:
        model.generate(**prompt.fresh_inputs(), max_new_tokens=2, do_sample=False)
    next_position = prompt.decode_position_ids[1].view(3, 1, 1)
    for step, position_ids in enumerate((prompt.position_ids, next_position)):
        assert_rotary(trace.rotary[0][step], gold.rotary_of(model, position_ids))


def test_encoder_as_published() -> None:
    """C1: single patches, query log-sum-exp: the states, the survivors and what they hold."""
    model, (merges,) = own.stock_model(), gold.encoder_merges("C1")
    pixel_values, grid_thw = gold.golden("C0", "patches"), gold.golden("C0", "grid_thw")
    visual = model.model.visual
    with patched(model, "C1") as session, gold.inputs_of(visual.blocks[2].norm1, visual.merger) as seen:
        features = model.get_image_features(pixel_values, grid_thw).pooler_output[0]
        vision = [session.provenance.at("vision", layer).images for layer in (1, 2)]
    gold.assert_near("C1 block_out.1", seen[0], gold.golden("C1", "block_out.1"), 2e-5)
    gold.assert_near("C1 block_out.4", seen[1], gold.golden("C1", "block_out.4"), 2e-5)
    expected = gold.golden("C1", "merger_out")
    assert features.shape == gold.golden("C0", "merger_out").shape
    gold.assert_near("C1 merger_out", features[: len(expected)], expected, 2e-5)
    for step, images in enumerate(vision):
        seats, shares = gold.chained(merges[: step + 1], len(pixel_values))
        assert torch.equal(seats, gold.golden("C1", f"kept_source.{step + 1}"))
        (image,) = images
        assert_provenance(f"C1 block {step + 1}", image, seats, shares)
