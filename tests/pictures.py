"""Sets of random pictures, for tests that read them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.data.config import DataConfig

SIDE_PX = 8
CASES = {}  # row of docs/inputs.md -> what makes its set


def case(row):
    """Register what makes the set of a row: it gets a folder and a maker of pictures.

    It returns the config of the set, and perhaps what must hold for the data set that is read.
    """

    def register(make):
        assert row not in CASES
        CASES[row] = make
        return make

    return register


def all_images(data):
    """(N, C, H, W) of all splits."""
    return torch.cat([data.train.images, data.test.images]).numpy()


def holds(pixels, tolerance=0):
    """Ask whether one of the images has these pixels, (H, W, C)."""
    wanted = np.asarray(pixels, int).transpose(2, 0, 1)
    return lambda data: (np.abs(all_images(data) - wanted).max((1, 2, 3)) <= tolerance).any()


def counts(train, valid, test):
    """Ask whether the splits have so many images."""
    return lambda data: (
        (len(data.search_train), len(data.search_valid), len(data.test)) == (train, valid, test)
    )


class Maker:
    """Makes pictures of which no two are alike."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def noise(self, *shape, levels=256, dtype=np.uint8):
        """Random pixels of a shape, 8 x 8 x 3 if none is given."""
        return self.rng.integers(0, levels, shape or (SIDE_PX, SIDE_PX, 3)).astype(dtype)

    def save(self, path, pixels=None, **options):
        """Save pixels, or noise, and return the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = self.noise() if pixels is None else pixels
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(path, **options)
        return path

    def folder(self, root, classes=("cat", "dog"), count=4):
        """Make a folder per class, and return the config that reads it."""
        for name in classes:
            for number in range(count):
                self.save(root / name / f"{number}.png")
        return folder_config(root)

    def deep(self, root, levels, dtype=np.uint16, suffix="png"):
        """Make a set of grey pictures that hold the smallest and the largest of the levels."""
        for number in range(8):
            pixels = self.noise(8, 8, levels=levels, dtype=dtype)
            pixels[0, 0], pixels[-1, -1] = 0, levels - 1
            self.save(root / ("cat", "dog")[number % 2] / f"{number}.{suffix}", pixels)
        return folder_config(root)

    def arrays(self, path, count=30, **changes):
        """Save an array file of two classes, and return the config that reads it."""
        given = {
            "train_images": self.noise(count, 8, 8, 3),
            "train_labels": np.arange(count) % 2,
        } | changes
        np.savez(path, **{key: value for key, value in given.items() if value is not None})
        return DataConfig(name="npz", root=str(path))


def folder_config(root, **changes):
    return DataConfig(**{"name": "folder", "root": str(root), "image_size_px": SIDE_PX} | changes)


def deep_png(path: Path, pixels) -> None:
    """Write (H, W, 3) of 16 bits, which Pillow cannot."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
