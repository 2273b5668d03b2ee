"""What people look at: the report's sentence, a session in a debugger, pictures without a private import."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from decode_helpers import SETTINGS
from families import families, family_of
from illava_hooks import (
    InputError,
    MergeConfigError,
    MergeReport,
    PatchStateError,
    merging,
    patch,
    session_of,
    tiny,
    unpatch,
)
from illava_hooks.tools.canvas import SAME_PICTURE, View, colour_of, sharpened
from illava_hooks.tools.draw import MergeMap, draw, merge_maps, strip
from illava_hooks.tools.loading import build_inputs
from illava_hooks.tools.media import load_media
from illava_hooks.tools.show import media_of
from tiny_models import FAMILIES, Sample, inputs_for, tiny_model

EMBEDDED = families(embedded=True)
PHOTO = Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def embedded() -> dict[str, tuple[Any, Any]]:
    return {name: tiny.load(name) for name in EMBEDDED}


def reported(family: str, samples: list[Sample], **settings: Any) -> MergeReport:
    model = tiny_model(family)
    session = patch(model, **{**SETTINGS[family], **settings})
    with torch.no_grad():
        model(**inputs_for(model, samples))
    return session.report


class TestTheReport:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_begins_with_a_sentence(self, family: str) -> None:
        report = reported(family, [Sample(text_seed=1, images=((48, 30), (64, 64)))])
        first = str(report).splitlines()[0]
        assert first == report.summary and repr(report) == f"<MergeReport: {first}>"
        (tokens, work, cache) = re.fullmatch(
            r"([\d.]+)x fewer visual tokens, ([\d.]+)x less prefill work, ([\d.]+)x smaller KV cache", first
        ).groups()
        whole = sum(v.prompt_tokens for v in report.visuals)
        left = sum(v.language_tokens[-1] for v in report.visuals)
        assert float(tokens) == round(whole / left, 1)
        assert float(work) == round(report.flops[1] / report.flops[0], 1)
        assert float(cache) == round(report.kv_bytes[1] / report.kv_bytes[0], 1)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_says_in_which_layer_tokens_went(self, family: str) -> None:
        report = reported(family, [Sample(text_seed=1, images=((48, 30), (64, 64)))])
        lines = [line for line in str(report).splitlines() if line.startswith("image ")]
        assert [line.split(":")[0] for line in lines] == ["image 1", "image 2"]
        for line, visual in zip(lines, report.images, strict=True):
            steps = [
                (int(n), kind, int(layer)) for n, kind, layer in re.findall(r"-> (\d+) \((\w+) layer (\d+)", line)
            ]
            expected = [
                (n, "encoder", layer)
                for layer, (before, n) in enumerate(zip(visual.vision_tokens, visual.vision_tokens[1:], strict=False))
                if n != before
            ]
            expected += [
                (n, "decoder", layer)
                for layer, n in enumerate(visual.language_tokens)
                if layer and n != visual.language_tokens[layer - 1]
            ]
            assert steps == expected
            layers = SETTINGS[family]["vit_layers"], SETTINGS[family]["llm_layers"]
            assert {layer for _, kind, layer in steps if kind == "encoder"} <= set(layers[0])
            assert {layer for _, kind, layer in steps if kind == "decoder"} == set(layers[1])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_in_a_notebook_says_the_same(self, family: str) -> None:
        report = reported(family, [Sample(images=((48, 30),)), Sample(images=((64, 64),))])
        page = report._repr_html_()
        text = re.sub(r"<[^>]+>", " ", page.replace("&rarr;", "->"))
        assert report.summary in text and "image 2 (row 1)" in text
        numbers = set(re.findall(r"\d+\.\d{3}", text))
        assert numbers == set(re.findall(r"\d+\.\d{3}", str(report))) - {f"{report.kept_fraction:.3f}"} | (
            numbers & {f"{report.kept_fraction:.3f}"}
        )
        assert page.count("<tr>") == page.count("</tr>") == 2 + 1 + 5


class TestTheSession:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_can_be_looked_at_before_a_forward(self, family: str) -> None:
        """As debuggers and notebooks do: every attribute is read and printed, and asked for what pictures have."""
        session = patch(tiny_model(family), **SETTINGS[family])
        for name, value in inspect.getmembers(session):
            assert repr(value) and not hasattr(value, "_repr_html_"), name
        assert not session.report and not session.provenance
        assert "run the model on an image" in repr(session.report) and "track is False" in repr(session.provenance)
        with pytest.raises(PatchStateError, match="^no report yet"):
            _ = session.report.kept_fraction
        with pytest.raises(PatchStateError, match="^track is False"):
            session.provenance.at("vision", 1)

    @pytest.mark.parametrize("wrong", ["off", "no", "", None, 0, 1, [False]])
    def test_is_switched_by_true_and_false_only(self, wrong: Any) -> None:
        """Any other text would mean on, "off" included."""
        session = patch(tiny_model(FAMILIES[0]), **SETTINGS[FAMILIES[0]])
        with pytest.raises(MergeConfigError, match=f"^enabled is {re.escape(repr(wrong))}; give True or False$"):
            session.enabled = wrong
        with pytest.raises(MergeConfigError, match="^enabled is"), merging(session.root, wrong):
            pass
        assert session.enabled is True and session.active
        session.enabled = np.bool_(False)  # type: ignore[assignment]
        assert session.enabled is False and not session.active

    @pytest.mark.parametrize("family", families(embedded=True))
    def test_report_is_of_the_last_forward_that_merged(self, embedded: Any, family: str) -> None:
        model, processor = embedded[family]
        session = patch(model)
        first, second = (
            build_inputs(processor, media_of(picture), "how many stars are there ?")
            for picture in (PHOTO, PHOTO.crop((0, 0, 200, 100)))
        )
        with torch.no_grad():
            model(**first)
            report = session.report
            with merging(model, False):
                model(**second)
            assert session.report is report
            session.enabled = False
            model(**second)
            assert session.report is report
            unpatch(model)
            assert session.report is report

    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_short(self, family: str) -> None:
        session = patch(tiny_model(family), **SETTINGS[family])
        text = repr(session)
        assert text.startswith("<MergeSession illava, on; ") and len(text) < 200 and "\n" not in text
        assert f"encoder layers {SETTINGS[family]['vit_layers']} " in text
        assert f"decoder layers {SETTINGS[family]['llm_layers']} keep 0.6 " in text
        session.enabled = False
        assert repr(session).startswith("<MergeSession illava, off; ")
        nothing = patch(tiny_model(family), [], 0, [], 1.0)
        assert repr(nothing) == "<MergeSession illava, on; nothing merges>"
        half = patch(tiny_model(family), SETTINGS[family]["vit_layers"], None, [2], None, keep=0.5)
        assert "keep=0.5 over encoder layers" in repr(half)


class TestShow:
    @pytest.mark.parametrize("family", EMBEDDED)
    def test_of_a_picture(self, embedded: Any, family: str) -> None:
        model, processor = embedded[family]
        session = patch(model, method="diverse")
        try:
            inputs = build_inputs(processor, load_media(tiny.media("scene.png")), "how many stars are there ?")
            with torch.no_grad():
                before = model(**inputs).logits
            report = session.report
            for given in (PHOTO, [PHOTO], PHOTO.convert("L"), np.asarray(PHOTO)):
                (picture,) = session.show(given)
                assert isinstance(picture, Image.Image) and picture.width > 640
            page = session.show([PHOTO, PHOTO], "how many ?", processor)._repr_html_()  # type: ignore[attr-defined]
            assert page.count("<img alt=") == 2 and page.count("data:image/png;base64,") == 2
            # It is the same session, with the same settings, and it merges as before.
            assert session_of(model) is session and session.report is report
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, before)
        finally:
            unpatch(model)

    @pytest.mark.parametrize("family", families(embedded=True, with_videos=True))
    def test_of_a_video(self, embedded: Any, family: str) -> None:
        model, _ = embedded[family]
        session = patch(model)
        try:
            frames = np.stack([np.asarray(frame) for frame in load_media(tiny.media("clip.gif")).images])
            for given in (frames, tiny.media("clip.gif"), str(tiny.media("clip.gif"))):
                shown = session.show(given)
                assert shown[0].n_frames > 1  # type: ignore[attr-defined]
            assert "data:image/gif;base64," in shown._repr_html_()  # type: ignore[attr-defined]
        finally:
            unpatch(model)

    def test_is_what_the_command_draws(self, embedded: Any) -> None:
        model, processor = embedded[EMBEDDED[0]]
        scene = load_media(tiny.media("scene.png"))
        inputs = build_inputs(processor, scene, "how many stars are there ?")
        maps = merge_maps(model, processor, inputs, scene.images, keep=0.4, method="diverse")
        session = patch(model, keep=0.4, method="diverse")
        try:
            (shown,) = session.show(tiny.media("scene.png"), "how many stars are there ?")
        finally:
            unpatch(model)
        assert shown.tobytes() == strip(maps, colours=True).tobytes()

    def test_refuses_in_one_line(self, embedded: Any, tmp_path: Path) -> None:
        model, _ = embedded[EMBEDDED[0]]
        session = patch(model)
        try:
            for given, words in (
                (7, "pictures is a int"),
                ([], "pictures is a list;"),
                (["a.png", "b.png"], "pictures is a list of str; give"),
                (tmp_path / "no.png", "does not"),
            ):
                with pytest.raises(InputError, match=words):
                    session.show(given)
            with pytest.raises(MergeConfigError, match="nothing merges in a image"):
                patch(model, [], 0, [], 1.0).show(PHOTO)
            with pytest.raises(MergeConfigError, match="layout 'aligned'"):
                patch(model, method="illava-reference").show(PHOTO)
            assert session_of(model) is not None, "an error leaves the model patched"
            with pytest.raises(PatchStateError, match="this session of .* is over"):
                session.show(PHOTO)
        finally:
            unpatch(model)

    def test_without_a_processor(self) -> None:
        session = patch(tiny_model(FAMILIES[0]), **SETTINGS[FAMILIES[0]])
        with pytest.raises(InputError, match="processor is None"):
            session.show(PHOTO)


def mapped(embedded: Any, family: str) -> tuple[list[MergeMap], list[MergeMap]]:
    """Maps of the photo on the encoder's picture, and on the original."""
    model, processor = embedded[family]
    media = load_media(tiny.media("scene.png"))
    photo = type(media)("image", ("photo",), (PHOTO,))
    inputs = build_inputs(processor, photo, "how many stars are there ?")
    return merge_maps(model, processor, inputs, method="diverse"), merge_maps(
        model, processor, inputs, [PHOTO], method="diverse"
    )


class TestThePictures:
    @pytest.mark.parametrize("family", EMBEDDED)
    def test_are_the_original(self, embedded: Any, family: str) -> None:
        small, sharp = mapped(embedded, family)
        for before, after in zip(small, sharp, strict=True):
            (frame,), (seen,) = after.frames, before.frames
            assert len(frame) == len(seen)
            for view, old in zip(frame, seen, strict=True):
                assert (view.pixels == np.asarray(PHOTO)).all()
                rows, columns = old.labels.shape
                for y, x in ((0, 0), (200, 333), (426, 639), (90, 500)):  # the label of the place in the small view
                    assert view.labels[y, x] == old.labels[y * rows // 427, x * columns // 640]
            undimmed = np.asarray(draw(after, dim=1.0)[0])
            assert (undimmed[:, -640:] == np.asarray(PHOTO)).all()

    def test_are_what_the_encoder_saw_where_that_is_not_the_whole_picture(self) -> None:
        photo = np.asarray(PHOTO.resize((64, 64)))
        seen = (View(photo, np.arange(64 * 64).reshape(64, 64)),)
        assert sharpened(seen, PHOTO)[0].pixels.shape == (427, 640, 3)
        padded = np.full_like(photo, 128)
        padded[12:-12] = np.asarray(PHOTO.resize((64, 40)))
        cropped = np.asarray(PHOTO.crop((100, 0, 527, 427)).resize((64, 64)))
        flipped = photo[:, ::-1].copy()
        for other in (padded, cropped, flipped):
            frame = (View(other, seen[0].labels),)
            assert abs(other.astype(float) - photo).mean() > SAME_PICTURE
            assert sharpened(frame, PHOTO) is frame

    @pytest.mark.parametrize("family", EMBEDDED)
    def test_have_one_colour_for_a_survivor_in_every_layer(self, embedded: Any, family: str) -> None:
        _, maps = mapped(embedded, family)
        stages = {one.stage for one in maps}
        assert stages == {"vision", "language"}
        colours: dict[int, set[tuple[int, int, int]]] = {}
        group = family_of(family).patches_per_token
        for one in maps:
            picture = np.asarray(draw(one, colours=True)[0])
            plain = np.asarray(draw(one, dim=1.0)[0])
            view = one.frames[0][-1]
            offset = picture.shape[1] - view.labels.shape[1]
            for unit in np.unique(one.keepers[(one.keepers != one.units) & (one.keepers >= 0)]):
                first = int(np.flatnonzero(one.units == unit)[0])
                here = np.isin(view.labels, np.flatnonzero(one.units == unit))
                changed = (picture != plain)[:, offset:].any(-1) & here
                found = {tuple(pixel) for pixel in picture[:, offset:][changed].tolist()}
                if found:
                    assert first % group == 0
                    colours.setdefault(first, set()).update(found)
        assert len(colours) > 5
        assert {first: found for first, found in colours.items() if found != {colour_of(first)}} == {}

    @pytest.mark.parametrize("family", EMBEDDED)
    def test_of_a_strip_are_in_rows_that_fit_a_page(self, embedded: Any, family: str) -> None:
        _, maps = mapped(embedded, family)
        picture = strip(maps, colours=True)
        assert picture.width <= 1610 and picture.height > 427
