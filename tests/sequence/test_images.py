"""Pictures: opened safely, resized as the reference does, normalised, and back."""

import io
import json
import os
import pickle
import threading
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, features

from unigen.sequence.grid import patchify, to_unit
from unigen.sequence.images import PictureError, area_means, image_size, open_image, to_image
from unigen.sequence.transform import ImageTransform

BLOCKS = np.kron(
    np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8)
)


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def failure(source) -> PictureError:
    with pytest.raises(PictureError) as opened:
        open_image(source)
    assert "Fix: " in str(opened.value)
    return opened.value


# ---- opening


def test_path_string_bytes_and_picture_are_the_same(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(BLOCKS))
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, Image.fromarray(BLOCKS)):
        assert (pixels(open_image(source)) == BLOCKS).all()
        assert image_size(source) == (80, 48)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_known_from_the_header(format: str, orientation: int) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(
        Image.fromarray(BLOCKS), format, exif=exif, **({"lossless": True} if format == "WEBP" else {})
    )
    with Image.open(io.BytesIO(data)) as lying:
        expected = ImageOps.exif_transpose(lying).convert("RGB")
    upright = open_image(data)
    assert upright.size == image_size(data) == expected.size
    assert (pixels(upright) == pixels(expected)).all()
    again = open_image(upright)  # must not be turned twice
    assert (pixels(again) == pixels(upright)).all()


def test_transparency_is_composed_onto_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = [[0, 255], [128, 255]]
    expected = [[[255, 255, 255], [200, 0, 0]], [[227, 127, 127], [200, 0, 0]]]
    picture = Image.fromarray(rgba)
    assert np.abs(pixels(open_image(encoded(picture))) - expected).max() <= 1
    assert np.abs(pixels(open_image(picture.convert("RGBa"))) - expected).max() <= 1

    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    assert pixels(open_image(encoded(Image.fromarray(grey, "LA"))))[..., 0].tolist() == [[255, 10]]


@pytest.mark.parametrize("transparent", [1, b"\xff\x00\xff"])
def test_transparent_palette_entries_become_white(transparent) -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encoded(picture, transparency=transparent)
    assert pixels(open_image(data)).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert open_image(picture.convert("PA")).mode == "RGB"


def test_transparent_colour_of_an_rgb_or_grey_picture_becomes_white() -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(open_image(encoded(rgb, transparency=(1, 2, 3)))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert pixels(open_image(encoded(grey, transparency=7)))[..., 0].tolist() == [[255, 8]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    grey = pixels(open_image(encoded(Image.fromarray(values), format)))
    assert grey[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert (grey[..., :1] == grey).all()
    assert pixels(open_image(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [
        0,
        1,
        1,
        128,
        255,
    ]


def test_numbers_without_a_known_range_are_refused() -> None:
    assert failure(Image.fromarray(np.array([[0, 70000]], np.int32))).code == "unsupported_picture"
    assert failure(Image.fromarray(np.ones((2, 2), np.float32))).code == "unsupported_picture"


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    expected = red.convert("RGB")
    assert (pixels(open_image(red)) == pixels(expected)).all()
    if mode == "CMYK":
        assert pixels(open_image(encoded(red, "JPEG", quality=100)))[0, 0].tolist() == pytest.approx(
            [255, 0, 0], abs=4
        )


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if format == "WEBP" else {}),
        )
        assert pixels(open_image(data))[0, 0].tolist() == [255, 0, 0], format


def test_opaque_alpha_changes_nothing() -> None:
    levels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([levels, np.full((64, 64), 255, np.uint8)]))
    assert (pixels(open_image(encoded(rgba))) == levels).all()
    composed = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    assert (pixels(composed) == levels).all()  # so the composition can be left out
    rgba.putpixel((63, 63), (0, 0, 0, 254))
    assert pixels(open_image(rgba))[63, 63].tolist() == [1, 1, 1]


def test_the_given_picture_is_not_changed_or_shared() -> None:
    picture = Image.fromarray(BLOCKS)
    opened = open_image(picture)
    opened.putpixel((0, 0), (1, 2, 3))
    assert (pixels(picture) == BLOCKS).all()


# ---- refusing


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    assert failure(tmp_path / "none.png").code == "missing_picture"
    assert failure(tmp_path).code == "not_a_file"
    assert failure("/dev/zero").code == "not_a_file"
    assert failure(str(tmp_path / "a\0b.png")).code == "unreadable_picture"
    (tmp_path / "file").write_bytes(b"")
    assert failure(tmp_path / "file" / "a.png").code == "missing_picture"


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    errors: list[PictureError] = []
    thread = threading.Thread(target=lambda: errors.append(failure(tmp_path / "pipe.png")), daemon=True)
    thread.start()
    thread.join(5)
    assert errors and errors[0].code == "not_a_file", "opening a pipe waited for a writer"


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture(data: bytes) -> None:
    assert failure(data).code in ("not_a_picture", "broken_picture")
    with pytest.raises(PictureError):
        image_size(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_half_a_picture_is_refused_even_where_a_library_allowed_it(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert failure(data[: len(data) // 2]).code in ("broken_picture", "not_a_picture")


def test_huge_pictures_are_refused_from_the_header() -> None:
    data = bytearray(encoded(Image.new("L", (8, 8))))
    for width, height in ((8001, 8000), (60000, 60000)):  # below and above PIL's own limit
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        assert failure(bytes(data)).code == "huge_picture"
        with pytest.raises(PictureError, match="64,000,000"):
            image_size(bytes(data))


def test_the_size_needs_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    for format in ("PNG", "JPEG"):
        for exif, size in ((turned, (64, 48)), (Image.Exif(), (48, 64))):
            data = encoded(noise, format, exif=exif)
            with pytest.raises(PictureError, match="decoded"):
                open_image(data)
            assert image_size(data[: len(data) * 2 // 3]) == size


def test_a_picture_error_crosses_processes() -> None:
    error = PictureError("broken_picture", "a.png", "it is cut", "save it again")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.png: it is cut. Fix: save it again"
    assert copy.code == "broken_picture"


def test_odd_metadata_is_passed_over_in_silence(capfd: pytest.CaptureFixture) -> None:
    """PIL would warn, once for each of the tags, about a picture that is sound; as errors its warnings would
    refuse it."""
    tags = b"".join((0x9000 + i).to_bytes(2, "little") + b"\7\0\xff\xff\0\0\0\0\0\0" for i in range(50))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\x32\0" + tags + bytes(4)
    data = encoded(Image.fromarray(BLOCKS), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("error")
        assert open_image(data).size == image_size(data) == (80, 48)
        warnings.simplefilter("always")  # someone else's filter, put before ours
        assert image_size(data) == (80, 48)
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
    assert not warned and capfd.readouterr() == ("", "")


# ---- large JPEGs, decoded small


@cache
def photo(width: int, height: int) -> Image.Image:
    """Random noise with the spectrum of photographs: amplitude falls with frequency; colours vary together,
    edges are sharp."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**1.2, s=(height, width))
        for _ in range(4)
    ]
    light, *tints = (plane / plane.std() for plane in planes)
    light += 1.5 * (planes[1] > planes[2])
    levels = np.stack([128 + 45 * light + 12 * tint for tint in tints], axis=-1)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def difference(data: bytes, size: tuple[int, int]) -> tuple[float, float, int]:
    """Mean and largest difference in levels, and PSNR in dB, of decoding small to decoding whole, after
    resizing to ``size``."""
    transform = ImageTransform(1024, 16, 16)
    whole = pixels(transform.resize(open_image(data), size=size))
    small = pixels(transform.resize(open_image(data, lambda w, h: size), size=size))
    gap = np.abs(whole - small)
    return gap.mean(), float(10 * np.log10(255**2 / max((gap**2).mean(), 1e-9))), int(gap.max())


def decoded_size(data: bytes, size: tuple[int, int]) -> tuple[int, int]:
    return open_image(data, lambda w, h: size).size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive", "4:4:4", "MPO"])
def test_a_large_jpeg_decoded_small_looks_the_same(kind: str, orientation: int) -> None:
    """Mean difference below 0.5 level and PSNR above 45 dB, for sizes that no scale divides, however the
    picture is turned."""
    picture, exif = photo(787, 653), Image.Exif()
    exif[0x0112] = orientation
    options: dict = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    format = "MPO" if kind == "MPO" else "JPEG"
    if kind == "MPO":
        options = {"save_all": True, "append_images": [picture.rotate(180)]}
    if kind in ("L", "CMYK"):
        picture = picture.convert(kind)
    data = encoded(picture, format, quality=90, exif=exif, **options)
    for scale, margin in ((2, 3), (4, 4), (8, 4)):
        size = (787 // (scale * margin), 653 // (scale * margin))
        size = size[::-1] if orientation > 4 else size
        decoded = (-(-787 // scale), -(-653 // scale))
        assert decoded_size(data, size) == (decoded[::-1] if orientation > 4 else decoded)
        mean, psnr, largest = difference(data, size)
        assert mean < 0.5 and psnr > 45 and largest < 16, (
            f"1/{scale}: mean {mean:.2f}, {psnr:.1f} dB, largest {largest}"
        )


def test_the_original_covers_less_than_all_of_a_small_decoded_picture() -> None:
    """Without ``info["box"]`` the picture would be stretched by up to a pixel, which costs 10 dB."""
    data = encoded(photo(785, 649), "JPEG", quality=90)
    size = (785 // 32, 649 // 32)
    opened = open_image(data, lambda w, h: size)
    assert opened.size == (99, 82) and opened.info == {"box": (0, 0, 785 / 8, 649 / 8)}
    whole = pixels(open_image(data).resize(size, Image.Resampling.BICUBIC))
    stretched = np.abs(whole - pixels(opened.resize(size, Image.Resampling.BICUBIC)))
    assert stretched.mean() > 2 * difference(data, size)[0]


def test_only_jpegs_far_above_the_wanted_size_are_decoded_small() -> None:
    data = encoded(photo(480, 300), "JPEG")
    assert decoded_size(data, (80, 50)) == (240, 150)
    assert (
        decoded_size(data, (81, 50))
        == decoded_size(data, (80, 51))
        == decoded_size(data, (480, 300))
        == (480, 300)
    )
    assert decoded_size(data, (30, 18)) == (120, 75) and decoded_size(data, (15, 9)) == (60, 38)
    assert decoded_size(data, (31, 18)) == decoded_size(data, (30, 19)) == (240, 150)
    asked = []

    def fit(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return 8, 8

    for format in ("PNG", "WEBP", "TIFF"):
        assert open_image(encoded(Image.fromarray(BLOCKS), format), fit).size == (80, 48)
    given = Image.open(io.BytesIO(data))
    assert open_image(given, fit).size == given.size == (480, 300)  # the caller's picture stays whole
    assert not asked
    turned = Image.Exif()
    turned[0x0112] = 6
    open_image(encoded(photo(480, 300), "JPEG", exif=turned), fit)
    assert asked == [(300, 480)]  # as the picture stands upright


def test_a_picture_decoded_small_cannot_be_resized_by_its_own_size() -> None:
    opened = open_image(encoded(photo(480, 300), "JPEG"), lambda w, h: (32, 16))
    transform = ImageTransform(64, 32, 16)
    with pytest.raises(AssertionError, match="give the size"):
        transform(opened)
    assert transform(opened, size=(32, 16)).shape == (3, 16, 32)
    again = open_image(opened)  # as any other picture: what it shows now is all there is
    assert again.info == {} and transform(again).shape == (3, 32, 64)


def test_half_a_jpeg_is_refused_when_it_is_decoded_small() -> None:
    data = encoded(photo(480, 300), "JPEG")
    with pytest.raises(PictureError) as cut:
        open_image(data[: len(data) // 2], lambda w, h: (32, 16))
    assert cut.value.code == "broken_picture"


# ---- sizes


def test_every_size_of_the_reference(golden: Path) -> None:
    cases = json.loads((golden / "image_resize.json").read_text())
    assert len(cases) == 240
    for c in cases:
        for limit in (None, 1024):  # a limit that is not reached changes nothing
            transform = ImageTransform(
                c["max_size"], c["min_size"], c["stride"], c["max_pixels"], limit=limit
            )
            assert transform.size(c["width"], c["height"], c["img_num"]) == tuple(c["out"]), c


SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.sampled_from([16, 14]), st.integers(16, 1100), st.integers(1, 5))
def test_no_side_outgrows_the_position_table(
    width: int, height: int, stride: int, limit: int, images: int
) -> None:
    for min_size in (64, 512, 2000):
        w, h = ImageTransform(1024, min_size, stride, limit=limit).size(width, height, images)
        assert w % stride == h % stride == 0
        assert stride <= min(w, h) and max(w, h) <= limit


@given(SIDES, SIDES, st.integers(1, 5000))
def test_tokens_stay_within_their_number_and_the_shape_is_kept(width: int, height: int, most: int) -> None:
    free = ImageTransform(1024, 512, 16, limit=1024)
    w, h = free.size(width, height)
    tw, th = ImageTransform(1024, 512, 16, limit=1024, max_tokens=most).size(width, height)
    assert tw % 16 == th % 16 == 0 and min(tw, th) >= 16
    tokens = tw * th // 256
    assert tokens <= most
    if w * h // 256 <= most:
        assert (tw, th) == (w, h)
    else:
        assert tw <= w and th <= h
        scale = (most / (w * h // 256)) ** 0.5
        columns, rows = int(w / 16 * scale), int(h / 16 * scale)
        if columns and rows:  # rounding both down always fits: the choice must not be worse

            def error(c: float, r: float) -> float:
                return abs(np.log(c / r / (width / height)))

            assert error(tw, th) <= error(columns, rows) + 1e-9
            assert tokens >= columns * rows / 2


def test_known_sizes_within_tokens() -> None:
    transform = ImageTransform(1024, 512, 16, limit=1024, max_tokens=1024)
    assert transform.size(1024, 1024) == (512, 512)
    assert transform.size(2000, 1000) == (720, 352)  # 45 x 22 = 990 tokens, shape 2.05
    assert ImageTransform(1024, 16, 16, max_tokens=4).size(1024, 16) == (64, 16)


# ---- pixels


def test_transform_values_and_layout() -> None:
    picture = Image.new("RGB", (64, 32), (0, 51, 255))
    x = ImageTransform(64, 32, 16)(picture)
    assert x.shape == (3, 32, 64) and x.dtype == torch.float32 and x.is_contiguous()
    assert x[:, 0, 0].tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=1e-7)


def test_every_level_is_normalised_as_the_reference_does() -> None:
    levels = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3) % 256
    # more rows than are normalised at a time
    picture = Image.fromarray(np.tile(levels.astype(np.uint8), (9, 9, 1)))
    reference = (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32).div_(255).sub_(0.5).div_(0.5)
    )
    transform = ImageTransform(144, 16, 16)
    assert torch.equal(transform(picture), reference) and transform(picture).is_contiguous()
    assert torch.equal(transform(picture, size=(144, 144)), reference)
    assert transform(picture, size=(32, 48)).shape == (3, 48, 32)


def test_resize_is_pillows_bicubic() -> None:
    picture = Image.fromarray(BLOCKS)
    transform = ImageTransform(64, 32, 16)
    assert transform.size(80, 48) == (64, 32)  # 38.4 rounds to 38, and 38 / 16 to 2
    assert (
        pixels(transform.resize(picture)) == pixels(picture.resize((64, 32), Image.Resampling.BICUBIC))
    ).all()


def test_picture_to_tensor_and_back_is_off_by_at_most_one_level() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    back = pixels(to_image(ImageTransform(16, 16, 16)(Image.fromarray(ramp))))
    assert np.abs(back - ramp).max() <= 1  # the floor of the reference


def test_to_image_floors_and_clamps() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).expand(3, 1, 6)
    assert pixels(to_image(x))[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert pixels(to_image(x.to(torch.bfloat16)))[0, :, 0].tolist()[-1] == 255
    with pytest.raises(PictureError, match="not finite"):
        to_image(torch.full((3, 2, 2), float("nan")))


def test_patches_are_those_of_the_pixels_to_the_bit():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 133, 3), np.uint8))
    for transform in (ImageTransform(112, 28, 14), ImageTransform(64, 32, 16)):
        for images in (1, 3):
            wanted = patchify(transform(picture, images), transform.stride)
            found = transform.patches(picture, images)
            assert found.dtype == torch.uint8 and torch.equal(to_unit(found), wanted)


def test_area_means_are_means_over_equal_areas():
    levels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    found = area_means(Image.fromarray(levels), (6, 4))
    assert found.shape == (4, 6) and np.allclose(found, levels.reshape(4, 5, 6, 5).mean((1, 3)), atol=1e-3)
