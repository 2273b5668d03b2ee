"""The command line on real files: answers, costs, pictures, and one clear line for everything that cannot work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from families import FAMILIES, families, family_of
from illava_hooks import PRESETS, tiny
from illava_hooks.cli import app
from illava_hooks.tiny.scenes import DIRECTIONS

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
#: The embedded models as the command line calls them, and their families.
MODELS = {family_of(name).embedded: name for name in families(embedded=True)}


def illava(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does."""
    command = [sys.executable, "-m", "illava_hooks", *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | QUIET, capture_output=True, text=True, check=False, timeout=300, cwd=cwd
    )


def ask_json(*arguments: str | Path) -> dict[str, Any]:
    """`ask --json` in this process."""
    result = CliRunner().invoke(app, ["ask", "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    body: dict[str, Any] = json.loads(result.stdout)
    return body


def refused(*arguments: str | Path) -> str:
    """The line of a command that cannot work, in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def write_video(path: Path, frames: int = 10, size: tuple[int, int] = (64, 64)) -> Path:
    """A circle that moves to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            picture = np.full((*size, 3), 90, np.uint8)
            picture[20:36, 2 + 4 * index : 18 + 4 * index] = (220, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "china.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    return path


class TestAsk:
    def test_the_bundled_scene_in_one_word(self) -> None:
        done = illava("ask")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("scene.png: how many circles are there ?\n")
        assert re.search(r"patches 320 -> \d+.*visual tokens 336 -> \d+", done.stdout)
        assert "prefill" in done.stdout and "decoding, per token" in done.stdout and "KV cache" in done.stdout

    def test_compare_shows_both(self, photo: Path) -> None:
        done = illava("ask", "--input", photo, "--question", "is there a red circle ?", "--compare")
        assert done.returncode == 0, done.stderr
        assert "without merging: " in done.stdout and "with merging: " in done.stdout
        assert len(re.findall(r"[\d.]+ ms", done.stdout)) == 4

    @pytest.mark.parametrize("model", MODELS)
    def test_trained_answers_survive_merging(self, model: str) -> None:
        body = ask_json("--model", model, "--question", "what color is the star ?", "--compare")
        assert [a["text"] for a in body["answers"]] == ["blue", "blue"] and body["same_answer"]
        plain, merged = body["answers"]
        assert (plain["merged"], merged["merged"]) == (False, True) and plain["report"] is None
        now, before = merged["report"]["kv_bytes"]
        assert 0 < now < before and 0 < merged["report"]["kept_fraction"] < 0.6
        assert all(a["prefill_s"] > 0 and a["decode_s"] > 0 and a["new_tokens"] == 2 for a in body["answers"])

    @pytest.mark.parametrize("model", MODELS)
    def test_a_folder_is_one_prompt_in_name_order(self, model: str) -> None:
        body = ask_json(
            "--input", tiny.media("pair"), "--model", model, "--question", "which image has a red circle ?"
        )
        assert body["answers"][0]["text"] == "second"
        assert len(body["answers"][0]["report"]["visuals"]) == 2

    @pytest.mark.parametrize("model", MODELS)
    def test_a_video(self, tmp_path: Path, model: str) -> None:
        path = write_video(tmp_path / "film.mp4")
        body = ask_json(
            "--input", path, "--model", model, "--frames", "6", "--question", "which way does the square move ?"
        )
        # The embedded LLaVA-OneVision is right about two clips of three, Qwen2-VL about nearly all.
        assert body["answers"][0]["text"] in (DIRECTIONS if model == "tiny" else ("right",))
        assert [v["modality"] for v in body["answers"][0]["report"]["visuals"]] == ["video"]

    def test_published_spelling_of_the_numbers(self) -> None:
        numbers = "--vit-layers 2-3-4 --vit-r 10 --llm-layers 1-3 --llm-ratio 0.5".split()
        visual = ask_json("--input", tiny.media("scene.png"), *numbers)["answers"][0]["report"]["visuals"][0]
        assert visual["vision_tokens"] == [320, 320, 320, 270, 220, 170, 170, 170, 170]
        assert len(set(visual["language_tokens"])) == 3

    def test_two_numbers_are_no_range_and_that_is_said(self) -> None:
        result = CliRunner().invoke(app, ["ask", "--vit-layers", "3-6", "--llm-layers", "2,5", "--json"])
        assert result.stderr == "note: --vit-layers 3-6 is layers 3 and 6; write 3-4-...-6 for all of them\n"
        tokens = json.loads(result.stdout)["answers"][0]["report"]["visuals"][0]["vision_tokens"]
        assert [one != other for one, other in pairwise(tokens)].count(True) == 2
        for quiet in ("3-4", "3-4-5", "3,6"):
            assert CliRunner().invoke(app, ["ask", "--vit-layers", quiet]).stderr == ""

    @pytest.mark.parametrize("empty", ["", " ", "\n"])
    def test_an_empty_question_is_none(self, empty: str) -> None:
        for question in ([str(tiny.media("scene.png")), empty], ["--question", empty]):
            assert "question is empty; give one, or leave it out" in refused("ask", *question)

    def test_times_of_a_toy_say_nothing(self) -> None:
        said = "note: the model is too small for its times"
        assert said in CliRunner().invoke(app, ["ask", "--compare"]).stdout
        assert said not in CliRunner().invoke(app, ["ask"]).stdout

    def test_no_merge_leaves_the_model_alone(self) -> None:
        assert ask_json("--no-merge")["answers"][0]["report"] is None

    def test_unknown_words_are_told(self) -> None:
        result = CliRunner().invoke(app, ["ask", "--question", "is there a red dragon ?"])
        assert result.exit_code == 0 and result.stderr == "note: tiny does not know the word dragon\n"
        result = CliRunner().invoke(app, ["ask", "--question", "is there a red dragon a zebra ?"])
        assert result.stderr == "note: tiny does not know the words dragon, zebra\n"

    @pytest.mark.parametrize("mode", ["RGBA", "L", "I;16", "P", "CMYK", "1"])
    def test_odd_pictures(self, tmp_path: Path, mode: str) -> None:
        picture = Image.open(tiny.media("scene.png")).resize((201, 77))
        path = tmp_path / ("odd.tif" if mode in ("I;16", "CMYK") else "odd.png")
        if mode == "I;16":
            Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)
        else:
            picture.convert(mode).save(path)
        done = illava("ask", "--input", path, "--json")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert json.loads(done.stdout)["answers"][0]["text"]

    def test_a_turned_and_an_animated_picture(self, tmp_path: Path, photo: Path) -> None:
        turned = tmp_path / "turned.jpg"
        with Image.open(photo) as picture:
            exif = picture.getexif()
            exif[0x0112] = 6
            picture.save(turned, exif=exif)
        upright, rotated = (
            ask_json("--input", path)["answers"][0]["report"]["visuals"][0]["prompt_tokens"]
            for path in (photo, turned)
        )
        assert (upright, rotated) != (0, 0) and upright != rotated  # unpadding keeps other rows
        assert ask_json("--input", tiny.media("clip.gif"))["answers"][0]["report"]["visuals"][0]["modality"] == "video"


class TestVisualize:
    @pytest.mark.parametrize("model", MODELS)
    def test_a_picture_per_merging_layer(self, tmp_path: Path, photo: Path, model: str) -> None:
        done = illava("visualize", "--input", photo, "--model", model, "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        files = [Path(line) for line in done.stdout.splitlines()]
        assert all(file.is_file() for file in files)
        schedule = PRESETS[f"{MODELS[model]}/tiny"]["image"]
        stages = [f"vision-layer{layer:02d}" for layer in schedule.vit_layers]
        stages += [f"language-layer{layer:02d}" for layer in schedule.llm_layers]
        for stage in [*stages, "strip"]:
            assert any(stage in file.name for file in files), (stage, files)
        assert all(file.name.startswith("china-") for file in files)

    def test_a_video_gets_a_sheet_and_a_film(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "film.mp4")
        done = illava("visualize", "--input", path, "--frames", "4", "--output", tmp_path / "out", "--colours")
        assert done.returncode == 0, done.stderr
        films = [line for line in done.stdout.splitlines() if line.endswith(".gif")]
        film: Any
        with Image.open(films[0]) as film:
            assert film.n_frames == 4


class TestInfo:
    def test_versions_and_torchvision(self) -> None:
        done = illava("info")
        assert done.returncode == 0, done.stderr
        for word in ("torch ", "transformers", "torchvision", "works", "illava-v2", "cpu", *FAMILIES):
            assert word in done.stdout, word

    @pytest.mark.parametrize("model", MODELS)
    def test_a_model(self, model: str) -> None:
        facts = json.loads(CliRunner().invoke(app, ["info", "--model", model, "--json"]).stdout)["model"]
        assert (facts["encoder_layers"], facts["decoder_layers"]) == (8, 6)
        assert facts["presets"]["image"]["vit_layers"] and facts["parameters"] < 3_000_000


class TestWhatCannotWork:
    def test_files(self, tmp_path: Path, photo: Path) -> None:
        text = tmp_path / "notes.txt"
        text.write_text("no picture")
        cut = tmp_path / "cut.jpg"
        cut.write_bytes(photo.read_bytes()[:5000])
        film = write_video(tmp_path / "film.mp4")
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(film.read_bytes()[:300])
        empty = tmp_path / "empty"
        empty.mkdir()
        for path in (tmp_path / "missing.png", text, cut, broken, empty):
            assert path.name in refused("ask", "--input", path)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--model", "no-such-folder/no-such-model"], "no-such-model"),
            (["--vit-layers", "5-x"], "--vit-layers is '5-x'"),
            (["--vit-layers", "99"], "vit_layers contains 99"),
            (["--llm-layers", "0"], "llm_layers contains 0"),
            (["--vit-r", "many"], "--vit-r is 'many'"),
            (["--llm-ratio", "1.5"], "llm_ratio is 1.5"),
            (["--method", "best"], "best"),
            (["--preset", "film"], "preset is 'film'"),
            (["--device", "cuda:99"], "device is 'cuda:99'"),
            (["--dtype", "int8"], "dtype is 'int8'"),
            (["--frames", "0"], "0"),
            (["--compare", "--no-merge"], "--no-merge"),
        ],
    )
    def test_options(self, arguments: list[str], named: str) -> None:
        assert named in refused("ask", *arguments)

    def test_no_traceback_but_with_debug(self) -> None:
        done = illava("ask", "--input", "missing.png")
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert "Traceback" in illava("ask", "--input", "missing.png", "--debug").stderr

    def test_ctrl_c_leaves_nothing_half_written(self, tmp_path: Path, photo: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "illava_hooks",
            "visualize",
            "--input",
            str(photo),
            "--output",
            str(tmp_path / "o"),
        ]
        process = subprocess.Popen(command, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 100
        while not (tmp_path / "o").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 130), errors  # 0: it was done already
        assert b"Traceback" not in errors
        for file in (tmp_path / "o").glob("*"):
            with Image.open(file) as picture:
                picture.load()
