"""Pictures of Qwen2-VL's groups, with counts by hand."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from drawing import ask, pixels_of, run, stock, texture
from illava_hooks.tools.draw import draw, save_maps

NAME = "qwen2_vl"


def test_files_of_one_image(tmp_path: Path) -> None:
    model, processor = stock(NAME)
    maps = run(model, processor, ask(processor, (texture(72, 72),)), [2, 5], 0.25, [3], 0.5)
    paths = save_maps(maps, tmp_path / "new" / "folder", "photo")
    names = [
        "photo-vision-layer02-108of144.png",
        "photo-vision-layer05-84of144.png",
        "photo-language-layer03-11of36.png",
        "photo-strip.png",
    ]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    for one, shown in zip(maps, pictures, strict=False):
        assert (pixels_of(shown) == pixels_of(draw(one)[0])).all()
    side, strip = pictures[0].width, pixels_of(pictures[-1])
    assert 2 * side < strip.shape[1] < 3 * side and 2 * side < strip.shape[0] < 3 * side, "two rows of two"
    across, down = strip.shape[1] - side, (strip.shape[0] + 6) // 2
    panels = [draw(maps[0], 1.0)[0], *pictures[:3]]
    for number, panel in enumerate(panels):
        row, column = number // 2 * down, number % 2 * across
        assert (strip[row : row + side, column : column + side] == pixels_of(panel)).all()
        caption = strip[row + side : row + down, column : column + side]
        assert caption.min() < 100, "no caption"
