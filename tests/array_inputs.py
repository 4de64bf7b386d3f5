"""The sets of the rows of docs/inputs.md on array files, and on any set."""

import numpy as np

from evaluation.data.config import DataConfig
from pictures import case, counts, folder_config, holds


def part(maker, name, count=4):
    """The arrays of one more part."""
    return {f"{name}_images": maker.noise(count, 8, 8, 3), f"{name}_labels": np.arange(count) % 2}


def own(root, maker, **changes):
    """An array file beside the folder that a case gets."""
    return maker.arrays(root.parent / "set.npz", **changes)


@case(
    "`train_images`, `train_labels`: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), "
    "integers (N,) or (N, 1)"
)
def _(root, maker):
    labels = (np.arange(40) % 2)[:, None]
    config = own(root, maker, train_images=maker.noise(40, 8, 8, 1), train_labels=labels)
    return config, lambda data: counts(24, 8, 8)(data) and data.image_shape == (1, 8, 8)


@case("also `val_*`, `test_*`")
def _(root, maker):
    parts = part(maker, "valid", 4) | part(maker, "test", 6)
    return own(root, maker, **parts), counts(30, 4, 6)


@case("`class_names`")
def _(root, maker):
    config = own(root, maker, class_names=np.array(["cat", "dog"]))
    return config, lambda data: data.class_names == ("cat", "dog")


@case("`image_size_px`")
def _(root, maker):
    images = maker.noise(30, 8, 8, 3)
    config = own(root, maker, train_images=images[:, :, 2:6])
    images[:, :, :2] = images[:, :, 6:] = 0
    return config.model_copy(update={"image_size_px": 8, "fit": "pad"}), holds(images[0])


@case("other arrays")
def _(root, maker):
    return own(root, maker, ids=np.arange(30)), counts(18, 6, 6)


@case("a part twice, such as `val_*` and `valid_*`")
def _(root, maker):
    return own(root, maker, **part(maker, "val"), **part(maker, "valid"))


@case("floating-point images, such as those in [0, 1]")
def _(root, maker):
    return own(root, maker, train_images=maker.noise(30, 8, 8, 3) / 255)


@case("images with the channels first")
def _(root, maker):
    return own(root, maker, train_images=maker.noise(30, 3, 8, 8))


@case("labels that are text or one-hot")
def _(root, maker):
    return own(root, maker, train_labels=np.array(["cat", "dog"] * 15))


@case("labels with a gap, or not from 0")
def _(root, maker):
    return own(root, maker, train_labels=np.arange(30) % 2 + 1)


@case("other keys, such as `x_train`")
def _(root, maker):
    return own(root, maker, train_images=None, x_train=maker.noise(30, 8, 8, 3))


@case("fewer `class_names` than labels")
def _(root, maker):
    labels = np.arange(30) % 3
    return own(root, maker, train_labels=labels, class_names=np.array(["cat", "dog"]))


@case("arrays of Python objects")
def _(root, maker):
    return own(root, maker, class_names=np.array(["cat", "dog"], dtype=object))


@case("parts of different shapes")
def _(root, maker):
    small = part(maker, "test") | {"test_images": maker.noise(4, 6, 6, 3)}
    return own(root, maker, **small)


@case("no or a damaged file")
def _(root, maker):
    path = root.parent / "set.npz"
    path.write_bytes(b"PK\3\4 and no more")
    return DataConfig(name="npz", root=str(path))


@case("pictures whose pixels are all equal")
def _(root, maker):
    images = maker.noise(30, 8, 8, 3)
    images[7] = 90
    return own(root, maker, train_images=images), holds(images[7])


@case("nothing but such pictures")
def _(root, maker):
    levels = np.arange(30, dtype=np.uint8)[:, None, None]
    return own(root, maker, train_images=np.tile(levels * 5, (1, 8, 8))), counts(18, 6, 6)


@case("99 % of the levels of the set within 16, as where one pixel is broken")
def _(root, maker):
    images = maker.noise(30, 8, 8, levels=16)
    images[3, 2, 2] = 255
    return own(root, maker, train_images=images), counts(18, 6, 6)


@case("fewer than 16 of 256 levels in the whole set")
def _(root, maker):
    return own(root, maker, train_images=100 + maker.noise(30, 8, 8, levels=16)), counts(18, 6, 6)


@case("the same pixels in two parts")
def _(root, maker):
    images = maker.noise(30, 8, 8, 3)
    copies = {"test_images": images[:4], "test_labels": np.arange(4) % 2}
    config = own(root, maker, train_images=images, **copies)
    return (
        config,
        lambda data: (
            len(data.train) == 26
            and not (
                {one.tobytes() for one in data.train.images.numpy()}
                & {one.tobytes() for one in data.test.images.numpy()}
            )
        ),
    )


@case("the same pixels twice in one class, where parts are to be drawn")
def _(root, maker):
    images = maker.noise(32, 8, 8, 3)
    images[2] = images[30] = images[0]
    labels = np.arange(32) % 2
    return own(root, maker, train_images=images, train_labels=labels), counts(18, 6, 6)


@case("the same pixels twice in one class and part, where all parts are given")
def _(root, maker):
    images = maker.noise(30, 8, 8, 3)
    images[2] = images[0]
    parts = part(maker, "val") | part(maker, "test")
    return own(root, maker, train_images=images, **parts), counts(30, 4, 4)


@case("the same pixels in two classes")
def _(root, maker):
    images = maker.noise(30, 8, 8, 3)
    images[1] = images[0]
    parts = part(maker, "val") | part(maker, "test")
    return own(root, maker, train_images=images, **parts), counts(30, 4, 4)


@case("a class whose pictures in a part all have copies in a later part")
def _(root, maker):
    maker.folder(root / "train")
    maker.folder(root / "test")
    for number in range(4):
        source = root / "test" / "cat" / f"{number}.png"
        (root / "train" / "cat" / f"{number}.png").write_bytes(source.read_bytes())
    return folder_config(root)
