"""Where images come from: scikit-learn's digits, torchvision's sets, .npz files, folders."""

import lzma
import tokenize
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, Field
from sklearn.datasets import load_digits

from evaluation.bounded import check_file
from evaluation.errors import DAMAGED, InputError
from evaluation.memory import available_bytes, require_room

MIN_SIDE_PX = 4
MOST_SIDE_PX = 4096
MOST_IMAGES = 10**9
DEFAULT_ROOT = "~/.cache/paretoblocks"
TRAIN, VALID, TEST = range(3)
PARTS = {"train": TRAIN, "val": VALID, "test": TEST}  # their names in .npz files and folders
BAD_IMAGE = (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning)
# Not all that Pillow knows: for EPS it starts another program, and others are seldom tested.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MOST_IMAGE_BYTES = 2**30
MOST_PIXELS = 80_000_000  # below Pillow's own limit, where it only warns
BAD_NPZ = (*DAMAGED, tokenize.TokenError, zipfile.BadZipFile, lzma.LZMAError)

Name = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "mnist", "npz", "folder"]
Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]  # (N, H, W) grey or (N, H, W, 3) RGB


class AugmentConfig(BaseModel, frozen=True, extra="forbid"):
    """Random changes of training images, drawn for each image anew."""

    # black border, from which a crop takes the original size
    pad_px: int = Field(default=0, ge=0, le=MOST_SIDE_PX)
    flip: bool = False  # mirror left to right with probability 1/2
    # side of a square set to the mean; 0 = off
    cutout_px: int = Field(default=0, ge=0, le=MOST_SIDE_PX)


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which images, and how they are divided; fractions are for parts that the source lacks."""

    name: Name = "digits"
    root: str | None = None  # the .npz file, the folder, or where torchvision's sets are
    download: bool = False  # let torchvision download its set into root
    # square; folder needs it
    image_size_px: int | None = Field(default=None, ge=MIN_SIDE_PX, le=MOST_SIDE_PX)
    color: Literal["auto", "grey", "rgb"] = "auto"  # auto: grey only if every image is grey
    valid_fraction: float = Field(default=0.25, gt=0, lt=1)  # of train, becomes search_valid
    test_fraction: float = Field(default=0.2, gt=0, lt=1)  # of all images
    # stratified subset; None = all
    max_train_images: int | None = Field(default=None, ge=1, le=MOST_IMAGES)
    max_test_images: int | None = Field(default=None, ge=1, le=MOST_IMAGES)
    augment: AugmentConfig = AugmentConfig()  # for whoever calls batches


class Source(NamedTuple):
    """All images of a set, and the part that its maker gave each to."""

    images: Pixels
    labels: Integers
    part: Integers  # TRAIN, VALID or TEST for each image
    class_names: tuple[str, ...]


def _join(parts: dict[str, tuple[Pixels, Integers]], class_names: tuple[str, ...]) -> Source:
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    part = np.repeat([PARTS[name] for name in parts], [len(pair[1]) for pair in parts.values()])
    return Source(images, labels, part, class_names)


def read_source(config: DataConfig) -> Source:
    """Read every image of a set.

    Raises:
        InputError: If the source is missing or damaged; names file or value.
    """
    return _READERS.get(config.name, _read_torchvision)(config)


def fit(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Resize until `size` (width, height) is just covered, and crop the centre."""
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR))


def require(condition: bool, message: str) -> None:
    """Raise an InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_images_fit(count: int, size: tuple[int, int], channels: int) -> None:
    """Refuse so many images of `size` (width, height) that the memory could not hold them."""
    what = f"data.image_size_px: {count:,} images of {size[0]}x{size[1]} pixels"
    require_room(what, count * size[0] * size[1] * channels, "cpu")


def _read_digits(config: DataConfig) -> Source:
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _join({"train": (images, digits.target)}, tuple(map(str, digits.target_names)))


def load_torchvision() -> Any:
    """Import torchvision, which takes seconds and fails where it does not fit torch.

    Raises:
        InputError: If it cannot be imported.
    """
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision cannot be imported beside this torch ({error}); see `paretoblocks doctor`"
        ) from error
    return torchvision


def _read_torchvision(config: DataConfig) -> Source:
    datasets = load_torchvision().datasets
    reader = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fashion_mnist": datasets.FashionMNIST,
        "mnist": datasets.MNIST,
    }[config.name]
    root = Path(config.root or DEFAULT_ROOT).expanduser()
    try:
        train, test = (reader(root, train=part, download=config.download) for part in (True, False))
    except (OSError, RuntimeError) as error:
        fetch = "" if config.download else "; data.download=true fetches it"
        raise InputError(f"{config.name}, data.root={root}: {error}{fetch}") from error
    parts = {
        "train": (np.asarray(train.data), np.asarray(train.targets)),
        "test": (np.asarray(test.data), np.asarray(test.targets)),
    }
    return _join(parts, tuple(train.classes))


def _read_npz(config: DataConfig) -> Source:
    """MedMNIST's layout: `train_images`, `train_labels`; perhaps `val_*`, `test_*`, class names."""
    path = Path(config.root or "").expanduser()
    if path.is_file():
        check_file(path, available_bytes("cpu"))
    undamaged = path.is_file() and zipfile.is_zipfile(path)
    require(undamaged, f"data.root={config.root}: expected an undamaged .npz file")
    arrays: dict[str, NDArray[Any]] = {}
    key = "list of keys"
    try:
        _check_npz(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for key in archive.files:
                arrays[key] = np.asarray(archive[key])  # a member that is no array comes as bytes
    except InputError:
        raise
    except BAD_NPZ as error:
        raise InputError(f"{path}, {key}: cannot be read: {error}") from error
    found = {"train", *(key.partition("_")[0] for key in arrays)}
    parts = {name: _npz_part(arrays, name, path) for name in PARTS if name in found}
    shapes = {images.shape[1:] for images, _ in parts.values()}
    require(len(shapes) == 1, f"{path}: expected parts with images of one shape, got {shapes}")
    labels = np.unique(np.concatenate([labels for _, labels in parts.values()]))
    class_names = arrays.get("class_names", np.arange(len(labels)))
    return _join(parts, tuple(map(str, class_names.flatten())))


def _check_npz(path: Path) -> None:
    """Refuse an archive whose members are declared larger than the memory that is free.

    The first bytes of a member are believed by NumPy only as far as the archive's own sizes go.
    """
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    require(
        declared <= (free := available_bytes("cpu")),
        f"{path}: its arrays are declared as {declared:,} bytes, {free:,} are free",
    )


def _npz_part(arrays: dict[str, NDArray[Any]], name: str, path: Path) -> tuple[Pixels, Integers]:
    for key in (f"{name}_images", f"{name}_labels"):
        require(key in arrays, f"{path}: expected the key {key}, got {', '.join(arrays)}")
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    require(
        shaped and images.dtype == np.uint8 and min(images.shape[1:3]) >= MIN_SIDE_PX,
        f"{path}, {name}_images: expected uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), H and W "
        f"at least {MIN_SIDE_PX}, got {images.dtype} {images.shape}",
    )
    count = len(images)
    require(
        count > 0 and labels.dtype.kind in "iu" and labels.shape in ((count,), (count, 1)),
        f"{path}, {name}_labels: expected an integer for each of {count} images, at least one, "
        f"got {labels.dtype} {labels.shape}",
    )
    return images, labels.reshape(-1).astype(np.int64)


def _read_folder(config: DataConfig) -> Source:
    """A folder per class; or `train`, `test` and perhaps `val`, each with a folder per class."""
    root, side_px = Path(config.root or "").expanduser(), config.image_size_px
    require(
        config.root is not None and root.is_dir(),
        f"data.root={config.root}: expected a folder with a folder per class",
    )
    if side_px is None:
        raise InputError("data.image_size_px: expected a size for data.name=folder, got None")
    found = {path.name for path in root.glob("[!.]*")}
    given = found in ({"train", "test"}, set(PARTS))
    folders = {name: root / name for name in PARTS if name in found} if given else {"train": root}
    files = {name: _list_classes(folder) for name, folder in folders.items()}
    names = {name: tuple(classes) for name, classes in files.items()}
    require(len(set(names.values())) == 1, f"{root}: parts differ in classes: {names}")
    count = sum(len(paths) for classes in files.values() for paths in classes.values())
    require_images_fit(count, (side_px, side_px), channels=3)
    parts = {}
    for name, classes in files.items():
        paths = [path for paths in classes.values() for path in paths]
        with ThreadPoolExecutor() as pool:
            read = partial(read_image, size=(side_px, side_px))
            images = np.stack(list(pool.map(read, paths)))
        parts[name] = images, np.repeat(np.arange(len(classes)), [*map(len, classes.values())])
    return _join(parts, names["train"])


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each class, hidden ones left out, in the order of their names."""
    classes = {}
    for entry in sorted(folder.glob("[!.]*")):
        _check_name(entry)
        require(entry.is_dir(), f"{entry}: expected nothing but class folders here, got a file")
        classes[entry.name] = sorted(entry.glob("[!.]*"))
        require(len(classes[entry.name]) > 0, f"{entry}: expected images of this class, got none")
    require(len(classes) > 1, f"{folder}: expected 2 or more class folders, got {[*classes]}")
    return classes


def _check_name(path: Path) -> None:
    """Refuse a name whose bytes are no text: it could be neither printed nor written as JSON."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path.parent}: the name {path.name!a} is not UTF-8") from error


def read_image(path: Path, size: tuple[int, int], mode: str = "RGB") -> Pixels:
    """Read a picture: upright by EXIF, 16-bit grey scaled to 8, transparency on white.

    Args:
        path: The file.
        size: (width, height), see `fit`.
        mode: Of Pillow, `RGB` or `L`.

    Returns:
        (H, W, 3) or (H, W).

    Raises:
        InputError: If it is no undamaged image, or too small; names the file.
    """
    try:
        require(path.is_file(), f"{path}: expected an image, got no file")  # a pipe would wait
        check_file(path, MOST_IMAGE_BYTES)
        with Image.open(path, formats=FORMATS) as stored:
            pixels_n = stored.width * stored.height
            require(
                pixels_n <= MOST_PIXELS,
                f"{path}: expected at most {MOST_PIXELS:,} pixels, got {pixels_n:,}",
            )
            image = ImageOps.exif_transpose(stored)
        require(image.mode != "F", f"{path}: expected integer pixels, got floating-point ones")
        if image.mode.startswith("I"):  # Pillow would clip its 16 bits
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
        image = image.convert("RGB")
    except InputError:
        raise
    except BAD_IMAGE as error:
        raise InputError(f"{path}: expected an undamaged image: {error}") from error
    width, height = image.size
    require(
        min(width, height) >= MIN_SIDE_PX,
        f"{path}: expected at least {MIN_SIDE_PX} x {MIN_SIDE_PX} px, got {width} x {height}",
    )
    pixels = fit(image, size)
    return pixels if mode == "RGB" else np.asarray(Image.fromarray(pixels).convert(mode))


_READERS = {"digits": _read_digits, "npz": _read_npz, "folder": _read_folder}
