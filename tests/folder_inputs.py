"""The sets of the rows of docs/inputs.md on folders."""

import os

from pictures import all_images, case, counts, folder_config, holds


@case("`ROOT/CLASS/PICTURE`")
def _(root, maker):
    return maker.folder(root, count=10), counts(12, 4, 4)


@case(
    "`ROOT/PART/CLASS/PICTURE`",
)
def _(root, maker):
    for number, part in enumerate(("Training", "validation", "TEST"), start=1):
        maker.folder(root / part, count=number)
    return folder_config(root), counts(2, 4, 6)


@case("train alone")
def _(root, maker):
    maker.folder(root / "train", count=10)
    return folder_config(root), counts(12, 4, 4)


@case("train and val")
def _(root, maker):
    maker.folder(root / "train", count=10)
    maker.folder(root / "val", count=3)
    return folder_config(root), counts(16, 6, 4)


@case("train and test")
def _(root, maker):
    maker.folder(root / "train", count=10)
    maker.folder(root / "test", count=3)
    return folder_config(root), counts(15, 5, 6)


@case("a class named train beside other classes")
def _(root, maker):
    config = maker.folder(root, classes=("car", "train", "plane"))
    return config, lambda data: data.class_names == ("car", "plane", "train")


@case("a folder or a picture that is a link")
def _(root, maker):
    config = maker.folder(root)
    (root / "dog").rename(root.parent / "elsewhere")
    (root / "dog").symlink_to(root.parent / "elsewhere")
    pixels = maker.noise()
    (root / "cat" / "link.png").symlink_to(maker.save(root.parent / "other.png", pixels))
    return config, holds(pixels)


def skipped(config):
    """Ask whether nothing but eight pictures of two classes was read."""
    return config, lambda data: len(all_images(data)) == 8 and data.class_names == ("cat", "dog")


@case("hidden files and folders (`.name`)")
def _(root, maker):
    config = maker.folder(root)
    (root / ".git").mkdir()
    (root / "cat" / "._0.png").write_bytes(b"fork")
    return skipped(config)


@case("`Thumbs.db`, `desktop.ini`, `__MACOSX`, `@eaDir`, `lost+found` and the like")
def _(root, maker):
    config = maker.folder(root)
    for name in ("Thumbs.db", "ehthumbs.db", "Desktop.ini", "Icon\r", "thumbs.DB"):
        for folder in (root, root / "cat"):
            (folder / name).write_bytes(b"litter")
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"):
        maker.folder(root / name)
        maker.folder(root / "cat" / name)
    return skipped(config)


@case("README and LICENSE as text or without an ending")
def _(root, maker):
    config = maker.folder(root)
    for name in ("README", "readme.dataset.txt", "LICENSE", "licence.md", "License.txt"):
        (root / name).write_text("words")
        (root / "dog" / name).write_text("words")
    return skipped(config)


@case("other text and tables (`.csv`, `.txt`, `.json`, `.pdf` ...)")
def _(root, maker):
    config = maker.folder(root)
    (root / "labels.csv").write_text("0,cat")
    (root / "cat" / "0.TXT").write_text("a cat")
    return skipped(config)


@case("names of classes that differ in case alone")
def _(root, maker):
    config = maker.folder(root, classes=("Cat", "cat", "dog"))
    return config, lambda data: data.classes == 3


@case("no folder there")
def _(root, maker):
    return folder_config(root)


@case("an archive, a picture or another file as root")
def _(root, maker):
    root.write_bytes(b"PK")
    return folder_config(root)


@case("one class")
def _(root, maker):
    return maker.folder(root, classes=("cat",))


@case("one folder that holds the set")
def _(root, maker):
    maker.folder(root / "data" / "all")
    return folder_config(root)


@case("pictures beside class folders")
def _(root, maker):
    config = maker.folder(root)
    maker.save(root / "loose.png")
    return config


@case("pictures in a part, without class folders")
def _(root, maker):
    maker.folder(root / "train")
    maker.save(root / "test" / "0.png")
    return folder_config(root)


@case("a folder among the pictures of a class")
def _(root, maker):
    config = maker.folder(root)
    (root / "cat" / "more").mkdir()
    return config


@case("other folders beside the parts")
def _(root, maker):
    for name in ("train", "test", "annotations"):
        maker.folder(root / name)
    return folder_config(root)


@case("a part twice, such as val and valid")
def _(root, maker):
    for name in ("train", "val", "valid"):
        maker.folder(root / name)
    return folder_config(root)


@case("test or val without train")
def _(root, maker):
    maker.folder(root / "test")
    return folder_config(root)


@case("parts with different classes")
def _(root, maker):
    maker.folder(root / "train", classes=("cat", "cow", "dog"))
    maker.folder(root / "test")
    return folder_config(root)


@case("a class without pictures")
def _(root, maker):
    config = maker.folder(root)
    (root / "cow").mkdir()
    return config


@case("a class of fewer than three pictures")
def _(root, maker):
    return maker.folder(root, count=2)


@case("a pipe or a broken link")
def _(root, maker):
    config = maker.folder(root)
    os.mkfifo(root / "cat" / "pipe.png")
    return config


@case("a class whose name is not UTF-8")
def _(root, maker):
    config = maker.folder(root)
    os.rename(os.fsencode(root / "dog"), os.fsencode(root) + b"/\xff")
    return config


@case("no `image_size_px`")
def _(root, maker):
    maker.folder(root)
    return folder_config(root, image_size_px=None)
