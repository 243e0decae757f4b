"""The store of encoded pictures: entries come back bit for bit or not at all, whatever happens to their files
or their writers."""

import errno
import json
import logging
import multiprocessing
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from unigen.cache import store as module
from unigen.cache.store import CacheError, CacheTally, Encoder, FeatureCache, Store, about, entry_key
from unigen.model.codec import VaeConfig
from unigen.sequence.contents import View

VAE = Encoder("vae", "weights", "float32")
VIT = Encoder("vit", "weights", "bfloat16")
VIEW = View((64, 48), (28, 42))
KEY = entry_key(VAE, "picture", VIEW)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "cache")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"mean": torch.randn(3, 6, 8, generator=g).bfloat16(), "std": torch.rand(3, 6, 8, generator=g)}


def put(store: Store, seed: int = 0, key: str = KEY) -> Path:
    store.put(key, tensors(seed), about(VAE, "picture", VIEW))
    return store.path(key)


def same(found: dict[str, torch.Tensor] | None, wanted: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == wanted.keys() and all(
        found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in wanted.items()
    )  # fmt: skip


# ---- what comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_comes_back_bit_for_bit(store, dtype):
    wanted = {
        "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).t(),
        "b": torch.full((1,), float("nan")),
    }
    size = store.put(KEY, wanted, {})
    found = store.get(KEY)
    assert found["a"].dtype == dtype and torch.equal(found["a"], wanted["a"]) and found["b"].isnan().all()
    assert store.path(KEY).stat().st_size == size and list(store.entries()) == [(KEY, size)]


def test_an_entry_is_a_safetensors_file_that_says_what_it_is_of(store):
    with safe_open(put(store), "pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors())  # noqa: SIM118
        said = file.metadata()
    assert (
        said["key"] == KEY
        and said["encoder"] == "vae"
        and said["size"] == "64x48"
        and said["decoded"] == "64x48"
    )


def test_an_entry_that_an_earlier_version_wrote_is_read(store):
    header = (
        b'{"__metadata__":{"version":"1","encoder":"vae","picture":"picture","size":"64x48","decoded":"64x48",'
        b'"pixels":"1","weights":"weights","dtype":"float32",'
        b'"key":"b759882566922217b05825b45b0e731ab8ae79781057c498797739fe5f534a95","checksum":"c9b8fb4b"},'
        b'"std":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"mean":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}} '
    )
    store.path(KEY).parent.mkdir(parents=True)
    store.path(KEY).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0?\x80?\0@")
    wanted = {"std": torch.tensor([0.5]), "mean": torch.tensor([1.0, 2.0]).bfloat16()}
    assert same(store.get(KEY), wanted)


def test_a_missing_entry_is_none_without_a_word(store, caplog):
    assert store.get(KEY) is None and not caplog.records


def test_an_entry_written_again_is_the_new_one(store):
    put(store, 0)
    put(store, 1)
    assert same(store.get(KEY), tensors(1)) and len(list(store.entries())) == 1


@pytest.mark.parametrize(
    ("encoder", "picture", "view"),
    [
        (replace(VAE, name="vit"), "picture", VIEW),
        (replace(VAE, weights="others"), "picture", VIEW),
        (replace(VAE, dtype="bfloat16"), "picture", VIEW),
        (VAE, "another", VIEW),
        (VAE, "picture", View((48, 64), (28, 42))),
        (VAE, "picture", View((64, 48), (28, 56))),  # the same size for the VAE, but decoded larger
    ],
)
def test_whatever_changes_the_answer_changes_the_key(encoder, picture, view):
    assert entry_key(encoder, picture, view) != KEY and len(entry_key(encoder, picture, view)) == 64


@pytest.mark.parametrize("name", ["PIXELS", "VERSION"])
def test_a_new_transform_or_store_version_changes_the_key(monkeypatch, name):
    monkeypatch.setattr(module, name, getattr(module, name) + 1)
    assert entry_key(VAE, "picture", VIEW) != KEY


def test_what_the_vit_does_not_see_leaves_the_key_of_the_vae_alone():
    assert (
        entry_key(VAE, "picture", View((64, 48), None))
        == KEY
        == entry_key(VAE, "picture", View((64, 48), (28, 28)))
    )


# ---- damage


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(store, caplog):
    """One bit of any byte, header or data: the entry is missing. (1,500 flips, every region of the file.)"""
    path = put(store)
    sound, r = path.read_bytes(), random.Random(0)
    for at in [*range(len(sound)), *(r.randrange(len(sound)) for _ in range(1500 - len(sound)))]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << r.randrange(8)
        path.write_bytes(damaged)
        assert store.get(KEY) is None, at
    path.write_bytes(sound)
    assert same(store.get(KEY), tensors())


@pytest.mark.slow
def test_every_truncation_and_every_tail_is_noticed(store):
    path = put(store)
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert store.get(KEY) is None, length
    for tail in (b"\0", b" " * 8, sound):
        path.write_bytes(sound + tail)
        assert store.get(KEY) is None


def test_damage_is_reported_once_and_repaired_by_writing(store, caplog):
    path = put(store)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None and store.get(KEY) is None
    assert [
        str(path) in record.getMessage() and "unigen cache" in record.getMessage()
        for record in caplog.records
    ] == [True]
    put(store)
    assert same(store.get(KEY), tensors())


def test_an_entry_under_the_name_of_another_is_not_used(store):
    other = entry_key(VIT, "picture", VIEW)
    store.path(other).parent.mkdir(parents=True)
    os.replace(put(store), store.path(other))
    assert store.get(other) is None


def test_a_folder_in_place_of_an_entry_is_no_crash(store):
    store.path(KEY).mkdir(parents=True)
    assert store.get(KEY) is None


# ---- writers


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_is_a_clear_error_and_breaks_nothing(store, monkeypatch, code, fails):
    """The old entry stays, and no unfinished file is left."""
    path = put(store, 0)

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(CacheError, match=r"disk is full.*Fix: make room"):
        put(store, 1)
    monkeypatch.undo()
    assert same(store.get(KEY), tensors(0)) and [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_number_of_writers_of_the_same_entries(store):
    keys = [entry_key(VAE, str(i), VIEW) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: put(store, i % 8, keys[i % 8]), range(160)))
    assert (
        all(same(store.get(key), tensors(i)) for i, key in enumerate(keys))
        and len(list(store.entries())) == 8
    )
    assert not list(store.folder.rglob("*.part"))


def write_for_ever(folder: Path, began) -> None:
    store, i = Store.create(folder), 0
    while True:
        store.put(entry_key(VAE, str(i % 5), VIEW), {"mean": torch.full((1 << 20,), float(i))}, {})
        i += 1
        began.set()


@pytest.mark.slow
def test_a_killed_writer_leaves_no_half_entry(tmp_path):
    """Killed without warning at ten random moments: every entry is whole, and what it left over is swept
    away."""
    folder, r, fork = tmp_path / "cache", random.Random(0), multiprocessing.get_context("fork")
    for _ in range(10):
        began = fork.Event()
        writer = fork.Process(target=write_for_ever, args=(folder, began), daemon=True)
        writer.start()
        assert began.wait(60)
        time.sleep(r.random() * 0.05)
        writer.kill()
        writer.join()
    store = Store.open(folder)
    entries = [key for key, _ in store.entries()]
    for key in entries:
        mean = store.get(key)["mean"]
        assert mean.numel() == 1 << 20 and bool((mean == mean[0]).all())
    left = store.path(entries[0]).with_name(f".{entries[0]}.0123456789abcdef.part")
    fresh = store.path(entries[0]).with_name(f".{entries[0]}.fedcba9876543210.part")
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert store.prune(set(entries)) == (0, 0)
    assert not left.exists() and fresh.exists()  # another process may be writing the fresh one


# ---- the folder


def test_training_needs_a_cache_that_is_there(tmp_path):
    with pytest.raises(CacheError, match=r"is not a folder\. Fix: fill it with unigen cache"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(CacheError, match="holds no cache"):
        Store.open(tmp_path / "other")
    for content in ("[1]", "{}", "half a"):
        (tmp_path / "other" / module.MARKER).write_text(content)
        with pytest.raises(CacheError, match="holds no cache"):
            Store.open(tmp_path / "other")
    (tmp_path / "other" / module.MARKER).write_text(json.dumps({"unigen_cache": module.VERSION + 1}))
    with pytest.raises(CacheError, match=f"version {module.VERSION + 1}"):
        Store.open(tmp_path / "other")


def test_a_folder_with_other_files_is_not_made_a_cache(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(CacheError, match=r"photo.jpg.*Fix"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_store_is_made_once_and_found_again(store):
    put(store)
    assert same(Store.create(store.folder).get(KEY), tensors()) and same(
        Store.open(store.folder).get(KEY), tensors()
    )


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be written.*Fix"):
        Store.create(tmp_path / "file" / "cache")


def test_pruning_removes_what_is_not_kept_and_nothing_else(store):
    keys = [entry_key(VAE, str(i), VIEW) for i in range(4)]
    sizes = [put(store, i, key).stat().st_size for i, key in enumerate(keys)]
    stranger = store.path(keys[0]).with_name("note.txt")
    stranger.write_text("")
    store.introduce(VAE)
    assert store.prune(set(keys[:2])) == (2, sum(sizes[2:]))
    assert [store.get(key) is not None for key in keys] == [True, True, False, False]
    assert stranger.exists() and store.knows(VAE)


def test_room_is_checked(store):
    store.check_space(1)
    with pytest.raises(CacheError, match=r"GB are needed and .* GB are free. Fix: make room"):
        store.check_space(1 << 60)


def test_encoders_are_known_by_weights_and_dtype(store):
    store.introduce(VAE)
    assert (
        store.knows(VAE)
        and not store.knows(replace(VAE, dtype="float16"))
        and not store.knows(replace(VAE, weights="x"))
    )
    assert not store.knows(replace(VAE, name="vit"))


# ---- what training asks


def test_only_encoders_that_were_named_are_looked_for(store):
    put(store)
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    store.put(entry_key(VIT, "picture", VIEW), {"features": features}, {})
    config = VaeConfig(z_channels=3)
    both, neither = (
        FeatureCache(store, *encoders, config, (14, 5)) for encoders in ((VAE, VIT), (None, None))
    )
    assert same(dict(zip(("mean", "std"), both.posterior("picture", VIEW), strict=True)), tensors())
    assert torch.equal(both.features("picture", VIEW), features)
    assert both.posterior("other", VIEW) is None and both.features("other", VIEW) is None
    assert neither.posterior("picture", VIEW) is None and neither.features("picture", VIEW) is None


def test_a_whole_entry_with_other_tensors_is_told_and_not_used(store, caplog):
    """A cache of someone else, whose checksum is right."""
    cache = FeatureCache(store, VAE, VIT, VaeConfig(z_channels=3), (14, 5))
    good = tensors()
    for number, wrong in enumerate((
        {"mean": good["mean"]}, {**good, "std": good["std"][:, :1]}, {**good, "mean": good["mean"].int()},
    )):  # fmt: skip
        picture = f"picture {number}"
        store.put(entry_key(VAE, picture, VIEW), wrong, {})
        assert cache.posterior(picture, VIEW) is None
    store.put(entry_key(VIT, "picture", VIEW), {"features": torch.zeros(5, 5)}, {})
    assert cache.features("picture", VIEW) is None
    assert sum("not those of this picture" in record.getMessage() for record in caplog.records) == 4


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_marker_or_an_entry_that_is_no_file_of_the_cache_is_not_read(store, tmp_path, kind):
    path = put(store)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved") if kind == "link" else os.mkfifo(path)
    assert store.get(KEY) is None
    marker = store.folder / module.MARKER
    marker.rename(tmp_path / "marker")
    marker.symlink_to(tmp_path / "marker") if kind == "link" else os.mkfifo(marker)
    with pytest.raises(CacheError, match="holds no cache"):
        Store.open(store.folder)


def test_the_tally_counts_what_is_looked_up(store):
    """A codec of pixels, and a ViT that learns, have nothing in a cache, so nothing of theirs is missing."""
    found = {"n_ready": 3, "vae_pixels": [0] * 4, "vit_lengths": [9] * 5, "vit_features": [0] * 3}
    told = []
    for encoders in ((VAE, VIT), (None, VIT), (VAE, None)):
        tally = CacheTally(FeatureCache(store, *encoders, VaeConfig(z_channels=3), (14, 5)))
        tally.add(SimpleNamespace(**found))
        told.append((tally.ready, tally.encoded))
    assert told == [(3, 6), (3, 2), (3, 4)]
    assert str(tally) == "3 pictures found in the cache (42.9%), 4 missing and encoded"
    assert "(0.0%)" in str(CacheTally(None))
