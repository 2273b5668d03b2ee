"""LLaVA-OneVision takes any text model: the score is that model's own attention row, or `patch` says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

import tiny_models
from decode_helpers import BOTH, IMAGE, IMAGES, SETTINGS, TEXT, single, steps
from helpers import assert_differ, assert_same, assert_says, forward, generate
from illava_hooks import Method, UnsupportedModelError, merging, patch, session_of, unpatch
from kind_helpers import PADDED, works_or_refuses
from tiny_models import FAMILIES, inputs_for, tiny_model

#: Text models that must work: as the name of their config and its settings.
WORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 12}),
    "Qwen3, wider heads": ("Qwen3Config", {"head_dim": 16, "num_attention_heads": 8}),
    "Llama": ("LlamaConfig", {}),
    "Llama with biases": ("LlamaConfig", {"attention_bias": True, "head_dim": 16}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
}
#: Others: they work, or are refused by `patch`. Scaling, norms over all heads, no rotation in some layers, one
#: projection for all, partial rotation, no grouping of heads.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Granite": ("GraniteConfig", {"attention_multiplier": 0.2}),
    "Olmo2": ("Olmo2Config", {}),
    "Cohere": ("CohereConfig", {"use_qk_norm": True}),
    "Gemma": ("GemmaConfig", {"head_dim": 12}),
    "Glm4": ("Glm4Config", {"head_dim": 12}),
    "Helium": ("HeliumConfig", {"head_dim": 12}),
    "StableLm": ("StableLmConfig", {"num_attention_heads": 6}),
    "Phi3": ("Phi3Config", {"partial_rotary_factor": 1.0}),
    "GPTNeoX": ("GPTNeoXConfig", {}),
    "Qwen2Moe": ("Qwen2MoeConfig", {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        {"head_dim": 12, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "DiffLlama": ("DiffLlamaConfig", {}),
    "SmolLM3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 1]}),
}
#: Windows in some layer or all.
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral by default": ("MistralConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": 32}),
    "Qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    "Qwen3": (
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0, "head_dim": 12},
    ),
    "Gemma2": ("Gemma2Config", {"head_dim": 12}),
    "Cohere2": ("Cohere2Config", {"head_dim": 12}),
}
ROW = Method("row", llm_score="last_query_attention", merge="drop")
SPECIAL = {"bos_token_id": None, "eos_token_id": None}


def with_decoder(name: str, settings: dict[str, Any], attn_implementation: str = "sdpa", depth: int = 4) -> Any:
    """A tiny LLaVA-OneVision around a text model; the same weights for each attention back-end."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this release has no {name}")
    text = {**tiny_models.TEXT_CONFIG, "rope_parameters": dict(tiny_models.ROPE), **SPECIAL, **settings}
    stock = tiny_model("llava_onevision").config
    config = LlavaOnevisionConfig(
        vision_config=stock.vision_config,
        text_config=kind(**{**text, "num_hidden_layers": depth}),
        image_token_index=tiny_models.IMAGE_ID,
        video_token_index=tiny_models.VIDEO_ID,
        image_grid_pinpoints=stock.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    arguments = (LlavaOnevisionForConditionalGeneration, config, attn_implementation, 0, torch.float32)
    return tiny_models.build(*arguments)


def attention_row(eager: Any, inputs: Any, layer: int) -> Tensor:
    """What the last query pays to each token in a layer of a stock model, mean over the heads."""
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    return attentions[layer][0].double().mean(0)[-1]


def check_rows(model: Any, eager: Any, sample: Any, layers: tuple[int, ...] = (1, 2, 3)) -> None:
    """The kept tokens of each image are those that the last query pays most to in the layer in front."""
    inputs = single(model, sample)
    ids = inputs["input_ids"][0]
    visual = (ids == tiny_models.IMAGE_ID) | (ids == tiny_models.VIDEO_ID)
    for layer in layers:
        row = attention_row(eager, inputs, layer - 1)
        session = patch(model, [], 0, [layer], 0.5, method=ROW, track=True)
        with torch.no_grad():
            model(**inputs)
        start, scores = 0, row[visual]
        images = session.provenance.at("language", layer).images
        for image, length in zip(images, [v.prompt_tokens for v in session.report.visuals], strict=True):
            own = scores[start : start + length]
            start += length
            kept = torch.zeros(length, dtype=torch.bool)
            kept[image.seats] = True
            assert 0 < kept.sum() < length
            assert own[kept].min() > own[~kept].max() - 1e-7, f"layer {layer}"
        unpatch(model)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("sample", [IMAGE, IMAGES], ids=["image", "images"])
@pytest.mark.parametrize("decoder", WORKS)
def test_the_score_is_the_attention_row(decoder: str, sample: Any, back_end: str) -> None:
    name, settings = WORKS[decoder]
    check_rows(with_decoder(name, settings, back_end), with_decoder(name, settings, "eager"), sample)


@pytest.mark.parametrize("sample", [IMAGE, IMAGES], ids=["image", "images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_of_each_family_is_the_attention_row(family: str, sample: Any) -> None:
    check_rows(tiny_model(family), tiny_model(family, attn_implementation="eager"), sample)


@pytest.mark.parametrize("decoder", OTHERS)
def test_other_decoders_have_the_right_score_or_are_refused(decoder: str) -> None:
    """In `patch`, in one line; never a wrong ranking, and never in the middle of a forward."""
    name, settings = OTHERS[decoder]
    model = with_decoder(name, settings, "eager")
    before = forward(model, inputs := single(model, IMAGE))
    if works_or_refuses(lambda: patch(model, **SETTINGS["llava_onevision"]), r"text|decoder|language|layer") is None:
        assert session_of(model) is None
        assert_same(forward(model, inputs), before)
        return
    unpatch(model)
    check_rows(model, model, IMAGE)


@pytest.mark.parametrize("decoder", WORKS)
def test_other_decoders_decode(decoder: str) -> None:
    """A padded batch as each row alone, greedy with and without a cache, a static one, and back to stock."""
    name, settings = WORKS[decoder]
    model, stock = with_decoder(name, settings), with_decoder(name, settings)
    batch = [IMAGES, TEXT, IMAGE]
    inputs = inputs_for(stock, batch)
    expected_stock = generate(stock, inputs)
    patch(model, **SETTINGS["llava_onevision"])
    _, logits = steps(model, inputs)
    for row, sample in enumerate(batch):
        _, alone = steps(model, single(model, sample))
        for ours, theirs in zip(logits, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], **PADDED)
    for other in ({"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        _, again = steps(model, inputs, **other)
        torch.testing.assert_close(torch.stack(again), torch.stack(logits), **PADDED)
    assert session_of(model).report.kept_fraction < 0.5
    with merging(model, False):
        assert_same(generate(model, inputs), expected_stock)
    assert_differ(logits[0], expected_stock["generate.logits.0"])
    unpatch(model)
    assert_same(generate(model, inputs), expected_stock)


@pytest.mark.parametrize("decoder", ["Qwen3", "Llama", "Mistral"])
def test_other_decoders_train(decoder: str) -> None:
    """Gradients reach the encoder through merges in both stages."""
    model = with_decoder(*WORKS[decoder]).train()
    patch(model, **SETTINGS["llava_onevision"])
    inputs = single(model, BOTH)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model(**inputs, labels=labels).loss.backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert model.model.language_model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("decoder", SLIDING)
def test_sliding_windows_are_refused_by_patch(decoder: str) -> None:
    """Not by the first forward; with the true reason, and nothing changed."""
    model = with_decoder(*SLIDING[decoder], "eager")
    inputs = single(model, IMAGE)
    before = forward(model, inputs)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS["llava_onevision"])
    assert_says(caught.value, "sliding", "window")
    assert session_of(model) is None
    assert_same(forward(model, inputs), before)


@pytest.mark.parametrize("decoder", ["Qwen3", "Llama", "Mistral"])
def test_a_smaller_depth_is_known_by_patch(decoder: str) -> None:
    model = with_decoder(*WORKS[decoder], depth=2)
    with pytest.raises(ValueError, match="llm_layers"):
        patch(model, vit_layers=[1], vit_r=0.25, llm_layers=[2], llm_ratio=0.5)
    assert session_of(model) is None
