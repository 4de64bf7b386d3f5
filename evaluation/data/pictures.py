"""One picture file -> pixels: format, orientation, depth, transparency; fitted to a frame."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from evaluation.errors import DAMAGED, InputError, require
from evaluation.files.bounded import check_file
from evaluation.workers.memory import require_room

MIN_SIDE_PX = 4
# Not all that Pillow knows: for EPS it starts another program, and others are seldom tested.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_BYTES = 2**30
MAX_PIXELS = 80_000_000  # below Pillow's own limit, where it only warns
# Of the depths in bits that cameras, scanners and detectors have: 8, 10, 12, 14, 16.
WHITES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)
DEEPEST = WHITES[-1]  # the largest value that is read
BAD_IMAGE = (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning)

Fit = Literal["crop", "pad", "squash"]  # see `fit`
FITS: dict[str, Fit] = {"crop": "crop", "pad": "pad", "squash": "squash"}  # as text names them
Pixels = NDArray[np.uint8]  # (N, H, W) grey or (N, H, W, 3) RGB
Size = tuple[int, int]  # (width, height), px


class Picture(NamedTuple):
    """What was read of a file.

    Attributes:
        pixels: (H, W, 3) or (H, W), in the frame.
        size: (width, height) of the picture in the file, px, upright.
        largest: The largest value in the file if it has more than 8 bits, else None.
        has_pages: Whether it is a TIFF file with further pages, which are not read.
    """

    pixels: Pixels
    size: Size
    largest: int | None
    has_pages: bool


def require_images_fit(count: int, size: Size, channels: int) -> None:
    """Refuse so many images of `size` (width, height) that the memory could not hold them."""
    what = f"data.image_size_px: {count:,} images of {size[0]}x{size[1]} pixels"
    require_room(what, count * size[0] * size[1] * channels, "cpu")


def white_of(largest: int) -> int:
    """Return the value that stands for white where `largest` is the largest: that of its depth.

    Args:
        largest: In [0, DEEPEST].

    Returns:
        The first of WHITES that is no smaller.
    """
    return next(white for white in WHITES if largest <= white)


def box_in(frame: Size, size: Size, how: Fit) -> tuple[int, int, int, int]:
    """Return where in a frame a picture lies that was fitted to it: all of it, unless padded.

    Args:
        frame: (width, height).
        size: (width, height) of the picture.
        how: See `fit`.

    Returns:
        Left, top, right, bottom, px.
    """
    if how != "pad":
        return 0, 0, *frame
    scale = min(frame[0] / size[0], frame[1] / size[1])
    width, height = (
        min(most, max(1, round(side * scale))) for side, most in zip(size, frame, strict=True)
    )
    left, top = (frame[0] - width) // 2, (frame[1] - height) // 2
    return left, top, left + width, top + height


def fit(image: Image.Image, frame: Size, how: Fit = "crop") -> Pixels:
    """Bring a picture to the size of a frame.

    Args:
        image: Of mode `L` or `RGB`.
        frame: (width, height).
        how: `crop`: resized until the frame is just covered, and its centre taken; `pad`: resized
            until it just fits, centred on black; `squash`: resized to the frame, its proportions
            not kept.
    """
    if how == "crop":
        return np.asarray(ImageOps.fit(image, frame, Image.Resampling.BILINEAR))
    left, top, right, bottom = box_in(frame, image.size, how)
    black = Image.new(image.mode, frame)
    black.paste(image.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(black)


def read_picture(path: Path, frame: Size, how: Fit = "crop", white: int = DEEPEST) -> Picture:
    """Read a picture: upright by EXIF, deep grey scaled to 8 bits, transparency on white.

    Args:
        path: The file.
        frame: (width, height), see `fit`.
        how: See `fit`.
        white: The value that becomes 255 in pictures of more than 8 bits; larger ones do as well.

    Raises:
        InputError: If it is no undamaged image, or too small; names the file.
    """
    try:
        is_file = path.is_file()  # a pipe would wait
        what = "" if is_file or not path.is_dir() else " but a folder"
        require(is_file, f"{path}: expected an image, got no file{what}")
        check_file(path, MAX_IMAGE_BYTES)
        image, largest, has_pages = _decode(path, white)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: expected an undamaged image: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        ) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except BAD_IMAGE as error:
        raise InputError(f"{path}: expected an undamaged image: {error}") from error
    width, height = image.size
    require(
        min(width, height) >= MIN_SIDE_PX,
        f"{path}: expected at least {MIN_SIDE_PX} x {MIN_SIDE_PX} px, got {width} x {height}",
    )
    return Picture(fit(image, frame, how), image.size, largest, has_pages)


def read_image(
    path: Path, frame: Size, mode: str = "RGB", how: Fit = "crop", white: int = DEEPEST
) -> Pixels:
    """Read the pixels of a picture, see `read_picture`.

    Args:
        path: The file.
        frame: (width, height).
        mode: Of Pillow, `RGB` or `L`.
        how: See `fit`.
        white: See `read_picture`.

    Returns:
        (H, W, 3) or (H, W).

    Raises:
        InputError: If it is no undamaged image, or too small; names the file.
    """
    pixels = read_picture(path, frame, how, white).pixels
    return pixels if mode == "RGB" else np.asarray(Image.fromarray(pixels).convert(mode))


def _decode(path: Path, white: int) -> tuple[Image.Image, int | None, bool]:
    """Return the picture in RGB, and the rest of what `Picture` says of the file."""
    with Image.open(path, formats=FORMATS) as stored:
        pixels_n = stored.width * stored.height
        require(
            pixels_n <= MAX_PIXELS,
            f"{path}: expected at most {MAX_PIXELS:,} pixels, got {pixels_n:,}",
        )
        has_pages = stored.format == "TIFF" and getattr(stored, "is_animated", False)
        image = ImageOps.exif_transpose(stored)
    require(image.mode != "F", f"{path}: expected integer pixels, got floating-point ones")
    largest = None
    if image.mode.startswith("I"):  # Pillow would clip its 16 bits
        values = np.asarray(image)
        smallest, largest = int(values.min()), int(values.max())
        require(
            smallest >= 0 and largest <= DEEPEST,
            f"{path}: expected values from 0 to {DEEPEST:,}, got {smallest:,} to {largest:,}",
        )
        scaled = values.clip(0, white).astype(np.uint32) * 255 // white
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return image.convert("RGB"), largest, has_pages
