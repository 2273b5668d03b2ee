"""Pictures for a model from a path: an image, a folder of images or a video."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError

from illava_hooks.errors import InputError

__all__ = ["Media", "load_media", "to_rgb"]

logger = logging.getLogger("illava_hooks")

_MAX_IMAGES = 256
# Named one by one: Pillow's EPS reader starts Ghostscript, its MPEG reader claims videos that it cannot decode.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # the further pictures of an MPO (phones) or a TIFF are no animation
# FFmpeg checks both lists before it reads a header: no playlist (hls, dash, concat, sdp) gets to name other files.
_CONTAINERS = "asf,av1,avi,dv,flv,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,vc1,webm"
#: FFmpeg's dispositions of streams that are no video: cover pictures, thumbnails, stills.
_STILL = 0x400 | 0x800 | 0x100000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}


@dataclass(frozen=True, slots=True)
class Media:
    """What a path holds: one or more images, all in one prompt, or a video.

    Attributes:
        names: The names of the files.
        images: RGB images; of a video its chosen frames, in order.
        times: Seconds of each frame of a video since its first one; empty for images.
    """

    kind: Literal["image", "video"]
    names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    times: tuple[float, ...] = ()

    @property
    def frames(self) -> NDArray[np.uint8]:
        """The frames of a video, (F, H, W, 3)."""
        return np.stack([np.asarray(image, dtype=np.uint8) for image in self.images])


def load_media(path: str | Path, num_frames: int = 32) -> Media:
    """Read an image, a folder of images (in natural name order) or a video.

    Args:
        path: A file or a folder on this machine. An animated image is a video, but in a folder its first frame.
        num_frames: Frames of a video, evenly spaced in time from its first to its last one (for 1 the middle one);
            fewer where it has fewer, or where one is the nearest to several of these times.

    Raises:
        InputError: The path cannot be read; one line says why and what to do.
    """
    if num_frames < 1:
        raise _error(path, f"num_frames is {num_frames}", "ask for 1 frame or more")
    file = Path(path)
    with _reading(file):
        if file.is_dir():
            return _read_folder(file)
        if not file.is_file():
            what = "is neither a file nor a folder" if file.exists() else "does not exist"
            raise _error(path, what, "give a file or a folder on this machine; URLs and pipes are not read")
        if not file.stat().st_size:
            raise _error(path, "is an empty file", "give an image or a video")
        # A stream of JPEGs begins like one JPEG, so here the content does not tell the two apart.
        if file.suffix.lower() not in (".mjpeg", ".mjpg"):
            with suppress(UnidentifiedImageError):
                return _read_picture(file, num_frames)
        return _read_video(file, num_frames)


def _error(path: str | Path, what: str, cure: str) -> InputError:
    return InputError(f"{str(path)!r}: {' '.join(what.split())}; {cure}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with `path` into an `InputError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Cameras write EXIF that is none: of no use here but for the turn.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
            yield
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _error(path, f"has more than {Image.MAX_IMAGE_PIXELS} pixels", "scale it down first") from error
    except Exception as error:  # readers of damaged files raise whatever trips them: struct.error, SyntaxError, ...
        cure = "change its permissions" if isinstance(error, PermissionError) else "convert it or get a whole copy"
        reason = getattr(error, "strerror", None) or error  # without libav's numbers and names
        raise _error(path, f"cannot be read as an image or a video ({reason})", cure) from error


def _read_folder(folder: Path) -> Media:
    seen = sorted(f for f in folder.iterdir() if f.name[0] != ".")
    suffixes = _suffixes()
    files = [f for f in seen if f.suffix.lower() in suffixes and f.is_file()]
    # Digits padded, so that img2 comes before img10.
    files.sort(key=lambda f: (re.sub(r"\d+", lambda digits: digits[0].zfill(255), f.name.casefold()), f.name))
    if not files:
        raise _error(folder, "has no images in it", "put .jpg, .png or other images directly into this folder")
    if len(files) > _MAX_IMAGES:
        raise _error(folder, f"has {len(files)} images", f"leave at most {_MAX_IMAGES}, or make a video of them")
    if left := [f.name for f in seen if f not in files]:
        named = ", ".join(map(repr, left[:8])) + (" ..." if len(left) > 8 else "")
        logger.warning(
            "%r: %d left out, since only images with a usual ending are read: %s", str(folder), len(left), named
        )
    images: list[Image.Image] = []
    for file in files:
        with _reading(file):
            images += _read_picture(file).images
    return Media("image", tuple(file.name for file in files), tuple(images))


def _suffixes() -> set[str]:
    """The endings of the formats that are read."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS}
    return known | {".avif", ".pnm", ".jfif"}  # AVIF is not in every build: then the file's own error says so


def _read_picture(path: Path, num_frames: int | None = None) -> Media:
    """Read an image, or the frames of an animated one; without `num_frames` just the first picture."""
    Image.init()  # fills Image.OPEN; not every build of Pillow reads AVIF
    with path.open("rb") as file, Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN]) as picture:
        first = int(getattr(picture, "default_image", False))  # of an APNG: shown by who knows no animation, no frame
        if num_frames is None or picture.format not in _ANIMATED or getattr(picture, "n_frames", 1) - first == 1:
            picture.seek(first)
            return Media("image", (path.name,), (to_rgb(picture),))
        times = [0.0]
        for frame in islice(ImageSequence.Iterator(picture), first, None):
            frame.load()  # WebP tells the duration of a frame only once it is decoded
            times.append(times[-1] + (frame.info.get("duration") or 100) / 1000)
        chosen = _choose(times[:-1], num_frames)
        frames = islice(ImageSequence.Iterator(picture), first, None)
        images = [to_rgb(frame) for index, frame in enumerate(frames) if index in chosen]
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture upright, in eight bits, transparent parts white."""
    clear = _transparent_value(picture)
    picture = _upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        usual = (1.0, 255.0, 65535.0) if picture.mode == "F" else (65535.0,)  # white: the first that no value exceeds
        white = min((end for end in usual if low == 0.0 and high <= end), default=high)
        shades = np.interp(values, (low, white), (0.0, 255.0)).round().astype(np.uint8)
        picture = Image.fromarray(shades if clear is None else np.where(values == clear, np.uint8(255), shades))
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        if clear is not None:
            picture.info["transparency"] = clear
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def _transparent_value(picture: Image.Image) -> int | tuple[int, ...] | None:
    """The one colour of a PNG without a palette that is transparent, in the values that its pixels have once loaded.

    Pillow scales the pixels of one, two, four bits and of 16 bits in colour to eight, and this colour not.
    """
    value = picture.info.get("transparency")
    if picture.format != "PNG" or picture.mode == "P" or not isinstance(value, int | tuple):
        return None
    tile: Any = getattr(picture, "tile", None)
    if not tile:
        return None
    stored = tile[0][3]
    if isinstance(value, tuple):
        return tuple(part >> 8 for part in value) if stored == "RGB;16B" else value
    return value * {"1": 255, "L;2": 85, "L;4": 17}.get(stored if isinstance(stored, str) else "", 1)


def _upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says; of EXIF nothing else is read, since cameras write much that is no EXIF."""
    picture.load()
    try:
        orientation = picture.getexif().get(0x0112)
    except Exception:  # damaged EXIF raises whatever trips its reader; a viewer shows the picture as it lies
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _choose(times: Sequence[float], count: int) -> list[int]:
    if count >= len(times):
        return list(range(len(times)))
    targets = np.linspace(times[0], times[-1], count) if count > 1 else [(times[0] + times[-1]) / 2]
    # Rounded, so that of two frames equally far from a target it is always the earlier one.
    return sorted({int(np.abs(np.subtract(times, target)).round(6).argmin()) for target in targets})


def _read_video(path: Path, num_frames: int) -> Media:
    """Decode twice, first for the times alone: headers may tell no length or a wrong one, and frames are large."""
    damage: list[str] = []
    clock = [(frame.pts, unit, index / rate) for index, (frame, unit, rate) in enumerate(_decode(path, damage))]
    if not clock:
        raise _error(path, f"no frame of it can be decoded ({(damage or ['it is empty'])[0]})", "get a complete copy")
    if damage:
        logger.warning("%r: damaged (%s); %d frames used", str(path), damage[0], len(clock))
    times = [(pts - (clock[0][0] or 0)) * unit for pts, unit, _ in clock if pts is not None]
    if len(times) < len(clock) or times != sorted(times) or times[-1] == 0:  # presentation times that are unusable
        times = [seconds for *_, seconds in clock]
    chosen = _choose(times, num_frames)
    images: list[Image.Image] = []
    for index, (frame, *_) in enumerate(_decode(path, [])):
        if index in chosen:  # a phone notes turns beside its frames; older PyAV does not tell them
            images.append(_as_displayed(Image.fromarray(frame.to_ndarray(format="rgb24")), _display_matrix(frame)))
    images = [image if image.size == images[0].size else image.resize(images[0].size) for image in images]
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))


def _display_matrix(frame: av.VideoFrame) -> NDArray[np.float64] | None:
    """``(2, 2)``: where the steps to the right and down in a frame lead on the screen; None: as they are."""
    sides: Any = frame.side_data
    data = next((side for side in sides if side.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return None
    values = np.frombuffer(bytes(data), np.int32)
    return values[[0, 3, 1, 4]].reshape(2, 2).astype(np.float64)


def _as_displayed(picture: Image.Image, matrix: NDArray[np.float64] | None) -> Image.Image:
    """A frame turned and mirrored by the linear part of a display matrix; one that maps all to a line says nothing."""
    if matrix is None or abs(np.linalg.det(matrix)) < 1e-6 * np.abs(matrix).max() ** 2 or not matrix.any():
        return picture
    if np.linalg.det(matrix) < 0:  # mirrored first, what is left is a rotation
        picture, matrix = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), matrix * (-1, 1)
    degrees = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))  # clockwise: y points down
    square = round(degrees / 90) * 90
    return picture.rotate(-(square if abs(degrees - square) < 1 else degrees), expand=True)


def _decode(path: Path, damage: list[str]) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Give each frame that decodes, its unit of time and the frame rate; add to `damage` what does not."""
    limit = min(Image.MAX_IMAGE_PIXELS or 2**30, 2**30 - 1)
    # An open file instead of its name: to FFmpeg, names can be URLs and protocols such as "concat:".
    with path.open("rb") as file, av.open(file, "r", container_options=_OPTIONS) as container:
        moving = [stream for stream in container.streams.video if not int(getattr(stream, "disposition", 0)) & _STILL]
        if not moving or container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1"):
            reason = "has no video in it, only sound, a cover picture or stills (HEIC)"
            raise _error(path, reason, "give a video, or a picture as PNG or JPEG")
        stream = moving[0]
        if stream.width * stream.height > limit:
            raise Image.DecompressionBombError
        stream.codec_context.options = {"max_pixels": str(2 * limit)}  # twice, as decoders round sizes up
        stream.thread_type = "AUTO"
        unit, rate = float(stream.time_base or 0), float(stream.guessed_rate or 25)
        packets, read, last = container.demux(stream), 0, False
        while not last:
            try:
                packet = next(packets, None)  # None after an error too; it makes the decoder give all it still holds
                last = packet is None
                if packet is None or (packet.size and not packet.is_corrupt):
                    read += not last
                    yield from ((frame, unit, rate) for frame in stream.decode(packet))
                damage += ["a frame is incomplete"] * bool(packet and packet.is_corrupt)
            except av.error.FFmpegError as error:
                damage.append(str(error))
        # Two containers tell where they should end: MP4 lists its packets, Matroska's segment begins with its size.
        file.seek(0)
        segment = re.match(rb"\x1a\x45\xdf\xa3.{,99}?\x18\x53\x80\x67\x01(?!\xff{7})(.{7})", file.read(200), re.DOTALL)
        size = segment.end() + int.from_bytes(segment[1], "big") if segment else 0
        if read < len(getattr(stream, "index_entries", ())) or path.stat().st_size < size:
            damage.append("it ends too early")
