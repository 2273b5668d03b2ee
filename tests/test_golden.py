"""The library gives the published code's numbers, and stock Hugging Face models carry its weights.

The first part needs no merging by the library: it shows that weights, inputs and recorded indices are read
rightly, by walking the stock layers and applying the recorded merges. The second part goes through the public
API. `pytest -s` prints the largest error of every comparison. Encoders, which differ by family, are tested in
`tests/families_only`.

Reached, largest absolute error per case, on the CPU with transformers 5.23 and torch 2.14.1 (`LIMIT`: 2e-5; indices,
lengths and weights are exact):

| A1     | A3     | B1c    | C0     | C1     | D1     | D2p    | E1 | E10 |
|--------|--------|--------|--------|--------|--------|--------|----|-----|
| 7.2e-6 | 4.6e-6 | 4.4e-6 | 1.9e-6 | 7.2e-6 | 6.6e-6 | 4.2e-6 | 0  | 0   |
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import golden as gold
from families import FAMILIES, family
from golden_checks import assert_provenance, assert_rotary, patched
from illava_hooks.engine.compat import CACHE

pytestmark = pytest.mark.usefixtures("no_grad", "golden_limit")

LANGUAGE_CASES = tuple(case for name in FAMILIES for case in family(name).golden_cases)

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


# ----------------------------------------------------------------------------------- through the library


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
