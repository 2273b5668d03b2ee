"""From a checkpoint of ``train.py`` to a folder that ``from_pretrained`` loads, and to a learning curve.

python examples/train_tiny/export.py llava_onevision --run runs/llava_onevision --output my_model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from learn import Learner
from models import FAMILIES, build_model, build_processor
from PIL import Image, ImageDraw


def export(family: str, run: Path, output: Path) -> None:
    """Writes the model in float16 with its processor."""
    processor = build_processor(family)
    learner = Learner(build_model(family, 0), processor.tokenizer)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["learner"]
    learner.load_state_dict({name: value for name, value in saved.items() if not name.startswith("token_heads")})
    learner.model.half().save_pretrained(output)
    processor.save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only


def draw_curve(history: list[dict[str, Any]], file: Path) -> None:
    """Accuracy on validation scenes over the steps of the second and third phase, one line per kind."""
    first = max(row["step"] for row in history if row["phase"] == 1)
    rows = [{**row, "step": row["step"] + first * (row["phase"] - 1)} for row in history if "existence" in row]
    kinds = [key for key in rows[-1] if key not in ("phase", "step", "cpu_s", "dense", "answer", "right")]
    width, height, left, top = 640, 360, 50, 20
    last = max(row["step"] for row in rows)
    picture = Image.new("RGB", (width + 220, height + 60), "white")
    pen = ImageDraw.Draw(picture)
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
    for percent in range(0, 101, 20):
        y = top + height * (1 - percent / 100)
        pen.line((left, y, left + width, y), fill="#dddddd")
        pen.text((10, y - 6), f"{percent} %", fill="black")
    for kind, color in zip(kinds, colors, strict=False):
        points = [(left + width * row["step"] / last, top + height * (1 - row[kind])) for row in rows if kind in row]
        pen.line(points, fill=color, width=2)
        at = 20 + 18 * kinds.index(kind)
        pen.line((left + width + 12, at + 6, left + width + 32, at + 6), fill=color, width=3)
        pen.text((left + width + 38, at), f"{kind} {rows[-1][kind]:.0%}", fill="black")
    pen.text((left + width // 2 - 80, top + height + 20), f"steps of the last two phases (0 to {last})", fill="black")
    picture.save(file)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.family, arguments.run, arguments.output)
    history = json.loads((arguments.run / "history.json").read_text())
    if any("existence" in row for row in history):
        draw_curve(history, arguments.run / "curve.png")


if __name__ == "__main__":
    main()
