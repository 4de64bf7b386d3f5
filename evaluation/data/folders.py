"""Folders of pictures: which layouts are known, what is passed over, and the pixels of all."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.data.parts import PARTS, part_of
from evaluation.data.pictures import (
    DEEPEST,
    Fit,
    Picture,
    Pixels,
    Size,
    read_picture,
    require_images_fit,
    white_of,
)
from evaluation.errors import InputError, require
from evaluation.words import counted, named

LAYOUTS = (
    "the layouts that are known: ROOT/CLASS/PICTURE, or ROOT/PART/CLASS/PICTURE with the parts "
    "train and perhaps val and test"
)
LITTER = {  # what systems and programs leave, in small letters
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r",
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
ABOUT = ("readme", "license", "licence", "copying")  # files of text that are litter, too
TEXTS = {  # endings of files of text or tables, in small letters
    ".txt", ".md", ".rst", ".rtf", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".ini", ".cfg",
    ".toml", ".yaml", ".yml", ".html", ".htm", ".log", ".db", ".sqlite", ".xls", ".xlsx", ".ods",
    ".doc", ".docx", ".odt", ".pdf", ".py", ".ipynb", ".sh", ".md5", ".sha1", ".sha256",
}  # fmt: skip
DEEPEST_FOLDERS = 8  # how far down the set is looked for
MAX_REASONS = 20


class Listing(NamedTuple):
    """What lies in a folder, in the order of the names, without litter and hidden files."""

    folders: list[Path]
    files: list[Path]  # that must be pictures
    texts: list[Path]


class Layout(NamedTuple):
    """The pictures of a set.

    Attributes:
        files: Part -> class -> pictures; the parts in the order of PARTS, each with all classes.
        notes: What a person should know.
    """

    files: dict[str, dict[str, list[Path]]]
    notes: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their labels."""
        return tuple(self.files["train"])

    @property
    def paths(self) -> list[Path]:
        """All pictures, part by part and class by class."""
        return [path for classes in self.files.values() for path in chain(*classes.values())]


class Pictures(NamedTuple):
    """The pixels of many files.

    Attributes:
        pixels: (N, H, W, 3).
        sizes: (width, height) of each in its file, px.
        white: The value that became 255 in those of more than 8 bits.
        notes: What a person should know.
    """

    pixels: Pixels
    sizes: list[Size]
    white: int
    notes: tuple[str, ...]


def list_pictures(root: Path) -> Layout:
    """Find the parts, the classes and their pictures; none is opened.

    Raises:
        InputError: If the folder has another layout; names what is in the way.
    """
    top = _list(root)
    spelled: dict[str | None, list[Path]] = {}
    for folder in top.folders:
        spelled.setdefault(part_of(folder.name), []).append(folder)
    texts, parts = list(top.texts), {"train": top}
    if spelled and None not in spelled:
        _check_parts(root, spelled)
        _require_folders(top)
        parts = {part: _list(spelled[part][0]) for part in PARTS if part in spelled}
        texts += [path for listing in parts.values() for path in listing.texts]
    else:
        _check_nesting(root, top)
        _check_others(root, spelled)
    files: dict[str, dict[str, list[Path]]] = {}
    for part, listing in parts.items():
        _require_folders(listing)
        classes = {folder: _list(folder) for folder in listing.folders}
        _require_pictures(classes)
        texts += [path for one in classes.values() for path in one.texts]
        files[part] = {path.name: sorted(one.files + one.folders) for path, one in classes.items()}
    _check_classes(root, files)
    return Layout(files, _note_on_texts(texts, root))


def read_pictures(paths: Sequence[Path], root: Path, side_px: int, how: Fit) -> Pictures:
    """Read pictures into squares; those of more than 8 bits are scaled by the range of them all.

    Args:
        paths: The files, at least one.
        root: The folder of the set.
        side_px: Of the squares.
        how: See `pictures.fit`.

    Raises:
        InputError: If files are no undamaged images; names all, or the first of many.
    """
    frame = side_px, side_px
    require_images_fit(len(paths), frame, channels=3)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_try_to_read, frame=frame, how=how), paths))
        _refuse(dict(zip(paths, found, strict=True)), root)
        read = [one for one in found if isinstance(one, Picture)]
        depths = {index: one.largest for index, one in enumerate(read) if one.largest is not None}
        white = white_of(max(depths.values())) if depths else DEEPEST
        pixels = np.stack([one.pixels for one in read])
        if white != DEEPEST:  # only now is it known
            again = partial(read_picture, frame=frame, how=how, white=white)
            for index, one in zip(depths, pool.map(again, [paths[i] for i in depths]), strict=True):
                pixels[index] = one.pixels
    pages = [path for path, one in zip(paths, read, strict=True) if one.has_pages]
    notes = (*_note_on_depth(depths, white), *_note_on_pages(pages, root))
    return Pictures(pixels, [one.size for one in read], white, notes)


def _list(folder: Path) -> Listing:
    """Look into a folder; what its entries hold is not looked at.

    Raises:
        InputError: If it cannot be read, or a name is no text.
    """
    listing = Listing([], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith(".") or entry.name.casefold() in LITTER:
                    continue
                # A link is followed by `Path`, which knows of links to themselves.
                if path.is_dir() if entry.is_symlink() else entry.is_dir():
                    listing.folders.append(path)
                elif path.suffix.lower() in TEXTS:
                    if not _is_about(path):
                        listing.texts.append(path)
                elif path.suffix or not _is_about(path):
                    listing.files.append(path)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    for paths in listing:
        paths.sort()
    return listing


def _is_about(path: Path) -> bool:
    name = path.name.casefold()
    return name.startswith(ABOUT) if path.suffix else name in ABOUT  # not license_1, a picture


def _check_parts(root: Path, spelled: Mapping[str | None, Sequence[Path]]) -> None:
    for part, folders in spelled.items():
        names = " and ".join(repr(folder.name) for folder in folders)
        require(
            len(folders) == 1,
            f"{root}: expected one folder for each part, got {names} for {part}; {LAYOUTS}",
        )
    names = ", ".join(repr(folder.name) for folders in spelled.values() for folder in folders)
    require("train" in spelled, f"{root}: expected a part train beside {names}; {LAYOUTS}")


def _check_nesting(root: Path, top: Listing) -> None:
    """Refuse a folder that holds nothing but the folder of the set; name the latter."""
    inner, listing = root, top
    for _ in range(DEEPEST_FOLDERS):
        if len(listing.folders) != 1 or part_of(listing.folders[0].name) is not None:
            break
        below = _list(listing.folders[0])
        if not below.folders:
            break
        inner, listing = listing.folders[0], below
    require(
        inner == root,
        f"data.root={root}: expected class folders, got one folder that holds folders; "
        f"did you mean data.root={inner}?",
    )


def _check_others(root: Path, spelled: Mapping[str | None, Sequence[Path]]) -> None:
    """Refuse other folders beside a train part; a class of that name holds no folders."""
    others = [repr(folder.name) for folder in spelled.get(None, ())]
    for folder in spelled.get("train", ()):
        require(
            not others or not _list(folder).folders,
            f"{root}: expected nothing but parts beside {folder.name!r}, got {named(others)}; "
            f"{LAYOUTS}",
        )


def _require_folders(listing: Listing) -> None:
    """Refuse files beside folders of classes."""
    if not listing.files:
        return
    first, *others = listing.files
    more = f", and {counted(len(others), 'more file')}" if others else ""
    what = "a file" if first.is_file() else "a pipe or a broken link"
    raise InputError(
        f"{first}: expected nothing but class folders here, got {what}{more}; {LAYOUTS}"
    )


def _require_pictures(classes: Mapping[Path, Listing]) -> None:
    empty = [folder for folder, listing in classes.items() if not listing.files + listing.folders]
    if empty:
        raise InputError(f"{named(empty)}: expected images of this class, got none; {LAYOUTS}")


def _check_classes(root: Path, files: Mapping[str, Mapping[str, Sequence[Path]]]) -> None:
    names = sorted({name for classes in files.values() for name in classes})
    for name in names:
        _check_name(root, name)
    missing = [
        f"{name!r} is missing in {part}"
        for name in names
        for part in files
        if name not in files[part]
    ]
    require(not missing, f"{root}: parts differ in classes: {', '.join(missing[:MAX_REASONS])}")
    require(len(names) > 1, f"{root}: expected 2 or more class folders, got {names}; {LAYOUTS}")


def _check_name(root: Path, name: str) -> None:
    """Refuse a name whose bytes are no text: it could be neither printed nor written as JSON."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{root}: the name {name!a} is not UTF-8") from error


def _try_to_read(path: Path, frame: Size, how: Fit) -> Picture | InputError:
    try:
        return read_picture(path, frame, how)
    except InputError as error:
        return error


def _refuse(found: Mapping[Path, Picture | InputError], root: Path) -> None:
    """Raise one error for all files that are no pictures, if there are any."""
    bad = {path: one for path, one in found.items() if isinstance(one, InputError)}
    errors = list(bad.values())
    hint = f"; {LAYOUTS}" if any(path.is_dir() for path in bad) else ""
    if len(errors) == 1:
        raise InputError(f"{errors[0]}{hint}") from errors[0]
    if errors:
        lines = [f"  {one}" for one in errors[:MAX_REASONS]]
        if len(errors) > MAX_REASONS:
            lines.append(f"  and {len(errors) - MAX_REASONS:,} more")
        text = "\n".join(lines)
        raise InputError(f"{root}: {len(errors):,} files cannot be read as pictures{hint}:\n{text}")


def _note_on_texts(texts: Sequence[Path], root: Path) -> tuple[str, ...]:
    if not texts:
        return ()
    names = named([path.relative_to(root) for path in sorted(texts)])
    verb = "is" if len(texts) == 1 else "are"
    return (f"{counted(len(texts), 'file')} of text or tables {verb} passed over: {names}",)


def _note_on_pages(paths: Sequence[Path], root: Path) -> tuple[str, ...]:
    if not paths:
        return ()
    names = named([path.relative_to(root) for path in paths])
    return (f"only the first page is read of {counted(len(paths), 'TIFF file')}: {names}",)


def _note_on_depth(depths: Mapping[int, int], white: int) -> tuple[str, ...]:
    """Say how deep pictures were read, unless it is by all of their 16 bits."""
    if white == DEEPEST:
        return ()
    return (
        f"{counted(len(depths), 'picture')} of more than 8 bits: their largest value is "
        f"{max(depths.values()):,}, so they are read as {white.bit_length()}-bit",
    )
