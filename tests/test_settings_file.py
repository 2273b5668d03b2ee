"""Settings in a file: what is saved is loaded again, what is not understood is refused in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_helpers import IMAGE, RICHEST, single
from helpers import assert_says
from illava_hooks import METHODS, MergeConfig, MergeConfigError, MergeSchedule, Method, patch, session_of
from tiny_models import FAMILIES, Inputs, tiny_model

LAYERS: dict[str, Any] = {"vit_layers": [1, 2], "llm_layers": [1, 3]}
BY_AMOUNT = MergeSchedule((1, 2), 4, (1, 3), 0.6)
SCHEDULES = {
    "counts": BY_AMOUNT,
    "fractions": MergeSchedule((0,), 0.16, (2,), 1 / 3),
    "nothing": MergeSchedule(),
    "one number": MergeSchedule((1, 2), 0, (1, 3), 1.0, 1 / 3, 0.1 + 0.6),
    "encoder alone": MergeSchedule((3,), 0, (), 1.0, 0.25, 0.25),
}
OWN = Method("mine", "query_lse", "uniform", merge="nearest", proportional=True, quota=True)
TWO_RULES = Method("two rules", merge="drop", llm_merge="nearest")


@torch.no_grad()
def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    found: torch.Tensor = model(**inputs).logits
    return found


def saved(folder: Path, config: MergeConfig) -> Path:
    file = folder / "settings.json"
    config.save(file)
    return file


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("method", [*METHODS.values(), OWN, TWO_RULES], ids=lambda method: method.name)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_is_saved_is_loaded(kind: str, method: Method, track: bool, tmp_path: Path) -> None:
    for image, video in ((SCHEDULES[kind], BY_AMOUNT), (BY_AMOUNT, SCHEDULES[kind])):
        config = MergeConfig(image, video, method, track)
        file = saved(tmp_path, config)
        assert MergeConfig.load(file) == MergeConfig.load(str(file)) == config
        assert type(MergeConfig.load(file).image.vit_r) is type(image.vit_r)


def test_a_file_can_be_read(tmp_path: Path) -> None:
    """By people: a line each for what belongs together, in the words of `patch`."""
    config = MergeConfig(SCHEDULES["one number"], BY_AMOUNT, METHODS["diverse"])
    assert saved(tmp_path, config).read_text().splitlines() == [
        "{",
        '  "illava_hooks": 1,',
        '  "method": "diverse",',
        '  "track": false,',
        '  "image": {"vit_layers": [1, 2], "llm_layers": [1, 3], "keep": 0.3333333333333333, "keep_encoder": 0.7},',
        '  "video": {"vit_layers": [1, 2], "vit_r": 4, "llm_layers": [1, 3], "llm_ratio": 0.6}',
        "}",
    ]


@pytest.mark.parametrize(
    "given",
    [{**LAYERS, "vit_r": 0.25, "llm_ratio": 0.6}, {**LAYERS, "keep": 0.3}, {**LAYERS, "keep": 0.3, "method": "tome"}],
    ids=["amounts", "one number", "method"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_does_what_the_arguments_did(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name)
    inputs = single(model, RICHEST[name])
    config = patch(model, **given).config
    merged, file = logits(model, inputs), saved(tmp_path, config)
    for path in (file, str(file)):
        assert patch(model, preset=path).config == config
        assert torch.equal(logits(model, inputs), merged)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_given_comes_before_the_file(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    file = saved(tmp_path, replace(patch(model, **LAYERS, keep=0.25, method="tome").config, track=True))
    config = patch(model, preset=file).config
    assert config.method == METHODS["tome"] and config.track
    assert patch(model, preset=file, method="illava").config.method == METHODS["illava"], "the default's own name"
    assert patch(model, preset=file, keep=0.49).config.image == MergeSchedule((1, 2), 0, (1, 3), 1.0, 0.49, 0.7)
    assert patch(model, preset=file, vit_layers=[]).config.image == MergeSchedule((), 0, (1, 3), 1.0, 0.25, 1.0)
    assert patch(model, preset=file, llm_layers=[]).config.image == MergeSchedule((1, 2), 0, (), 1.0, 0.25, 0.25)
    assert patch(model, preset=file, vit_r=4, llm_ratio=0.6).config.image == BY_AMOUNT
    assert patch(model, preset=file, keep=1).config.image.is_identity
    for amount, missing in (({"vit_r": 4}, "llm_ratio"), ({"llm_ratio": 0.5}, "vit_r")):
        with pytest.raises(MergeConfigError) as caught:
            patch(model, preset=file, **amount)
        assert_says(caught.value, f"^{missing} is None", "the preset has keep", f"give {missing} too")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_split_of_its_own_comes_from_the_file_alone(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    config = patch(model, **LAYERS, keep=0.25).config
    assert config.image.keep_encoder == 0.5
    mine = replace(config.image, keep_encoder=0.8)
    file = saved(tmp_path, replace(config, image=mine, video=mine))
    session = patch(model, preset=file)
    assert session.config.image == mine
    logits(model, single(model, IMAGE))
    for visual in session.report.visuals:
        assert visual.vision_tokens[-1] / visual.vision_tokens[0] == pytest.approx(0.8, abs=0.05)
        assert visual.kept_fraction == pytest.approx(0.25, abs=0.5 / visual.prompt_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_another_model_is_held_to_this_ones_depth(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    file = saved(tmp_path, MergeConfig(MergeSchedule((5, 6), 9, (2,), 0.7), MergeSchedule(), METHODS["illava"]))
    with pytest.raises(MergeConfigError) as caught:
        patch(model, preset=file)
    assert_says(caught.value, "^vit_layers contains 5", "from the preset; give it yourself", r"0\.\.3")
    assert session_of(model) is None


# ---------------------------------------------------------------------------- what is refused

SCHEDULE: dict[str, Any] = {"vit_layers": [1], "vit_r": 4, "llm_layers": [2], "llm_ratio": 0.5}
NUMBER: dict[str, Any] = {"vit_layers": [1], "llm_layers": [2], "keep": 0.25, "keep_encoder": 0.5}
GOOD: dict[str, Any] = {
    "illava_hooks": 1,
    "method": "illava",
    "track": False,
    "image": SCHEDULE,
    "video": NUMBER,
}
METHOD: dict[str, Any] = {
    "name": "mine",
    "encoder_score": "uniform",
    "llm_score": "uniform",
    "merge": "drop",
    "layout": "aligned",
    "proportional": False,
    "quota": False,
}


def without(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != name}


WRONG: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([GOOD], ("no version", "MergeConfig.save")),
    "a number": (1, ("no version", "MergeConfig.save")),
    "no version": (without(GOOD, "illava_hooks"), ("no version", "MergeConfig.save")),
    "a future version": ({**GOOD, "illava_hooks": 2}, ("illava_hooks is 2", "up to version 1", "newer release")),
    "a future version with more in it": (
        {**GOOD, "illava_hooks": 9, "stages": 3},
        ("illava_hooks is 9", "up to version 1", "newer release"),
    ),
    "a version of no kind": ({**GOOD, "illava_hooks": "1"}, ("illava_hooks is '1'", "must be the version")),
    "a version that is true": ({**GOOD, "illava_hooks": True}, ("illava_hooks is True", "must be the version")),
    "version 0": ({**GOOD, "illava_hooks": 0}, ("illava_hooks is 0", "must be the version")),
    "an unknown key": ({**GOOD, "layers": [1]}, ("the file has an unknown key 'layers'", "it may have")),
    "a missing key": (without(GOOD, "track"), ("the file has no 'track'", "it must have")),
    "a modality missing": (without(GOOD, "video"), ("the file has no 'video'", "it must have")),
    "a modality that is none": ({**GOOD, "image": [1]}, (r"image is \[1\]", "must be an object")),
    "an unknown key of a modality": (
        {**GOOD, "image": {**SCHEDULE, "vit_R": 4}},
        ("image has an unknown key 'vit_R'", "it may have"),
    ),
    "both ways of a modality": (
        {**GOOD, "image": {**SCHEDULE, "keep": 0.5}},
        ("image has an unknown key 'vit_r'", "it may have"),
    ),
    "one number without layers": (
        {**GOOD, "video": {**NUMBER, "vit_layers": [], "llm_layers": []}},
        ("video: keep is 0.25", "list layers that merge, or use keep 1"),
    ),
    "half of a modality": ({**GOOD, "video": without(NUMBER, "keep_encoder")}, ("video has no 'keep_encoder'",)),
    "a layer that is text": (
        {**GOOD, "image": {**SCHEDULE, "vit_layers": ["1"]}},
        ("image: vit_layers contains '1'", "choose other layers"),
    ),
    "layers that are text": (
        {**GOOD, "image": {**SCHEDULE, "llm_layers": "12"}},
        ("image: llm_layers is '12'", "1 and above"),
    ),
    "layer 0": ({**GOOD, "image": {**SCHEDULE, "llm_layers": [0]}}, ("image: llm_layers contains 0", "1 and above")),
    "a layer twice": ({**GOOD, "image": {**SCHEDULE, "llm_layers": [2, 2]}}, ("image: llm_layers is", "twice")),
    "vit_r": ({**GOOD, "image": {**SCHEDULE, "vit_r": 1.5}}, ("image: vit_r is 1.5", "use 0")),
    "llm_ratio": ({**GOOD, "image": {**SCHEDULE, "llm_ratio": 0}}, ("image: llm_ratio is 0", "use 1.0")),
    "keep": ({**GOOD, "video": {**NUMBER, "keep": 2}}, ("video: keep is 2", r"\(0, 1\]")),
    "keep of nothing": ({**GOOD, "video": {**NUMBER, "keep": None}}, ("video: keep is None", r"\(0, 1\]")),
    "keep_encoder": ({**GOOD, "video": {**NUMBER, "keep_encoder": 0}}, ("video: keep_encoder is 0", r"\(0, 1\]")),
    "an encoder below the total": (
        {**GOOD, "video": {**NUMBER, "keep_encoder": 0.2}},
        ("video: keep_encoder is 0.2 and keep is 0.25", "use keep_encoder >= keep"),
    ),
    "track": ({**GOOD, "track": 1}, ("track is 1", "true or false")),
    "a method of no name": ({**GOOD, "method": "magic"}, ("method is 'magic'", "choose one of")),
    "a method that is a number": ({**GOOD, "method": 3}, ("method is 3", "must be an object")),
    "a method with an unknown key": (
        {**GOOD, "method": {**METHOD, "size": 1}},
        ("method has an unknown key 'size'",),
    ),
    "a method without a key": ({**GOOD, "method": without(METHOD, "quota")}, ("method has no 'quota'",)),
    "a method with a wrong choice": ({**GOOD, "method": {**METHOD, "merge": "melt"}}, ("merge is 'melt'", "choose")),
    "a method with a wrong kind": (
        {**GOOD, "method": {**METHOD, "proportional": "yes"}},
        ("method: proportional is 'yes'", "true or false"),
    ),
    "a method with a wrong rule for one stage": (
        {**GOOD, "method": {**METHOD, "llm_merge": "melt"}},
        ("llm_merge is 'melt'", "choose"),
    ),
    "a method with none for one stage": (
        {**GOOD, "method": {**METHOD, "llm_merge": None}},
        ("method: llm_merge is None", "must be text"),
    ),
    "a method with a number": ({**GOOD, "method": {**METHOD, "merge": 1}}, ("method: merge is 1", "must be text")),
}

TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("no JSON", "MergeConfig.save")),
    "half a file": (json.dumps(GOOD)[:-20].encode(), ("no JSON", "MergeConfig.save")),
    "something else": (b"vit_layers: [1]\n", ("no JSON", "MergeConfig.save")),
    "no text": (b"\xff\xfe\x00\x9f", ("cannot be read", "MergeConfig.save")),
    "deep": (b"[" * 100_000, ("no JSON", "MergeConfig.save")),
    "a key twice": (
        json.dumps(GOOD).replace('"track"', '"method": "tome", "track"').encode(),
        ("no JSON", "'method' stands twice"),
    ),
    "not a number": (json.dumps(GOOD).replace("0.25", "NaN").encode(), ("video: keep is nan",)),
}


def assert_refused(file: Path, words: tuple[str, ...]) -> None:
    """By `load` and by `patch`, in one line that names the file."""
    model = tiny_model(FAMILIES[0])
    for read in (MergeConfig.load, lambda path: patch(model, preset=path)):
        with pytest.raises(MergeConfigError) as caught:
            read(file)
        assert_says(caught.value, f"^{re.escape(str(file))}: ", *words)
    assert session_of(model) is None


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_understood_is_refused(case: str, tmp_path: Path) -> None:
    body, words = WRONG[case]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(body))
    assert_refused(file, words)


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_json_is_refused(case: str, tmp_path: Path) -> None:
    text, words = TEXTS[case]
    file = tmp_path / "settings.json"
    file.write_bytes(text)
    assert_refused(file, words)


def test_the_cases_differ_from_a_file_that_is_read_in_one_thing(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**GOOD, "method": METHOD}))
    found = MergeConfig.load(file)
    assert found.image == MergeSchedule((1,), 4, (2,), 0.5) and found.video == MergeSchedule(
        (1,), 0, (2,), 1.0, 0.25, 0.5
    )
    assert found.method == Method("mine", "uniform", "uniform", merge="drop")


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing.json", ("cannot be read", "No such file"))
    (tmp_path / "folder.json").mkdir()
    assert_refused(tmp_path / "folder.json", ("cannot be read", "directory"))


@pytest.mark.parametrize("name", ["settings.txt", "settings", "imag"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    """A preset's name and a file's cannot be taken for each other."""
    config = MergeConfig(BY_AMOUNT, BY_AMOUNT, METHODS["illava"])
    with pytest.raises(MergeConfigError) as caught:
        config.save(tmp_path / name)
    assert_says(caught.value, "^path is ", r"ends in \.json")
    with pytest.raises(MergeConfigError) as caught:
        MergeConfig.load(tmp_path / name)
    assert_says(caught.value, "^path is ", r"ends in \.json")
    with pytest.raises(MergeConfigError) as caught:
        patch(tiny_model(FAMILIES[0]), preset=name)
    assert_says(caught.value, f"^preset is '{name}'", "'image', 'video', 'auto'", r"ends in \.json")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    """And what was there before is left."""
    file = saved(tmp_path, MergeConfig(BY_AMOUNT, BY_AMOUNT, METHODS["illava"]))
    before = file.read_text()
    own = Method("mine", lambda inputs: inputs.positions.float())
    with pytest.raises(MergeConfigError) as caught:
        MergeConfig(BY_AMOUNT, BY_AMOUNT, own).save(file)
    assert_says(caught.value, "^encoder_score of method 'mine' is a function", "give yours to patch")
    assert file.read_text() == before
    with pytest.raises(MergeConfigError) as caught:
        MergeConfig(BY_AMOUNT, BY_AMOUNT, OWN).save(tmp_path / "nowhere" / "settings.json")
    assert_says(caught.value, "^path is ", "cannot be written")
