"""Where images come from: scikit-learn's digits, torchvision's sets, .npz files, folders."""

import lzma
import tokenize
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.data.config import DataConfig
from evaluation.data.folders import list_pictures, read_pictures
from evaluation.data.parts import PARTS, part_of
from evaluation.data.pictures import DEEPEST, MIN_SIDE_PX, Pixels
from evaluation.errors import DAMAGED, InputError, require
from evaluation.files.bounded import check_file
from evaluation.words import named
from evaluation.workers.memory import available_bytes

DEFAULT_ROOT = "~/.cache/paretoblocks"
DIGITS = "sklearn/datasets/data/digits.csv.gz"  # scikit-learn itself takes seconds to import
DIGITS_SIDE_PX, DIGITS_WHITE = 8, 16
BAD_NPZ = (*DAMAGED, tokenize.TokenError, zipfile.BadZipFile, lzma.LZMAError)

Integers = NDArray[np.int64]


class Source(NamedTuple):
    """All images of a set, and the part that its maker gave each to.

    Attributes:
        images: (N, H, W) or (N, H, W, 3).
        labels: (N,), from 0 up.
        part: (N,), TRAIN, VALID or TEST.
        class_names: In the order of the labels.
        sizes: (N, 2), width and height of each picture before it was fitted, px.
        name: Index -> what a person knows the image by.
        white: The value that became 255 in pictures of more than 8 bits.
        notes: What a person should know.
    """

    images: Pixels
    labels: Integers
    part: Integers
    class_names: tuple[str, ...]
    sizes: Integers
    name: Callable[[int], str]
    white: int = DEEPEST
    notes: tuple[str, ...] = ()


class Arrays(NamedTuple):
    """The images and labels of one part, and what a person knows the part by."""

    images: Pixels
    labels: Integers
    name: str


def _join(
    parts: Mapping[str, Arrays], class_names: Sequence[str], notes: Sequence[str] = ()
) -> Source:
    counts = [len(one.labels) for one in parts.values()]
    starts = np.cumsum([0, *counts])
    names = [one.name for one in parts.values()]

    def name(index: int) -> str:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return f"{names[number]}[{index - starts[number]}]"

    images = np.concatenate([one.images for one in parts.values()])
    return Source(
        images=images,
        labels=np.concatenate([one.labels for one in parts.values()]),
        part=np.repeat([PARTS[part] for part in parts], counts),
        class_names=tuple(class_names),
        sizes=np.broadcast_to((images.shape[2], images.shape[1]), (len(images), 2)),
        name=name,
        notes=tuple(notes),
    )


def read_source(config: DataConfig) -> Source:
    """Read every image of a set.

    Raises:
        InputError: If the source is missing or damaged; names file or value.
    """
    return _READERS.get(config.name, _read_torchvision)(config)


def _read_digits(config: DataConfig) -> Source:
    path = str(distribution("scikit-learn").locate_file(DIGITS))
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # of each image pixels and label
    pixels, labels = rows[:, :-1].reshape(-1, DIGITS_SIDE_PX, DIGITS_SIDE_PX), rows[:, -1]
    images = np.rint(pixels * (255 / DIGITS_WHITE)).astype(np.uint8)
    return _join({"train": Arrays(images, labels, "train_images")}, [*map(str, range(10))])


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
        part: Arrays(np.asarray(one.data), np.asarray(one.targets), f"{part}_images")
        for part, one in (("train", train), ("test", test))
    }
    return _join(parts, train.classes)


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
        what = "it holds Python objects, not numbers" if "allow_pickle" in str(error) else error
        raise InputError(f"{path}, {key}: cannot be read: {what}") from error
    prefixes = _npz_prefixes(arrays, path)
    parts = {part: _npz_part(arrays, prefix, path) for part, prefix in prefixes.items()}
    shapes = {one.images.shape[1:] for one in parts.values()}
    require(len(shapes) == 1, f"{path}: expected parts with images of one shape, got {shapes}")
    labels = np.unique(np.concatenate([one.labels for one in parts.values()]))
    class_names = arrays.get("class_names", np.arange(len(labels)))
    require(
        "class_names" not in arrays or class_names.size > labels.max(),
        f"{path}, class_names: expected a name for each of the labels 0 to {labels.max()}, "
        f"got {class_names.size}",
    )
    used = {f"{prefix}_{what}" for prefix in prefixes.values() for what in ("images", "labels")}
    others = [key for key in arrays if key not in used and key != "class_names"]
    notes = [f"arrays that are passed over: {named(others)}"] if others else []
    return _join(parts, [*map(str, class_names.flatten())], notes)


def _npz_prefixes(arrays: Mapping[str, object], path: Path) -> dict[str, str]:
    """Return how the file spells each part that it has, in the order of PARTS."""
    spelled: dict[str, str] = {}
    for prefix, _, what in (key.partition("_") for key in arrays):
        part = part_of(prefix)
        if part is not None and what in ("images", "labels") and spelled.get(part) != prefix:
            require(
                part not in spelled,
                f"{path}: expected one name for each part, got {spelled.get(part)}_* and "
                f"{prefix}_* for {part}",
            )
            spelled[part] = prefix
    return {part: spelled.get(part, part) for part in PARTS if part in {"train", *spelled}}


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


def _npz_part(arrays: Mapping[str, NDArray[Any]], name: str, path: Path) -> Arrays:
    for key in (f"{name}_images", f"{name}_labels"):
        require(key in arrays, f"{path}: expected the key {key}, got {', '.join(arrays)}")
    return _part(arrays[f"{name}_images"], arrays[f"{name}_labels"], name, path)


def source_of(
    parts: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], class_names: Sequence[str] | None
) -> Source:
    """Return the source of arrays in memory.

    Args:
        parts: Images and labels of each part, keys of `PARTS`, in that order, as in an .npz file.
        class_names: In the order of the labels; None gives the labels themselves.

    Raises:
        InputError: If an array has another type or shape.
    """
    arrays = {
        part: _part(_eight_bits(np.asarray(images)), np.asarray(labels), part, "own images")
        for part, (images, labels) in parts.items()
    }
    shapes = {one.images.shape[1:] for one in arrays.values()}
    require(len(shapes) == 1, f"own images: expected parts of one shape, got {shapes}")
    if class_names is None:
        class_names = [*map(str, np.unique(np.concatenate([a.labels for a in arrays.values()])))]
    return _join(arrays, class_names)


def _eight_bits(images: NDArray[Any]) -> NDArray[Any]:
    """Return integers from 0 to 255 as uint8, and anything else as it is."""
    whole = images.dtype.kind in "iu" and images.size > 0
    return images.astype(np.uint8) if whole and 0 <= images.min() <= images.max() <= 255 else images


def _part(images: NDArray[Any], labels: NDArray[Any], name: str, place: object) -> Arrays:
    """Return the images and labels of a part, (N, H, W) or (N, H, W, 3) and (N,)."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    require(
        shaped and images.dtype == np.uint8 and min(images.shape[1:3]) >= MIN_SIDE_PX,
        f"{place}, {name}_images: expected uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), H and W "
        f"at least {MIN_SIDE_PX}, got {images.dtype} {images.shape}",
    )
    count = len(images)
    require(
        count > 0 and labels.dtype.kind in "iu" and labels.shape in ((count,), (count, 1)),
        f"{place}, {name}_labels: expected an integer for each of {count} images, at least one, "
        f"got {labels.dtype} {labels.shape}",
    )
    return Arrays(images, labels.reshape(-1).astype(np.int64), f"{name}_images")


def _read_folder(config: DataConfig) -> Source:
    """A folder per class, perhaps within a folder per part: see `folders.LAYOUTS`."""
    root, side_px = Path(config.root or "").expanduser(), config.image_size_px
    if config.root is None or not root.is_dir():
        got = "there is nothing of that name"
        if config.root is None:
            got = "--set data.root=DIR says where it is"
        elif root.exists():
            got = "this is a file (unpack an archive; arrays are read by data.name=npz)"
        raise InputError(
            f"data.root={config.root}: expected a folder with one folder per class; {got}"
        )
    if side_px is None:
        raise InputError("data.image_size_px: expected a size for data.name=folder, got None")
    layout = list_pictures(root)
    paths = layout.paths
    read = read_pictures(paths, root, side_px, config.fit)
    counts = [list(map(len, classes.values())) for classes in layout.files.values()]
    return Source(
        images=read.pixels,
        labels=np.concatenate([np.repeat(np.arange(len(one)), one) for one in counts]),
        part=np.repeat([PARTS[part] for part in layout.files], [*map(sum, counts)]),
        class_names=layout.class_names,
        sizes=np.array(read.sizes),
        name=lambda index: str(paths[index].relative_to(root)),
        white=read.white,
        notes=(*layout.notes, *read.notes),
    )


_READERS = {"digits": _read_digits, "npz": _read_npz, "folder": _read_folder}
