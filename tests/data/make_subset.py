"""Make the small golden set of the tests from the full one: `python make_subset.py SRC DST`.

SRC holds the published code's numbers (`X.safetensors` and `X.json` per group). DST receives
`golden.safetensors` (the tensors that the tests read, unchanged) and `cases.json` (per case: the settings as
arguments of `patch`, the model's configuration, and the lengths to expect).
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

SOURCES = ("A_siglip", "B_qwen2_llm", "CD_qwen2vl_weights", "C_qwen2vl_vit", "D_qwen2vl_llm", "E_packing")

WEIGHTS = ("A1.w.", "A3.w.", "B.w.", "visual.", "model.", "embed_row", "lm_head_rows")

TENSORS = {
    "A1": ("pixel_values_x32", "hidden.1", "hidden.2", "hidden.6")
    + tuple(f"{name}.{i}" for name in ("lowest", "kept_local", "kept_source") for i in (1, 2, 3)),
    "A3": ("pixel_values_x32", "hidden.4"),
    "B1": ("inputs_embeds",),
    "B1c": ("order.2", "position_ids.2", "layer_in.2", "final_hidden"),
    "C0": ("patches", "grid_thw", "merger_out"),
    "C1": ("rotary", "block_out.1", "block_out.4", "merger_out")
    + tuple(f"{name}.{i}" for name in ("lowest", "kept_local", "kept_source") for i in (1, 2)),
    "D1": ("input_ids", "position_ids_full", "inputs_embeds", "layer_in.1", "layer_in.2", "final_hidden")
    + ("order.1.0", "order.2.0", "position_ids.1", "position_ids.2", "k_cache.4"),
    "D2p": ("input_ids", "position_ids_full", "inputs_embeds", "layer_in.1", "layer_in.2", "final_hidden")
    + ("order.1.0", "order.1.1", "order.2.0", "order.2.1", "position_ids.1", "position_ids.2"),
    "E1": ("input_ids", "inputs_embeds"),
    "E10": ("input_ids", "inputs_embeds", "features_19", "pooled"),
}
DECODING = ("decode_logits", "generated_ids", "decode_position_ids")


def wanted_tensors() -> list[str]:
    """Names every tensor that belongs to one case (weights are selected by prefix)."""
    names = [f"{case}.{name}" for case, own in TENSORS.items() for name in own]
    return names + [f"{case}.{name}" for case in ("B1c", "D1", "D2p") for name in DECODING]


def settings(method: str = "illava", **given: Any) -> dict[str, Any]:
    """Fills in the arguments of `patch`: whatever is not given is the identity."""
    return {"vit_layers": [], "vit_r": 0, "llm_layers": [], "llm_ratio": 1.0, "method": method} | given


def encoder_case(case: dict[str, Any]) -> dict[str, Any]:
    """Describes a case of the LLaVA-OneVision encoder."""
    return {
        "config": case["config"],
        "tiles": case["tiles"],
        "settings": settings(vit_layers=case["Layer_index"], vit_r=case["reduce_tokens"]),
        "tokens_before_layer": [shape[1] for shape in case["shapes"]],
    }


def language_case(case: dict[str, Any], method: str, layers: list[int], keep_ratio: float) -> dict[str, Any]:
    """Describes a case of a language stage."""
    return {
        "settings": settings(method, llm_layers=layers, llm_ratio=keep_ratio),
        "prefill_lengths": case["prefill_len_per_layer"],
        "cache_lengths": case["kv_len_after_each_step"],
    }


def describe_cases(described: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Turns the descriptions of the source into what the tests need.

    Args:
        described: The `cases` of all source files in one dictionary.

    Returns:
        One entry per case, and `qwen2_vl` with the configuration that the cases C and D share.
    """
    cases: dict[str, dict[str, Any]] = {name: encoder_case(described[name]) for name in ("A1", "A3")}
    b1c, c1 = described["B1c"], described["C1"]
    cases["B1c"] = language_case(b1c, "illava", b1c["illava"]["k"], b1c["illava"]["r"]) | {
        "config": {key: value for key, value in b1c["config"].items() if not key.startswith("use_sliding")},
        "span": [b1c["illava"]["start"], b1c["illava"]["start"] + b1c["illava"]["image_tokens"]],
    }
    cases["C1"] = {
        "settings": settings("illava-reference", vit_layers=c1["k"], vit_r=c1["r"]),
        "tokens_after_block": c1["tokens_after_block"],
    }
    for name, method in (("D1", "illava-reference"), ("D2p", "illava")):
        case = described[name]
        cases[name] = language_case(case, method, case["illava"]["illava_llm_k"], case["illava"]["illava_llm_r"])
        cases[name]["image_grid_thw"] = case["imggrid"]
        cases[name]["spans"] = [
            [start + 1, end] for start, end in zip(case["vision_start"], case["vision_end"], strict=True)
        ]
    cases["E1"] = {"image_size_hw": described["E1"]["image_sizes"][0][::-1], "span": [14, 14 + 988]}
    cases["E10"] = {"span": [14, 14 + 301]}
    cases["qwen2_vl"] = {key: described["all_CD"][key] for key in ("vision_config", "text_config")}
    return cases


def main(source: Path, target: Path) -> None:
    """Reads the full golden set in `source` and writes the subset to `target`."""
    tensors: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name in SOURCES:
        tensors |= load_file(source / f"{name}.safetensors")
        described |= json.loads((source / f"{name}.json").read_text())["cases"]
    wanted = wanted_tensors() + [name for name in tensors if name.startswith(WEIGHTS)]
    save_file({name: tensors[name] for name in sorted(wanted)}, target / "golden.safetensors")
    (target / "cases.json").write_text(json.dumps(describe_cases(described), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
