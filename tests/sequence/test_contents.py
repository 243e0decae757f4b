"""What the encoders see of a picture: opened for those that look, found in a cache where it is, the same
pixels in every visit."""

from pathlib import Path

import pytest
import torch

from unigen.config import DataOptions
from unigen.sequence import contents
from unigen.sequence.contents import View, Viewer, digest
from unigen.sequence.draw import RandomKey
from unigen.sequence.grid import patchify, to_unit
from unigen.sequence.images import Confined, PictureError, open_image, to_image
from unigen.sequence.pack import Geometry
from unigen.sequence.plan import Planner, Transforms
from unigen.sequence.tokens import WordTokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Image, Kind, Text

VAE, VIT = ImageTransform(64, 32, 16), ImageTransform(42, 28, 14)
VIEWER = Viewer(VAE, VIT, 1, 14)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    to_image(torch.rand(3, 48, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1).save(
        tmp_path / "a.png"
    )
    return tmp_path / "a.png"


class Known:
    """A cache that knows what it is told to, and notes what it is asked."""

    def __init__(self, *names: str):
        self.names, self.asked = names, []

    def posterior(self, picture: str, view: View):
        self.asked.append(("vae", picture, view))
        return (torch.zeros(4, 6, 8), torch.ones(4, 6, 8)) if "vae" in self.names else None

    def features(self, picture: str, view: View):
        self.asked.append(("vit", picture, view))
        return torch.ones(6, 5) if "vit" in self.names else None

    def latent(self, posterior, noise):
        return posterior[0] + posterior[1] * noise


def test_both_encoders_see_the_picture_as_their_transforms_make_it(path):
    seen = VIEWER.look(path, vae=True, vit=True)
    picture = open_image(path)
    assert seen.view == View(VAE.size(60, 48), VIT.size(60, 48)) == View((64, 48), (42, 28))
    assert torch.equal(to_unit(seen.pixels), VAE(picture)) and torch.equal(
        to_unit(seen.patches), patchify(VIT(picture), 14)
    )
    assert seen.nbytes == 3 * 64 * 48 + 6 * 588 and seen.posterior is None is seen.features


@pytest.mark.parametrize(("vae", "vit"), [(True, False), (False, True)])
def test_nothing_is_made_for_an_encoder_that_does_not_look(path, vae, vit):
    seen = VIEWER.look(path, vae, vit)
    assert (seen.pixels is not None, seen.patches is not None) == (vae, vit)
    both = VIEWER.look(path, True, True)
    assert torch.equal(seen.pixels, both.pixels) if vae else torch.equal(seen.patches, both.patches)


@pytest.mark.parametrize(
    ("vae", "vit", "decoded"),
    [
        ((64, 48), (42, 28), (64, 48)),
        ((32, 64), (56, 28), (56, 64)),
        (None, (42, 28), (42, 28)),
        ((32, 16), None, (32, 16)),
    ],
)
def test_decoding_suffices_for_the_larger_use(vae, vit, decoded):
    assert View(vae, vit).decoded == decoded


@pytest.mark.parametrize(("vae", "vit"), [(True, True), (True, False), (False, True)])
def test_a_large_jpeg_is_decoded_alike_whoever_looks(tmp_path, vae, vit, monkeypatch):
    """The size that decoding is fitted to is that of both encoders' uses, also where a visit drops one of
    them."""
    to_image(torch.rand(3, 800, 600, generator=torch.Generator().manual_seed(0)) * 2 - 1).save(
        tmp_path / "a.jpg", quality=95
    )
    fitted, viewer = [], Viewer(ImageTransform(32, 32, 16), ImageTransform(98, 28, 14), 1, 14)

    def opened(source, fit):
        return open_image(source, lambda *size: fitted.append((size, fit(*size))) or fitted[-1][1])

    monkeypatch.setattr(contents, "open_image", opened)
    seen = viewer.look(tmp_path / "a.jpg", vae, vit)
    view = viewer.view(600, 800)
    assert fitted == [((600, 800), view.decoded)] and view.decoded == (70, 98) and seen.view == view
    assert seen.pixels is None or seen.pixels.shape[1:] == view.vae[::-1]


# ---- with a cache


@pytest.mark.parametrize("confined", [False, True])
def test_what_the_cache_knows_is_not_decoded(path, confined, monkeypatch):
    monkeypatch.setattr(contents, "open_image", None)
    cache = Known("vae", "vit")
    seen = VIEWER.look(Confined(path, path.parent) if confined else path, True, True, cache)
    assert seen.pixels is None is seen.patches and len(seen.posterior) == 2 and seen.features.shape == (6, 5)
    assert cache.asked == [(name, digest(path.read_bytes()), VIEWER.view(60, 48)) for name in ("vae", "vit")]


@pytest.mark.parametrize("known", [(), ("vae",), ("vit",)])
def test_what_the_cache_does_not_know_is_decoded(path, known):
    seen, plain = VIEWER.look(path, True, True, Known(*known)), VIEWER.look(path, True, True)
    assert (seen.posterior is None) == ("vae" not in known) and (seen.features is None) == (
        "vit" not in known
    )
    assert seen.pixels is None if "vae" in known else torch.equal(seen.pixels, plain.pixels)
    assert seen.patches is None if "vit" in known else torch.equal(seen.patches, plain.patches)


def test_the_cache_is_asked_only_for_who_looks(path):
    cache = Known("vae", "vit")
    VIEWER.look(path, False, True, cache)
    assert [name for name, _, _ in cache.asked] == ["vit"]


def test_an_opened_picture_is_not_looked_up(path):
    cache = Known("vae", "vit")
    seen = VIEWER.look(open_image(path), True, True, cache)
    assert not cache.asked and torch.equal(seen.pixels, VIEWER.look(path, True, True).pixels)


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_errors_name_the_file_though_its_bytes_were_read_before(path, content):
    path.write_bytes(path.read_bytes()[:600] if content == "half" else content)
    with pytest.raises(PictureError) as caught:
        VIEWER.look(path, True, True, Known())
    assert caught.value.name == str(path) and str(caught.value).count(str(path)) == 1


def test_errors_about_bytes_say_so():
    with pytest.raises(PictureError, match="the given bytes"):
        VIEWER.look(b"no picture", True, True, Known())


# ---- in a sample


def planner() -> Planner:
    geometry = Geometry(
        latent_stride=16, latent_patch=2, patch_dim=16, max_latent_size=8, vit_patch=14, vit_side=8
    )
    return Planner(WordTokenizer(), geometry, Transforms(VAE, VIT, VIT), DataOptions(), 4096)


def test_what_is_dropped_changes_no_random_number_of_other_pictures(path):
    """The second picture's posterior draw is the same whether the first one shows its latents, its ViT
    tokens, or both."""
    make, draws = planner(), []
    sample = [Image(path), Text("x"), Image(path, target=True)]
    grid = {Kind.VIT: (2, 3), Kind.CLEAN: (3, 4), Kind.NOISED: (3, 4)}
    for dropped in (None, Kind.CLEAN, Kind.VIT):
        context = [
            Block(kind, grid[kind][0] * grid[kind][1], 0, grid[kind], dropped=kind == dropped)
            for kind in (Kind.CLEAN, Kind.VIT)
        ]
        target = Block(Kind.NOISED, 12, 2, grid[Kind.NOISED], loss=True)
        draws.append(make.fill(sample, [*context, target], RandomKey(0, 0, 0))[-1].posterior)
    assert draws[0].shape == (4, 6, 8) and all(torch.equal(draws[0], draw) for draw in draws)


def test_a_cached_picture_fills_blocks_with_one_latent_and_features(path):
    make, plain = planner(), planner()
    make.cache = Known("vae", "vit")
    sample = [Text("x"), Image(path, target=True), Text("y", target=True)]
    sizes = plain.token_lengths(type("Record", (), {"sample": sample}))
    draw = RandomKey(0, 0, 0, training=False)
    found, wanted = (p.fill(sample, p.outline(sample, sizes, draw), draw) for p in (make, plain))
    images = [(a, b) for a, b in zip(found, wanted, strict=True) if a.kind != Kind.TEXT]
    assert [a.kind for a, _ in images] == [Kind.NOISED, Kind.CLEAN, Kind.VIT]
    for a, b in images:
        assert a.pixels is None is a.patches and (a.noise is None) == (b.noise is None) and a.u == b.u
    (noised, b), (clean, _), (vit, _) = images
    assert (
        noised.latent is clean.latent
        and torch.equal(noised.latent, b.posterior)
        and torch.equal(noised.noise, b.noise)
    )
    assert vit.features.shape == (6, 5) and vit.latent is None
