"""Pictures for a model from a path: an image, a folder of images or a video."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from illava_hooks.errors import InputError

__all__ = ["Media", "load_media", "to_rgb"]

_MAX_IMAGES = 256
_SUFFIXES = set(".apng .avif .bmp .gif .ico .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
# Named one by one: Pillow's EPS reader starts Ghostscript, its MPEG reader claims videos that it cannot decode.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # the further pictures of an MPO (phones) or a TIFF are no animation
# FFmpeg checks both lists before it reads a header: no playlist (hls, dash, concat, sdp) gets to name other files.
_CONTAINERS = "asf,av1,avi,dv,flv,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,vc1,webm"
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
            yield
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _error(path, f"has more than {Image.MAX_IMAGE_PIXELS} pixels", "scale it down first") from error
    except Exception as error:  # readers of damaged files raise whatever trips them: struct.error, SyntaxError, ...
        cure = "change its permissions" if isinstance(error, PermissionError) else "convert it or get a whole copy"
        raise _error(path, f"cannot be read as an image or a video ({error})", cure) from error


def _read_folder(folder: Path) -> Media:
    files = [f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and f.name[0] != "." and f.is_file()]
    # Digits padded, so that img2 comes before img10.
    files.sort(key=lambda f: (re.sub(r"\d+", lambda digits: digits[0].zfill(255), f.name.casefold()), f.name))
    if not files:
        raise _error(folder, "has no images in it", "put .jpg, .png or other images directly into this folder")
    if len(files) > _MAX_IMAGES:
        raise _error(folder, f"has {len(files)} images", f"leave at most {_MAX_IMAGES}, or make a video of them")
    images: list[Image.Image] = []
    for file in files:
        with _reading(file):
            images += _read_picture(file).images
    return Media("image", tuple(file.name for file in files), tuple(images))


def _read_picture(path: Path, num_frames: int | None = None) -> Media:
    """Read an image, or the frames of an animated one; without `num_frames` just the first picture."""
    Image.init()  # fills Image.OPEN; not every build of Pillow reads AVIF
    with path.open("rb") as file, Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN]) as picture:
        if num_frames is None or picture.format not in _ANIMATED or getattr(picture, "n_frames", 1) == 1:
            return Media("image", (path.name,), (to_rgb(picture),))
        times = [0.0]
        for frame in ImageSequence.Iterator(picture):
            frame.load()  # WebP tells the duration of a frame only once it is decoded
            times.append(times[-1] + (frame.info.get("duration") or 100) / 1000)
        chosen = _choose(times[:-1], num_frames)
        images = [to_rgb(frame) for index, frame in enumerate(ImageSequence.Iterator(picture)) if index in chosen]
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture upright, in eight bits, transparent parts white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        usual = (1.0, 255.0, 65535.0) if picture.mode == "F" else (65535.0,)  # white: the first that no value exceeds
        white = min((end for end in usual if low == 0.0 and high <= end), default=high)
        picture = Image.fromarray(np.interp(values, (low, white), (0.0, 255.0)).round().astype(np.uint8))
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


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
        logging.getLogger("illava_hooks").warning("%r: damaged (%s); %d frames used", str(path), damage[0], len(clock))
    times = [(pts - (clock[0][0] or 0)) * unit for pts, unit, _ in clock if pts is not None]
    if len(times) < len(clock) or times != sorted(times) or times[-1] == 0:  # presentation times that are unusable
        times = [seconds for *_, seconds in clock]
    chosen = _choose(times, num_frames)
    images: list[Image.Image] = []
    for index, (frame, *_) in enumerate(_decode(path, [])):
        if index in chosen:  # a phone notes turns beside its frames; older PyAV does not tell them
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            images.append(picture.rotate(getattr(frame, "rotation", 0), expand=True))
    images = [image if image.size == images[0].size else image.resize(images[0].size) for image in images]
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))


def _decode(path: Path, damage: list[str]) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Give each frame that decodes, its unit of time and the frame rate; add to `damage` what does not."""
    limit = min(Image.MAX_IMAGE_PIXELS or 2**30, 2**30 - 1)
    # An open file instead of its name: to FFmpeg, names can be URLs and protocols such as "concat:".
    with path.open("rb") as file, av.open(file, "r", container_options=_OPTIONS) as container:
        if not container.streams.video or container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1"):
            raise _error(path, "holds only sound or stills (HEIC)", "give a video, or a picture as PNG or JPEG")
        stream = container.streams.video[0]
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
