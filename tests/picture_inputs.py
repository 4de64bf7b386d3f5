"""The sets of the rows of docs/inputs.md on pictures."""

import numpy as np
from PIL import Image

from pictures import all_images, case, deep_png, folder_config, holds

EXIF_TURNED = 0x0112


@case("AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF, WebP")
def _(root, maker):
    config = maker.folder(root)
    made = []
    for ending in ("avif", "bmp", "gif", "jpg", "jp2", "png", "ppm", "tif", "webp"):
        pixels = np.full((8, 8, 3), 230, np.uint8)
        pixels[:, :4] = 20 * len(made)
        path = maker.save(root / "cat" / f"{len(made)}.{ending}", pixels)
        path.rename(path.with_name(f"other{len(made)}.png"))
        made.append(pixels)
    return config, lambda data: all(holds(pixels, tolerance=9)(data) for pixels in made)


@case("grey, black and white, palette, CMYK")
def _(root, maker):
    config = maker.folder(root)
    made = []
    for mode, ending in (("L", "png"), ("1", "png"), ("P", "gif"), ("CMYK", "tif")):
        picture = Image.new("RGB", (8, 8), "white")
        picture.paste((0, 0, 0), (0, 0, 2 + len(made), 8))
        maker.save(root / "cat" / f"{mode}.{ending}", picture.convert(mode))
        made.append(np.asarray(picture))
    return config, lambda data: all(holds(pixels)(data) for pixels in made)


@case("turned by EXIF")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise()
    exif = Image.Exif()
    exif[EXIF_TURNED] = 6
    maker.save(root / "cat" / "turned.png", pixels, exif=exif)
    return config, holds(np.rot90(pixels, -1))


@case("transparent")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise(8, 8, 4)
    pixels[..., 3] = 255
    pixels[:4, :, 3] = 0
    maker.save(root / "cat" / "clear.png", pixels)
    pixels[:4] = 255
    return config, holds(pixels[..., :3])


@case("animation")
def _(root, maker):
    config = maker.folder(root)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:3] = 255
    more = [Image.fromarray(255 - pixels)]
    maker.save(root / "cat" / "moving.gif", pixels, save_all=True, append_images=more)
    return config, holds(pixels)


@case("TIFF of several pages")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise()
    more = [Image.fromarray(maker.noise())]
    maker.save(root / "cat" / "pages.tif", pixels, save_all=True, append_images=more)
    return config, holds(pixels)


@case("16 bits, grey")
def _(root, maker):
    return maker.deep(root, 2**16), lambda data: data.train.images.max() == 255


@case("8, 10, 12 or 14 bits in a 16-bit file, grey")
def _(root, maker):
    return maker.deep(root, 2**12), lambda data: (data.white, data.train.images.max()) == (
        4095, 255,
    )  # fmt: skip


@case("16 bits, colour")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise(8, 8, 3, levels=2**16, dtype=np.uint16)
    deep_png(root / "cat" / "deep.png", pixels)
    return config, holds(pixels >> 8)


@case("12 bits in a 16-bit file, colour")
def _(root, maker):
    for number in range(8):
        pixels = maker.noise(8, 8, 3, levels=2**12, dtype=np.uint16)
        deep_png(root / ("cat", "dog")[number % 2] / f"{number}.png", pixels)
    return folder_config(root)


@case("negative values, or above 65,535")
def _(root, maker):
    config = maker.folder(root)
    maker.save(root / "cat" / "low.tif", maker.noise(8, 8, dtype=np.int32) - 300)
    return config


@case("floating-point values")
def _(root, maker):
    config = maker.folder(root)
    maker.save(root / "cat" / "shares.tif", maker.noise(8, 8).astype(np.float32) / 255)
    return config


@case("HEIC, SVG, RAW, a video, any other format")
def _(root, maker):
    config = maker.folder(root)
    (root / "cat" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    return config


def cut(root, maker, count):
    config = maker.folder(root)
    for number in range(count):
        path = maker.save(root / "cat" / f"cut{number}.png", maker.noise(30, 30, 3))
        path.write_bytes(path.read_bytes()[:1000])
    return config


@case("damaged or cut short")
def _(root, maker):
    return cut(root, maker, 1)


@case("several that cannot be read")
def _(root, maker):
    return cut(root, maker, 22)


@case("smaller than 4 px")
def _(root, maker):
    config = maker.folder(root)
    maker.save(root / "cat" / "tiny.png", maker.noise(3, 9, 3))
    return config


@case("more than 80 million pixels")
def _(root, maker):
    config = maker.folder(root)
    maker.save(root / "cat" / "huge.png", Image.new("1", (10_000, 8_001)))
    return config


@case("wider or higher than the square, `fit: crop`")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise(8, 14, 3)
    maker.save(root / "cat" / "wide.png", pixels)
    return config, holds(pixels[:, 3:11])


@case("more than twice as wide as high, `fit: crop`")
def _(root, maker):
    config = maker.folder(root)
    pixels = maker.noise(8, 40, 3)
    maker.save(root / "cat" / "wide.png", pixels)
    return config, holds(pixels[:, 16:24])


@case("any proportions, `fit: pad`")
def _(root, maker):
    maker.folder(root)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 2:6] = maker.noise(8, 4, 3)
    maker.save(root / "cat" / "high.png", pixels[:, 2:6])
    return folder_config(root, fit="pad"), holds(pixels)


@case("any proportions, `fit: squash`")
def _(root, maker):
    maker.folder(root)
    pixels = np.zeros((8, 320, 3), np.uint8)
    pixels[:, :80, 0] = pixels[:, -80:, 2] = 255
    maker.save(root / "cat" / "wide.png", pixels)

    def keeps_both_ends(data):
        ends = all_images(data)[:, :, 4, [0, -1]]  # (N, C, 2)
        return (ends == np.array([(255, 0), (0, 0), (0, 255)])).all((1, 2)).any()

    return folder_config(root, fit="squash"), keeps_both_ends
