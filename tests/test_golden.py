"""The library gives the published code's numbers, and stock Hugging Face models carry its weights.

The first part needs no merging by the library: it shows that weights, inputs and recorded indices are read
rightly, by walking the stock layers and applying the recorded merges. The second part goes through the public
API. `pytest -s` prints the largest error of every comparison.

Reached, largest absolute error per case, on the CPU with transformers 5.23 and torch 2.14.1 (`LIMIT`: 2e-5; indices,
lengths and weights are exact):

| A1     | A3     | B1c    | C0     | C1     | D1     | D2p    | E1 | E10 |
|--------|--------|--------|--------|--------|--------|--------|----|-----|
| 7.2e-6 | 4.6e-6 | 4.4e-6 | 1.9e-6 | 7.2e-6 | 6.6e-6 | 4.2e-6 | 0  | 0   |
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import golden as gold
from illava_hooks import MergeSession, patch, unpatch
from illava_hooks.engine.compat import CACHE
from illava_hooks.patchers import llava_onevision

LANGUAGE_CASES = ("B1c", "D1", "D2p")

LIMIT = 2e-5
"""What the largest error of every case has to stay below."""


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    """Prints the errors reached, once all tests have run, and holds the largest of every case to the limit."""
    yield
    print(f"\nlargest error of every golden comparison\n{gold.report_reached()}")
    largest: dict[str, float] = {}
    for label, error in gold.reached.items():
        case = label.removeprefix("stock ").split()[0]
        largest[case] = max(error, largest.get(case, 0.0))
    print(f"by case: {', '.join(f'{case} {error:.1e}' for case, error in sorted(largest.items()))}")
    assert {case: error for case, error in largest.items() if not error <= LIMIT} == {}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """Runs every test without autograd."""
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------- stock models, recorded indices


def walk_language(
    model: PreTrainedModel, prompt: gold.Prompt, case: str, seen: dict[str, Tensor], cache: DynamicCache
) -> Tensor:
    """Runs prefill and decoding layer by layer on stock layers, merging by the recorded indices.

    Args:
        model: Stock model of the case.
        prompt: Its prompt.
        case: Name of the case.
        seen: Receives the hidden states that enter merging layers and the final ones of the prompt.
        cache: Receives keys and values.

    Returns:
        Logits of the last prompt token and of every decoded one, (steps, ids).
    """
    language = model.model.language_model
    merge_layers = gold.cases()[case]["settings"]["llm_layers"]
    merges, spans = gold.language_merges(case, prompt.spans), prompt.spans
    hidden_states, position_ids = prompt_embeds(model, prompt), prompt.position_ids
    logits = []
    for step, token in enumerate(gold.golden(case, "generated_ids")):
        for index, layer in enumerate(language.layers):
            if step == 0 and index in merge_layers:
                own = [span_merges[merge_layers.index(index)] for span_merges in merges]
                matrices = [merge.matrix(stop - start) for merge, (start, stop) in zip(own, spans, strict=True)]
                hidden_states = gold.sequence_merge(matrices, spans, hidden_states.shape[1]) @ hidden_states
                spans = shrunk([len(matrix) for matrix in matrices], spans)
                position_ids = gold.golden(case, f"position_ids.{index}").view(*position_ids.shape[:-1], -1)
                seen[f"layer_in.{index}"] = hidden_states[0]
            hidden_states = layer(
                hidden_states,
                position_embeddings=language.rotary_emb(hidden_states, position_ids),
                **{CACHE: cache},
            )
        hidden_states = language.norm(hidden_states)
        seen.setdefault("final_hidden", hidden_states[0])
        logits.append(model.lm_head(hidden_states[0, -1])[: gold.NUM_LOGITS])
        hidden_states = language.embed_tokens(token.view(1, 1))
        position_ids = (prompt.decode_position_ids[0] + step + 1).view(*position_ids.shape[:-1], 1)
    return torch.stack(logits)


def prompt_embeds(model: PreTrainedModel, prompt: gold.Prompt) -> Tensor:
    """Returns the embeddings that enter the stock language model, (1, N, C)."""
    with gold.traced(model) as trace:
        model(**prompt.fresh_inputs())
    return trace.entering[0][0]


def shrunk(lengths: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the spans of a sequence whose spans have shrunk to `lengths`."""
    result, removed = [], 0
    for length, (start, stop) in zip(lengths, spans, strict=True):
        result.append((start - removed, start - removed + length))
        removed += stop - start - length
    return result


def test_stock_siglip_carries_the_published_weights() -> None:
    """The tower's first layer, stock, and all layers with the recorded merges give the published states."""
    model, num_tiles = gold.encoder_model("A1"), gold.cases()["A1"]["tiles"]
    tower, merge_layers = model.model.vision_tower, gold.cases()["A1"]["settings"]["vit_layers"]
    merges = gold.encoder_merges("A1", num_tiles)
    hidden_states = tower.embeddings(gold.encoder_inputs("A1")["pixel_values"][0])
    for index, layer in enumerate(tower.encoder.layers):
        hidden_states = hidden_states + layer.self_attn(layer.layer_norm1(hidden_states))[0]
        if index in merge_layers:
            step, num_tokens = merge_layers.index(index), hidden_states.shape[1]
            hidden_states = torch.stack([merges[t][step].matrix(num_tokens) for t in range(num_tiles)]) @ hidden_states
        hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        if index in (0, 1, 5):
            expected = gold.golden("A1", f"hidden.{index + 1}")
            gold.assert_near(f"stock A1 hidden.{index + 1}", hidden_states, expected, 2e-5)


def test_stock_qwen2_vl_encoder_gives_the_published_features() -> None:
    """C0: without merging, the stock vision encoder and patch merger give the published features."""
    model = gold.qwen2_vl_model()
    features = model.get_image_features(gold.golden("C0", "patches"), gold.golden("C0", "grid_thw")).pooler_output
    gold.assert_near("stock C0 merger_out", features[0], gold.golden("C0", "merger_out"), 1e-5)


def test_stock_qwen2_vl_encoder_with_recorded_merges() -> None:
    """C1: stock blocks and the recorded merges of single patches give the published states."""
    visual, (merges,) = gold.qwen2_vl_model().model.visual, gold.encoder_merges("C1")
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


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_stock_language_model_with_recorded_merges(case: str) -> None:
    """Stock decoder layers with the recorded merges give the published states and logits, decoding too."""
    model, prompt = gold.prompt_of(case)
    embeds = gold.golden("B1", "inputs_embeds") if case == "B1c" else gold.golden(case, "inputs_embeds")[None]
    assert torch.equal(prompt_embeds(model, prompt), embeds)
    seen: dict[str, Tensor] = {}
    logits = walk_language(model, prompt, case, seen, DynamicCache())
    for name, states in seen.items():
        gold.assert_near(f"stock {case} {name}", states, gold.golden(case, name), 2e-5)
    gold.assert_near(f"stock {case} decode_logits", logits, gold.golden(case, "decode_logits"), 2e-5)


@pytest.mark.parametrize("case", ["D1", "D2p"])
def test_stock_qwen2_vl_positions(case: str) -> None:
    """Stock Qwen2-VL places the prompt as published: rotary positions of the prompt and of the next token."""
    model, prompt = gold.prompt_of(case)
    with gold.traced(model) as trace:
        model.generate(**prompt.fresh_inputs(), max_new_tokens=2, do_sample=False)
    next_position = prompt.decode_position_ids[1].view(3, 1, 1)
    for step, position_ids in enumerate((prompt.position_ids, next_position)):
        assert_rotary(trace.rotary[0][step], gold.rotary_of(model, position_ids))


# ----------------------------------------------------------------------------------- through the library


@contextmanager
def patched(model: PreTrainedModel, case: str) -> Iterator[MergeSession]:
    """Patches a model with the settings of a case, and takes it back at the end."""
    session = patch(model, **gold.cases()[case]["settings"], track=True)
    try:
        yield session
    finally:
        unpatch(model)


def assert_rotary(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares rotary tables: equal positions give equal tables."""
    for table, expected_table in zip(actual, expected, strict=True):
        assert table.shape == expected_table.shape
        torch.testing.assert_close(table, expected_table, atol=1e-6, rtol=0)


def assert_provenance(label: str, image: Any, seats: Tensor, shares: Tensor) -> None:
    """Compares where the survivors of one image sit, and what each of them stands for."""
    assert torch.equal(image.seats, seats), f"{label}: other tokens survive"
    gold.assert_near(f"{label} weights", image.weights.to_dense(), shares, 1e-6)


def test_encoder_of_llava_onevision() -> None:
    """A1: three tiles, three merging layers: the states, the survivors and what they hold."""
    model, num_tiles = gold.encoder_model("A1"), gold.cases()["A1"]["tiles"]
    base, merges = model.model, gold.encoder_merges("A1", num_tiles)
    num_tokens = gold.cases()["A1"]["tokens_before_layer"][0]
    third_layer = base.vision_tower.encoder.layers[2].layer_norm1
    with patched(model, "A1") as session, gold.inputs_of(third_layer, base.multi_modal_projector) as seen:
        model.get_image_features(**gold.encoder_inputs("A1"))
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
    model = gold.encoder_model("A3")
    with patched(model, "A3"), gold.inputs_of(model.model.multi_modal_projector) as seen:
        model.get_image_features(**gold.encoder_inputs("A3"))
    for tile, (rows, expected) in enumerate(zip(seen[0], gold.golden("A3", "hidden.4"), strict=True)):
        gold.assert_same_rows(f"A3 hidden.4 tile {tile}", rows, expected, 2e-5)


def test_encoder_of_qwen2_vl_as_published() -> None:
    """C1: single patches, query log-sum-exp: the states, the survivors and what they hold."""
    model, (merges,) = gold.qwen2_vl_model(), gold.encoder_merges("C1")
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


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_prefill(case: str) -> None:
    """The prompt's states, positions, cache lengths and survivors are the published ones."""
    model, prompt = gold.prompt_of(case)
    description, layers = gold.cases()[case], gold.cases()[case]["settings"]["llm_layers"]
    with patched(model, case) as session, gold.traced(model) as trace:
        outputs = model(**prompt.fresh_inputs(), use_cache=True)
        images = {layer: session.provenance.at("language", layer).images for layer in layers}
    assert outputs.logits.shape[:2] == (1, prompt.num_tokens)
    logits = outputs.logits[0, -1, : gold.NUM_LOGITS]
    gold.assert_near(f"{case} prefill logits", logits, gold.golden(case, "decode_logits")[0], 2e-5)
    gold.assert_near(f"{case} final_hidden", trace.final[0][0], gold.golden(case, "final_hidden"), 2e-5)
    assert [trace.entering[i][0].shape[1] for i in range(len(trace.entering))] == description["prefill_lengths"]
    merges = gold.language_merges(case, prompt.spans)
    for step, layer in enumerate(layers):
        expected = gold.golden(case, f"layer_in.{layer}")
        gold.assert_near(f"{case} layer_in.{layer}", trace.entering[layer][0][0], expected, 2e-5)
        position_ids = gold.golden(case, f"position_ids.{layer}").view(*prompt.position_ids.shape[:-1], -1)
        assert_rotary(trace.rotary[layer][0], gold.rotary_of(model, position_ids))
        assert len(images[layer]) == len(prompt.spans)
        for index, (start, stop) in enumerate(prompt.spans):
            seats, shares = gold.chained(merges[index][: step + 1], stop - start)
            assert_provenance(f"{case} layer {layer} image {index}", images[layer][index], seats, shares)


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_keys_and_values_in_the_cache(case: str) -> None:
    """At every layer, those of stock layers with the recorded merges; of the prompt also the published ones."""
    model, prompt = gold.prompt_of(case)
    walked, num_tokens = DynamicCache(), len(gold.golden(case, "generated_ids"))
    walk_language(model, prompt, case, {}, walked)
    with patched(model, case):
        cache = model(**prompt.fresh_inputs(), use_cache=True).past_key_values
        options = {"max_new_tokens": num_tokens, "do_sample": False, "return_dict_in_generate": True}
        decoded = model.generate(**prompt.fresh_inputs(), **options).past_key_values
    recorded = {name for name in gold.tensors() if name.startswith(f"{case}.") and "_cache." in name}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            label, states = f"{case}.{name[0]}_cache.{index}", getattr(layer, name)[0]
            expected = getattr(walked.layers[index], name)[0]
            gold.assert_near(f"{case} {name}.{index}", states, expected[:, : states.shape[1]], 2e-5)
            gold.assert_near(f"{case} {name}.{index} decoded", getattr(decoded.layers[index], name)[0], expected, 2e-5)
            if label in recorded:
                gold.assert_near(f"{case} {name}.{index} published", states, gold.tensors()[label], 2e-5)
                recorded.remove(label)
    assert recorded == set(), "published numbers that nothing was compared with"


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_decoding_step_by_step(case: str) -> None:
    """Five decode steps by `forward`: logits, positions, and physical and logical cache lengths."""
    model, prompt = gold.prompt_of(case)
    tokens, expected = gold.golden(case, "generated_ids"), gold.golden(case, "decode_logits")
    inputs = prompt.fresh_inputs()
    with patched(model, case), gold.traced(model) as trace:
        for step, lengths in enumerate(gold.cases()[case]["cache_lengths"]):
            outputs = model(**inputs, use_cache=True)
            cache = outputs.past_key_values
            logits = outputs.logits[0, -1, : gold.NUM_LOGITS]
            gold.assert_near(f"{case} decode logits", logits, expected[step], 2e-5)
            assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
            assert cache.get_seq_length() == prompt.num_tokens + step
            inputs = {"input_ids": tokens[step].view(1, 1), CACHE: cache}
    for step in range(1, len(tokens)):
        position_ids = prompt.decode_position_ids[step].view(*prompt.position_ids.shape[:-1], 1)
        for tables in trace.rotary.values():
            assert_rotary(tables[step], gold.rotary_of(model, position_ids))


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_generate(case: str) -> None:
    """`generate` gives the published tokens and logits."""
    model, prompt = gold.prompt_of(case)
    tokens, expected = gold.golden(case, "generated_ids"), gold.golden(case, "decode_logits")
    options = {"max_new_tokens": len(tokens), "do_sample": False, "return_dict_in_generate": True}
    with patched(model, case), gold.traced(model) as trace:
        outputs = model.generate(**prompt.fresh_inputs(), **options, output_logits=True)
    logits = torch.cat(outputs.logits)[:, : gold.NUM_LOGITS]
    gold.assert_near(f"{case} generate logits", logits, expected, 2e-5)
    assert torch.equal(outputs.sequences[0, prompt.num_tokens :], tokens)
    lengths = [layer.keys.shape[-2] for layer in outputs.past_key_values.layers]
    assert lengths == gold.cases()[case]["cache_lengths"][-1]
    last_position = prompt.decode_position_ids[-1].view(*prompt.position_ids.shape[:-1], 1)
    assert_rotary(trace.rotary[0][-1], gold.rotary_of(model, last_position))


# ---------------------------------------------------------------------------------- the compact layout


def layout_model() -> PreTrainedModel:
    """Builds a LLaVA-OneVision with the geometry of the cases E: tiles of 384 pixels, 4 channels."""
    vision = gold.TINY_VISION | {"image_size": 384, "patch_size": 14}
    return gold.llava_onevision(vision, gold.TINY_TEXT | {"hidden_size": 4}, image_grid_pinpoints=[[384, 768]])


def test_compact_grid() -> None:
    """E1: base and two tiles of 19 x 19 survivors, unpadded, with a newline after every row."""
    tile, row, column = torch.meshgrid(torch.arange(3), torch.arange(19), torch.arange(19), indexing="ij")
    kept = torch.stack([tile, row, column, torch.ones_like(tile)], dim=-1).float().view(3, 19 * 19, 4)
    image_sizes = torch.tensor([gold.cases()["E1"]["image_size_hw"]])
    (packed,) = llava_onevision.compact_grid(layout_model().model, [kept], image_sizes, torch.full((4,), -1.0))
    start, stop = gold.cases()["E1"]["span"]
    assert torch.equal(packed, gold.golden("E1", "inputs_embeds")[start:stop])


def test_compact_pool() -> None:
    """E10: three frames of 19 x 19 survivors become 10 x 10 each, with one newline after all of them."""
    pooled = llava_onevision.compact_pool(layout_model().model, gold.golden("E10", "features_19"))
    gold.assert_near("E10 pooled", pooled, gold.golden("E10", "pooled"), 1e-5)
    packed = torch.cat([pooled.flatten(0, 1), torch.full((1, 4), -1.0)])
    start, stop = gold.cases()["E10"]["span"]
    gold.assert_near("E10 inputs_embeds", packed, gold.golden("E10", "inputs_embeds")[start:stop], 1e-5)
