"""Pictures of LLaVA-OneVision's tiles and frames, with counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drawing import ask, run, soft, stock, texture
from illava_hooks.tools.draw import MergeMap, save_maps

NAME = "llava_onevision"


def test_the_canvas_has_no_padding() -> None:
    model, processor = stock(NAME)
    inputs = ask(processor, (soft(100, 70) // 2 + 100,))
    (one,) = run(model, processor, inputs, [1], 8, [], 1.0)
    base, mosaic = one.frames[0]
    assert base.labels.shape == (64, 64) and mosaic.labels.shape == (128, 90)
    assert mosaic.pixels.min() > 60


@pytest.fixture(scope="module")
def video_maps() -> list[MergeMap]:
    model, processor = stock(NAME)
    inputs = ask(processor, (texture(64, 128),), (np.stack([texture(64, 64, seed) for seed in range(10)]),))
    return run(model, processor, inputs, [1, 2], 8, [3], 0.5)


def test_files_of_an_image_and_a_video(video_maps: list[MergeMap], tmp_path: Path) -> None:
    paths = save_maps(video_maps, tmp_path, "both", colours=True)
    assert [path.name for path in paths] == [
        "both-1-vision-layer01-168of192.png",
        "both-1-vision-layer02-144of192.png",
        f"both-1-language-layer03-{video_maps[2].kept}of{video_maps[2].total}.png",
        "both-1-strip.png",
        "both-2-vision-layer01-560of640.png",
        "both-2-vision-layer02-480of640.png",
        f"both-2-language-layer03-{video_maps[5].kept}of161.png",
        "both-2-strip.png",
        "both-2-animated.gif",
    ]
    with Image.open(paths[4]) as sheet:
        assert sheet.height * 3 < sheet.width  # 8 + 2 frames in two rows
    moving: Any
    with Image.open(paths[-1]) as moving:
        assert moving.format == "GIF" and moving.n_frames == 10
        for index in range(10):
            moving.seek(index)
            assert moving.info["duration"] == 400


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_files_are_complete_or_not_there(
    video_maps: list[MergeMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    save, calls = Image.Image.save, []

    def failing(image: Image.Image, path: Path, **options: Any) -> None:
        calls.append(path)
        assert path.parent == tmp_path and path.suffix not in (".png", ".gif")
        save(image, path, **options)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise error("the disk is full")

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(error, match="disk"):
        save_maps(video_maps, tmp_path, "both")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["both-1-vision-layer01-168of192.png", "both-1-vision-layer02-144of192.png"]
    for name in left:
        with Image.open(tmp_path / name) as picture:
            picture.load()
