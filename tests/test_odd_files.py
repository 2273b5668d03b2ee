"""Files and terminals of kinds that users of this field reported elsewhere: turned, mirrored, unprintable."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from families import families, family_of
from illava_hooks import InputError, patch, tiny
from illava_hooks.cli import app
from illava_hooks.tools.evaluate.run import item_inputs
from illava_hooks.tools.items import make_item
from illava_hooks.tools.loading import build_inputs, parse_fraction, parse_number, parse_ratio
from illava_hooks.tools.media import load_media

COLOURS = {"R": (230, 20, 20), "G": (20, 200, 20), "B": (20, 20, 230), "Y": (230, 230, 20)}
#: a, b, c, d of x' = a x + c y, y' = b x + d y: all turns, mirrored and not, and some that are scaled.
SQUARE = [
    matrix
    for matrix in itertools.product((-1, 0, 1), repeat=4)
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] in (-1, 1) and 0 in matrix and sum(map(abs, matrix)) == 2
]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.output
    return str(done.stderr)


def corners(picture: Image.Image) -> str:
    """The colours of the corners in reading order, by the nearest of the four."""
    near = [(8, 8), (picture.width - 9, 8), (8, picture.height - 9), (picture.width - 9, picture.height - 9)]
    seen: list[Any] = [picture.getpixel(at) for at in near]
    return "".join(
        min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))
        for pixel in seen
    )


def quartered(names: str = "RGBY", width: int = 64, height: int = 48) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    for number, name in enumerate(names):
        y, x = number // 2 * height // 2, number % 2 * width // 2
        pixels[y : y + height // 2, x : x + width // 2] = COLOURS[name]
    return pixels


def write_video(path: Path, names: str = "RGBY", frames: int = 3) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5, options={"qmin": "1", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(quartered(names))))
        out.mux(stream.encode())
    return path


def with_matrix(path: Path, matrix: Sequence[float]) -> Path:
    """Writes a display matrix into an MP4, as telephones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


class TestTurnedVideos:
    @pytest.mark.parametrize("scale", [1, 2, 0.5])
    @pytest.mark.parametrize("matrix", SQUARE, ids=str)
    def test_by_every_matrix_of_turns_and_mirrors(self, tmp_path: Path, matrix: Any, scale: float) -> None:
        """Each corner is sent where the matrix says."""
        path = with_matrix(write_video(tmp_path / "a.mp4"), [scale * value for value in matrix])
        picture = load_media(path).images[0]
        a, b, c, d = matrix
        sent = {}
        for name, (x, y) in zip("RGBY", ((-1, -1), (1, -1), (-1, 1), (1, 1)), strict=True):
            sent[a * x + c * y, b * x + d * y] = name
        assert corners(picture) == "".join(sent[x, y] for y in (-1, 1) for x in (-1, 1))
        assert picture.size == ((64, 48) if a else (48, 64))

    def test_there_are_eight_of_them(self) -> None:
        assert len(SQUARE) == 8

    @pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 1, 1)], ids=str)
    def test_by_nothing_where_a_matrix_says_nothing(self, tmp_path: Path, matrix: Any) -> None:
        picture = load_media(with_matrix(write_video(tmp_path / "a.mp4"), matrix)).images[0]
        assert picture.size == (64, 48) and corners(picture) == "RGBY"

    def test_by_any_angle(self, tmp_path: Path) -> None:
        """By 30 degrees clockwise the left upper corner goes up and to the right."""
        turn = np.radians(30)
        matrix = (np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn))
        picture = load_media(with_matrix(write_video(tmp_path / "a.mp4"), matrix)).images[0]
        assert picture.width > 64 and picture.height > 48
        x, y = picture.width / 2, picture.height / 2
        for name, (across, down) in zip("RGBY", ((-16, -12), (16, -12), (-16, 12), (16, 12)), strict=True):
            at = (round(x + matrix[0] * across + matrix[2] * down), round(y + matrix[1] * across + matrix[3] * down))
            assert np.abs(np.subtract(picture.getpixel(at), COLOURS[name])).max() < 60, name


def add_cover(out: Any) -> Any:
    cover = out.add_stream("mjpeg")
    cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
    cover.disposition = av.stream.Disposition.attached_pic
    return cover


class TestCovers:
    def test_of_a_song_are_no_video(self, tmp_path: Path) -> None:
        path = tmp_path / "song.m4a"
        with av.open(str(path), "w", format="mp4") as out:
            sound, cover = out.add_stream("aac", rate=8000, layout="mono"), add_cover(out)
            out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            out.mux(cover.encode())
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            out.mux(sound.encode(frame))
            out.mux(sound.encode())
        with pytest.raises(InputError, match="has no video in it"):
            load_media(path)

    def test_in_front_of_a_film_are_not_the_film(self, tmp_path: Path) -> None:
        path = tmp_path / "film.mp4"
        with av.open(str(path), "w") as out:
            cover, film = add_cover(out), out.add_stream("mpeg4", rate=5)
            film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
            out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            out.mux(cover.encode())
            for _ in range(4):
                out.mux(film.encode(av.VideoFrame.from_ndarray(quartered())))
            out.mux(film.encode())
        with av.open(str(path)) as written:
            assert len(written.streams.video) == 2, "the cover is a stream of its own"
        media = load_media(path)
        assert len(media.images) == 4 and corners(media.images[0]) == "RGBY"


class TestFolders:
    def test_tell_what_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """By format, not by a list of a few endings; and nothing is left out without a word."""
        for name in ("1.png", "2.jp2", "3.BMP", "4.jfif", "5.dib"):
            Image.new("RGB", (16, 16)).save(tmp_path / name, format="JPEG" if name[-4:] == "jfif" else None)
        (tmp_path / "6.heic").write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
        (tmp_path / "noext").write_bytes((tmp_path / "1.png").read_bytes())
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / "more").mkdir()
        (tmp_path / ".hidden.png").write_bytes(b"")
        assert load_media(tmp_path).names == ("1.png", "2.jp2", "3.BMP", "4.jfif", "5.dib")
        (line,) = caplog.messages
        for name in ("6.heic", "dead.png", "noext", "notes.txt", "more"):
            assert repr(name) in line
        assert "5 left out" in line and ".hidden" not in line and "1.png" not in line

    def test_without_anything_else_say_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
        load_media(tmp_path)
        assert caplog.messages == []


def png(width: int, depth: int, colour: int, rows: bytes, *, clear: bytes) -> bytes:
    """A PNG of one row, written by hand: Pillow cannot write these."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


#: Bits, colour type, one row of two pixels of which the first is transparent, that colour, and the second one shown.
CLEAR = {
    "grey 1": (1, 0, bytes([0b01000000]), (0,), 255),
    "grey 1, white": (1, 0, bytes([0b10000000]), (1,), 0),
    "grey 2": (2, 0, bytes([0b01100000]), (1,), 170),
    "grey 4": (4, 0, bytes([0x5A]), (5,), 170),
    "grey 8": (8, 0, bytes([7, 100]), (7,), 100),
    "grey 16": (16, 0, struct.pack(">2H", 0, 0x6464), (0,), 100),
    "grey 16, not black": (16, 0, struct.pack(">2H", 0x1234, 0x6464), (0x1234,), 100),
    "colour 8": (8, 2, bytes([1, 2, 3, 100, 100, 100]), (1, 2, 3), 100),
    "colour 16": (16, 2, struct.pack(">6H", 0x1111, 0x2222, 0x3333, *[0x6464] * 3), (0x1111, 0x2222, 0x3333), 100),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_one_transparent_colour_is_white(tmp_path: Path, kind: str) -> None:
    depth, colour, rows, clear, shown = CLEAR[kind]
    file = tmp_path / "a.png"
    file.write_bytes(png(2, depth, colour, rows, clear=struct.pack(f">{len(clear)}H", *clear)))
    (picture,) = load_media(file).images
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(picture.getpixel((1, 0)), shown)).max() <= 1


class TestAnimations:
    @staticmethod
    def write(path: Path, frames: int, default: bool) -> Path:
        pictures = [Image.fromarray(quartered(names)) for names in ("RGBY", "GRYB", "BYRG", "YBGR")][
            : frames + default
        ]
        pictures[0].save(
            path, "PNG", save_all=True, append_images=pictures[1:], default_image=default, duration=[100] * frames
        )
        return path

    @pytest.mark.parametrize("default", [False, True])
    def test_have_the_frames_that_they_show(self, tmp_path: Path, default: bool) -> None:
        """The picture for those who know no animation is none of them."""
        media = load_media(self.write(tmp_path / "a.png", 2, default))
        assert media.kind == "video" and len(media.times) == 2
        assert [corners(image) for image in media.images] == (["GRYB", "BYRG"] if default else ["RGBY", "GRYB"])

    def test_of_one_frame_are_pictures(self, tmp_path: Path) -> None:
        media = load_media(self.write(tmp_path / "a.png", 1, True))
        assert media.kind == "image" and corners(media.images[0]) == "GRYB"


def test_a_photo_is_turned_whatever_else_its_camera_wrote(tmp_path: Path) -> None:
    """EXIF with a negative resolution, and with values that are no EXIF at all, as cameras and editors leave it."""
    buffer = io.BytesIO()
    Image.fromarray(quartered()).save(buffer, "JPEG", quality=95)
    entries = {
        "negative": struct.pack(">HHII", 0x011A, 10, 1, 50) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0),
        "odd type": struct.pack(">HHII", 0x010F, 99, 1, 50) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0),
        "beyond": struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x011B, 5, 9, 1 << 20),
    }
    for name, entry in entries.items():
        table = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 2) + entry + struct.pack(">I", 0)
        exif = b"Exif\0\0" + table.ljust(50, b"\0") + struct.pack(">ii", -72, 1)
        data = buffer.getvalue()
        path = tmp_path / "photo.jpg"
        path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
        picture = load_media(path).images[0]
        assert picture.size == (48, 64) and corners(picture) == "BRYG", name


class TestTerminals:
    @pytest.mark.parametrize(
        "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("cp1252", "utf-8"))]
    )
    def test_that_lack_a_letter_get_its_escape(self, tmp_path: Path, encoding: str) -> None:
        name = os.fsdecode(b"pict\xffure.png")
        Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
        (tmp_path / "p.png").rename(tmp_path / name)
        environment = os.environ | {"PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "0"}
        command = [
            sys.executable,
            "-m",
            "illava_hooks",
            "ask",
            str(tmp_path / name),
            "多少个圆 how many circles are there ?",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        text = done.stdout.decode(encoding)
        assert "pict\\udcffure.png" in text and ("多" if encoding == "utf-8" else "\\u591a") in text

    def test_and_answers_with_brackets_are_not_read_as_markup(self, capsys: pytest.CaptureFixture[str]) -> None:
        from illava_hooks.cli.pictures import _print_costs
        from illava_hooks.tools.ask import Answer

        _print_costs([Answer("[/b] [red]two[/red] :smile:", True, 9, 1, 0.1, 0.0, None)])
        assert "[/b] [red]two[/red] :smile:" in capsys.readouterr().out


class TestQuestions:
    @pytest.mark.parametrize("family", families(embedded=True))
    def test_with_a_placeholder_are_refused_with_the_reason(self, family: str, tmp_path: Path) -> None:
        alias = family_of(family).embedded
        _, processor = tiny.load(family)
        tokens = {value for name, value in vars(processor).items() if name in ("image_token", "video_token")}
        assert len(tokens) == 2
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        media = load_media(tmp_path / "a.png")
        for token in tokens:
            question = f"what does {token} mean ?"
            assert f"question contains {token!r}" in refused("ask", tmp_path / "a.png", question, "--model", alias)
            with pytest.raises(InputError, match="put in front of the question anyway"):
                build_inputs(processor, media, question)
            item = make_item({"image": media.images[0], "question": question}, "item 1")
            with pytest.raises(InputError, match="question contains"):
                item_inputs(processor, [item])

    def test_that_are_no_unicode_are_refused(self) -> None:
        assert "no Unicode" in refused("ask", "--question", "how many \udcff ?")


class TestNothing:
    @pytest.mark.parametrize(
        "options", [["--vit-layers", "", "--llm-layers", ""], ["--vit-r", "0", "--llm-ratio", "1"]]
    )
    def test_to_draw_is_said(self, tmp_path: Path, options: list[str]) -> None:
        """And nothing is written; `ask` answers, and says that nothing merged."""
        assert "nothing merges in this image" in refused("visualize", "--output", tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        done = run("ask", *options)
        assert done.exit_code == 0 and "nothing merged: these settings remove nothing" in done.stderr

    def test_of_a_decode_time_where_there_is_no_further_token(self) -> None:
        done = run("ask", "--max-new-tokens", "1")
        (line,) = [line for line in done.stdout.splitlines() if "decoding, per token" in line]
        assert "ms" not in line
        body = json.loads(run("ask", "--max-new-tokens", "1", "--json").stdout)
        assert body["answers"][0]["decode_s"] is None and body["answers"][0]["new_tokens"] == 1


@pytest.mark.parametrize("size", [(5000, 10), (7, 3000)], ids=str)
def test_a_very_long_picture_is_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    """By the command and by the session, next to a picture of a common form too."""
    Image.new("RGB", size, "navy").save(tmp_path / "strip.png")
    done = run("visualize", tmp_path / "strip.png", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    for file in (tmp_path / "out").iterdir():
        with Image.open(file) as drawn:
            assert min(drawn.size) > 30
    (embedded,) = (name for name in families(embedded=True) if family_of(name).embedded == "tiny")
    model, processor = tiny.load(embedded)
    pictures = [Image.open(tmp_path / "strip.png"), Image.open(tiny.media("scene.png"))]
    shown = patch(model).show(pictures, processor=processor)
    assert len(shown) == 2 and min(shown[0].size) > 30


class TestPercentages:
    @pytest.mark.parametrize("text", ["70%", " 70 %", "70.0%"])
    def test_are_refused_with_what_they_may_mean(self, text: str) -> None:
        for parse in (parse_ratio, parse_number, parse_fraction):
            with pytest.raises(InputError, match=r"such as (1/3 or )?0\.7$"):
                parse(text, "--amount")

    def test_of_a_ratio_are_never_answered_with_a_number_of_tokens(self) -> None:
        for option in (["--llm-ratio", "70%"], ["--llm-ratio", "most"], ["--keep", "70%"]):
            message = refused("ask", *option)
            assert "tokens" not in message and "fraction" in message
        assert "whole number of tokens or a fraction such as 0.16" in refused("ask", "--vit-r", "16%")
        assert "0.5" in refused("evaluate", "--kept", "50%")
