"""The cases of ``hostile.py``: what is changed, which command meets it, and what may come of it."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import json
import math
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "model"
SECRET = "SECRET-OF-THE-VICTIM"
MISSING = object()
VALUES = {
    "x": "x", "0": 0, "-1": -1, "10^12": 10**12, "1.5": 1.5, "null": None, "[]": [], "{}": {}, "true": True,
    "NaN": math.nan, "missing": MISSING,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input and what may come of it.

    Args:
        make: (originals, an empty folder) -> arguments of ``unigen``, which runs in that folder.
        names: the output of a refusal holds one of them.
        accepted: what exit code 0 is worth: ``no``: it must be refused; ``same``: held where the outcome is
            that of the unedited input; ``named``: held where the output holds one of ``names``; ``any``:
            held.
        baseline: which unedited input ``same`` compares with.
        outcome: of the folder after the command.
        kept: files that must be as before, byte for byte.
    """

    kind: str
    name: str
    make: Callable[[Originals, Path], list[str]]
    names: tuple[str, ...] = ()
    accepted: str = "no"
    baseline: str = "train"
    outcome: Callable[[Path], str] = lambda folder: ""
    kept: Callable[[Path], list[Path]] = lambda folder: []
    wants_error_line: bool = True


@dataclass(frozen=True)
class Originals:
    """Unedited inputs: a model, a run with a checkpoint, data."""

    model: Path
    run: Path
    data: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "step_1"


def originals(folder: Path) -> Originals:
    """Makes them; the run is a real one."""
    from PIL import Image

    shutil.copytree(GOLDEN, folder / "model")
    data = folder / "data"
    data.mkdir()
    pixels = random.Random(0).randbytes(48 * 48 * 3)
    Image.frombytes("RGB", (48, 48), pixels).save(data / "a.png")
    (data / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    made = Originals(folder / "model", folder / "run", data)
    argv = train(made.model, made.data, made.run, "--save_steps", "1", "--max_steps", "1")
    subprocess.run([sys.executable, "-m", "unigen", *argv], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    # serving engines' config.json belongs to a model as well
    shutil.copy(made.checkpoint / "config.json", made.model)
    return made


def records() -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    picture = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
    return [
        {
            "conversations": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello there"},
            ]
        },
        {"messages": [picture, {"role": "assistant", "content": "dots"}]},
        {"text_prompt": "dots", "image_path": "a.png"},
    ]


def train(model: Path | str, data: Path, run: Path | str, *more: str) -> list[str]:
    return [
        "train", "--model_path", str(model), "--train_data_path", str(data / "d.jsonl"), "--output_dir", str(run),
        "--num_workers", "0", "--logging_steps", "1", "--min_free_gb", "0", "--max_image_tokens", "16",
        "--no_async_save", *more,
    ]  # fmt: skip


def digest_of(path: Path) -> str:
    """What a file, link or special file is; ``missing`` for none."""
    try:
        status = os.lstat(path)
    except OSError:
        return "missing"
    if stat.S_ISREG(status.st_mode):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{status.st_mode} {status.st_ino}"


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# ---- outcomes


def trained(folder: Path) -> str:
    """The losses of the run, without what a clock wrote; and whether a secret came into it."""
    rows = []
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append(
            {key: value for key, value in row.items() if "loss" in key or key in ("step", "grad_norm")}
        )
    return json.dumps(rows) + leaked(folder)


def leaked(folder: Path) -> str:
    for path in (folder / "run").rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20 and SECRET.encode() in path.read_bytes():
            return f" LEAK {path.name}"
    return ""


# ---- edits of JSON


def edits(
    document: dict[str, Any], deep: int = 2, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """(name, edited copy of the document, the value) for each key and each odd value."""
    for key, value in document.items():
        for name, odd in VALUES.items():
            if type(odd) is type(value) and odd == value:
                continue
            edited = dict(document)
            if odd is MISSING:
                del edited[key]
            else:
                edited[key] = odd
            yield ".".join((*path, key)) + f"={name}", edited, odd
        if isinstance(value, dict) and value and deep > 1:
            for name, inner, odd in edits(value, deep - 1, (*path, key)):
                yield name, {**document, key: inner}, odd


def is_number(value: Any, low: float = 0.0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < math.inf


# Keys of which another sound value makes another sound model.
FREE: dict[str, Callable[[Any], bool]] = {
    "rope_theta": is_number, "rms_norm_eps": is_number, "layer_norm_eps": is_number, "timestep_shift": is_number,
    "scale_factor": is_number, "shift_factor": lambda v: is_number(v, -math.inf), "interpolate_pos": lambda v: True,
    "max_position_embeddings": is_number, "max_size": is_number, "min_size": is_number, "image_size": is_number,
    "max_latent_size": lambda v: v is MISSING, "vae_transform": lambda v: v is MISSING,
    "vit_transform": lambda v: v is MISSING, "vit_edit_transform": lambda v: v is MISSING,
    "vit_max_num_patch_per_side": lambda v: v is MISSING,
}  # fmt: skip


def json_edit(
    kind: str, file: str, name: str, edited: Any, accepted: str, command: Callable[..., list[str]]
) -> Case:
    def make(made: Originals, folder: Path) -> list[str]:
        shutil.copytree(made.model, folder / "model")
        (folder / "model" / file).write_text(json.dumps(edited))
        return command(made)

    return Case(kind, f"{file} {name}", make, (file, "vocabulary"), accepted, outcome=trained)


def one_step(made: Originals) -> list[str]:
    return train("model", made.data, "run", "--max_steps", "1")


def configs(made: Originals) -> Iterator[Case]:
    for file in ("llm_config.json", "vit_config.json", "vae_config.json", "config.json"):
        document = json.loads((made.model / file).read_text())
        for name, edited, odd in edits(document, deep=2 if file == "config.json" else 1):
            key = name.partition("=")[0]
            inside = key.partition(".")[0] in (
                "llm_config",
                "vit_config",
                "vae_config",
            )  # copies, for other programs
            free = FREE.get(key.rpartition(".")[2], lambda value: False)
            accepted = "any" if free(odd) else "same"
            if not (inside and not name.endswith("=x")):
                yield json_edit("configs", file, name, edited, accepted, one_step)
        for name, text in (
            ("empty", b""), ("binary", b"\x00\xff" * 50), ("list", b"[1]"), ("number", b"3"), ("null", b"null"),
            ("cut", (made.model / file).read_bytes()[:-20]), ("deep", b"[" * 100_000), ("LFS", POINTER),
            ("HTML", b"<!DOCTYPE html><html></html>"), ("twice", b'{"hidden_size": 64, "hidden_size": 65}'),
            ("UTF-16", (made.model / file).read_text().encode("utf-16")), ("digits", b'{"a": ' + b"9" * 10_000 + b"}"),
        ):  # fmt: skip
            yield replaced("configs", file, name, text)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 29200000000\n" % 0


def replaced(kind: str, file: str, name: str, data: bytes, accepted: str = "same") -> Case:
    def make(made: Originals, folder: Path) -> list[str]:
        shutil.copytree(made.model, folder / "model")
        (folder / "model" / file).write_bytes(data)
        return one_step(made)

    return Case(kind, f"{file} {name}", make, (file, "tokenizer", "vocabulary"), accepted, outcome=trained)


# ---- tokenizer


def tokenizers(made: Originals) -> Iterator[Case]:
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for name, edited, _ in edits(json.loads((made.model / file).read_text()), deep=2):
            yield json_edit("tokenizer", file, name, edited, "same", one_step)
    config = json.loads((made.model / "tokenizer_config.json").read_text())
    for name, auto in (("auto_map", {"AutoTokenizer": ["evil.T", None]}), ("auto_map list", ["evil.T"])):
        yield json_edit(
            "tokenizer", "tokenizer_config.json", name, {**config, "auto_map": auto}, "no", one_step
        )
    vocabulary = json.loads((made.model / "vocab.json").read_text())
    words = list(vocabulary)
    odd = {
        "empty": {}, "list": [], "one missing": {w: i for w, i in vocabulary.items() if w != words[40]},
        "twice the id": {**vocabulary, words[40]: vocabulary[words[41]]}, "id -1": {**vocabulary, words[40]: -1},
        "id 10^12": {**vocabulary, words[40]: 10**12}, "id x": {**vocabulary, words[40]: "x"},
        "id 1.5": {**vocabulary, words[40]: 1.5}, "id beyond": {**vocabulary, words[40]: 4000},
        "all the same": dict.fromkeys(words, 0), "swapped bytes": dict(zip(words[1:] + words[:1], vocabulary.values(), strict=True)),
    }  # fmt: skip
    for name, document in odd.items():
        accepted = "any" if name in ("swapped bytes", "one missing") else "same"
        yield replaced("tokenizer", "vocab.json", name, json.dumps(document).encode(), accepted)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        for name, data in (
            ("zero bytes", b""), ("binary", b"\x00\xff\xfe" * 99), ("LFS", POINTER), ("HTML", b"<html>no</html>"),
            ("one line", b"x"), ("spaces", b" " * 999),
        ):  # fmt: skip
            yield replaced("tokenizer", file, name, data)
    for gone in (("vocab.json",), ("merges.txt",), ("vocab.json", "merges.txt"), ("vocab.json", "tokenizer_config.json"),
                 ("merges.txt", "tokenizer_config.json"), ("added_tokens.json", "tokenizer_config.json")):  # fmt: skip

        def make(made: Originals, folder: Path, gone: tuple[str, ...] = gone) -> list[str]:
            shutil.copytree(made.model, folder / "model")
            for file in gone:
                (folder / "model" / file).unlink()
            return one_step(made)

        yield Case(
            "tokenizer",
            "missing " + " ".join(gone),
            make,
            (*gone, "tokenizer", "<|"),
            "same",
            outcome=trained,
        )


# ---- weights


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def weights_of(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights(made: Originals) -> Iterator[Case]:
    for file in ("ema.safetensors", "ae.safetensors"):
        data = (made.model / file).read_bytes()
        header, body = header_of(data)
        names = sorted(name for name in header if name != "__metadata__")
        chosen = names[:: max(1, len(names) // 18)]
        for name in chosen:
            start, stop = header[name]["data_offsets"]
            for odd, value in (("NaN", math.nan), ("Inf", math.inf)):
                at = start + (stop - start) // 8 * 4
                whole = body[:at] + struct.pack("<f", value) + body[at + 4 :]
                yield weight_case(file, f"{odd} in {name}", weights_of(header, whole), (name,))
        for name in chosen[::3]:
            entry = header[name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            for odd, change in (
                ("dtype F8", {"dtype": "F8_E4M3", "shape": [size]}), ("dtype I32", {"dtype": "I32"}),
                ("dtype x", {"dtype": "x"}), ("dtype 3", {"dtype": 3}), ("no shape", {"shape": None}),
                ("shape -1", {"shape": [-1, -size]}), ("shape 10^12", {"shape": [10**12]}), ("shape x", {"shape": "x"}),
                ("shape true", {"shape": [True, True]}), ("flat", {"shape": [size // 4, 1, 1, 1, 1]}),
                ("offsets swapped", {"data_offsets": entry["data_offsets"][::-1]}), ("offsets -1", {"data_offsets": [-1, 3]}),
                ("offsets beyond", {"data_offsets": [len(body), len(body) + size]}), ("offsets x", {"data_offsets": "x"}),
                ("overlap", {"data_offsets": [0, size]}),
            ):  # fmt: skip
                if change.get("data_offsets") != entry["data_offsets"]:
                    edited = weights_of({**header, name: {**entry, **change}}, body)
                    yield weight_case(file, f"{odd} {name}", edited, (name,))
            yield weight_case(
                file,
                f"gone {name}",
                weights_of({k: v for k, v in header.items() if k != name}, body),
                (name,),
            )
        text = json.dumps(header)
        twice = text[:-1] + f', "{names[0]}": {json.dumps(header[names[0]])}}}'
        million = (
            "{"
            + ",".join(f'"n{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
            + "}"
        )
        for name, broken in {
            "cut": data[:-1000], "cut header": data[:50], "trailing": data + b"x" * 100, "empty": b"",
            "seven bytes": b"x" * 7, "LFS": POINTER, "HTML": b"<!DOCTYPE html><html>" + b" " * 500,
            "header 10^18": struct.pack("<Q", 10**18) + data[8:], "header list": weights_of("[]", body),
            "header no JSON": weights_of("{" * 100, body), "header deep": weights_of("[" * 100_000, body),
            "twice the name": weights_of(twice, body), "many names": weights_of(million, b""),
            "module.": weights_of({k if k[0] == "_" else "module." + k: v for k, v in header.items()}, body),
            "metadata": weights_of({**header, "__metadata__": {"a": 3}}, body), "zip": b"PK\x03\x04" + data,
            "pickle": b"\x80\x02" + data, "GGUF": b"GGUF" + data,
        }.items():  # fmt: skip
            yield weight_case(file, name, broken)


def weight_case(file: str, name: str, data: bytes, names: tuple[str, ...] = ()) -> Case:
    def make(made: Originals, folder: Path) -> list[str]:
        shutil.copytree(made.model, folder / "model")
        (folder / "model" / file).write_bytes(data)
        return one_step(made)

    return Case("weights", f"{file} {name}", make, (file, *names), "same", outcome=trained)


# ---- special files


def place_special(path: Path, what: str, outside: Path) -> None:
    path.unlink(missing_ok=True)
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link to a secret":
        outside.write_text(f"{SECRET}\n")
        path.symlink_to(outside)
    elif what == "link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is at most 108 bytes long
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    elif what == "a terabyte of nothing":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        assert what == "link to nothing"
        path.symlink_to("nowhere")


SPECIAL = (
    "FIFO", "folder", "link to a secret", "link to /dev/zero", "link to itself", "socket", "a terabyte of nothing",
    "link to nothing",
)  # fmt: skip


def special_files(made: Originals) -> Iterator[Case]:
    # side files of any name that are copied into checkpoints
    files = sorted(
        {path.name for path in made.model.iterdir()} | {"LICENSE", "chat_template.jinja", "README.md"}
    )
    for file in files:
        for what in SPECIAL:

            def make(made: Originals, folder: Path, file: str = file, what: str = what) -> list[str]:
                shutil.copytree(made.model, folder / "model")
                place_special(folder / "model" / file, what, folder / "outside")
                return one_step(made)

            names = (file, "tokenizer")
            yield Case("special", f"model/{file} {what}", make, names, "same", outcome=trained)
    for command in ("watch", "ls", "verify", "resume", "export"):
        inside = [made.run / "config.json", made.run / "metrics.jsonl", *sorted(made.checkpoint.iterdir())]
        for path in inside:
            for what in SPECIAL[:4]:

                def make(
                    made: Originals, folder: Path, path: Path = path, what: str = what, command: str = command
                ) -> list[str]:
                    shutil.copytree(made.run, folder / "run")
                    place_special(folder / "run" / path.relative_to(made.run), what, folder / "outside")
                    return on_run(made, command)

                accepted = "any" if command in ("watch", "ls") else "same"
                if command in ("resume", "verify", "export") and path.parent == made.run:
                    accepted = "any"  # not a part of the checkpoint
                yield Case(
                    "special", f"{command} {path.relative_to(made.run)} {what}", make,
                    (path.name, "tokenizer", path.stem), accepted, baseline=command,
                    outcome=resumed if command == "resume" else leaked_export, wants_error_line=command != "verify",
                )  # fmt: skip


def leaked_export(folder: Path) -> str:
    for path in folder.glob("exported/*"):
        if path.is_file() and SECRET.encode() in path.read_bytes():
            return f"LEAK {path.name}"
    return ""


def on_run(made: Originals, command: str) -> list[str]:
    return {
        "watch": ["watch", "run", "--once"],
        "ls": ["ckpt", "ls", "run"],
        "verify": ["ckpt", "verify", "run"],
        "export": ["ckpt", "export", "run/step_1", "exported"],
        "resume": train(
            made.model, made.data, "run", "--max_steps", "2", "--resume_from_checkpoint", "run/step_1"
        ),
    }[command]


def resumed(folder: Path) -> str:
    return trained(folder)


# ---- checkpoints and runs


def reseal(folder: Path) -> None:
    """Makes a manifest that fits what lies there, as who edits a checkpoint would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    seal(folder, manifest)


def seal(folder: Path, manifest: Any) -> None:
    if isinstance(manifest, dict) and "sha256" in manifest:
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def checkpoints(made: Originals) -> Iterator[Case]:
    def edit(file: str, name: str, edited: Any, accepted: str, command: str = "resume") -> Case:
        def make(made: Originals, folder: Path) -> list[str]:
            shutil.copytree(made.run, folder / "run")
            checkpoint = folder / "run" / "step_1"
            if file == "manifest.json":
                seal(checkpoint, copy.deepcopy(edited))
            else:
                (checkpoint / file).write_text(json.dumps(edited))
                reseal(checkpoint)
            return on_run(made, command)

        names = (file, file.removesuffix(".json"), name.partition("=")[0].rpartition(".")[2])
        if name.startswith("files."):  # the message may name the file that no longer agrees
            names += (name.partition("=")[0].removeprefix("files.").rpartition(".")[0],)
        wants = command != "verify"
        return Case(
            "resealed",
            f"{command} {file} {name}",
            make,
            names,
            accepted,
            command,
            resumed,
            wants_error_line=wants,
        )

    trainer = json.loads((made.checkpoint / "trainer.json").read_text())
    for name, edited, odd in edits(trainer, deep=2):
        sound = odd is None or (type(odd) is int and 0 <= odd <= 1) or odd in ([], True)
        yield edit("trainer.json", name, edited, "any" if sound else "same")
    options = json.loads((made.checkpoint / "training_config.json").read_text())
    for name, edited, _ in list(edits(options, deep=1))[::4]:
        yield edit("training_config.json", name, edited, "any")
    manifest = json.loads((made.checkpoint / "manifest.json").read_text())
    small = {**manifest, "files": dict(list(manifest["files"].items())[:2])}
    for name, edited, _ in edits(small, deep=3):
        if name.startswith("sha256=") and not name.endswith("=missing"):
            continue  # sealing writes it again
        if name.startswith("files."):
            edited = {**edited, "files": {**manifest["files"], **edited["files"]}}
            if name.count(".") == 2 and name.endswith("=missing"):
                continue
        elif not name.startswith("files"):
            edited = {**edited, "files": manifest["files"]}
        harmless = name.split("=")[0] in ("time", "world", "engine", "average")
        for command in ("resume", "verify"):
            yield edit("manifest.json", name, edited, "any" if harmless else "same", command)
    run = json.loads((made.run / "config.json").read_text())
    for name, edited, _ in list(edits(run, deep=1))[::6]:
        yield of_run("config.json", name, json.dumps(edited).encode())
    rank = next((made.run / "ranks").glob("rank_*.json"), None)
    lines = (made.run / "metrics.jsonl").read_bytes().splitlines()
    for name, edited, _ in edits(json.loads(lines[0]), deep=1):
        yield of_run("metrics.jsonl", name, json.dumps(edited).encode() + b"\n")
    if rank is not None:
        for name, edited, _ in edits(json.loads(rank.read_text()), deep=1):
            yield of_run(f"ranks/{rank.name}", name, json.dumps(edited).encode())
    for file in ("config.json", "metrics.jsonl", "step_1/manifest.json", "step_1/trainer.json"):
        for name, data in (
            ("empty", b""), ("binary", b"\x00\xff" * 99), ("deep", b"[" * 100_000), ("digits", b"9" * 10_000),
            ("escapes", json.dumps({"step": "\x1b[2J", "\x1b]0;x\x07": 1}).encode()),
        ):  # fmt: skip
            yield of_run(file, name, data)
            yield of_run(file, name, data, "ls")


def of_run(file: str, name: str, data: bytes, command: str = "watch") -> Case:
    """A run whose file is odd is shown as far as it can be, or refused."""

    def make(made: Originals, folder: Path) -> list[str]:
        shutil.copytree(made.run, folder / "run")
        (folder / "run" / file).write_bytes(data)
        return on_run(made, command)

    return Case("run", f"{command} {file} {name}", make, accepted="any", wants_error_line=False)


# ---- options and recipes

ODD_WORDS = (
    "x", "", "0", "-1", "1e20", "nan", "inf", "1.5", "true", "[]", "{}", "null", "010", "1:30", "\x1b[31mred\x1b]0;x\x07",
    "1" + "0" * 30, "9" * 5000, "\u202eevil", "../../etc", "/dev/null",
)  # fmt: skip


def options(made: Originals) -> Iterator[Case]:
    from unigen.cli import load_name
    from unigen.commands.table import COMMANDS

    start: dict[str, Callable[[Originals], list[str]]] = {
        "train": lambda made: train(made.model, made.data, "run", "--dry_run"),
        "generate": lambda made: [
            "generate", "--model_path", str(made.model), "--prompt", "hi", "--mode", "text", "--max_new_tokens", "2",
            "--output_dir", "out",
        ],
        "check": lambda made: ["check", str(made.data / "d.jsonl"), "--num_workers", "0"],
        "preview": lambda made: ["preview", str(made.data / "d.jsonl"), "--output", "page.html"],
        "cache": lambda made: [
            "cache", str(made.data / "d.jsonl"), "--model_path", str(made.model), "--cache_dir", "cache",
        ],
        "watch": lambda made: ["watch", str(made.run), "--once"],
        "fetch": lambda made: ["fetch", str(made.data / "d.jsonl"), "--output_dir", "fetched"],
    }  # fmt: skip
    for command, argv in start.items():
        names = [field.name for field in fields(load_name(COMMANDS[command].options))]
        for number, name in enumerate(names):
            if command == "watch" and name in ("once", "interval"):
                continue  # it would go on watching, as asked
            words = ODD_WORDS if command in ("train", "generate") else ODD_WORDS[number % 2 :: 2]
            for word in words:

                def make(
                    made: Originals, folder: Path, name: str = name, word: str = word, argv: Callable = argv
                ) -> list[str]:
                    return [*argv(made), f"--{name}={word}"]

                about = (name, name.replace("_", " "), Path(word).name or name)
                shown = f"{command} --{name}={word[:20]!r}"
                yield Case(
                    "options", shown, make, about, "any", wants_error_line=command not in ("check", "fetch")
                )


def recipes(made: Originals) -> Iterator[Case]:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "null": (b"learning_rate:\n", ("learning_rate",)), "tab": (b"\tseed: 1\n", ()), "list": (b"- seed\n", ()),
        "twice": (b"seed: 1\nseed: 2\n", ("seed",)), "two documents": (b"seed: 1\n---\nseed: 2\n", ()),
        "bomb": (bomb.encode(), ()), "bomb in a list": (b"sample_prompts: [*x]\n", ()), "binary": (b"\x00\xff" * 99, ()),
        "tag": (b"seed: !!python/object/apply:os.system ['true']\n", ("seed",)), "cut": (b"seed: {a: [\n", ()),
        "unknown": (b"sead: 1\n", ("sead",)), "key 3": (b"3: 1\n", ("3",)), "key list": (b"? [a, b]\n: 1\n", ()),
        "key empty": (b"'': 1\n", ()), "key null": (b"~: 1\n", ()), "merge": (b"<<: {seed: 1}\n", ("<<",)),
        "octal": (b"seed: 010\n", ("seed",)), "sixty": (b"max_steps: 1:30\n", ("max_steps",)), "hex": (b"seed: 0x1F\n", ("seed",)),
        "binary number": (b"seed: 0b11\n", ("seed",)), "underscores": (b"max_steps: 1_000\n", ("max_steps",)),
        "yes": (b"max_steps: yes\n", ("max_steps",)), "date": (b"seed: 2026-11-01\n", ("seed",)),
        "inf": (b"learning_rate: .inf\n", ("learning_rate",)), "nan": (b"learning_rate: .nan\n", ("learning_rate",)),
        "deep": (b"seed: " + b"[" * 5000 + b"\n", ()), "long": (b"seed: " + b"9" * 10_000 + b"\n", ("seed",)),
        "escapes": (b'"\\e[2Jseed": 1\n', ()), "bom utf-16": ("seed: 1\n".encode("utf-16"), ()), "spaces": (b"seed: '  '\n", ("seed",)),
        "bool for a number": (b"batch_size: true\n", ("batch_size",)), "text for a number": (b"batch_size: many\n", ("batch_size",)),
        "list for a number": (b"batch_size: [1]\n", ("batch_size",)), "map for a text": (b"output_dir: {a: b}\n", ("output_dir",)),
        "huge": (b"seed: 1 #" + b"x" * (80 << 20), ()), "control": (b"seed: \x01\n", ()), "alias to itself": (b"sample_prompts: &a [*a]\n", ("sample_prompts",)),
        "negative": (b"max_steps: -5\n", ("max_steps",)), "e without a dot": (b"learning_rate: 1e20\n", ("learning_rate",)),
    }  # fmt: skip
    fine = {"binary number", "underscores", "hex", "yes", "bom utf-16", "merge", "spaces", "date"}
    for name, (data, names) in texts.items():

        def make(made: Originals, folder: Path, data: bytes = data) -> list[str]:
            (folder / "r.yaml").write_bytes(data)
            return [*train(made.model, made.data, "run", "--dry_run"), "--config", "r.yaml"]

        yield Case(
            "recipes",
            name,
            make,
            names or ("r.yaml", "sample_prompts"),
            "any" if name in fine or name == "huge" else "no",
        )
    for what in SPECIAL:
        if what == "link to a secret":
            continue

        def special(made: Originals, folder: Path, what: str = what) -> list[str]:
            place_special(folder / "r.yaml", what, folder / "outside")
            return [*train(made.model, made.data, "run", "--dry_run"), "--config", "r.yaml"]

        yield Case("recipes", what, special, ("r.yaml",), "no")


# ---- outputs


def outputs(made: Originals) -> Iterator[Case]:
    commands: dict[str, Callable[[Originals, str], list[str]]] = {
        "check --output": lambda made, to: ["check", "in/d.jsonl", "--num_workers", "0", "--output", to],
        "check --problems": lambda made, to: ["check", "in/d.jsonl", "--num_workers", "0", "--problems", to],
        "preview --output": lambda made, to: ["preview", "in/d.jsonl", "--output", to],
        "watch --html": lambda made, to: ["watch", "run", "--html", to],
        "train": lambda made, to: train(made.model, Path("in"), to, "--max_steps", "1"),
        "generate": lambda made, to: [
            "generate", "--model_path", str(made.model), "--prompt", "hi", "--mode", "text", "--max_new_tokens", "2",
            "--output_dir", to,
        ],
        "cache": lambda made, to: ["cache", "in/d.jsonl", "--model_path", str(made.model), "--cache_dir", to],
        "fetch": lambda made, to: ["fetch", "in/d.jsonl", "--output_dir", to],
        "export": lambda made, to: ["ckpt", "export", "run/step_1", to],
        "export --overwrite": lambda made, to: ["ckpt", "export", "run/step_1", to, "--overwrite"],
        "demo": lambda made, to: ["demo", "--quick", "--output_dir", to],
    }  # fmt: skip
    targets = {
        "the input": "in/d.jsonl", "the input by another way": "in/../in/./d.jsonl", "a link to the input": "link.jsonl",
        "a hard link": "hard.jsonl", "a picture": "in/a.png", "the folder of the input": "in", "other data": "other.jsonl",
        "weights": "run/step_1/ema.safetensors", "a log": "run/metrics.jsonl", "a page": "page.html", "a text": "notes.txt",
        "a folder of files": "folder", "a folder with an index.html": "site", "/dev/full": "/dev/full", "nothing": "",
        "below a file": "notes.txt/x.html", "a folder of data": "set", "a manifest": "run/step_1/manifest.json",
        "the checkpoint": "run/step_1", "a model": "model",
    }  # fmt: skip
    everything = (
        "in/d.jsonl", "in/a.png", "hard.jsonl", "other.jsonl", "run/step_1/ema.safetensors", "run/step_1/manifest.json",
        "run/metrics.jsonl", "run/config.json", "page.html", "notes.txt", "folder/a.txt", "folder/01_text.txt",
        "folder/index.html", "site/index.html", "set/train.jsonl", "set/data/train/draw.jsonl", "set/prompts.jsonl",
        "set/model/ema.safetensors", "model/ema.safetensors", "model/config.json",
    )  # fmt: skip
    for command, argv in commands.items():
        for what, target in targets.items():

            def make(
                made: Originals, folder: Path, argv: Callable[..., list[str]] = argv, target: str = target
            ) -> list[str]:
                shutil.copytree(made.data, folder / "in")
                shutil.copytree(made.run, folder / "run")
                shutil.copytree(made.model, folder / "model")
                os.link(folder / "in" / "d.jsonl", folder / "hard.jsonl")
                (folder / "link.jsonl").symlink_to("in/d.jsonl")
                for name in everything:
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.exists():
                        path.write_text(f"precious {name}\n")
                return argv(made, target)

            def kept(folder: Path, command: str = command, target: str = target) -> list[Path]:
                return [folder / name for name in everything]

            missing = target in ("", "/dev/full", "notes.txt/x.html")
            names = (
                (target, Path(target).name)
                if target
                else ("output", "html", "problems", "cache_dir", "empty")
            )
            # A folder may take more files, as long as those that are there stay.
            folder = target in ("in", "folder", "site", "set", "model", "run/step_1")
            accepted = "any" if folder and not missing and "--" not in command else "no"
            wants = command != "fetch"
            yield Case(
                "outputs", f"{command} to {what}", make, names, accepted, kept=kept, wants_error_line=wants
            )


# ---- data


def data(made: Originals) -> Iterator[Case]:
    escape = "\x1b[2J\x1b[H\x1b]0;owned\x07 \x9b31m \u202e"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    odd: dict[str, bytes] = {}
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"):
        odd[f"special {token}"] = json.dumps(
            {"conversations": [chat[0], {**chat[1], "content": f"x {token} y"}]}
        ).encode()
    keys = ",".join(f'"k{i}":1' for i in range(60_000))
    png = base64.b64encode((made.data / "a.png").read_bytes()).decode()
    odd |= {
        "keys": (f'{{"conversations": [], {keys}, "k59999": 2}}').encode(), "key escapes": json.dumps({escape: 1}).encode(),
        "role escapes": json.dumps({"conversations": [{"role": escape, "content": "x"}]}).encode(),
        "path escapes": json.dumps({"text_prompt": "x", "image_path": f"{escape}.png"}).encode(),
        "path surrogate": b'{"text_prompt": "x", "image_path": "\\ud83d.png"}', "text surrogate": b'{"text_prompt": "\\ud83d", "image_path": "a.png"}',
        "path NUL": json.dumps({"text_prompt": "x", "image_path": "a\x00.png"}).encode(),
        "path 5 MB": json.dumps({"text_prompt": "x", "image_path": "a" * 5_000_000}).encode(),
        "deep": b"[" * 100_000, "long": b'{"conversations": "' + b"x" * (30 << 20) + b'"}', "digits": b'{"a": ' + b"9" * 10_000 + b"}",
        "binary": b"\x00\xff\xfe" * 1000, "empty": b"", "NaN": b'{"weight": NaN, "conversations": []}',
        "picture a FIFO": json.dumps({"text_prompt": "x", "image_path": "fifo.png"}).encode(),
        "picture /dev/zero": json.dumps({"text_prompt": "x", "image_path": "zero.png"}).encode(),
        "picture outside": json.dumps({"text_prompt": "x", "image_path": "../../../../etc/passwd"}).encode(),
        "picture bomb": json.dumps({"text_prompt": "x", "image_path": "bomb.png"}).encode(),
        "picture data": json.dumps({"text_prompt": "x", "image_path": f"data:image/png;base64,{png}"}).encode(),
    }  # fmt: skip
    starts = {
        "check": lambda made: ["check", "d.jsonl", "--num_workers", "0"],
        "check model": lambda made: [
            "check",
            "d.jsonl",
            "--num_workers",
            "0",
            "--model_path",
            str(made.model),
        ],
        "preview": lambda made: ["preview", "d.jsonl", "--output", "p.html"],
        "fetch": lambda made: ["fetch", "d.jsonl", "--output_dir", "f"],
        "train": lambda made: train(made.model, Path("."), "run", "--dry_run"),
        "train skip": lambda made: train(
            made.model, Path("."), "run", "--dry_run", "--on_bad_record", "skip"
        ),
    }
    for name, line in odd.items():
        for command, argv in starts.items():

            def make(
                made: Originals, folder: Path, line: bytes = line, argv: Callable[..., list[str]] = argv
            ) -> list[str]:
                shutil.copy(made.data / "a.png", folder / "a.png")
                os.mkfifo(folder / "fifo.png")
                (folder / "zero.png").symlink_to("/dev/zero")
                (folder / "bomb.png").write_bytes(png_bomb())
                (folder / "d.jsonl").write_bytes(line + b"\n")
                return argv(made)

            said = name.removeprefix("special ") if name.startswith("special") else "d.jsonl"
            accepted = "named" if name.startswith("special") and command == "preview" else "no"
            if (
                name == "text surrogate"
                or command in ("fetch", "preview", "train skip")
                or name == "picture data"
            ):
                accepted = "named" if accepted == "named" else "any"
            wants = command.startswith("train")
            yield Case(
                "data",
                f"{command} {name}",
                make,
                (said, "d.jsonl", "record"),
                accepted,
                wants_error_line=wants,
            )
    for name, data_ in (("gzip bomb", gzip.compress(b" " * (1 << 28))), ("no gzip", b"x" * 99)):
        for command in ("check", "train"):

            def gz(made: Originals, folder: Path, data_: bytes = data_, command: str = command) -> list[str]:
                (folder / "d.jsonl.gz").write_bytes(data_)
                argv = starts[command](made)
                return [word.replace("d.jsonl", "d.jsonl.gz") for word in argv]

            yield Case(
                "data", f"{command} {name}", gz, ("d.jsonl.gz",), "no", wants_error_line=command == "train"
            )


def png_bomb() -> bytes:
    """A picture of 60,000 x 60,000 pixels in a few bytes."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 10_000))
        + chunk(b"IEND", b"")
    )


def cases(made: Originals) -> Iterator[Case]:
    """All of them, and the unedited inputs (kind ``baseline``)."""

    def unedited(command: str) -> Callable[[Originals, Path], list[str]]:
        def make(made: Originals, folder: Path) -> list[str]:
            shutil.copytree(made.model, folder / "model")
            if command != "train":
                shutil.copytree(made.run, folder / "run")
            return one_step(made) if command == "train" else on_run(made, command)

        return make

    yield Case("baseline", "train", unedited("train"), baseline="train", outcome=trained)
    yield Case("baseline", "resume", unedited("resume"), baseline="resume", outcome=resumed)
    for command in ("verify", "export"):
        yield Case("baseline", command, unedited(command), baseline=command, outcome=leaked_export)
    for make in (configs, tokenizers, weights, special_files, checkpoints, options, recipes, outputs, data):
        yield from make(made)
