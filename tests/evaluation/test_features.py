"""Extractors name what a feature depends on, give what the networks give, and remember it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from unigen.evaluation.features import (
    FeatureStore,
    inception_extractor,
    load_extractor,
    module_extractor,
    resized,
    tower_extractor,
    vit_extractor,
)
from unigen.evaluation.inception import Inception, resize_as_tensorflow
from unigen.evaluation.results import CannotRun
from unigen.evaluation.towers import PictureTower
from unigen.sequence.images import PictureError, bicubic_levels


@pytest.fixture(scope="module")
def pictures():
    return [
        Image.merge("RGB", [noise(40 + 7 * i, 60, 3 * i + c).getchannel(0) for c in range(3)])
        for i in range(4)
    ]


def pixels(picture, size, mean, std):
    levels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return torch.tensor((levels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("clip", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ("siglip", [0.5] * 3, [0.5] * 3),
    ],
)
def test_features_of_a_dual_encoder_are_its_embeddings(towers, pictures, name, mean, std):
    from transformers import AutoModel

    found = load_extractor(towers[name])(pictures)
    model = AutoModel.from_pretrained(towers[name]).eval()
    for picture, feature in zip(pictures, found.values):
        with torch.no_grad():
            ids = torch.tensor([[2, 5, 3]])
            expected = model(pixel_values=pixels(picture, 32, mean, std), input_ids=ids).image_embeds[0]
        got = feature / np.linalg.norm(feature)
        assert got == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.identity.startswith(f"{name}@") and found.identity.endswith("|pil-bicubic-32|projected")
    assert "torch-" in found.libraries and "pillow-" in found.libraries


def test_features_of_dinov2_are_its_class_token(towers, pictures):
    from transformers import AutoModel

    found = load_extractor(towers["dinov2"])(pictures)
    model = AutoModel.from_pretrained(towers["dinov2"]).eval()
    x = pixels(pictures[1], 28, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model(pixel_values=x).last_hidden_state[0, 0]
    assert found.values[1] == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_folder_says_how_pictures_are_prepared(towers, pictures, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for path in Path(towers["clip"]).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "crop_size": {"height": 32, "width": 32}}'
    )
    tower = PictureTower.load(folder)
    assert (
        tower.size == 32
        and tower.mean.flatten().tolist() == [0, 0, 0]
        and tower.std.flatten().tolist() == [1, 1, 1]
    )
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CannotRun, match="JSON"):
        PictureTower.load(folder)


@pytest.mark.slow
def test_other_weights_have_another_name(towers, tmp_path):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(towers["dinov2"])
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3
    model.save_pretrained(tmp_path / "dinov2")
    one, other = load_extractor(towers["dinov2"]), load_extractor(str(tmp_path / "dinov2"))
    assert (
        one.identity.partition("@")[0] == other.identity.partition("@")[0] and one.identity != other.identity
    )


def test_any_module_is_an_extractor(pictures):
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    found = module_extractor(module, "means", 16, mean=[0, 0, 0], std=[1, 1, 1])(pictures)
    expected = [
        np.asarray(p.resize((16, 16), Image.Resampling.BICUBIC), float).mean((0, 1)) / 255 for p in pictures
    ]
    assert found.values == pytest.approx(np.array(expected), abs=1e-5)
    assert found.identity.startswith("means@") and "pil-bicubic-16" in found.identity


def test_the_checkpoints_own_vit_sees_as_the_model_does(golden, pictures):
    from unigen.model.weights import load_bagel
    from unigen.sequence.grid import grid_positions, patchify

    found = vit_extractor(golden / "model", size=56)(pictures)
    model = load_bagel(golden / "model", dtype=torch.float32, visual_gen=False)
    patch, side = model.config.vit.patch_size, model.config.vit_max_num_patch_per_side
    x = pixels(pictures[2], 56, [0.5] * 3, [0.5] * 3)[0]
    n = 56 // patch
    with torch.no_grad():
        features = model.vit_model(patchify(x, patch), grid_positions(n, n, side, False), [n * n])
    assert found.values[2] == pytest.approx(features.mean(0).numpy(), abs=1e-4)
    assert found.identity.startswith("bagel-vit@") and found.identity.endswith("|pil-bicubic-56|mean")


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("bagel-vit:{tmp}", "ema.safetensors"),
        ("inception-tf1:{tmp}/none.pth", "6726825d"),
        ("{tmp}/none", "not a folder"),
        ("{tmp}", "config.json"),
        ("{bert}", "CLIP"),
        ("no-such-organisation/no-such-model", "hf download"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_what_to_do(spec, word, towers, tmp_path):
    with pytest.raises(CannotRun) as error:
        load_extractor(spec.format(tmp=tmp_path, bert=towers["bert"]))
    assert word in str(error.value) and error.value.fix and "\n" not in str(error.value)


def test_a_name_is_looked_for_in_the_local_cache_and_nowhere_else(towers, tmp_path, monkeypatch):
    def connect(*_, **__):
        raise AssertionError("a connection is opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as where nobody set it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(CannotRun, match="models/dino is not a folder"):
        load_extractor("models/dino")  # a path that is misspelt
    cached = tmp_path / "models--models--dino"
    shutil.copytree(towers["dinov2"], cached / "snapshots" / "0f1e")
    said = {"size": 20, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (cached / "snapshots" / "0f1e" / "preprocessor_config.json").write_text(json.dumps(said))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0f1e")
    by_name, by_folder = load_extractor("models/dino"), load_extractor(str(cached / "snapshots" / "0f1e"))
    assert by_name.identity.startswith("dino@") and "20" in by_name.identity
    assert by_name.identity.partition("@")[2] == by_folder.identity.partition("@")[2]


def test_pickled_code_in_a_file_of_weights_is_not_run(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(CannotRun):
        inception_extractor(tmp_path / "weights.pth")
    assert not (tmp_path / "run").exists()


# ---- Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of weights with the published names and random values."""
    network, generator = Inception().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.05 if parameter.ndim > 1 else 0.1
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale + name.endswith("bn.weight")
            )
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    picture = torch.randint(0, 256, (2, 3, 77, 400), generator=generator)
    return path, network, picture


@pytest.mark.slow
def test_inception_is_torch_fidelitys(inception):
    # torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with these weights gave these numbers for this
    # picture
    _, network, picture = inception
    with torch.no_grad():
        features = network(resize_as_tensorflow(picture.float()))
    assert features[:, :4].flatten().tolist() == pytest.approx(
        [0.0851, 1.5923, 0.6141, 0.0619, 0.0854, 1.5911, 0.6134, 0.0619], abs=2e-4
    )
    assert features.sum(1).tolist() == pytest.approx([6130.2148, 6129.9512], rel=1e-5)


@pytest.mark.slow
def test_the_resize_is_part_of_inceptions_name(inception, pictures):
    path, network, _ = inception
    found = {resize: inception_extractor(path, resize=resize)(pictures[:2]) for resize in ("tf1", "clean")}
    assert [f.identity.split("|")[1] for f in found.values()] == ["tf1-bilinear-299", "clean-fid-bicubic-299"]
    assert all("of-other-weights@" in f.identity for f in found.values())
    clean = torch.tensor(bicubic_levels(pictures[0], (299, 299)))[None]
    with torch.no_grad():
        assert found["clean"].values[0] == pytest.approx(network(clean)[0].numpy(), rel=1e-4, abs=1e-4)
    assert np.abs(found["clean"].values - found["tf1"].values).max() > 1e-3


def test_the_legacy_resize_is_that_of_tensorflow_1():
    # without half pixels: the i-th of 4 lies at i * 2 / 4, and past the last pixel nothing changes
    x = torch.tensor([[0.0, 100.0], [10.0, 110.0]])[None, None]
    row = torch.tensor([0.0, 50, 100, 100])
    assert (
        resize_as_tensorflow(x, 4)[0, 0].tolist() == (row + torch.tensor([[0.0], [5], [10], [10]])).tolist()
    )


def test_cleanfids_resize_is_not_rounded(pictures):
    levels = bicubic_levels(pictures[0], (20, 10))
    rounded = np.asarray(pictures[0].resize((20, 10), Image.Resampling.BICUBIC), float).transpose(2, 0, 1)
    # PIL rounds twice, after rows and after columns
    assert levels.shape == (3, 10, 20) and np.abs(levels - rounded).max() < 3 and (levels % 1 != 0).any()
    assert levels.min() >= 0 and levels.max() <= 255


def test_a_crop_takes_the_centre():
    picture = Image.new("RGB", (80, 40))
    picture.paste((255, 255, 255), (20, 0, 60, 40))
    assert resized(picture, 20, crop=True)[:, :, 2:-2].min() == 1
    assert resized(picture, 20).min() == 0


# ---- the cache


def test_features_are_remembered_by_picture_and_extractor(towers, pictures, tmp_path):
    store, tower = FeatureStore(tmp_path / "cache"), PictureTower.load(towers["dinov2"])
    extractor = tower_extractor(tower)
    pictures[0].save(tmp_path / "a.png")
    first = extractor([tmp_path / "a.png", *pictures[1:]], store)
    assert len(list(store)) == 4
    calls = []
    extractor.run = lambda pixels: calls.append(len(pixels)) or tower.pictures(pixels)
    again = extractor([(tmp_path / "a.png").read_bytes(), *pictures[1:]], store)
    assert calls == [] and (again.values == first.values).all()
    tower_extractor(tower, crop=True)([pictures[1]], store)  # another preparation is another feature
    assert len(list(store)) == 5
    pictures[1].save(tmp_path / "a.png")  # another picture of the same name
    extractor([tmp_path / "a.png"], store)
    assert calls == [1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
        lambda data: b"x" * 80,
    ],
)
def test_a_damaged_entry_is_computed_again(damage, tmp_path):
    store = FeatureStore(tmp_path)
    feature = np.arange(8, dtype=np.float32)
    store.put("ab" * 32, feature)
    path = next(tmp_path.rglob("*.safetensors"))
    assert (store.get("ab" * 32) == feature).all() and store.get("cd" * 32) is None
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("ab" * 32) is None
    store.put("ab" * 32, feature)
    assert (store.get("ab" * 32) == feature).all()


def test_a_picture_that_cannot_be_read_is_named(towers, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"broken\.png"):
        load_extractor(towers["dinov2"])([tmp_path / "broken.png"])


def test_numbers_that_are_not_finite_are_no_features(pictures):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) / 0

    with pytest.raises(CannotRun, match="finite"):
        module_extractor(Broken(), "broken", 8)(pictures)
    with pytest.raises(CannotRun, match="no samples"):
        module_extractor(Broken(), "broken", 8)([])
