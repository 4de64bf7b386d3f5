"""Pictures and folders from strangers: read with the right pixels, or refused by name."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import evaluation.data.pictures
from evaluation.data.config import DataConfig
from evaluation.data.pictures import read_image
from evaluation.data.preprocessing import Preprocessing
from evaluation.data.sources import read_source
from evaluation.deploy.prediction import Prediction, prediction_table
from evaluation.errors import InputError, printable
from run_pipeline import app

SIZE = (8, 8)
RED = (255, 0, 0)


def red(path, mode="RGB", size=SIZE, **options):
    Image.new("RGB", size, RED).convert(mode).save(path, **options)
    return path


def pixels(path, mode="RGB"):
    return read_image(path, SIZE, mode)


def quadrants():
    """White above left, black elsewhere."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4] = 255
    return image


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "RGB", 0), ("a.png", "P", 0), ("a.png", "RGBA", 0), ("a.bmp", "RGB", 0),
        ("a.gif", "P", 0), ("a.tiff", "RGB", 0), ("a.tiff", "CMYK", 0), ("a.jpg", "RGB", 2),
        ("a.jpg", "CMYK", 2), ("a.webp", "RGB", 4), ("a.ppm", "RGB", 0),
    ],
)  # fmt: skip
def test_a_red_picture_is_red_in_every_format_and_mode(name, mode, tolerance, tmp_path):
    found = pixels(red(tmp_path / name, mode)).astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found - RED).max() <= tolerance


def test_the_extension_does_not_decide(tmp_path):
    red(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (pixels(tmp_path / "a.jpg") == RED).all()


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_sixteen_bits_are_scaled_to_eight(level, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 257 * level, np.uint16)).save(path)
    assert (pixels(path) == level).all() and (pixels(path, "L") == level).all()


def test_floating_point_pixels_are_refused_as_their_range_is_not_known(tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path)
    with pytest.raises(InputError, match=r"a\.tiff: expected integer pixels"):
        pixels(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    path = tmp_path / "a.png"
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", SIZE, 3)
        image.putpalette([0] * 768)
        image.save(path, transparency=3)
    else:
        image.convert(mode).save(path)
    assert (pixels(path) == 255).all()


def test_half_transparent_black_is_grey(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", SIZE, (0, 0, 0, 128)).save(path)
    assert (pixels(path) == 127).all()


@pytest.mark.parametrize(
    ("orientation", "white"),
    [(1, (0, 0)), (2, (0, 7)), (3, (7, 7)), (4, (7, 0)), (5, (0, 0)), (6, (0, 7)), (7, (7, 7)),
     (8, (7, 0))],
)  # fmt: skip
def test_a_picture_is_turned_as_its_exif_says(orientation, white, tmp_path):
    path = tmp_path / "a.png"
    image = Image.fromarray(quadrants())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    found = pixels(path)[..., 0]
    assert found[white] == 255 and found.astype(int).sum() == 16 * 255


def test_of_an_animation_the_first_picture_counts(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (pixels(path) == RED).all()


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(width, height):
    """Return a PNG of a few bytes that declares a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9000, 12_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_size_alone(side, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(bomb(side, side))
    with pytest.raises(InputError, match=r"a\.png: expected"):
        pixels(path)


def test_a_bomb_below_the_limit_of_pillow_names_the_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.data.pictures, "MAX_PIXELS", 63)
    with pytest.raises(InputError, match=r"a\.png: expected at most 63 pixels, got 64"):
        pixels(red(tmp_path / "a.png"))
    monkeypatch.setattr(evaluation.data.pictures, "MAX_PIXELS", 64)
    assert (pixels(tmp_path / "a.png") == RED).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg onload='alert(1)'/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"],
    ids=["empty", "text", "svg", "png", "gif", "jpeg"],
)
def test_what_is_no_picture_is_refused_by_name(data, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png: expected an undamaged image"):
        pixels(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_a_truncated_picture_is_refused_by_name(name, tmp_path):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{name}: expected an undamaged image"):
        pixels(path)


def test_a_format_that_starts_another_program_is_not_read(tmp_path):
    path = tmp_path / "a.eps"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.eps: expected an undamaged image"):
        pixels(path)


def folder_of(root):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            red(root / name / f"{number}.png")
    return DataConfig(name="folder", root=str(root), image_size_px=8)


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    config = folder_of(tmp_path / "set")
    os.mkfifo(tmp_path / "set" / "cat" / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: expected an image, got no file"):
        read_source(config)


def test_a_link_to_itself_is_refused_by_name(tmp_path):
    config = folder_of(tmp_path / "set")
    (tmp_path / "set" / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(InputError, match=r"loop\.png: expected an image, got no file"):
        read_source(config)


def test_a_class_folder_that_links_to_itself_is_refused(tmp_path):
    config = folder_of(tmp_path / "set")
    (tmp_path / "set" / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: expected nothing but class folders"):
        read_source(config)


def test_a_folder_among_the_pictures_is_refused_by_name(tmp_path):
    config = folder_of(tmp_path / "set")
    (tmp_path / "set" / "cat" / "more").mkdir()
    with pytest.raises(InputError, match="more: expected an image, got no file"):
        read_source(config)


@pytest.mark.parametrize("name", ["猫 <b>", "a\nb", "<script>alert(1)</script>".replace("/", "|")])
def test_a_class_with_an_odd_name_is_read_under_it(name, tmp_path):
    config = folder_of(tmp_path / "set")
    (tmp_path / "set" / "dog").rename(tmp_path / "set" / name)
    assert name in read_source(config).class_names


def test_a_name_that_is_no_text_is_refused(tmp_path):
    config = folder_of(tmp_path / "set")
    os.rename(os.fsencode(tmp_path / "set" / "dog"), os.fsencode(tmp_path / "set") + b"/\xff")
    with pytest.raises(InputError, match="name") as caught:
        read_source(config)
    str(caught.value).encode()


def test_class_names_are_text_in_a_table_and_never_markup():
    table = prediction_table([Prediction("[red]a[/red].png", ("[bold]cat",), (1.0,))])
    cells = [cell.plain for column in table.columns for cell in column.cells]
    assert cells == ["[red]a[/red].png", "[bold]cat 1.000"]
    assert Preprocessing((1, 8, 8), (0.5,), (0.5,), ("[b]", "\x1b[31m")).class_names[0] == "[b]"


def test_what_a_terminal_would_obey_is_written_out():
    table = prediction_table([Prediction("a\x1b[31m.png", ("\x9b2J\x07\u202e\ud800",), (1.0,))])
    cells = [cell.plain for column in table.columns for cell in column.cells]
    assert cells == [r"a\x1b[31m.png", r"\x9b2J\x07\u202e\ud800 1.000"]
    assert printable("été 猫 🙂\n\t[red]") == "été 猫 🙂\n\t[red]"


@pytest.mark.parametrize("command", ["run", "front"])
def test_an_error_on_the_terminal_is_plain_text(command, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text('seed: "\\e[2J[red]x"\n"\\e]0;title\\a": 1\n')
    given = path if command == "run" else tmp_path / "none\x1b[2J"
    result = CliRunner().invoke(app, [command, str(given)])
    assert result.exit_code == 2 and "\x1b" not in result.output and "\x07" not in result.output
    assert r"\x1b[2J" in result.output and (command == "front" or "[red]x" in result.output)
