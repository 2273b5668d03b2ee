"""The stock models of the golden cases A, B and E, with their published weights; the prompt of the cases B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedModel

import golden as gold


def stock_model(vision: dict[str, Any], text: dict[str, Any], **config: Any) -> PreTrainedModel:
    """Builds a stock LLaVA-OneVision with fixed random weights, its last two ids being image and video."""
    vocab_size = text["vocab_size"]
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | vision,
            text_config={"model_type": "qwen2", "bos_token_id": None, "eos_token_id": None} | text,
            image_token_index=vocab_size - 2,
            video_token_index=vocab_size - 1,
            **config,
        )
    )
    return model.eval()


TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
}


def encoder_model(case: str) -> PreTrainedModel:
    """Builds the LLaVA-OneVision of a case A: its vision tower is the published one, the rest is small."""
    config, num_tiles = gold.cases()[case]["config"], gold.cases()[case]["tiles"]
    grid = [config["image_size"], config["image_size"] * (num_tiles - 1)]  # the first tile is the base
    model = stock_model(config, TINY_TEXT, image_grid_pinpoints=[grid])
    gold.load_exactly(model.model.vision_tower, gold.weights(f"{case}.w.vision_model."))
    return model


def encoder_inputs(case: str) -> dict[str, Tensor]:
    """Returns the arguments of `get_image_features` for the one image of a case A."""
    pixel_values = gold.golden(case, "pixel_values_x32").float() / 32
    height, width = pixel_values.shape[-2:]
    return {
        "pixel_values": pixel_values[None],
        "image_sizes": torch.tensor([[height, width * (len(pixel_values) - 1)]]),
    }


def language_model() -> PreTrainedModel:
    """Builds the LLaVA-OneVision of the cases B: its language model is the published one.

    The published prompt is given as embeddings. Here its text rows are added to the embedding table, so that
    the prompt can be given as ids; logits of the added ids are zero.
    """
    config = gold.cases()["B1c"]["config"]
    text = text_rows()
    vocab_size = config["vocab_size"] + len(text) + 2
    model = stock_model(TINY_VISION, config | {"vocab_size": vocab_size})
    state = gold.weights("B.w.")
    table, head = state["model.embed_tokens.weight"], state.pop("lm_head.weight")
    ids = range(len(table) + len(text))
    state["model.embed_tokens.weight"] = gold.rows(torch.cat([table, text]), ids, vocab_size)
    gold.load_exactly(
        model.model.language_model, {name.removeprefix("model."): value for name, value in state.items()}
    )
    gold.load_exactly(model.lm_head, {"weight": gold.rows(head, range(len(head)), vocab_size)})
    return model


def text_rows() -> Tensor:
    """Returns the embeddings of the text of the prompt of the cases B, (text tokens, C)."""
    start, stop = gold.cases()["B1c"]["span"]
    embeds = gold.golden("B1", "inputs_embeds")[0]
    return torch.cat([embeds[:start], embeds[stop:]])


def prompt(case: str) -> tuple[PreTrainedModel, gold.Prompt]:
    """Builds model and prompt of a case B."""
    model = language_model()
    start, stop = span = tuple(gold.cases()[case]["span"])
    embeds = gold.golden("B1", "inputs_embeds")[0]
    input_ids = torch.full((1, len(embeds)), model.config.image_token_id)
    text = torch.arange(len(text_rows())) + gold.cases()[case]["config"]["vocab_size"]
    input_ids[0, :start], input_ids[0, stop:] = text[:start], text[start:]
    inputs = {"input_ids": input_ids, "mm_encoder_outputs": gold.image_features(embeds, [span])}
    decode_position_ids = gold.golden(case, "decode_position_ids")[:, None]
    return model, gold.Prompt(inputs, [span], torch.arange(len(embeds))[None], decode_position_ids)
