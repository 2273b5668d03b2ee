"""The golden cases: their numbers, the stock models with their weights, and the arithmetic of one merge.

The numbers in `data` come from the published code on tiny random models (see `data/README.md`). This module
knows nothing of the library under test: it builds stock Hugging Face models, gives them the published weights
under today's names, and holds what is needed to say what a merge must give.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from helpers import TAKES_READY_FEATURES

DATA = Path(__file__).parent / "data"
NUM_LOGITS = 200  # the published numbers hold the logits of the ids 0..199

QWEN2_VL_VOCAB = 256
QWEN2_VL_IDS = {
    151652: 200,
    151653: 201,
    151655: 202,
    151656: 203,
}  # published id -> id in the small vocabulary

reached: dict[str, float] = {}
"""The largest error of every comparison, by its label: `report_reached` prints it."""


# ------------------------------------------------------------------------------------------------ data


@functools.cache
def tensors() -> dict[str, Tensor]:
    """Returns all golden tensors by name; integers come as int64."""
    loaded = load_file(DATA / "golden.safetensors")
    return {name: value.long() if value.dtype == torch.int32 else value for name, value in loaded.items()}


@functools.cache
def cases() -> dict[str, dict[str, Any]]:
    """Returns the description of every case by name."""
    return json.loads((DATA / "cases.json").read_text())


def golden(case: str, name: str) -> Tensor:
    """Returns one tensor of one case."""
    return tensors()[f"{case}.{name}"]


def weights(prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors().items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------- models


def load_exactly(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict that must match the module key by key."""
    module.load_state_dict(state, strict=True)


def rows(values: Tensor, ids: Sequence[int] | Tensor, num_rows: int) -> Tensor:
    """Returns a table of zeros with `values` in the rows `ids`."""
    table = values.new_zeros(num_rows, values.shape[1])
    table[torch.as_tensor(ids)] = values
    return table


def llava_onevision(vision: dict[str, Any], text: dict[str, Any], **config: Any) -> PreTrainedModel:
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
    config, num_tiles = cases()[case]["config"], cases()[case]["tiles"]
    grid = [config["image_size"], config["image_size"] * (num_tiles - 1)]  # the first tile is the base
    model = llava_onevision(config, TINY_TEXT, image_grid_pinpoints=[grid])
    load_exactly(model.model.vision_tower, weights(f"{case}.w.vision_model."))
    return model


def encoder_inputs(case: str) -> dict[str, Tensor]:
    """Returns the arguments of `get_image_features` for the one image of a case A."""
    pixel_values = golden(case, "pixel_values_x32").float() / 32
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
    config = cases()["B1c"]["config"]
    text = text_rows()
    vocab_size = config["vocab_size"] + len(text) + 2
    model = llava_onevision(TINY_VISION, config | {"vocab_size": vocab_size})
    state = weights("B.w.")
    table, head = state["model.embed_tokens.weight"], state.pop("lm_head.weight")
    ids = range(len(table) + len(text))
    state["model.embed_tokens.weight"] = rows(torch.cat([table, text]), ids, vocab_size)
    load_exactly(model.model.language_model, {name.removeprefix("model."): value for name, value in state.items()})
    load_exactly(model.lm_head, {"weight": rows(head, range(len(head)), vocab_size)})
    return model


def text_rows() -> Tensor:
    """Returns the embeddings of the text of the prompt of the cases B, (text tokens, C)."""
    start, stop = cases()["B1c"]["span"]
    embeds = golden("B1", "inputs_embeds")[0]
    return torch.cat([embeds[:start], embeds[stop:]])


def qwen2_vl_model() -> PreTrainedModel:
    """Builds the Qwen2-VL of the cases C and D, with a small vocabulary instead of the published one."""
    config = cases()["qwen2_vl"]
    ids = [QWEN2_VL_IDS.get(index, index) for index in tensors()["embed_row_ids"].tolist()]
    no_specials = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config=config["vision_config"],
            text_config=config["text_config"] | no_specials | {"vocab_size": QWEN2_VL_VOCAB},
            **{
                name: QWEN2_VL_IDS[published]
                for name, published in (
                    ("vision_start_token_id", 151652),
                    ("vision_end_token_id", 151653),
                    ("image_token_id", 151655),
                    ("video_token_id", 151656),
                )
            },
        )
    )
    state = weights("model.") | {"embed_tokens.weight": rows(tensors()["embed_rows"], ids, QWEN2_VL_VOCAB)}
    head = rows(tensors()["lm_head_rows"], range(NUM_LOGITS), QWEN2_VL_VOCAB)
    load_exactly(model.model.language_model, state)
    load_exactly(model.model.visual, weights("visual."))
    load_exactly(model.lm_head, {"weight": head})
    return model.eval()


# --------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """What the language stage of a case starts from.

    Attributes:
        inputs: Arguments of the model's forward and `generate`; the visual features come ready-made.
        spans: First and past-the-end position of every image.
        position_ids: Positions of the full prompt, (1, N) or (3, 1, N).
        decode_position_ids: Positions of the last prompt token and of every decoded one, (steps, 1 or 3).
    """

    inputs: dict[str, Any]
    spans: list[tuple[int, int]]
    position_ids: Tensor
    decode_position_ids: Tensor

    @property
    def num_tokens(self) -> int:
        """Length of the unpatched prompt."""
        return self.inputs["input_ids"].shape[1]

    def fresh_inputs(self) -> dict[str, Any]:
        """Returns the inputs with a new dictionary of features, since models may write to it."""
        features = dict(self.inputs["mm_encoder_outputs"])
        return self.inputs | {"mm_encoder_outputs": features}


def image_features(embeds: Tensor, spans: Sequence[tuple[int, int]]) -> dict[str, BaseModelOutputWithPooling]:
    """Takes the visual features out of the embeddings that entered the published language model."""
    return {"image": BaseModelOutputWithPooling(pooler_output=[embeds[start:stop] for start, stop in spans])}


def prompt_of(case: str) -> tuple[PreTrainedModel, Prompt]:
    """Builds the stock model and the prompt of a case B or D."""
    if not TAKES_READY_FEATURES:
        pytest.skip("this release takes no ready-made features, which are all that is known of these prompts")
    return llava_prompt(case) if case.startswith("B") else qwen2_vl_prompt(case)


def llava_prompt(case: str) -> tuple[PreTrainedModel, Prompt]:
    """Builds model and prompt of a case B."""
    model = language_model()
    start, stop = span = tuple(cases()[case]["span"])
    embeds = golden("B1", "inputs_embeds")[0]
    input_ids = torch.full((1, len(embeds)), model.config.image_token_id)
    text = torch.arange(len(text_rows())) + cases()[case]["config"]["vocab_size"]
    input_ids[0, :start], input_ids[0, stop:] = text[:start], text[start:]
    inputs = {"input_ids": input_ids, "mm_encoder_outputs": image_features(embeds, [span])}
    decode_position_ids = golden(case, "decode_position_ids")[:, None]
    return model, Prompt(inputs, [span], torch.arange(len(embeds))[None], decode_position_ids)


def qwen2_vl_prompt(case: str) -> tuple[PreTrainedModel, Prompt]:
    """Builds model and prompt of a case D."""
    model = qwen2_vl_model()
    spans = [(start, stop) for start, stop in cases()[case]["spans"]]
    input_ids = golden(case, "input_ids").clone()
    for published, index in QWEN2_VL_IDS.items():
        input_ids[input_ids == published] = index
    inputs = {
        "input_ids": input_ids[None],
        "mm_token_type_ids": (input_ids == model.config.image_token_id).int()[None],
        "image_grid_thw": torch.tensor(cases()[case]["image_grid_thw"]),
        "mm_encoder_outputs": image_features(golden(case, "inputs_embeds"), spans),
    }
    position_ids = golden(case, "position_ids_full")[:, None]
    return model, Prompt(inputs, spans, position_ids, golden(case, "decode_position_ids"))


# ----------------------------------------------------------------------------------------- one merge


@dataclass(frozen=True)
class Merge:
    """One merge of one run of tokens, read off the golden indices (local to the run).

    Attributes:
        lowest: The r + 1 lowest-scored tokens, ascending by score; the last one receives the others.
        kept: The tokens that survive, ascending.
    """

    lowest: Tensor
    kept: Tensor

    @classmethod
    def from_order(cls, order: Tensor, num_kept: int) -> "Merge":
        """Reads a merge off token indices by descending score."""
        return cls(lowest=order[num_kept - 1 :].flip(0), kept=order[:num_kept].sort().values)

    def matrix(self, num_tokens: int) -> Tensor:
        """Returns the merge as a matrix (survivors, tokens): the weights of the tokens in each survivor."""
        merge = torch.eye(num_tokens)
        count = len(self.lowest)
        merge[self.lowest[-1]] = 0.0
        merge[self.lowest[-1], self.lowest] = torch.arange(count, 0, -1) / (count * (count + 1) / 2)
        return merge[self.kept]


def chained(merges: Sequence[Merge], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Follows tokens through consecutive merges.

    Returns:
        The original index of every survivor, and its weights over the original tokens (survivors, tokens).
    """
    seats, shares = torch.arange(num_tokens), torch.eye(num_tokens)
    for merge in merges:
        shares = merge.matrix(len(seats)) @ shares
        seats = seats[merge.kept]
    return seats, shares


def encoder_merges(case: str, num_segments: int = 1) -> list[list[Merge]]:
    """Returns the merges of a case A or C: per segment (tile or image), layer after layer."""
    layers = cases()[case]["settings"]["vit_layers"]
    indices = [
        [golden(case, f"{name}.{i}").view(num_segments, -1) for name in ("lowest", "kept_local")] for i in layers
    ]
    return [[Merge(lowest[s], kept[s]) for lowest, kept in indices] for s in range(num_segments)]


def language_merges(case: str, spans: Sequence[tuple[int, int]]) -> list[list[Merge]]:
    """Returns the merges of a case B or D: per visual span, layer after layer."""
    settings = cases()[case]["settings"]
    merges: list[list[Merge]] = []
    for index in range(len(spans)):
        merges.append([])
        for layer in settings["llm_layers"]:
            order = golden(case, f"order.{layer}" if case.startswith("B") else f"order.{layer}.{index}")
            num_merged = round(len(order) * (1 - settings["llm_ratio"]))
            merges[-1].append(Merge.from_order(order, len(order) - num_merged))
    return merges


def sequence_merge(merges: Sequence[Tensor], spans: Sequence[tuple[int, int]], num_tokens: int) -> Tensor:
    """Sets the matrices of the visual spans into the identity of the text around them.

    Args:
        merges: One matrix (survivors, span tokens) per span.
        spans: First and past-the-end position of each span in the sequence as it is before the merge.
        num_tokens: Length of that sequence.

    Returns:
        Matrix (remaining tokens, tokens).
    """
    blocks, position = [], 0
    for matrix, (start, stop) in zip(merges, spans, strict=True):
        blocks += [torch.eye(start - position), matrix]
        position = stop
    return torch.block_diag(*blocks, torch.eye(num_tokens - position))


# ---------------------------------------------------------------------------------------- observation


@dataclass
class Trace:
    """What a model did, one entry per forward: read by plain PyTorch hooks on stock submodules.

    Attributes:
        entering: Per decoder layer, the hidden states that enter it, (B, N', C).
        rotary: Per decoder layer, the (cos, sin) that its attention gets.
        final: The hidden states after the final norm, at their physical length.
    """

    entering: dict[int, list[Tensor]] = field(default_factory=dict)
    rotary: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    final: list[Tensor] = field(default_factory=list)


@contextmanager
def traced(model: PreTrainedModel) -> Iterator[Trace]:
    """Records what the language model of `model` does.

    The hooks sit *inside* the decoder layers (on the first norm and on the attention), so they see a layer's
    tokens after whatever happens on entry to it.
    """
    trace = Trace()

    def norm_hook(index: int) -> Any:
        return lambda module, args: trace.entering.setdefault(index, []).append(args[0].detach())

    def attention_hook(index: int) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.rotary.setdefault(index, []).append(kwargs["position_embeddings"])

        return read

    language = model.model.language_model
    handles = [language.norm.register_forward_hook(lambda module, args, output: trace.final.append(output.detach()))]
    for index, layer in enumerate(language.layers):
        handles.append(layer.input_layernorm.register_forward_pre_hook(norm_hook(index)))
        handles.append(layer.self_attn.register_forward_pre_hook(attention_hook(index), with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[list[Tensor | None]]:
    """Holds the first argument of the last call of each module."""
    seen: list[Tensor | None] = [None] * len(modules)

    def reader(index: int) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = (args[0] if args else next(iter(kwargs.values()))).detach()

        return read

    handles = [module.register_forward_pre_hook(reader(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rotary_of(model: PreTrainedModel, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the stock (cos, sin) of positions, (1, N) or (3, 1, N)."""
    return model.model.language_model.rotary_emb(torch.zeros(1), position_ids)


# ------------------------------------------------------------------------------------------ comparison


def assert_near(label: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares floats by their largest absolute difference, and notes it under `label`."""
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.float() - expected.float()).abs().max().item()
    reached[label] = max(error, reached.get(label, 0.0))
    assert error <= tolerance, f"{label}: largest error {error:.2e}, allowed {tolerance:.0e}"


def assert_same_rows(label: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares two sets of rows (N, C) as multisets: every row occurs equally often in both."""
    assert actual.shape == expected.shape
    distances = torch.cdist(actual, expected, p=float("inf"))
    error = torch.maximum(distances.amin(0).max(), distances.amin(1).max()).item()
    reached[label] = max(error, reached.get(label, 0.0))
    assert error <= tolerance, f"{label}: a row differs by {error:.2e}, allowed {tolerance:.0e}"
    own = torch.cdist(expected, expected, p=float("inf"))
    torch.testing.assert_close((distances <= tolerance).sum(0), (own <= tolerance).sum(0))


def report_reached() -> str:
    """Lists the largest error of every comparison made so far."""
    return "\n".join(f"{label:<44} {error:.1e}" for label, error in sorted(reached.items()))
