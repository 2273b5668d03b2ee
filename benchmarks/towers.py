"""Real, pretrained vision towers as stock models whose blocks run one by one, merging in some of them.

Weights come from files of other packages, which are no part of this repository; docs/RESULTS.md has the commands that
fetch them. Merging is the library's own (``EncoderRun`` and ``MergeStep``, as in every family).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from illava_hooks import MergeConfig, MergeSchedule, MergeSession, Method
from illava_hooks.engine.attention_tap import TappedConfig
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergeStep
from illava_hooks.engine.traits import EncoderTraits

#: Side of a patch, in pixels.
PATCH = 14


@dataclass(frozen=True, slots=True)
class Tower:
    """A stock DINOv2 whose attention can be heard.

    Attributes:
        model: the stock model.
        prefix: 1 with its class token, which never merges; 0 without one, as in SigLIP: its patches then see only
            each other.
    """

    model: Any
    prefix: int = 1

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """``(B, prefix + N, C)`` in front of the first block, of pictures ``(B, 3, height, width)``."""
        hidden: Tensor = self.model.embeddings(pixels)
        return hidden[:, 1 - self.prefix :]

    @torch.inference_mode()
    def run(
        self,
        hidden: Tensor,
        layers: Sequence[int],
        method: Method | None = None,
        places: Sequence[int] = (),
        kept: float = 1.0,
    ) -> Tensor:
        """Hidden states ``(B, prefix + N, C)`` behind some blocks, merged on the way to ``(B, prefix + K, C)``.

        Args:
            hidden: in front of the first of ``layers``.
            layers: the blocks.
            method: merges in ``places``; None: nothing does.
            places: blocks that merge.
            kept: what is left of the patches behind them.
        """
        run = None
        if method is not None:
            schedule = MergeSchedule(tuple(places), 1 - kept ** (1 / len(places)))
            session = MergeSession(MergeConfig(schedule, schedule, method), None)
            lengths = [hidden.shape[1] - self.prefix] * len(hidden)
            traits = EncoderTraits(prefix=self.prefix)
            run = EncoderRun(session, "image", traits, lengths, len(hidden), hidden.device)
        for index in layers:
            block = self.model.encoder.layer[index]

            def attend(block: Any = block, states: Tensor = hidden) -> Tensor:
                out: Tensor = states + block.layer_scale1(block.attention(block.norm1(states))[0])
                return out

            hidden = MergeStep(run, index).around(attend) if run is not None and run.reaches(index) else attend()
            hidden = hidden + block.layer_scale2(block.mlp(block.norm2(hidden)))
        if run is not None:
            run.check_finished()
        return hidden


def listened_to(model: Any, prefix: int = 1) -> Tower:
    """A stock model as a tower."""
    for layer in model.encoder.layer:
        layer.attention.config = TappedConfig(layer.attention.config)
    return Tower(model, prefix)


def load_dinov2(file: Path) -> Any:
    """The stock model with the weights of an ONNX file.

    Raises:
        SystemExit: a weight is missing.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    given = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    model: Any = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH)
    ).eval()
    weights = {_own_name(name): value for name, value in given.items() if name.startswith("backbone.")}
    for node in graph.node:  # exporters rename the matrices of linear layers
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder") and node.input[1] in given:
            name = node.name.removesuffix("/MatMul").replace("/", ".")[1:]
            weights[_own_name(f"{name}.weight")] = given[node.input[1]].T.contiguous()
    patches = next(value for value in given.values() if tuple(value.shape) == (1, 1369, 384))
    first = [value for name, value in given.items() if not name.startswith("backbone") and value.numel() == 384]
    place = first[0].view(1, 1, 384) if first else torch.zeros(1, 1, 384)
    weights["embeddings.position_embeddings"] = torch.cat([place, patches], 1)
    if missing := [name for name in model.state_dict() if name not in weights and "mask_token" not in name]:
        raise SystemExit(f"{file} lacks {missing[:5]}; it is not the tower that this benchmark knows")
    model.load_state_dict(weights, strict=False)
    return model


def _own_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{theirs}", f"attention.{ours}")
    return name.replace("attention.output.dense", "attention.o_proj")
