"""The stock model of the golden cases C and D, with its published weights; the prompts of the cases D."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import golden as gold

VOCAB = 256
IDS = {
    151652: 200,
    151653: 201,
    151655: 202,
    151656: 203,
}  # published id -> id in the small vocabulary


def stock_model() -> PreTrainedModel:
    """Builds the Qwen2-VL of the cases C and D, with a small vocabulary instead of the published one."""
    config = gold.cases()["qwen2_vl"]
    ids = [IDS.get(index, index) for index in gold.tensors()["embed_row_ids"].tolist()]
    no_specials = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config=config["vision_config"],
            text_config=config["text_config"] | no_specials | {"vocab_size": VOCAB},
            **{
                name: IDS[published]
                for name, published in (
                    ("vision_start_token_id", 151652),
                    ("vision_end_token_id", 151653),
                    ("image_token_id", 151655),
                    ("video_token_id", 151656),
                )
            },
        )
    )
    state = gold.weights("model.") | {"embed_tokens.weight": gold.rows(gold.tensors()["embed_rows"], ids, VOCAB)}
    head = gold.rows(gold.tensors()["lm_head_rows"], range(gold.NUM_LOGITS), VOCAB)
    gold.load_exactly(model.model.language_model, state)
    gold.load_exactly(model.model.visual, gold.weights("visual."))
    gold.load_exactly(model.lm_head, {"weight": head})
    return model.eval()


def prompt(case: str) -> tuple[PreTrainedModel, gold.Prompt]:
    """Builds model and prompt of a case D."""
    model = stock_model()
    spans = [(start, stop) for start, stop in gold.cases()[case]["spans"]]
    input_ids = gold.golden(case, "input_ids").clone()
    for published, index in IDS.items():
        input_ids[input_ids == published] = index
    inputs = {
        "input_ids": input_ids[None],
        "mm_token_type_ids": (input_ids == model.config.image_token_id).int()[None],
        "image_grid_thw": torch.tensor(gold.cases()[case]["image_grid_thw"]),
        "mm_encoder_outputs": gold.image_features(gold.golden(case, "inputs_embeds"), spans),
    }
    position_ids = gold.golden(case, "position_ids_full")[:, None]
    return model, gold.Prompt(inputs, spans, position_ids, gold.golden(case, "decode_position_ids"))
