"""PSNR, SSIM and LPIPS against their definitions and the packages that made them known; edits by hand."""

import math

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from unigen.evaluation.perceptual import Lpips, edit_changed, edit_stayed, lpips, psnr, ssim

SHARP = noise(70, 90, 1)
BLENDED = Image.blend(SHARP, noise(70, 90, 2), 0.3)


def test_psnr_and_ssim_are_scikit_images():
    # scikit-image 0.26: peak_signal_noise_ratio; structural_similarity of the gray pictures with
    # gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    assert psnr([BLENDED], [SHARP]).value == pytest.approx(17.763936850697956)
    assert ssim([BLENDED], [SHARP]).value == pytest.approx(0.884078970387786)


def test_psnr_by_hand():
    gray, lighter = (Image.new("RGB", (4, 4), (level,) * 3) for level in (100, 110))
    assert psnr([gray], [lighter]).value == pytest.approx(20 * math.log10(255 / 10))
    assert psnr([gray], [gray]).value == 100


def test_ssim_by_its_definition_at_one_window():
    x, y = (np.asarray(p.convert("L"), float)[:11, :11] for p in (SHARP, BLENDED))
    at = np.arange(11) - 5
    weight = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, c = (
        (weight * (x - mx) ** 2).sum(),
        (weight * (y - my) ** 2).sum(),
        (weight * (x - mx) * (y - my)).sum(),
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    crops = [p.crop((0, 0, 11, 11)) for p in (SHARP, BLENDED)]
    assert ssim(crops[:1], crops[1:]).value == pytest.approx(expected)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pictures_of_another_size_are_resized_and_that_is_said(metric):
    result = metric([SHARP, SHARP], [SHARP.resize((35, 45)), SHARP], to="source")
    assert (
        "1 of 2" in result.notes[0] and "to=source" in result.name and result.samples[0] < result.samples[1]
    )
    assert metric([SHARP], [SHARP]).notes == ()
    assert metric([], []).value is None


def test_a_picture_smaller_than_the_window_has_no_ssim():
    tiny = noise(10, 30)
    assert ssim([tiny], [tiny]).value is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """AlexNet's and lpips' files with random numbers under the published names."""
    folder, generator = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    trunk = {}
    for number, shape in shapes.items():
        trunk[f"features.{number}.weight"] = torch.randn(shape, generator=generator) * 0.05
        trunk[f"features.{number}.bias"] = torch.randn(shape[0], generator=generator) * 0.05
    heads = {
        f"lin{place}.model.1.weight": torch.rand((1, shape[0], 1, 1), generator=generator)
        for place, shape in enumerate(shapes.values())
    }
    torch.save(trunk, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


def test_lpips_is_that_of_its_package(weights):
    # lpips 0.1.4 over an AlexNet of torchvision's layers, with these numbers in both, gave this
    trunk, heads = weights
    result = lpips([SHARP], [BLENDED], alexnet=trunk, weights=heads)
    assert result.value == pytest.approx(0.159237444, rel=1e-5)
    assert lpips([SHARP], [SHARP], alexnet=trunk, weights=heads).value == 0
    assert result.higher_is_better is False and "|v0.1|" in result.name
    assert Lpips.load(trunk, heads)(torch.zeros(2, 3, 64, 70), torch.zeros(2, 3, 64, 70)).shape == (2,)


def test_lpips_without_its_weights_has_no_value(weights, tmp_path, monkeypatch):
    trunk, heads = weights
    for alexnet, alex in [(tmp_path / "no", heads), (heads, heads), (trunk, trunk)]:
        result = lpips([SHARP], [BLENDED], alexnet=alexnet, weights=alex)
        assert result.value is None and "alex.pth" in result.fix
    monkeypatch.setattr("unigen.evaluation.perceptual.find_spec", lambda name: None)
    assert "lpips" in lpips([SHARP], [BLENDED], alexnet=trunk).reason
    small = noise(63, 80)
    assert lpips([small], [small], alexnet=trunk, weights=heads).value is None


# ---- edits


def picture(left: int, right: int):
    """The left half of one level, the right half of another."""
    levels = np.full((8, 8, 3), left, np.uint8)
    levels[:, 4:] = right
    return Image.fromarray(levels)


SOURCE, REFERENCE = picture(100, 0), picture(100, 200)  # the right half changes


@pytest.mark.parametrize(
    ("made", "changed", "stayed"),
    [
        (REFERENCE, 1, 1),
        (SOURCE, 0, 1),
        (picture(100, 150), 0.75, 1),
        (picture(151, 200), 1, 0.8),  # 51 of 255 levels beside it
        (picture(100, 255), 1 - 55 / 200, 1),
    ],
)
def test_the_two_halves_are_told_apart(made, changed, stayed):
    assert edit_changed([made], [SOURCE], [REFERENCE]).value == pytest.approx(changed)
    assert edit_stayed([made], [SOURCE], [REFERENCE]).value == pytest.approx(stayed)


def test_edits_that_leave_nothing_count_for_what_changed_alone():
    whole = picture(0, 255)
    inverted = picture(255, 0)
    made, sources, references = [REFERENCE, inverted], [SOURCE, whole], [REFERENCE, inverted]
    assert edit_changed(made, sources, references).value == 1
    stayed = edit_stayed(made, sources, references)
    assert stayed.value == 1 and stayed.notes == ("1 of 2 edits count",)
    none = edit_stayed([inverted], [whole], [inverted])
    assert none.value is None and none.lacks == "samples"


def test_pictures_of_another_size_are_resized():
    assert edit_changed([REFERENCE.resize((16, 16))], [SOURCE], [REFERENCE]).value > 0.9
