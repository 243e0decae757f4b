"""Pixels <-> latents: the exact codec, the FLUX VAE against the reference's numbers, and pictures of mixed
sizes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import copy_of

from unigen.model.codec import FluxCodec, PixelCodec, VaeConfig, encode_all, read_vae_config
from unigen.model.storage import CheckpointFolderError
from unigen.model.weights import load_bagel, load_codec

PIXEL = VaeConfig(type="pixel", downsample=4, z_channels=48, scale_factor=0.5, shift_factor=0.25)
TINY = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "z_channels": 4, "downsample": 2}


@pytest.fixture(scope="module")
def flux(golden):
    codec = FluxCodec(read_vae_config(golden / "model"))
    codec.load(load_file(golden / "model" / "ae.safetensors"))
    return codec.eval()


def test_the_pixel_codec_is_exact():
    # values that halves and quarters keep exact
    codec, pixels = PixelCodec(PIXEL), torch.randint(-8, 9, (2, 3, 8, 12)) / 8
    latents = codec.encode(pixels)
    assert latents.shape == (2, 48, 2, 3) and not list(codec.parameters())
    assert torch.equal(codec.decode(latents), pixels)


def test_the_pixel_codec_moves_every_pixel_to_its_cell():
    latents = PixelCodec(PIXEL).encode(torch.arange(3 * 8 * 12.0).reshape(1, 3, 8, 12))[0]
    assert torch.equal(
        latents[:, 1, 2], 0.5 * (torch.arange(288.0).reshape(3, 8, 12)[:, 4:8, 8:12].flatten() - 0.25)
    )


def test_a_gray_pixel_codec_keeps_gray_pictures():
    codec = PixelCodec(VaeConfig(type="pixel", downsample=4, z_channels=16))
    gray = torch.rand(1, 1, 8, 8).expand(-1, 3, -1, -1)
    latents = codec.encode(gray)
    assert latents.shape == (1, 16, 2, 2) and torch.allclose(codec.decode(latents), gray, atol=1e-6)


@torch.no_grad()
def test_the_flux_codec_has_the_reference_s_numbers(golden, flux):
    theirs = load_file(golden / "vae.safetensors")
    for ours, expected in (
        (flux.encode(theirs["image"]), theirs["latent_mean"]),
        (flux.decode(theirs["latent_mean"]), theirs["decoded"]),
    ):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def patterned(codec):
    """Weights that everybody can write down."""
    for number, (name, value) in enumerate(sorted(codec.state_dict().items())):
        places = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
        value.copy_(torch.sin(places * 0.7 + number) * scale + ("norm" in name and name.endswith("weight")))
    return codec


@torch.no_grad()
def test_the_flux_codec_has_the_numbers_of_diffusers_also_where_widths_change():
    """Numbers of diffusers 0.42.1 (AutoencoderKL) with the same weights; the golden VAE has one width."""
    codec = patterned(FluxCodec(VaeConfig(**TINY | {"ch_mult": (1, 2), "num_res_blocks": 2})).eval())
    mean, std = codec.posterior(torch.sin(torch.arange(72.0)).reshape(1, 3, 6, 4))
    decoded = codec.decoder(torch.cos(torch.arange(24.0)).reshape(1, 4, 3, 2))
    found = [*mean.flatten()[::5], *std.flatten()[::5], *decoded.flatten()[::11]]
    wanted = [-1.38667, 0.315133, 0.65102, -0.608064, -0.207921]
    wanted += [1.86564, 0.605232, 1.392771, 1.442069, 0.857613]
    wanted += [0.719051, 0.511985, -0.68373, 0.684115, 0.209898, -1.134529, -0.27491]
    assert [float(x) for x in found] == pytest.approx(wanted, abs=2e-5)


def test_flux_s_own_vae_has_the_published_parameters():
    with torch.device("meta"):
        published = FluxCodec(VaeConfig()).state_dict()
    assert len(published) == 244 and sum(p.numel() for p in published.values()) == 83_819_683


@torch.no_grad()
def test_a_latent_is_drawn_from_the_posterior(flux):
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    noise = torch.randn(1, 16, 2, 2)
    mean, logvar = flux.encoder(pixels).chunk(2, dim=1)
    expected = 0.3611 * (mean + torch.exp(0.5 * logvar) * noise - 0.1159)
    assert torch.allclose(flux.encode(pixels, noise), expected, atol=1e-6)
    assert torch.allclose(flux.encode(pixels, 0 * noise), flux.encode(pixels), atol=1e-6)


@pytest.mark.parametrize("drawn", [False, True])
def test_pictures_of_mixed_sizes_come_back_in_order(flux, drawn):
    g = torch.Generator().manual_seed(0)
    sizes = [(16, 16), (8, 24), (16, 16), (24, 8), (8, 24), (16, 16)]
    pixels = [torch.rand(3, *size, generator=g) * 2 - 1 for size in sizes]
    noise = [torch.randn(16, h // 8, w // 8, generator=g) for h, w in sizes] if drawn else None
    with torch.no_grad():
        alone = [flux.encode(p[None], noise[i][None] if noise else None)[0] for i, p in enumerate(pixels)]
    for ours, theirs in zip(encode_all(flux, pixels, noise), alone, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert encode_all(flux, []) == []


def test_at_most_a_megapixel_goes_through_the_vae_at_once(monkeypatch):
    """But a picture that is larger goes alone."""
    codec, batches, encode = PixelCodec(PIXEL), [], PixelCodec.encode
    monkeypatch.setattr(
        codec,
        "encode",
        lambda pixels, noise: batches.append(tuple(pixels.shape)) or encode(codec, pixels, noise),
    )
    pixels = [
        torch.zeros(3, *size)
        for size in [(512, 512)] * 5 + [(1024, 1024)] * 2 + [(1024, 1028)] * 2 + [(256, 512)]
    ]
    latents = encode_all(codec, pixels)
    assert [tuple(latent.shape) for latent in latents] == [
        (48, p.shape[1] // 4, p.shape[2] // 4) for p in pixels
    ]
    assert [(n, h, w) for n, _, h, w in batches] == [
        (4, 512, 512), (1, 512, 512), *[(1, 1024, 1024)] * 2, *[(1, 1024, 1028)] * 2, (1, 256, 512),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_codec_learns(golden, dtype):
    model = load_bagel(golden / "model", dtype=dtype)
    assert not any(p.requires_grad for p in model.codec.parameters())
    assert all(p.dtype == torch.float32 for p in model.codec.parameters())  # whatever the decoder computes in
    assert not [name for name in model.state_dict() if name.startswith("codec")]


# ---- errors


def test_a_missing_vae_config_means_flux(tmp_path):
    config = read_vae_config(tmp_path)
    assert (config.type, config.ch, config.ch_mult, config.z_channels, config.downsample) == (
        "flux",
        128,
        (1, 2, 4, 4),
        16,
        8,
    )
    assert (config.num_res_blocks, config.scale_factor, config.shift_factor) == (2, 0.3611, 0.1159)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "vq"}, "type is 'vq'; known types are flux, pixel"),
        ({"type": "pixel", "downsample": 4, "z_channels": 7}, "z_channels is 7.*48.*16"),
        ({**TINY, "downsample": 8}, "downsample is 8; 2 levels of ch_mult give 2"),
    ],
)
def test_a_vae_config_that_cannot_be_is_explained(tmp_path, values, message):
    (tmp_path / "vae_config.json").write_text(
        json.dumps({**values, "ch_mult": list(values.get("ch_mult", [1, 2, 4, 4]))})
    )
    with pytest.raises(ValueError, match=message):
        config = read_vae_config(tmp_path)
        (PixelCodec if config.type == "pixel" else FluxCodec)(config)


@pytest.mark.parametrize("content", ["[1]", "{", '{"ch_mult": 4}', '"flux"'])
def test_a_damaged_vae_config_is_the_user_s_error(golden, tmp_path, content):
    folder = copy_of(golden / "model", tmp_path)
    (folder / "vae_config.json").write_text(content)
    with pytest.raises(CheckpointFolderError, match=str(folder)):
        load_bagel(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_vae_weights_of_another_shape_are_explained(golden, tmp_path, change):
    folder = copy_of(golden / "model", tmp_path)
    tensors = load_file(folder / "ae.safetensors")
    if change == "missing":
        del tensors["encoder.conv_in.weight"]
    elif change == "unexpected":
        tensors["encoder.down.0.block.7.norm1.weight"] = torch.zeros(32)
    else:
        tensors["encoder.conv_in.weight"] = torch.zeros(32, 3, 1, 1)
    save_file(tensors, folder / "ae.safetensors")
    with pytest.raises(CheckpointFolderError, match=r"ae\.safetensors"):
        load_bagel(folder)
    config = load_bagel(folder, visual_gen=False).config  # without drawing, nobody needs it
    with pytest.raises(CheckpointFolderError):
        load_codec(folder, config)


def test_a_missing_vae_is_explained(golden, tmp_path):
    folder = copy_of(golden / "model", tmp_path)
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointFolderError, match=r"ae\.safetensors is missing\. Fix"):
        load_bagel(folder)
