"""Pictures for a model from a path: an image, a folder of images or a video."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from illava_hooks.errors import InputError

__all__ = ["Media", "load_media"]

_LOGGER = logging.getLogger("illava_hooks")
_MAX_IMAGES = 256
_SUFFIXES = ".apng .avif .bmp .dib .gif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
# Named one by one: Pillow's EPS reader starts Ghostscript, its MPEG reader claims videos that it cannot decode.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # the further pictures of an MPO (phones) or a TIFF are no animation
# FFmpeg checks both lists before it reads a header: no playlist (hls, dash, concat, sdp) gets to name other files.
_CONTAINERS = "asf,av1,avi,dv,flv,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,vc1,webm"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
_STILL_BRANDS = ("avif", "heic", "heix", "mif1")  # FFmpeg opens such a picture as a video of its tiles


@dataclass(frozen=True, slots=True)
class Media:
    """What a path holds.

    Attributes:
        kind: "image" (one or more images, all in one prompt) or "video".
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
        if self.kind != "video":
            raise _error(self.names[0], "is an image and has no frames", "use the images")
        return np.stack([np.asarray(image, dtype=np.uint8) for image in self.images])


def load_media(path: str | Path, num_frames: int = 32) -> Media:
    """Read an image, a folder of images (in natural name order) or a video.

    Args:
        path: A file or a folder on this machine. An animated image is a video, but in a folder its first frame.
        num_frames: Frames of a video, evenly spaced in time from its first to its last one (for 1 the middle one).
            There are fewer where the video has fewer, or where one frame is the nearest to several of the times.

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
    except PermissionError as error:
        raise _error(path, "may not be read by this user", "change its permissions or copy it") from error
    except Exception as error:  # readers of damaged files raise whatever trips them: struct.error, SyntaxError, ...
        what = f"cannot be read as an image or a video ({error})"
        raise _error(path, what, "check that it is complete or convert it, e.g. to PNG or MP4") from error


def _read_folder(folder: Path) -> Media:
    found = [file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES.split() and file.is_file()]
    files = sorted((file for file in found if not file.name.startswith(".")), key=_natural)
    if not files:
        raise _error(folder, "has no images in it", "put .jpg, .png or other images directly into this folder")
    if len(files) > _MAX_IMAGES:
        raise _error(folder, f"has {len(files)} images", f"leave at most {_MAX_IMAGES}, or make a video of them")
    images = []
    for file in files:
        with _reading(file):
            images += _read_picture(file).images
    return Media("image", tuple(file.name for file in files), tuple(images))


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name.casefold())  # text and digits alternate, so like is compared with like
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def _read_picture(path: Path, num_frames: int | None = None) -> Media:
    """Read an image, or the frames of an animated one; without `num_frames` just the first picture."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # not every build of Pillow reads AVIF
    with path.open("rb") as file, Image.open(file, formats=formats) as picture:
        length = getattr(picture, "n_frames", 1) if picture.format in _ANIMATED else 1
        if length == 1 or num_frames is None:
            return Media("image", (path.name,), (_to_rgb(picture),))
        times, images = [0.0], []
        for index in range(length):
            picture.seek(index)
            picture.load()  # WebP tells the duration of a frame only once it is decoded
            times.append(times[-1] + (picture.info.get("duration") or 100) / 1000)
        chosen = _choose(times[:-1], num_frames)
        for index in chosen:
            picture.seek(index)
            images.append(_to_rgb(picture))
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))


def _to_rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_to_8_bits(np.asarray(picture, dtype=np.float64), picture.mode == "F"))
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _to_8_bits(values: NDArray[np.float64], floating: bool) -> NDArray[np.uint8]:
    """Scale to 0..255 from the smallest usual range that holds the values, else from their own."""
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = min(values.min(), 0.0), values.max()
    usual = [top for top in ((1.0, 255.0, 65535.0) if floating else (65535.0,)) if low == 0.0 and high <= top]
    return ((values - low) * (255.0 / ((usual or [high])[0] - low or 1.0))).round().astype(np.uint8)


def _choose(times: Sequence[float], count: int) -> list[int]:
    if count >= len(times):
        return list(range(len(times)))
    targets = np.linspace(times[0], times[-1], count) if count > 1 else [(times[0] + times[-1]) / 2]
    # Rounded, so that of two frames equally far from a target it is always the earlier one.
    return sorted({int(np.abs(np.subtract(times, target)).round(6).argmin()) for target in targets})


def _read_video(path: Path, num_frames: int) -> Media:
    """Decode twice, first for the times alone: headers may tell no length or a wrong one, and frames are large."""
    damage: list[str] = []
    shown, counted = [], []
    for frame, seconds in _decode(path, damage):
        shown.append(frame.time)
        counted.append(seconds)
    if not shown:
        raise _error(path, f"no frame of it can be decoded ({(damage or ['it is empty'])[0]})", "get a complete copy")
    if damage:
        _LOGGER.warning("%r: is damaged (%s); its %d whole frames are used", str(path), damage[0], len(shown))
    usable = None not in shown and shown == sorted(shown) and (shown[0] < shown[-1] or len(shown) == 1)
    times = [time - shown[0] for time in shown] if usable else counted
    chosen = _choose(times, num_frames)
    frames = islice(_decode(path, []), chosen[-1] + 1)
    # Recent PyAV tells the quarter turns that a phone notes beside its frames.
    images = [(frame.to_image(), getattr(frame, "rotation", 0)) for frame, _ in frames]
    return Media("video", (path.name,), tuple(images), tuple(times[index] for index in chosen))
