"""What a path on the command line becomes: upright 8-bit RGB pictures in the right order, or one clear line."""

import http.server
import io
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images

from illava_hooks.errors import InputError
from illava_hooks.tools import media as media_module
from illava_hooks.tools.media import Media, load_media

WIDTH, HEIGHT, STEP = 48, 32, 6
RED, WHITE = (255, 0, 0), (255, 255, 255)


class Pipe:
    """A file that can be written only, as a pipe."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(bytes(part))
        return len(part)


def write_video(
    path: Path,
    stamps: Sequence[int],
    *,
    codec: str = "mpeg4",
    rate: int = 10,
    file: Any = None,
    container: str | None = None,
    movflags: str = "faststart",
    picture: Callable[[int], np.ndarray] | None = None,
    turn: int = 0,
) -> Path:
    """Frame i is grey of level 6 i and shown at stamps[i] / rate seconds."""
    options = {"movflags": movflags} if path.suffix == ".mp4" and movflags else {}
    with av.open(file or str(path), "w", format=container, options=options) as out:
        stream: Any = out.add_stream(codec, rate=rate, options={"bf": "0", "g": "5", "qmin": "1", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        if turn:
            stream.set_display_rotation(turn)
        for index, stamp in enumerate(stamps):
            pixels = picture(index) if picture else np.full((HEIGHT, WIDTH, 3), STEP * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbers(media: Media) -> list[int]:
    """Read the frame numbers back from the grey levels."""
    assert media.kind == "video"
    levels = media.frames.reshape(len(media.images), -1).mean(axis=1) / STEP
    np.testing.assert_allclose(levels, levels.round(), atol=0.34)
    return [int(level) for level in levels.round()]


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixel(path: Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    media = load_media(path)
    assert media.kind == "image" and media.times == () and media.names == (path.name,)
    assert [image.mode for image in media.images] == ["RGB"]
    value = media.images[0].getpixel(at)
    assert isinstance(value, tuple)
    return value


def refusal(path: str | Path, **arguments: Any) -> str:
    """The line of the error: it names the path, and no other error leaks."""
    with pytest.raises(InputError) as caught:
        load_media(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message and repr(str(path))[1:-1] in message and "; " in message
    return message


# Images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_a_photo(tmp_path: Path, orientation: int) -> None:
    photo = Image.fromarray(load_sample_images().images[0]).resize((96, 64))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose that brings the stored pixels upright
    inverse = {0: 0, 1: 1, 2: 4, 3: 3, 4: 2, 5: 5, 6: 6}
    stored = photo if orientation == 1 else photo.transpose(Image.Transpose(inverse[turns[orientation]]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image,) = load_media(save(tmp_path / "photo.jpg", stored, exif=exif, quality=95)).images
    assert image.size == (96, 64)
    assert np.abs(np.asarray(image, int) - np.asarray(photo, int)).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_transparency_over_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", image, **options)
    assert (pixel(path), pixel(path, (1, 0))) == (RED, WHITE)


def test_half_transparent_pixel(tmp_path: Path) -> None:
    assert pixel(save(tmp_path / "a.png", Image.new("RGBA", (1, 1), (0, 0, 0, 128)))) == (127, 127, 127)


def test_grey_with_alpha(tmp_path: Path) -> None:
    assert pixel(save(tmp_path / "a.png", Image.new("LA", (1, 1), (10, 255)))) == (10, 10, 10)
    assert pixel(save(tmp_path / "b.png", Image.new("LA", (1, 1), (10, 0)))) == WHITE


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_palette(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", palette_image())
    assert (pixel(path), pixel(path, (1, 0))) == (RED, (0, 0, 255))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(tmp_path: Path, suffix: str, transparency: int | bytes) -> None:
    if suffix == "gif" and isinstance(transparency, bytes):
        pytest.skip("a GIF names one colour only")
    path = save(tmp_path / f"a.{suffix}", palette_image(), transparency=transparency)
    assert (pixel(path), pixel(path, (1, 0))) == (RED, WHITE)


@pytest.mark.parametrize(("mode", "colour", "seen"), [("L", 7, 7), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_bilevel(tmp_path: Path, mode: str, colour: int, seen: int) -> None:
    assert pixel(save(tmp_path / "a.png", Image.new(mode, (1, 1), colour))) == (seen,) * 3


def test_cmyk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.new("CMYK", (3, 3), (0, 255, 255, 0)))
    assert pixel(path) == RED
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    np.testing.assert_allclose(pixel(path), RED, atol=3)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(values))
    assert [pixel(path, (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_dark_16_bit_grey_stays_dark(tmp_path: Path) -> None:
    assert pixel(save(tmp_path / "a.png", Image.fromarray(np.full((1, 1), 200, np.uint16)))) == (1, 1, 1)


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0, 32896, 65535], [0, 128, 255]),
        ([0, 500_000, 1_000_000], [0, 128, 255]),
        ([-100, 0, 300], [0, 64, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_32_bit_integers(tmp_path: Path, values: list[int], seen: list[int]) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(np.array([values], np.int32)))
    assert [pixel(path, (x, 0))[0] for x in range(3)] == seen


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 51, 255], [0, 51, 255]),
        ([0, 32896, 65535], [0, 128, 255]),
        ([0, 1e6, 2e6], [0, 128, 255]),
        ([-1, 0, 3], [0, 64, 255]),
        ([float("nan"), float("inf"), 1], [0, 0, 255]),
        ([-3, -3, -3], [0, 0, 0]),
    ],
)
def test_floats(tmp_path: Path, values: list[float], seen: list[int]) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(np.array([values], np.float32)))
    assert [pixel(path, (x, 0))[0] for x in range(3)] == seen


@pytest.mark.parametrize("size", [(1, 1), (3, 1001), (1001, 3)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    assert load_media(save(tmp_path / "a.png", Image.new("RGB", size))).images[0].size == size


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2), RED))
    assert pixel(path.rename(tmp_path / "a.mp4")) == RED
    assert numbers(load_media(write_video(tmp_path / "v.mp4", range(3)).rename(tmp_path / "v.jpg"))) == [0, 1, 2]


def test_string_and_path_are_the_same(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2), RED))
    assert load_media(str(path)).images[0].tobytes() == load_media(path).images[0].tobytes()


@pytest.mark.parametrize(("suffix", "container"), [("tiff", "TIFF"), ("jpg", "MPO")])
def test_further_pictures_of_scans_and_phones_are_no_video(tmp_path: Path, suffix: str, container: str) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    path = save(tmp_path / f"a.{suffix}", pages[0], format=container, save_all=True, append_images=pages[1:])
    assert pixel(path) == (0, 0, 0)


# Animated images


def write_animation(path: Path, durations: Sequence[int], **options: Any) -> Path:
    images = [Image.new("RGB", (WIDTH, HEIGHT), (STEP * index,) * 3) for index in range(len(durations))]
    options = {"lossless": True} | options if path.suffix == ".webp" else options
    return save(path, images[0], save_all=True, append_images=images[1:], duration=list(durations), **options)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "apng"])
def test_animation_is_a_video(tmp_path: Path, suffix: str) -> None:
    path = write_animation(tmp_path / f"a.{suffix}", [100] * 9, **({"format": "PNG"} if suffix == "apng" else {}))
    media = load_media(path, 3)
    assert numbers(media) == [0, 4, 8] and media.names == (path.name,)
    assert media.times == pytest.approx((0, 0.4, 0.8))
    assert numbers(load_media(path)) == list(range(9))
    assert numbers(load_media(path, 1)) == [4]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_is_sampled_by_time(tmp_path: Path, suffix: str) -> None:
    path = write_animation(tmp_path / f"a.{suffix}", [100, 100, 100, 700, 1000, 500])
    media = load_media(path, 3)  # shown at 0, .1, .2, .3, 1 and 2 seconds
    assert numbers(media) == [0, 4, 5] and media.times == pytest.approx((0, 1, 2))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_of_one_frame_is_an_image(tmp_path: Path, suffix: str) -> None:
    assert pixel(write_animation(tmp_path / f"a.{suffix}", [100])) == (0, 0, 0)


def test_animation_without_durations(tmp_path: Path) -> None:
    assert load_media(write_animation(tmp_path / "a.gif", [0] * 3)).times == pytest.approx((0, 0.1, 0.2))


def test_transparent_animation_over_white(tmp_path: Path) -> None:
    images = [Image.new("RGBA", (4, 4), (255, 0, 0, alpha)) for alpha in (255, 0)]
    path = save(tmp_path / "a.webp", images[0], save_all=True, append_images=images[1:], duration=100, lossless=True)
    assert [image.getpixel((0, 0)) for image in load_media(path).images] == [RED, WHITE]


# Folders


def test_folder_in_natural_order(tmp_path: Path) -> None:
    for level, name in enumerate(["a.png", "B.png", "img2.png", "IMG10.jpg", "img10b.PNG", "x²3.png"]):
        save(tmp_path / name, Image.new("RGB", (8 + level, 8), (20 * level,) * 3))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    save((tmp_path / "folder.png").mkdir() or tmp_path / "folder.png" / "c.png", Image.new("RGB", (8, 8)))
    media = load_media(tmp_path)
    assert media.kind == "image" and media.times == ()
    assert media.names == ("a.png", "B.png", "img2.png", "IMG10.jpg", "img10b.PNG", "x²3.png")
    assert [image.size for image in media.images] == [(8 + level, 8) for level in range(6)]
    assert [np.asarray(image)[0, 0, 0] for image in media.images] == [0, 20, 40, 60, 80, 100]


def test_same_names_but_for_case_and_zeros_are_ordered(tmp_path: Path) -> None:
    for name in ("a1.png", "A1.png", "a01.png"):
        save(tmp_path / name, Image.new("RGB", (1, 1)))
    assert load_media(tmp_path).names == ("A1.png", "a01.png", "a1.png")


def test_animation_in_a_folder_is_its_first_frame(tmp_path: Path) -> None:
    write_animation(tmp_path / "a.gif", [100] * 3)
    save(tmp_path / "b.png", Image.new("RGB", (2, 2), RED))
    assert [image.getpixel((0, 0)) for image in load_media(tmp_path).images] == [(0, 0, 0), RED]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / ".b.png").write_bytes(b"")
    assert "has no images in it; put" in refusal(tmp_path)


def test_folder_with_an_unreadable_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    (tmp_path / "b.png").write_bytes(b"no image")
    assert repr(str(tmp_path / "b.png")) in refusal(tmp_path)


def test_folder_with_too_many_images(tmp_path: Path) -> None:
    save(tmp_path / "0.png", Image.new("RGB", (1, 1)))
    for index in range(1, 256):
        os.link(tmp_path / "0.png", tmp_path / f"{index}.png")
    assert len(load_media(tmp_path).images) == 256
    os.link(tmp_path / "0.png", tmp_path / "256.png")
    assert "has 257 images; leave at most 256" in refusal(tmp_path)


# Videos


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", "mp4"), ("libx264", "mkv"), ("mpeg4", "avi"), ("mpeg4", "ts")]
)
def test_frames_are_evenly_spaced(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", range(31), codec=codec)
    media = load_media(path, 4)
    assert numbers(media) == [0, 10, 20, 30] and media.names == (path.name,)
    assert media.times == pytest.approx((0, 1, 2, 3), abs=2e-3)
    assert media.frames.shape == (4, HEIGHT, WIDTH, 3) and media.frames.dtype == np.uint8
    assert {(image.mode, image.size) for image in media.images} == {("RGB", (WIDTH, HEIGHT))}
    assert numbers(load_media(path, 2)) == [0, 30]
    assert numbers(load_media(path, 1)) == [15]


def test_default_is_32_frames(tmp_path: Path) -> None:
    assert len(load_media(write_video(tmp_path / "a.mp4", range(40))).images) == 32


@pytest.mark.parametrize("asked", [5, 6, 1000])
def test_fewer_frames_than_asked_are_all_used(tmp_path: Path, asked: int) -> None:
    assert numbers(load_media(write_video(tmp_path / "a.mp4", range(5)), asked)) == [0, 1, 2, 3, 4]


def test_video_of_one_frame(tmp_path: Path) -> None:
    media = load_media(write_video(tmp_path / "a.mp4", [0]), 4)
    assert (numbers(media), media.times) == ([0], (0.0,))


def test_colours_survive(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(2), picture=lambda _: np.full((HEIGHT, WIDTH, 3), RED, np.uint8))
    np.testing.assert_allclose(load_media(path).frames[0, 16, 24], RED, atol=6)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path, suffix: str) -> None:
    stamps = [0, 1, 2, 3, 4, 5, 20, 31, 40]  # by number it would be 0, 2, 4, 6, 8
    media = load_media(write_video(tmp_path / f"a.{suffix}", stamps), 5)
    assert numbers(media) == [0, 5, 6, 7, 8]
    assert media.times == pytest.approx((0, 0.5, 2, 3.1, 4), abs=2e-3)


def test_frame_that_is_nearest_to_several_times_comes_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", [0, 1, 2, 3, 4, 40])
    assert numbers(load_media(path, 5)) == [0, 4, 5]  # 0, 10, 20, 30 and 40 tenths: 20 is nearer to 4 than to 40


def test_times_begin_at_zero(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", [50, 51, 52])
    assert load_media(path).times == pytest.approx((0, 0.1, 0.2), abs=2e-3)


def raw_mjpeg(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    with path.open("wb") as file:
        for index, size in enumerate(sizes):
            Image.new("RGB", size, (STEP * index,) * 3).save(file, "JPEG", quality=95)
    return path


def test_raw_mjpeg_of_unknown_length(tmp_path: Path) -> None:
    path = raw_mjpeg(tmp_path / "a.mjpeg", [(WIDTH, HEIGHT)] * 31)
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].frames == 0
    media = load_media(path, 4)
    assert numbers(media) == [0, 10, 20, 30] and media.times == pytest.approx((0, 0.4, 0.8, 1.2))


def test_raw_h264_without_presentation_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.h264", range(31), codec="libx264")
    media = load_media(path, 4)
    assert numbers(media) == [0, 10, 20, 30] and media.times == pytest.approx((0, 1, 2, 3))


def test_matroska_from_a_pipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, path = Pipe(), tmp_path / "a.mkv"
    write_video(path, range(31), file=pipe, container="matroska")
    path.write_bytes(b"".join(pipe.parts))
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].frames == 0
    assert numbers(load_media(path, 4)) == [0, 10, 20, 30]
    assert damage_lines(caplog) == []


def test_times_that_run_backwards_are_replaced_by_the_frame_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", range(5))
    decode = media_module._decode

    def backwards(*arguments: Any) -> Iterator[tuple[av.VideoFrame, float, float]]:
        for frame, unit, rate in decode(*arguments):
            frame.pts = -frame.pts
            yield frame, unit, rate

    monkeypatch.setattr(media_module, "_decode", backwards)
    media = load_media(path, 3)
    assert numbers(media) == [0, 2, 4] and media.times == pytest.approx((0, 0.2, 0.4))


def test_few_decoded_frames_are_kept_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is turned into pictures are the chosen frames only."""
    path = write_video(tmp_path / "a.mp4", range(40))
    turned: list[int] = []
    original = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda *a, **k: turned.append(1) or original(*a, **k))
    assert len(load_media(path, 3).images) == len(turned) == 3


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation_of_a_phone_video(tmp_path: Path, turn: int) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = 255  # the corner at the top left
    path = write_video(tmp_path / "a.mp4", range(3), picture=lambda _: pixels, turn=turn)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    a, b, _, c, d = struct.unpack(">5i", data[at : at + 20])
    expected = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), -90: (0, 1, -1, 0)}[turn]  # x' = a x + c y, y' = b x + d y
    assert (a >> 16, b >> 16, c >> 16, d >> 16) == expected  # counter-clockwise on a screen
    image = load_media(path).images[0]
    assert image.size == ((WIDTH, HEIGHT) if turn == 180 else (HEIGHT, WIDTH))
    bright = np.asarray(image.convert("L")) > 128
    corners = {(y, x) for y in (0, -1) for x in (0, -1) if bright[y, x]}
    assert corners == {{90: (-1, 0), 180: (-1, -1), -90: (0, -1)}[turn]}


def test_size_that_changes_mid_stream(tmp_path: Path) -> None:
    media = load_media(raw_mjpeg(tmp_path / "a.mjpg", [(WIDTH, HEIGHT)] * 3 + [(32, 16)] * 3))
    assert media.frames.shape == (6, HEIGHT, WIDTH, 3) and numbers(media) == list(range(6))


# Damage


def damage_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "illava_hooks"]


def packets(path: Path) -> list[tuple[int, int]]:
    """Where the frames of a video begin and end in its file."""
    with av.open(str(path)) as container:
        found = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    return [(begin, begin + size) for begin, size in found]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mjpeg"])
def test_cut_video_gives_what_decodes_and_one_warning(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    if suffix == "mjpeg":
        path = raw_mjpeg(tmp_path / "a.mjpeg", [(WIDTH, HEIGHT)] * 30)
    else:
        path = write_video(tmp_path / f"a.{suffix}", range(30))
    begin, end = packets(path)[20]
    path.write_bytes(path.read_bytes()[: (begin + end) // 2])
    with caplog.at_level(logging.WARNING, "illava_hooks"):
        assert numbers(load_media(path)) == list(range(20))
        (line,) = damage_lines(caplog)
        assert str(path) in line and "; 20 frames used" in line
        assert numbers(load_media(path, 2)) == [0, 19]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_cut_between_two_frames_is_noticed(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / f"a.{suffix}", range(12))
    path.write_bytes(path.read_bytes()[: packets(path)[-1][0]])
    assert numbers(load_media(path)) == list(range(11))
    (line,) = damage_lines(caplog)
    assert "ends too early" in line


def test_whole_videos_are_not_called_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in ("mp4", "mkv", "avi", "ts"):
        load_media(write_video(tmp_path / f"a.{suffix}", range(8)))
    load_media(raw_mjpeg(tmp_path / "a.mjpeg", [(WIDTH, HEIGHT)] * 3))
    assert damage_lines(caplog) == []


def test_damaged_frame_in_the_middle_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "a.mp4", range(12), codec="mjpeg")
    begin, end = packets(path)[6]
    data = path.read_bytes()
    path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    assert numbers(load_media(path)) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert len(damage_lines(caplog)) == 1


def test_video_without_a_frame_that_decodes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(5))
    data = path.read_bytes()
    at = data.index(b"mdat") + 4
    path.write_bytes(data[:at] + b"\xff" * (len(data) - at))
    assert "no frame of it can be decoded" in refusal(path)
    path.write_bytes(data[:at])
    assert "no frame of it can be decoded" in refusal(path)


def test_video_cut_before_its_index(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(5), movflags="")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    assert "cannot be read as an image or a video" in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")  # Pillow adds this to its error
def test_truncated_image(tmp_path: Path, suffix: str, part: float) -> None:
    photo = Image.fromarray(load_sample_images().images[0]).resize((96, 64))
    path = save(tmp_path / f"a.{suffix}", photo)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refusal(path)


def test_truncated_animation(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "a.webp", [100] * 5)
    path.write_bytes(path.read_bytes()[:-40])
    refusal(path)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.png", "a.mp4", "a.mjpeg", "a.h264", "a.mpg", "a.ts", "a.asc"])
@pytest.mark.parametrize("content", [b"", b"Two frogs.\n" * 40, np.random.default_rng(1).bytes(5000), bytes(4096)])
def test_no_picture_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


def test_sound_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert "has no video in it, only sound, a cover picture or stills (HEIC)" in refusal(path)


def test_heic_is_not_taken_for_a_video_of_its_tiles(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.heic", range(3), container="mp4")
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"heic" + data[12:])
    assert "give a video, or a picture as PNG or JPEG" in refusal(path)


# What is refused


@pytest.mark.parametrize("limit", [100, 40])  # Pillow warns above its limit, and raises above twice of it
def test_huge_images(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (15, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"has more than {limit} pixels; scale it down" in refusal(path)
    assert repr(str(path)) in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "h264"])
def test_huge_videos(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / f"a.{suffix}", range(3), codec="libx264")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT)
    assert len(load_media(path).images) == 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    assert "has more than 1535 pixels; scale it down" in refusal(path)


def test_frames_that_grow_huge_mid_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = raw_mjpeg(tmp_path / "a.mjpeg", [(WIDTH, HEIGHT)] * 3 + [(640, 480)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4 * WIDTH * HEIGHT)
    assert numbers(load_media(path)) == [0, 1, 2]
    assert len(damage_lines(caplog)) == 1


def test_no_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert numbers(load_media(write_video(tmp_path / "a.mp4", range(3)))) == [0, 1, 2]


@pytest.mark.parametrize("count", [0, -1])
def test_number_of_frames(tmp_path: Path, count: int) -> None:
    assert f"num_frames is {count}; ask for 1 frame or more" in refusal(tmp_path, num_frames=count)


@pytest.mark.parametrize("path", ["nowhere.mp4", "nowhere\n.mp4", "a\0b", "x" * 5000])
def test_missing_path(path: str) -> None:
    refusal(path)


@pytest.mark.parametrize(
    "path",
    ["http://{host}/a.mp4", "https://{host}/a.mp4", "rtsp://{host}/a", "concat:{clip}|{clip}", "file:{clip}",
     "pipe:0", "pipe:", "subfile,,start,0,end,0,,:{clip}", "crypto:{clip}", "data:image/png;base64,AAAA", "lavfi"],
)  # fmt: skip
def test_protocols_are_not_opened(tmp_path: Path, path: str, server: tuple[str, list[str]]) -> None:
    host, asked = server
    path = path.format(host=host, clip=write_video(tmp_path / "clip.mp4", range(3)))
    assert "does not exist; give a file or a folder on this machine; URLs" in refusal(path)
    assert asked == []


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine and the list of what it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()
        thread.join()


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT3S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("suffix", [None, ".mp4", ".ts"])
@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_reach_neither_files_nor_hosts(
    tmp_path: Path, name: str, suffix: str | None, server: tuple[str, list[str]]
) -> None:
    host, asked = server
    clip = write_video(tmp_path / "clip.ts", range(5))
    path = (tmp_path / name).with_suffix(suffix or Path(name).suffix)
    for target in (f"http://{host}/clip.ts", clip.name, str(clip), f"file:{clip}"):
        path.write_text(PLAYLISTS[name].format(target=target))
        assert "cannot be read as an image or a video" in refusal(path)
    assert asked == []


def test_playlists_of_these_tests_would_work_otherwise(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    """Without the list of containers FFmpeg follows them, so the test above shows something."""
    host, asked = server
    path = tmp_path / "a.m3u8"
    path.write_text(PLAYLISTS["a.m3u8"].format(target=f"http://{host}/clip.ts"))
    with pytest.raises(av.error.FFmpegError), path.open("rb") as file, av.open(file, "r", options={"protocol_whitelist": "http,tcp"}) as out:  # fmt: skip # noqa: E501
        next(out.decode(video=0))
    assert "/clip.ts" in asked


def test_denied_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root nothing is denied, so the refusal of the system is imitated."""
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2)))

    def denied(self: Path, *arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(path) and "; change its permissions" in refusal(path)
    assert repr(str(path)) in refusal(tmp_path)
    monkeypatch.setattr(Path, "iterdir", denied)
    assert "; change its permissions" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_really_denied_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    path.chmod(0)
    assert "; change its permissions" in refusal(path)


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    assert "is neither a file nor a folder" in refusal(tmp_path / "a")


def test_read_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", range(3))

    class Broken(io.BytesIO):
        def read(self, *arguments: Any) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda self, *arguments: Broken())
    assert "Input/output error" in refusal(path)


def test_files_are_closed(tmp_path: Path) -> None:
    """Open files would be ResourceWarnings, which are errors here; the number of descriptors tells it too."""
    paths = [write_video(tmp_path / "a.mp4", range(3)), save(tmp_path / "a.png", Image.new("RGB", (2, 2)))]
    (tmp_path / "bad.mp4").write_bytes(paths[0].read_bytes()[:400])
    before = len(os.listdir("/proc/self/fd"))
    for path in paths:
        load_media(path)
    refusal(tmp_path / "bad.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_limits_of_the_reader_are_on_the_list_of_the_library() -> None:
    assert re.fullmatch(r"[a-z0-9,]+", media_module._CONTAINERS)
    refused = {"hls", "concat", "dash", "image2", "image2pipe", "sdp", "rtsp", "lavfi", "tty"}
    assert not refused & set(media_module._CONTAINERS.split(","))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path: Path) -> None:
    np.testing.assert_allclose(pixel(save(tmp_path / "a.avif", Image.new("RGB", (16, 16), RED))), RED, atol=6)


def test_media_is_frozen(tmp_path: Path) -> None:
    media = load_media(save(tmp_path / "a.png", ImageOps.expand(Image.new("RGB", (2, 2)), 1)))
    with pytest.raises(AttributeError):
        media.kind = "video"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["empty.png", "empty.mp4", "empty"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is an empty file; give an image or a video" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["text.jpg", "text.mp4", "text.png", "text"])
def test_what_a_reader_says_comes_without_its_numbers(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello, this is no picture at all")
    said = refusal(tmp_path / name)
    assert "cannot be read as an image or a video" in said and "Errno" not in said and "returned" not in said
