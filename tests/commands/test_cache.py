"""``unigen cache``: training with it is training without it, to the bit; nothing stale is ever used; every
way it can go wrong says so."""

import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import step_of

from unigen.cache import store as store_module
from unigen.cache.encoders import Encoders, digest_weights, open_cache
from unigen.cache.store import CacheError, Store
from unigen.cli import main
from unigen.commands import cache as precompute
from unigen.commands.cache import CacheOptions, Filler, parse_shard
from unigen.config import ConfigError
from unigen.data.loader import load_batches
from unigen.model import bagel
from unigen.model.weights import load_bagel
from unigen.runs.signals import SignalHandler
from unigen.sequence import contents
from unigen.sequence.images import to_image
from unigen.training.build import build
from unigen.training.engine import Engine
from unigen.training.loop import TrainingLoop
from unigen.training.precision import DeviceFacts, choose_precision


def picture(path: Path, seed: int, width: int, height: int) -> str:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    to_image(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path.name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five records, one ViT picture at most in each, and no two pictures of one size: none is encoded
    together with another. The JPEG is so large that it is decoded small. Entries: the VAE's of a, b and c,
    the ViT's of a and (in two sizes) of b."""
    a, b = picture(tmp_path / "a.png", 0, 48, 32), picture(tmp_path / "b.png", 1, 64, 48)
    c = picture(tmp_path / "c.jpg", 2, 512, 640)
    records = [
        {"text_prompt": "A red house", "image_path": a},
        {"image_path": b, "caption": "A small tree beside the house."},
        {"input_image": a, "editing_steps": [{"instruction": "Make it night", "result_image": c}]},
        {"text_prompt": "Nothing at all", "image_path": c},
        {
            "sequence": [
                {"type": "text", "content": "First"},
                {"type": "image", "image_path": b},
                {"type": "text", "content": "the end."},
            ]
        },
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def options(small_model: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_path": str(small_model), "train_data_path": str(data), "device": "cpu", "freeze_vit": True,
        "single_image_stop_prob": 0.0,
        "output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip


def fill(**options: Any) -> precompute.Report:
    config = CacheOptions(**options)
    return Filler(config, Encoders.load(config.resolve(), torch.device("cpu"), computes(config))).run()


def computes(config: CacheOptions) -> torch.dtype:
    return choose_precision(config, DeviceFacts("cpu")).dtype


def trainer(with_cache: bool, **options: Any) -> TrainingLoop:
    """Ready for its first step."""
    config = CacheOptions(**{"learning_rate": 1e-3, "max_steps": 6, **options})
    cache_dir, config.cache_dir = config.cache_dir, None
    made = TrainingLoop(build(config.resolve(), Engine(config), SignalHandler()))
    for part in [
        *made.run.stream.mixture.parts,
        *(made.run.val_stream.mixture.parts if made.run.val_stream else []),
    ]:
        part.planner.cache = (
            open_cache(cache_dir, made.run.model, config, computes(config)) if with_cache else None
        )
    return made


def losses(
    made: TrainingLoop, steps: int = 6
) -> tuple[list[tuple[float, float, float]], list[tuple[int, int]]]:
    """(text loss, image loss, gradient norm) of every step, and how many pictures of it were (ready, to
    encode)."""
    results, pictures = [], []
    for rows in load_batches(made.run.stream, made.run.rank_slice, made.position.loader, limit=steps):
        result = step_of(made, rows, 1e-3)
        results.append((result.text_loss, result.image_loss, result.grad_norm))
        pictures.append((sum(r.pack.n_ready for r in rows), sum(r.pack.n_to_encode for r in rows)))
    return results, pictures


# ---- the same training


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_training_with_the_cache_is_training_without_it_to_the_bit(options, precision, monkeypatch):
    """Losses and gradient norms of six steps, with posterior sampling and dropout; no encoder runs and no
    picture is decoded."""
    plain, counts = losses(trainer(False, **options, **precision))
    assert all(ready == 0 and encoded > 0 for ready, encoded in counts)
    assert fill(**options, **precision).written == 6
    made = trainer(True, **options, **precision)
    monkeypatch.setattr(bagel, "encode_all", None)
    monkeypatch.setattr(contents, "open_image", None)
    see = made.run.model.vit_model.forward
    monkeypatch.setattr(
        made.run.model.vit_model,
        "forward",
        lambda patches, *rest: see(patches, *rest) if not len(patches) else None,
    )
    found, ready = losses(made)
    assert found == plain and ready == [(encoded, 0) for _, encoded in counts]
    assert len({loss for loss, _, _ in plain} | {loss for _, loss, _ in plain}) > 6


@pytest.fixture
def long(data: Path, tmp_path: Path) -> Path:
    """One record of four pictures."""
    names = [picture(tmp_path / f"step{i}.png", i, 32 + 16 * i, 48) for i in range(3)]
    steps = [{"instruction": "Go on", "result_image": name} for name in names]
    data.write_text(json.dumps({"input_image": "a.png", "editing_steps": steps}) + "\n")
    return data


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("frozen", [False, True], ids=["vae", "vae and vit"])
def test_a_row_of_which_only_some_pictures_are_cached_has_the_same_losses(options, long, first, frozen):
    """Every second entry is lost, so rows mix ready latents and pixels, features and patches. Latents: to the
    bit. The ViT sees the pictures of a row in one matrix product, whose rounding depends on its size: the
    last bits may differ."""
    options["freeze_vit"] = frozen
    plain, _ = losses(trainer(False, **options), 4)
    fill(**options)
    for name in ("mean", "features"):
        entries = sorted(
            path for path in Path(options["cache_dir"]).glob("*/*/*.safetensors") if name in load_file(path)
        )
        assert len(entries) == (4 if name == "mean" else 3 * frozen)  # nobody looks at the last answer
        for path in entries[first::2]:
            path.unlink()
    found, pictures = losses(trainer(True, **options), 4)
    assert all(ready and encoded for ready, encoded in pictures)
    assert torch.allclose(torch.tensor(found), torch.tensor(plain), rtol=1e-5) if frozen else found == plain


@pytest.mark.slow
def test_pictures_of_one_size_in_a_row_differ_by_rounding_only(options, data, tmp_path):
    """Without a cache they go through the VAE together, which changes the last bits of its float32."""
    names = [picture(tmp_path / f"{i}.png", i, 64, 64) for i in range(4)]
    data.write_text(
        "".join(json.dumps({"text_prompt": "A house", "image_path": name}) + "\n" for name in names)
    )
    plain, _ = losses(trainer(False, **options, batch_size=4), 3)
    fill(**options)
    found, pictures = losses(trainer(True, **options, batch_size=4), 3)
    assert torch.allclose(torch.tensor(found), torch.tensor(plain), rtol=1e-4) and all(
        encoded == 0 for _, encoded in pictures
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_cached_latent_is_the_codecs_to_the_bit(options, small_model, dtype):
    """For the same noise: mean and deviation are kept in the dtype they have, and are put together in the
    codec's order."""
    config = CacheOptions(**options, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    whole = load_bagel(small_model)
    encoders = Encoders.of(whole, config, computes(config))
    filler = Filler(config, encoders)
    filler.run()
    lookup = open_cache(config.cache_dir, whole, config, computes(config))
    noise = torch.Generator().manual_seed(0)
    for job in filler.jobs():
        if "vae" not in job.names:
            continue
        dataset, planner = filler.parts[job.part]
        sample = dataset[job.record].sample
        seen = planner.viewer(sample).look(sample[job.segment].source, True, True, lookup)
        pixels = planner.viewer(sample).decode(sample[job.segment].source, True, False).pixels
        drawn = torch.randn(seen.posterior[0].shape, generator=noise)
        assert seen.pixels is None
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), torch.no_grad():
            wanted = whole.codec.encode(pixels[None], drawn[None])[0]
        found = lookup.latent(seen.posterior, drawn)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_a_vit_that_learns_is_not_cached(options):
    only_gen = CacheOptions(**{**options, "freeze_vit": False, "freeze_und": True})
    frozen = Encoders.load(only_gen, torch.device("cpu"), torch.float32)
    assert frozen.names == ("vae", "vit")  # freeze_und keeps the ViT too
    report = fill(**{**options, "freeze_vit": False})
    assert report.written == 3 and all(
        "mean" in load_file(p) for p in Path(options["cache_dir"]).glob("*/*/*.safetensors")
    )


@pytest.mark.slow
def test_workers_and_pinned_rows_carry_what_the_cache_gave(options):
    fill(**options)
    made = trainer(True, **options)
    rows = [
        [
            row
            for step in load_batches(
                made.run.stream, made.run.rank_slice, made.position.loader, num_workers=n, limit=5
            )
            for row in step
        ]
        for n in (0, 2)
    ]
    for here, there in zip(*rows, strict=True):
        assert (
            here.pack.n_to_encode == there.pack.n_to_encode == 0
            and here.pack.n_ready == there.pack.n_ready > 0
        )
        parts = (
            *zip(here.pack.latents, there.pack.latents, strict=True),
            *zip(here.pack.vit_features, there.pack.vit_features, strict=True),
        )
        assert all(torch.equal(a, b) for a, b in parts)


# ---- never stale


def change_weights(folder: Path, file: str, prefix: str) -> None:
    tensors = load_file(folder / file)
    name = next(name for name in sorted(tensors) if name.startswith(prefix))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"bf16": True}, 0),
        ({"max_image_tokens": 4}, 1),  # where nothing is drawn, the ViT sees the picture as before
        ("ae.safetensors encoder.", 3),
        ("ema.safetensors vit_model.", 3),
        ("picture", 4),
    ],
)
def test_whatever_changed_is_computed_anew(options, change, stays, tmp_path, caplog):
    """Other precision, sizes, weights or pictures: what is stale is not found, and losses are those without a
    cache."""
    fill(**options)
    if isinstance(change, dict):
        options |= change
    elif change == "picture":
        picture(tmp_path / "a.png", 77, 48, 32)
    else:
        shutil.copytree(options["model_path"], tmp_path / "model")
        options["model_path"] = str(tmp_path / "model")
        change_weights(tmp_path / "model", *change.split())
    plain, counts = losses(trainer(False, **options), 5)
    with caplog.at_level(logging.WARNING):
        found, pictures = losses(trainer(True, **options), 5)
    assert found == plain
    assert (sum(r for r, _ in pictures) < sum(e for _, e in counts)) and (stays == 0) == (
        sum(r for r, _ in pictures) == 0
    )
    told = " ".join(record.getMessage() for record in caplog.records)
    assert ("run unigen cache with the options of this run" in told) == (
        change != "picture" and "max_image_tokens" not in change
    )
    report = fill(**options)
    assert (report.found, report.found + report.written) == (stays, 6)


def test_a_picture_that_changes_between_the_two_passes_is_stored_as_what_it_is(
    options, tmp_path, monkeypatch
):
    look_up = Filler._look_up

    def then_change(self, *arguments):
        missing = look_up(self, *arguments)
        picture(tmp_path / "a.png", 77, 48, 32)
        return missing

    monkeypatch.setattr(Filler, "_look_up", then_change)
    fill(**options)
    monkeypatch.undo()
    found = fill(**options)
    assert (found.found, found.written) == (6, 0)


@pytest.mark.slow
def test_a_damaged_entry_is_computed_and_then_repaired(options, caplog):
    plain, _ = losses(trainer(False, **options), 5)
    fill(**options)
    for path in Path(options["cache_dir"]).glob("*/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3] + b"\xff\x00\xff")
    with caplog.at_level(logging.WARNING):
        found, pictures = losses(trainer(True, **options), 5)
    assert found == plain and all(ready == 0 for ready, _ in pictures)
    assert sum(" is damaged" in record.getMessage() for record in caplog.records) == 6
    again = fill(**options)
    assert (again.found, again.written) == (0, 6) and fill(**options).found == 6


def test_fingerprints_cover_values_names_dtypes_and_config():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    base = digest_weights(tensors.items(), [1])
    assert base == digest_weights(reversed(tensors.items()), [1])
    others = [
        ({**tensors, "b": torch.tensor([1.0, 1, 1, 1.0000001])}, [1]),
        ({"a": tensors["a"], "c": tensors["b"]}, [1]),
        ({**tensors, "a": torch.zeros(3, 2)}, [1]),
        ({**tensors, "a": torch.zeros(2, 3, dtype=torch.int32)}, [1]),
        (tensors, [2]),
    ]
    assert len({base, *(digest_weights(t.items(), shape) for t, shape in others)}) == 6


# ---- the command


def run(options: dict[str, Any], *more: str) -> int:
    flags = [
        f"--{name}={value}"
        for name, value in options.items()
        if name not in ("train_data_path", "output_dir")
    ]
    return main(["cache", options["train_data_path"], *flags, *more])


@pytest.mark.slow
def test_the_command_fills_once_and_says_what_it_did(options, caplog):
    with caplog.at_level(logging.INFO, "unigen"):
        assert run(options) == 0 and run(options) == 0
    told = [record.getMessage() for record in caplog.records]
    summaries = [text for text in told if text.startswith("Cache ")]
    assert (
        len(summaries) == 2
        and "6 entries of this data, 6 of them new" in summaries[0]
        and "0 of them new" in summaries[1]
    )
    assert "kB an entry" in summaries[0] and "to decode and" in summaries[0] and "saving" in summaries[0]
    assert any("6 entries are there; 0 pictures are to be encoded" in text for text in told)


def test_a_recipe_of_the_training_run_is_all_it_needs(options, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "".join(f"{name}: {value}\n" for name, value in options.items())
        + "learning_rate: 1e-4\nnum_epochs: 3\n"
    )
    assert main(["cache", "--config", str(recipe)]) == 0
    assert fill(**options).found == 6


@pytest.mark.slow
def test_sources_and_validation_data_are_cached_as_they_are_shown(options, data, tmp_path):
    """Each source with its own sizes; the held-out file too."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        json.dumps({"text_prompt": "House", "image_path": picture(tmp_path / "d.png", 5, 64, 64)}) + "\n"
    )
    options |= {"train_data_path": None, "val_data_path": str(other), "freeze_vit": False}
    options["train_sources"] = [
        {"path": str(data), "name": "a"},
        {"path": str(data), "name": "b", "max_image_tokens": 4},
    ]
    fill(**options)
    sizes = [
        tuple(load_file(path)["mean"].shape[1:])
        for path in Path(options["cache_dir"]).glob("*/*/*.safetensors")
    ]
    assert len(sizes) == 7 and (8, 8) in sizes and sum(h * w <= 16 for h, w in sizes) == 3
    made = trainer(True, **options)
    packs = [
        row.pack
        for rows in load_batches(made.run.stream, made.run.rank_slice, made.position.loader, limit=10)
        for row in rows
    ]
    packs += [
        row.pack
        for rows in load_batches(made.run.val_stream, made.run.rank_slice, made.position.loader, limit=1)
        for row in rows
    ]
    assert sum(len(pack.latents) for pack in packs) == 11 and not any(pack.vae_pixels for pack in packs)


def test_copies_that_only_some_visits_make_are_cached_too(options):
    """With single_image_stop_prob above 0 an answer of one image is shown to the ViT now and then."""
    # c, by the ViT
    assert fill(**options).written == 6 and fill(**{**options, "single_image_stop_prob": 0.01}).written == 1


@pytest.mark.slow
def test_shards_together_are_the_whole(options, tmp_path):
    for i in range(3):
        assert run(options, f"--shard={i}/3") == 0
    assert fill(**options).found == 6 and sum(1 for _ in Store.open(options["cache_dir"]).entries()) == 6


def test_pruning_drops_what_this_data_does_not_use(options, data):
    fill(**options)
    data.write_text(data.read_text().splitlines()[0] + "\n")
    report = fill(**options, prune=True)
    assert report.found == sum(1 for _ in Store.open(options["cache_dir"]).entries()) == 1


@pytest.mark.slow
def test_a_picture_that_cannot_be_decoded_is_named_and_left_out(options, tmp_path, caplog):
    sound = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(sound[: len(sound) // 2])
    with caplog.at_level(logging.INFO, "unigen"):
        assert run(options) == 1
        assert run(options, "--prune") == 1
    told = [record.getMessage() for record in caplog.records]
    assert sum(f"left out  {tmp_path / 'b.png'}: it is truncated or damaged" in text for text in told) == 2
    assert any(text.startswith("Not pruned: 1 ") for text in told)
    assert sum(1 for _ in Store.open(options["cache_dir"]).entries()) == 3


def test_a_pixel_codec_has_nothing_to_cache(options, small_model, tmp_path, caplog):
    folder = tmp_path / "pixel"
    shutil.copytree(small_model, folder)
    (folder / "vae_config.json").write_text(json.dumps({"type": "pixel", "downsample": 4, "z_channels": 16}))
    options |= {"model_path": str(folder), "freeze_vit": False}
    with caplog.at_level(logging.INFO, "unigen"):
        assert run(options) == 0
    assert "Nothing is worth caching" in caplog.text and not Path(options["cache_dir"]).exists()


@pytest.mark.parametrize("text", ["4/4", "0", "a/b", "-1/2", "1/0", "1/2/3", ""])
def test_a_shard_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match="shard"):
        parse_shard(text)


def test_what_cannot_work_is_said_before_anything_is_encoded(options, tmp_path, capsys, monkeypatch):
    def says(*words: str, **changed: Any) -> None:
        assert run({**options, **changed}) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in words), told

    assert main(["cache", options["train_data_path"], f"--model_path={options['model_path']}"]) == 2
    assert "--cache_dir" in capsys.readouterr().err
    says("prune", "shard", shard="0/2", prune="true")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("")
    says("thesis.doc", "Fix", cache_dir=str(tmp_path / "full"))
    says("model_path", model_path=str(tmp_path / "nowhere"))
    monkeypatch.setattr(store_module, "free_bytes", lambda _: 1000)
    says("GB are needed", "Fix: make room")
    assert not list(Path(options["cache_dir"]).glob("*/*/*"))


def test_a_disk_that_fills_up_stops_the_command_and_the_next_run_goes_on(options, monkeypatch, capsys):
    put, calls = Store.put, []

    def full(self, *arguments):
        calls.append(0)
        if len(calls) > 3:
            raise CacheError("the disk is full")
        return put(self, *arguments)

    monkeypatch.setattr(Store, "put", full)
    assert run(options) == 2 and "disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    report = fill(**options)
    assert (report.found, report.written) == (3, 3)


@pytest.mark.slow
def test_pictures_of_tars_and_of_folders_with_texts_are_cached_and_evaluated(options, data, tmp_path, capsys):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(tmp_path / name, folder)
        (folder / name).with_suffix(".txt").write_text(f"The picture {name}")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    for source in (folder, tmp_path / "set.tar"):  # the second finds what the first has made
        report = fill(**options | {"train_data_path": str(source)})
        assert (report.views, report.found + report.written) == (2, 2) and not report.bad
        _, used = losses(trainer(True, **options | {"train_data_path": str(source)}), steps=1)
        assert all(ready > 0 and encoded == 0 for ready, encoded in used)
        asked = (
            f"--model_path {options['model_path']} --data_path {source} --output_dir {tmp_path / 'evaluated'}"
        )
        assert main(f"evaluate {asked} --check".split()) == 0
        assert "generate" in capsys.readouterr().out
