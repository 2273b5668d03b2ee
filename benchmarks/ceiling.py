"""The arithmetic of the ceiling: `python benchmarks/ceiling.py` prints the table of docs/how-it-works.md.

Shapes are those of the published 7B checkpoints, settings the paper's presets; one prompt with 64 text tokens.
Nothing runs: FLOPs and bytes follow from the numbers of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from illava_hooks import PRESETS
from illava_hooks.config import MergeSchedule
from illava_hooks.engine.report import DecoderShape, EncoderShape, encoder_flops, kv_bytes, llm_flops

TEXT = 64
SIGLIP = EncoderShape(
    depth=26, width=1152, mlp_width=4304, patches_per_unit=1, projector_flops=2 * 3584 * (1152 + 3584)
)
QWEN_VIT = EncoderShape(
    depth=32, width=1280, mlp_width=5120, patches_per_unit=4, projector_flops=2 * 5120 * (5120 + 3584)
)
QWEN2_7B = DecoderShape(depth=28, width=3584, mlp_width=18944, kv_width=512)


@dataclass(frozen=True)
class Case:
    """One prompt: equal encoder segments, and how many visual tokens they give to the language model."""

    name: str
    encoder: EncoderShape
    schedule: MergeSchedule
    segments: int
    patches: int
    visual: int
    visual_kept: int
    multiple: int = 1


def tokens_per_layer(start: int, removed: dict[int, int], depth: int, *, after: bool) -> list[int]:
    """Tokens at the entry of each layer (a merge on entry counts already), and with `after` behind the last."""
    counts = []
    for layer in range(depth):
        counts.append(start if after else start - removed.get(layer, 0))
        start -= removed.get(layer, 0)
    return [*counts, start] if after else counts


def ratios(case: Case) -> list[float]:
    """Unmerged over merged: prefill, encoder, language model, KV bytes."""
    encoder, schedule = case.encoder, case.schedule
    removed = dict(zip(schedule.vit_layers, schedule.encoder_removed(case.patches, case.multiple), strict=True))
    merged = tokens_per_layer(case.patches, removed, encoder.depth, after=True)
    vision = [case.segments * encoder_flops(encoder, s) for s in (merged, [case.patches] * (encoder.depth + 1))]
    project = [
        case.segments * s // encoder.patches_per_unit * encoder.projector_flops for s in (merged[-1], case.patches)
    ]
    fewer = schedule.decoder_removed(case.visual_kept, case.visual, lambda tokens: tokens - 1)
    removed = dict(zip(schedule.llm_layers, fewer, strict=True))
    short = tokens_per_layer(case.visual_kept + TEXT, removed, QWEN2_7B.depth, after=False)
    whole = [case.visual + TEXT] * QWEN2_7B.depth
    language = [llm_flops(QWEN2_7B, tokens) for tokens in (short, whole)]
    memory = [kv_bytes(QWEN2_7B, tokens, 2) for tokens in (short, whole)]
    stages = [[sum(parts) for parts in zip(vision, project, language, strict=True)], vision, language, memory]
    return [unmerged / merged for merged, unmerged in stages]


def llava(tiles: int, schedule: MergeSchedule) -> Case:
    """Base tile and `tiles` side by side, 27 x 27 tokens each, a newline behind each row of the grid."""
    kept = 729 - sum(schedule.encoder_removed(729))
    rows = 27 * (1 if tiles < 4 else 2)
    return Case(
        f"LLaVA-OneVision, base + {tiles} tile{'s' * (tiles > 1)}" if tiles else "LLaVA-OneVision, base tile only",
        SIGLIP,
        schedule,
        1 + tiles,
        729,
        729 * (1 + tiles) + (rows if tiles else 1),
        kept * (1 + tiles) + (rows if tiles else 1),
    )


def qwen(name: str, slices: int, patches: int, schedule: MergeSchedule) -> Case:
    """Temporal slices of so many patches, four of which are a visual token."""
    kept = (patches - sum(schedule.encoder_removed(patches, 4))) // 4
    return Case(name, QWEN_VIT, schedule, slices, patches, patches // 4 * slices, kept * slices, 4)


def main() -> None:
    """Print the table."""
    image, video = (PRESETS["llava_onevision"][kind] for kind in ("image", "video"))
    pooled = math.ceil(196 * (729 - 4 * 92) / 729)
    packed = PRESETS["qwen2_vl"]["image"]
    cases = [
        llava(0, image),
        llava(1, image),
        llava(4, image),
        Case(
            f"LLaVA-OneVision, 32 frames (196 -> {pooled} each)", SIGLIP, video, 32, 729, 196 * 32 + 1, pooled * 32 + 1
        ),
        qwen("Qwen2-VL, 1280 visual tokens", 1, 5120, packed),
        qwen("Qwen2-VL, 16 slices of 448 x 448", 16, 1024, packed),
    ]
    print("| case | total prefill FLOPs | encoder | language model | KV bytes |")
    print("|---|---|---|---|---|")
    for case in cases:
        print(f"| {case.name} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios(case)) + " |")


if __name__ == "__main__":
    main()
