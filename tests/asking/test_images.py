"""Opening pictures: what is accepted comes out upright and RGB, everything else is refused in words."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from crosstrim import mini
from crosstrim.asking.images import MAX_PIXELS, find, open_image
from crosstrim.errors import InputError


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims this size and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 99) + b"IDAT"


def noise(size=(40, 30), mode="RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "picture.png"
    noise().save(path)
    return path


def test_a_path_a_file_and_stdin_give_the_same_picture(picture_file, monkeypatch):
    expected = np.asarray(noise())
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(buffer=io.BytesIO(picture_file.read_bytes()), isatty=lambda: False)
    )
    for source in (picture_file, str(picture_file), io.BytesIO(picture_file.read_bytes()), "-"):
        picture = open_image(source)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tiff" if mode == "CMYK" else "png"
    noise(mode=mode).save(tmp_path / f"picture.{suffix}")
    picture = open_image(tmp_path / f"picture.{suffix}")
    assert (picture.mode, picture.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PPM", "TIFF", "WEBP"])
def test_common_formats_open(kind):
    assert open_image(io.BytesIO(encoded(noise(), kind))).size == (40, 30)


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(open_image(io.BytesIO(encoded(clear)))).min() == 255


def test_sixteen_bit_greys_keep_their_brightness():
    greys = Image.fromarray(np.full((4, 4), 128 << 8, dtype=np.uint16))
    assert np.unique(np.asarray(open_image(io.BytesIO(encoded(greys))))).tolist() == [128]


def test_a_turned_photograph_is_put_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show turned by 90 degrees
    picture = open_image(io.BytesIO(encoded(noise((40, 30)), "JPEG", exif=exif)))
    assert picture.size == (30, 40)


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(io.BytesIO(animation)))[0, 0].tolist() == [255, 0, 0]


WHOLE = encoded(noise((200, 200)), "JPEG")
OTHERS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG 2000": encoded(noise(), "JPEG2000") if features.check("jpg_2000") else b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "ICO": encoded(noise((16, 16)), "ICO"),
}
REFUSED = {
    **{kind: (content, f" is {kind}, which crosstrim does not read; convert it") for kind, content in OTHERS.items()},
    "codestream": (b"\xff\x4f\xff\x51\0\x2f", "is JPEG 2000"),
    "empty": (b"", "is empty; a picture was expected"),
    "text": (b"hello, this is no picture", "is no picture that crosstrim reads"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it reads AVIF, BMP, GIF, JPEG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture that crosstrim reads"),
    "cut off": (WHOLE[: len(WHOLE) // 2], "is damaged or cut off"),
    "corrupt": (encoded(noise())[:60] + b"\0" * 400, "is damaged or cut off"),
    "no pixels": (png_header(20, 20), "is damaged or cut off"),
    "zero size": (png_header(0, 20), "is"),
    "many pixels": (png_header(9000, 9000), "has 9000 x 9000 pixels; the limit is 64 million pixels"),
    "bomb": (png_header(60000, 60000), f"has more than {MAX_PIXELS} pixels; the limit is 64 million pixels"),
    "32-bit": (encoded(Image.new("I", (4, 4)), "TIFF"), "save it as 8-bit"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error")
def test_everything_else_is_refused_in_words(tmp_path, case):
    content, words = REFUSED[case]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_the_size_is_checked_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="the limit is"):
        open_image(io.BytesIO(png_header(9000, 9000)))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no such.png", "there is no picture no such.png; check the path"),
        (".", "is a directory"),
        ("half \ud800.png", r"'half \\ud800.png' cannot be the name of a file; check the path"),
        ("zero \0.png", r"'zero \\x00.png' cannot be the name of a file"),
        ("https://example.com/a.png", "is a web address, which crosstrim does not open; download"),
    ],
)
def test_what_is_no_file_is_refused(source, words):
    with pytest.raises(InputError, match=words):
        open_image(source)


def test_a_terminal_is_no_picture(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(InputError, match="is a terminal; pipe a picture into it"):
        open_image("-")


def test_an_example_goes_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mini, "examples", lambda: [{"image": "/a/first.jpg"}, {"image": "/a/second.jpg"}])
    assert find("example") == "/a/first.jpg"
    assert find("second") == "/a/second.jpg"
    for untouched in ("-", "second.jpg", "a/second"):
        assert find(untouched) == untouched
    (tmp_path / "second").touch()
    assert find("second") == "second"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("catt", "Did you mean 'cat'?"), ("exmple", "Did you mean 'example'?"), ("holiday", "Check the path.")],
)
def test_a_name_that_nothing_has_is_told_which_there_are(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mini, "examples", lambda: [{"image": "/a/cat.jpg"}, {"image": "/a/rocket.jpg"}])
    words = f"there is no picture {name!r}, and no example of that name; there are cat, rocket. {hint}"
    with pytest.raises(InputError, match=re.escape(words)):
        find(name)
