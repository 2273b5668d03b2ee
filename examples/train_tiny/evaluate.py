"""Accuracy of an embedded model, or of a folder, on held-out scenes, pairs, clips and easy-VQA.

python examples/train_tiny/evaluate.py llava_onevision
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm

from illava_hooks import tiny
from illava_hooks.tools.datasets import clip_items, easy_vqa_items, pair_items, scene_items
from illava_hooks.tools.evaluate import accuracy, predict
from illava_hooks.tools.loading import load_model


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="llava_onevision, qwen2_vl, or a folder")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--questions", type=int, default=2000, help="about single images")
    arguments = parser.parse_args()
    embedded = arguments.model in ("llava_onevision", "qwen2_vl")
    model: Any
    model, processor = tiny.load(arguments.model) if embedded else load_model(arguments.model)
    torch.manual_seed(0)
    suites = {
        "one image": scene_items(arguments.questions, arguments.split),
        "two images": pair_items(arguments.questions // 4, arguments.split),
        "clips": clip_items(arguments.questions // 4, arguments.split),
    }
    if arguments.split == "test":
        suites["easy-VQA"] = easy_vqa_items()
    for name, items in suites.items():
        with tqdm(total=len(items), desc=name, leave=False) as bar:
            table = accuracy(items, predict(model, processor, items, advance=bar.update))
        for kind, (right, total) in table.items():
            print(f"{name:<12} {kind:<14} {right / total:7.1%}  of {total}")


if __name__ == "__main__":
    main()
