"""Draws the golden pictures of tests/test_golden_pictures.py again; look at them before they are committed.

python tests/data/make_pictures.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from illava_hooks import tiny
from illava_hooks.cli import app

FOLDER = Path(__file__).parent / "pictures"
#: Model, bundled picture and method of each golden picture: the strip over all layers.
CASES = {
    "tiny-scene": ("tiny", "scene.png", "random"),
    "tiny-digits": ("tiny", "digits.png", "illava"),
    "tiny-qwen2-vl-scene": ("tiny-qwen2-vl", "scene.png", "random"),
    "tiny-qwen2-vl-digits": ("tiny-qwen2-vl", "digits.png", "illava"),
}


def draw(name: str, folder: Path) -> Path:
    """The strip of one case, drawn by the command into a folder."""
    model, picture, method = CASES[name]
    arguments = ["visualize", "--model", model, "--input", str(tiny.media(picture)), "--method", method, "--colours"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(folder)])
    if result.exit_code:
        sys.exit(result.output)
    (strip,) = (Path(line) for line in result.stdout.splitlines() if "strip" in Path(line).name)
    return strip


def main() -> None:
    """Writes all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(draw(name, Path(folder)), FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
