"""The embedded models as vLLM's CPU attention takes them: heads of 24 padded to 32 without changing what they say.

Zeros are added to the text model's width, 96 to 128, and to its heads. Norms see a smaller mean square, so their
weights and epsilon shrink with it; queries grow by what the larger head takes from the scale; theta grows so that the
frequencies that were there stay where they were.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from illava_hooks import tiny

HIDDEN, WIDE = 96, 128
HEAD, WIDE_HEAD = 24, 32


def padded(name: str, folder: Path) -> Path:
    """The checkpoint of an embedded model, padded, in float32, with its processor.

    Args:
        name: as ``tiny.load`` takes it.
        folder: where it is written.
    """
    source = tiny.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    weights = {key: value.float() for key, value in load_file(source / "model.safetensors").items()}
    save_file(
        {key: _padded(key, value, config["text_config"]).contiguous() for key, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(_wider(config), indent=1))
    return folder


def _wider(config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    rope = {**text["rope_parameters"], "rope_theta": text["rope_parameters"]["rope_theta"] ** (WIDE_HEAD / HEAD)}
    vision = dict(config["vision_config"])
    if "mrope_section" in rope:
        rope["mrope_section"] = [4, 4, 8]
        # vLLM's tower knows the published activation only.
        vision |= {"hidden_size": WIDE, "hidden_act": "quick_gelu"}
    text = {**text, "hidden_size": WIDE, "rms_norm_eps": text["rms_norm_eps"] * HIDDEN / WIDE, "rope_parameters": rope}
    return {**config, "dtype": "float32", "text_config": text, "vision_config": vision}


def _padded(key: str, value: Tensor, text: dict[str, Any]) -> Tensor:
    """One weight; those of the vision encoder stay as they are."""
    if key.startswith(("model.", "lm_head", "language_model.")):
        return _text(key, value, text["num_attention_heads"], text["num_key_value_heads"])
    if "merger.mlp.2" in key or key.startswith("multi_modal_projector.linear_1"):
        return _rows(value)
    if key.startswith("multi_modal_projector.linear_2"):
        return _rows(_columns(value) if value.dim() == 2 else value)
    return _columns(value) if key == "image_newline" else value


def _text(key: str, value: Tensor, queries: int, keys: int) -> Tensor:
    if key.endswith("norm.weight"):
        return _columns(value) * math.sqrt(HIDDEN / WIDE)
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "embed_tokens": _columns,
        "lm_head": _columns,
        "q_proj": lambda w: _heads(_wide_input(w), queries, math.sqrt(WIDE_HEAD / HEAD)),
        "k_proj": lambda w: _heads(_wide_input(w), keys),
        "v_proj": lambda w: _heads(_wide_input(w), keys, halves=1),
        "o_proj": lambda w: _rows(_heads(w.T.contiguous(), queries, halves=1).T),
        "gate_proj": _columns,
        "up_proj": _columns,
        "down_proj": _rows,
    }
    return next(change for name, change in parts.items() if name in key)(value)


def _columns(value: Tensor) -> Tensor:
    return torch.nn.functional.pad(value, (0, WIDE - HIDDEN))


def _wide_input(value: Tensor) -> Tensor:
    return _columns(value) if value.dim() == 2 else value  # a bias has no input


def _rows(value: Tensor) -> Tensor:
    return torch.cat([value, value.new_zeros(WIDE - HIDDEN, *value.shape[1:])])


def _heads(value: Tensor, count: int, scale: float = 1.0, halves: int = 2) -> Tensor:
    """``(count * HEAD, ...)`` as ``(count * WIDE_HEAD, ...)``; rotation pairs the two halves of a head."""
    parts = value.view(count, halves, HEAD // halves, *value.shape[1:]) * scale
    zeros = parts.new_zeros(count, halves, (WIDE_HEAD - HEAD) // halves, *value.shape[1:])
    return torch.cat([parts, zeros], 2).flatten(0, 2)
