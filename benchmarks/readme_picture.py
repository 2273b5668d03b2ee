"""The picture of the README: a photo, and what is left of it behind the last merge.

    python benchmarks/readme_picture.py

The photo is "china.jpg" of scikit-learn, by danielbuechele (CC BY 2.0); model and settings stand under the picture.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

from illava_hooks import patch, tiny, unpatch
from illava_hooks.engine.report import MergeReport
from illava_hooks.tools.canvas import tabulate
from illava_hooks.tools.draw import MergeMap, draw, merge_maps
from illava_hooks.tools.loading import build_inputs
from illava_hooks.tools.media import Media

TARGET = Path(__file__).parents[1] / "docs" / "before-after.jpg"
METHOD = "novel-agnostic"


def merged() -> tuple[MergeMap, MergeReport]:
    """The last map of the photo, and what the report of the same forward says."""
    photo = Media("image", ("china.jpg",), (Image.fromarray(load_sample_image("china.jpg")),))
    model, processor = tiny.load("qwen2_vl")
    inputs = build_inputs(processor, photo, "how many triangles are there ?")
    last = merge_maps(model, processor, inputs, photo.images, method=METHOD)[-1]
    session = patch(model, method=METHOD)
    model.generate(**inputs, max_new_tokens=1)
    report = session.report
    unpatch(model)
    return last, report


def main() -> None:
    """Writes the picture and prints what stands under it."""
    last, report = merged()
    before, after = draw(last, dim=1.0)[0], draw(last, colours=True)[0]
    captions = [f"before: {last.total} visual tokens", f"after: {last.kept}, {report.summary.split(' ')[0]} fewer"]
    tabulate([before, after], 2, captions).save(TARGET, quality=82, optimize=True)
    print(report)


if __name__ == "__main__":
    main()
