"""The golden cases: their numbers, and the arithmetic of one merge.

The numbers in `data` come from the published code on tiny random models (see `data/README.md`). This module
knows nothing of the library under test: it holds what is needed to say what a merge must give. The stock Hugging Face
models that get the published weights under today's names are the families' (`tests/families/_*_golden.py`).
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
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from families import FAMILIES, family
from helpers import TAKES_READY_FEATURES

DATA = Path(__file__).parent / "data"
NUM_LOGITS = 200  # the published numbers hold the logits of the ids 0..199

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
    """Builds the stock model and the prompt of a case of a language stage."""
    if not TAKES_READY_FEATURES:
        pytest.skip("this release takes no ready-made features, which are all that is known of these prompts")
    (name,) = (name for name in FAMILIES if case in family(name).golden_cases)
    return family(name).golden_prompt(case)


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
    """Returns the merges of a case of an encoder: per segment (tile or image), layer after layer."""
    layers = cases()[case]["settings"]["vit_layers"]
    indices = [
        [golden(case, f"{name}.{i}").view(num_segments, -1) for name in ("lowest", "kept_local")] for i in layers
    ]
    return [[Merge(lowest[s], kept[s]) for lowest, kept in indices] for s in range(num_segments)]


def language_merges(case: str, spans: Sequence[tuple[int, int]]) -> list[list[Merge]]:
    """Returns the merges of a case of a language stage: per visual span, layer after layer."""
    settings = cases()[case]["settings"]
    merges: list[list[Merge]] = []
    for index in range(len(spans)):
        merges.append([])
        for layer in settings["llm_layers"]:
            alone = f"order.{layer}"  # cases with one image only may leave its number out
            order = golden(case, alone if f"{case}.{alone}" in tensors() else f"{alone}.{index}")
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
