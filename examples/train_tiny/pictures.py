"""Draws the pictures that the package bundles: `python examples/train_tiny/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from illava_hooks.tiny.scenes import draw_clip, draw_scene

FOLDER = Path(__file__).parents[2] / "src" / "illava_hooks" / "tiny" / "media"


def main() -> None:
    """Writes the folder; the seeds were picked by eye among held-out scenes."""
    (FOLDER / "pair").mkdir(parents=True, exist_ok=True)
    draw_scene(np.random.default_rng([30_000, 8]), 128, 128, "test", cell=16).image.save(FOLDER / "scene.png")
    draw_scene(np.random.default_rng([30_000, 3]), 64, 128, "test", digit_share=1.0).image.save(FOLDER / "digits.png")
    for seed, name in ((5, "first"), (17, "second")):
        scene = draw_scene(np.random.default_rng([30_000, seed]), 64, 64, "test")
        scene.image.save(FOLDER / "pair" / f"{name}.png")
    clip = draw_clip(np.random.default_rng([30_000, 4]), 64, 64, 8, "test")
    first, *others = [Image.fromarray(frame) for frame in clip.frames]
    first.save(FOLDER / "clip.gif", save_all=True, append_images=others, duration=250, loop=0)


if __name__ == "__main__":
    main()
