"""Inputs at the edge: nothing but padding, holes in the mask, missing pixels, tiny, thin and many images."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from decode_helpers import IMAGE, IMAGES, SETTINGS, TEXT, VIDEO, patched, single, steps, stock_keeps_images_apart
from families import families, families_and, family, family_of
from helpers import assert_differ, assert_says
from illava_hooks import PatchStateError, merging, patch, session_of, tiny, unpatch
from illava_hooks.cli import app
from illava_hooks.engine.prompt import Visuals, compact_prompt
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.report import MergeReport
from illava_hooks.engine.scoring_query import ScoringQuery
from tiny_models import FAMILIES, IMAGE_ID, VIDEO_ID, Inputs, Sample, inputs_for, tiny_model

#: Settings that send everything through the machinery of both stages and remove nothing.
IDLE: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 1e-6, "llm_layers": [1, 3], "llm_ratio": 1 - 1e-6}
SAMPLES = {"image": IMAGE, "images": IMAGES, "video": VIDEO}
MANY = Sample(text_seed=9, images=((16, 16),) * 60, text=(2,) * 61)


@torch.no_grad()
def logits(model: Any, inputs: Inputs) -> Tensor:
    """Of a forward."""
    found: Tensor = model(**inputs).logits
    return found


def report_of(model: Any) -> MergeReport:
    """Of the last forward."""
    session = session_of(model)
    assert session is not None
    return session.report


# --------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_everything_is_real(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    expected = steps(model, inputs, 3)[1]
    absent = {name: value for name, value in inputs.items() if name != "attention_mask"}
    nothing: dict[str, Any] = {**inputs, "attention_mask": None}
    for bare in (absent, nothing):
        torch.testing.assert_close(logits(model, bare), logits(model, inputs), atol=0, rtol=0)
        torch.testing.assert_close(steps(model, bare, 3)[1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("hole", ["in an image", "in the text", "at both ends of an image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_holes_in_the_mask(family: str, hole: str) -> None:
    """With nothing removed it is stock with the same holes, or stock's own error."""
    if "image" in hole and not family_of(family).takes_holes_in_images:
        model = patched(family)
        inputs = single(model, IMAGES)
        inputs["attention_mask"][0, (inputs["input_ids"][0] == IMAGE_ID).nonzero()[5:9, 0]] = 0
        assert_same_error(model, inputs)
        return
    model = tiny_model(family)
    inputs = single(model, IMAGES)
    at = (inputs["input_ids"][0] == IMAGE_ID).nonzero().flatten()
    places = {"in an image": at[5:9], "in the text": torch.tensor([1, 2]), "at both ends of an image": at[[0, 1, -1]]}
    inputs["attention_mask"][0, places[hole]] = 0
    real = inputs["attention_mask"][0].bool()
    if family_of(family).carries_state:
        for settings in (IDLE, SETTINGS[family]):
            patch(model, **settings)
            with pytest.raises(PatchStateError, match="padding between real tokens.*merging\\(model, False\\)"):
                logits(model, inputs)
        with merging(model, False):
            assert logits(model, inputs).isfinite().all()
        return
    stock = logits(model, inputs)[0, real]
    patch(model, **IDLE)
    torch.testing.assert_close(logits(model, inputs)[0, real], stock, atol=2e-5, rtol=1e-5)
    unpatch(model)
    model = patched(family)
    merged = model(**inputs)
    assert merged.logits[0, real].isfinite().all() and merged.logits.shape[1] == len(real)
    first, *_, last = report_of(model).sequence_tokens
    assert last < first <= (int(real.sum()),)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_that_lie_in_two_rows_are_refused(family: str, settings: dict[str, Any]) -> None:
    """Where stock mixes the images of a prompt among its sequences and sizes tell; elsewhere they are answered."""
    model = patched(family)
    inputs = single(model, Sample(7, images=((48, 30), (64, 64), (80, 30))))
    with torch.no_grad():
        model(**inputs)
    sizes = {visual.prompt_tokens for visual in report_of(model).visuals}
    told = len(sizes) > 1 and not stock_keeps_images_apart(family)
    refused = pytest.raises(PatchStateError, match="begin in one row of the batch and end in another.*num_beams=1")
    with refused if told else nullcontext():
        model.generate(**inputs, max_new_tokens=2, **settings)


@pytest.mark.parametrize(
    ("rows", "lengths", "fits"),
    [
        ([4, 3], [4, 3], True),
        ([4, 3], [2, 2, 3], True),
        ([0, 7], [3, 4], True),
        ([4, 3], [3, 4], False),
        ([4, 3], [7], False),
        ([2, 5], [3, 2, 2], False),
    ],
)
def test_rows_and_images(rows: list[int], lengths: list[int], fits: bool) -> None:
    ids = torch.zeros(2, 9, dtype=torch.bool)
    for row, count in enumerate(rows):
        ids[row, 1 : 1 + count] = True
    visuals = Visuals({"image": [VisualRecord("image", n) for n in lengths]}, {"image": ids})
    found = compact_prompt(visuals, ScoringQuery(), torch.ones_like(ids), None)
    assert found.counts.lengths == (9, 9) and found.mixed == (None if fits else "image")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", families(takes_empty_rows=True))
def test_a_row_of_padding_beside_a_prompt(family: str, side: Any) -> None:
    model = patched(family)
    alone = logits(model, single(model, IMAGE))
    for other in (TEXT, Sample(text_seed=4, images=((32, 90),), text=(5, 7))):
        inputs = inputs_for(model, [IMAGE, other], side=side)
        inputs["attention_mask"][1] = 0
        torch.testing.assert_close(logits(model, inputs)[:1], alone, atol=2e-5, rtol=1e-5)
        assert logits(model, inputs).isfinite().all()
        assert [lengths[1] for lengths in report_of(model).sequence_tokens] == [0] * 4


@pytest.mark.parametrize("family", families(takes_empty_rows=False))
def test_stock_refuses_a_row_of_padding_with_and_without_merging(family: str) -> None:
    """While it counts positions."""
    model = patched(family)
    inputs = inputs_for(model, [IMAGE, TEXT])
    inputs["attention_mask"][1] = 0
    assert_same_error(model, inputs)


@pytest.mark.parametrize("family", families(takes_empty_rows=True))
def test_nothing_but_padding(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    expected = logits(model, inputs)
    with pytest.raises(PatchStateError) as caught:
        logits(model, {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])})
    assert_says(caught.value, "^attention_mask marks every token of every row as padding", "give 1", "merging")
    assert torch.equal(logits(model, inputs), expected)


# -------------------------------------------------------------------------- pixels that do not fit


def assert_same_error(model: Any, inputs: Inputs) -> None:
    """A forward and a generation fail as they do without merging: the same error in the same words."""
    for call in (lambda: logits(model, inputs), lambda: steps(model, inputs, 2)):
        with merging(model, False), pytest.raises(Exception) as stock:  # noqa: B017, PT011  # whatever stock raises
            call()
        with pytest.raises(type(stock.value)) as ours:
            call()
        assert type(ours.value) is type(stock.value) and str(ours.value) == str(stock.value)


def without_pixels(family: str, inputs: Inputs) -> Inputs:
    """Placeholders with nothing to put there."""
    return {name: inputs[name] for name in family_of(family).token_inputs}


def without_placeholders(inputs: Inputs, count: int | None = None) -> Inputs:
    """Pixels whose first ``count`` placeholders (None: all) are words."""
    ids = inputs["input_ids"].clone()
    at = ((ids == IMAGE_ID) | (ids == VIDEO_ID)).nonzero()[:count]
    ids[at[:, 0], at[:, 1]] = 20
    return {**inputs, "input_ids": ids}


@pytest.mark.parametrize(("family", "kind"), families_and(["image", "video"], SAMPLES))
def test_placeholders_without_pixels_are_stock(family: str, kind: str) -> None:
    model = patched(family)
    inputs = without_pixels(family, single(model, SAMPLES[kind]))
    with merging(model, False):
        stock, stock_steps = logits(model, inputs), steps(model, inputs, 2)
    assert torch.equal(logits(model, inputs), stock)
    assert torch.equal(torch.stack(steps(model, inputs, 2)[1]), torch.stack(stock_steps[1]))


@pytest.mark.parametrize("count", [None, 1], ids=["all", "one"])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_pixels_without_placeholders_fail_as_in_stock(family: str, kind: str, count: int | None) -> None:
    model = patched(family)
    inputs = single(model, SAMPLES[kind])
    expected = logits(model, inputs)
    assert_same_error(model, without_placeholders(inputs, count))
    assert torch.equal(logits(model, inputs), expected)


# --------------------------------------------------------------------------------- sizes and numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_sixty_images(family: str) -> None:
    model = patched(family, dtype=torch.float64)
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in single(model, MANY).items()}
    found = logits(model, inputs)
    report = report_of(model)
    assert len(report.images) == 60 and len({v.language_tokens for v in report.images}) == 1
    with merging(model, False):
        assert_differ(logits(model, inputs), found)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("family", families(with_videos=True))
def test_a_video_of_few_frames(family: str, frames: int) -> None:
    model = patched(family)
    inputs = single(model, Sample(text_seed=3, videos=(frames,)))
    with merging(model, False):
        stock = steps(model, inputs, 3)[1]
    found = steps(model, inputs, 3)[1]
    (video,) = report_of(model).videos
    assert 0 < video.language_tokens[-1] < video.prompt_tokens
    assert_differ(found[0], stock[0])


EMBEDDED = families(embedded=True)
PICTURES: dict[str, tuple[int, ...]] = {"1x1": (1, 1), "2x3": (2, 3), "a line": (1, 150), "10000x40": (40, 10_000)}


@pytest.mark.filterwarnings("ignore:The channel dimension is ambiguous")  # older releases, of one pixel
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("name", [family(name).embedded for name in EMBEDDED])
def test_pictures_of_odd_sizes_on_the_command_line(tmp_path: Any, name: str, picture: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*PICTURES[picture], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    result = CliRunner().invoke(app, ["ask", "--model", name, "--input", str(tmp_path / "odd.png"), "--compare"])
    (largest,) = (family(one).largest_aspect_ratio for one in EMBEDDED if family(one).embedded == name)
    if largest is not None and max(PICTURES[picture]) / min(PICTURES[picture]) > largest:
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        said = f"odd.png: the processor refuses it (absolute aspect ratio must be smaller than {largest}"
        assert said in result.stderr
    else:
        assert result.exit_code == 0 and "kept fraction of visual tokens" in result.stdout, result.output


@pytest.mark.parametrize("name", EMBEDDED)
def test_sixty_pictures_through_the_processor(name: str) -> None:
    model, processor = tiny.load(name)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(60)]
    content = [*[{"type": "image"}] * 60, {"type": "text", "text": "how many stars are there ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[pictures], return_tensors="pt")
    session = patch(model)
    ids = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 2)
    assert len(session.report.images) == 60 and session.report.kept_fraction < 0.6
