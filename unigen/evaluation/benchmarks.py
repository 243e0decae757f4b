"""The field's benchmarks: how BAGEL's published numbers were sampled, and the files that public scorers read.

Two tables, :data:`PRESETS` and :data:`LAYOUTS`; a benchmark is a row of each. Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unigen.config import UserError
from unigen.data.words import Json
from unigen.inference.options import Guidance
from unigen.printing import printable


class BenchmarkError(UserError):
    """A benchmark's prompts or folder cannot be used; the message says where, why and the fix."""


# ---- sampling

# These scripts call the model themselves: WISE's with cfg_text_past_key_values=None, those of KRIS and RISE
# with the thought in cfg_img_past_key_values.
_REFERENCE, _BARE, _THOUGHT = Guidance(), Guidance(system=False), Guidance(thought=True)


@dataclass(frozen=True)
class Preset:
    """How a benchmark's pictures are sampled.

    Args:
        settings: of ``SamplingOptions``, by name.
        source: where these figures stand.
        layout: the benchmark's row of :data:`LAYOUTS`.
        pictures: of a prompt.
        one_seed: every picture is drawn from ``seed`` itself; otherwise seeds go on from picture to picture.
        vit: longest and shortest side in pixels of a picture to edit, as the ViT sees it; the VAE sees 1024
            and 512.
        guidance: where a thought and its system prompt enter.
    """

    settings: Mapping[str, Any]
    source: str
    layout: str
    pictures: int = 1
    one_seed: bool = False
    vit: tuple[int, int] | None = None
    guidance: Guidance = _REFERENCE


_GUIDED = {
    "num_timesteps": 50, "timestep_shift": 3.0, "cfg_text_scale": 4.0, "cfg_renorm_min": 0.0, "think": False,
    "seed": 42,
}  # fmt: skip
_DRAW = {
    **_GUIDED, "cfg_img_scale": 1.0, "cfg_interval": (0.4, 1.0), "cfg_renorm_type": "global", "height": 1024,
    "width": 1024,
}  # fmt: skip
_EDIT = {**_GUIDED, "cfg_img_scale": 1.5, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
_THINK = {"think": True, "do_sample": True, "temperature": 0.3, "max_new_tokens": 2048}
_EVERYWHERE = {**_DRAW, "cfg_interval": (0.0, 1.0)}
_SCRIPTS = "ByteDance-Seed/Bagel, eval/gen/"
_VIT = (980, 378)

PRESETS: dict[str, Preset] = {
    "geneval": Preset(_EVERYWHERE, _SCRIPTS + "gen_images_mp.py", "geneval", pictures=4),
    "geneval2": Preset(
        _EVERYWHERE, f"none is published for it; GenEval's: {_SCRIPTS}gen_images_mp.py", "geneval2"
    ),
    "wise": Preset(
        {**_DRAW, **_THINK}, _SCRIPTS + "gen_images_mp_wise.py, run_wise.sh", "wise", guidance=_BARE
    ),
    "wise_verified": Preset(
        {**_DRAW, **_THINK},
        f"its leaderboard says BAGEL with CoT; WISE's: {_SCRIPTS}gen_images_mp_wise.py", "wise",
        guidance=_BARE,
    ),
    "dpg": Preset(
        _DRAW, "none is published for it; text to image of ByteDance-Seed/Bagel, inference.ipynb", "dpg",
        pictures=4,
    ),
    "imgedit": Preset(_EDIT, _SCRIPTS + "gen_images_mp_imgedit.py", "imgedit", vit=_VIT),
    "gedit": Preset(
        {**_EDIT, "cfg_interval": (0.4, 1.0)}, _SCRIPTS + "gedit/gen_images_gedit.py", "gedit", one_seed=True,
        vit=_VIT,
    ),
    "kris": Preset(
        {**_EDIT, **_THINK}, _SCRIPTS + "gen_images_mp_kris.py, run_kris.sh", "kris", vit=_VIT,
        guidance=_THOUGHT,
    ),
    "rise": Preset(
        {**_EDIT, **_THINK, "cfg_img_scale": 2.0}, _SCRIPTS + "gen_images_mp_rise.py, run_rise.sh", "rise",
        vit=_VIT, guidance=_THOUGHT,
    ),
    "lmms-eval": Preset(
        {**_DRAW, "seed": 0}, "EvolvingLMMs-Lab/lmms-eval, models/simple/bagel.py, task_mode=generate",
        "lmms-eval",
    ),
    "lmms-eval-edit": Preset(
        {**_EDIT, "cfg_img_scale": 2.0, "seed": 0},
        "EvolvingLMMs-Lab/lmms-eval, models/simple/bagel.py, task_mode=edit", "lmms-eval", vit=(980, 224),
    ),
}  # fmt: skip
"""By the names of ``--preset``."""
PresetName = Literal[tuple(PRESETS)]  # type: ignore[valid-type]


def preset_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` options with the settings of their ``preset`` where they set none."""
    name = given.get("preset")
    return {**(PRESETS[name].settings if name in PRESETS else {}), **given}


def beaten(preset: str | None, options: Any) -> list[str]:
    """Where an option differs from the preset, a sentence: it was given, and wins."""
    settings = PRESETS[preset].settings if preset else {}
    return [
        f"{name} {getattr(options, name)} wins over {value} of preset {preset}"
        for name, value in settings.items()
        if getattr(options, name) != value
    ]


# ---- folders


@dataclass(frozen=True)
class Layout:
    """The folder that a public scorer reads, and the fields of a record that it is made from.

    Args:
        text: field of what is asked for.
        file: that of picture ``k`` of a record, named by its fields and its ``number`` in the prompts file,
            with ``/`` between folders.
        names: fields that become names of files and folders.
        needs: further fields that the scorer reads.
        picture: field of the pictures to edit; ``optional``: it may be missing.
        folder: field that names the folder of these pictures.
        keyed: the prompts file is one object, whose keys become the field ``key``.
        beside: JSON or pictures that stand beside the pictures of a record, by their places: ``record`` the
            record itself, ``source`` the picture to edit.
        grid: a record's pictures, four at most, are quarters of one: ``k`` in row ``k // 2``.
        several: a record may have any number of pictures.
        listing: files that say where everything lies, of all records, their pictures' absolute paths and
            their thoughts.
        one_of: field whose values differ from record to record, besides the places.
    """

    text: str
    file: str
    names: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    picture: str = ""
    optional: bool = False
    folder: str = ""
    keyed: bool = False
    beside: Mapping[str, Callable[[str], str]] | None = None
    grid: bool = False
    several: bool = False
    listing: Callable[[Sequence[Json], Sequence[str], Sequence[str]], dict[str, Any]] | None = None
    one_of: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """All that a record must have."""
        picture = (self.picture,) if self.picture and not self.optional else ()
        return tuple(dict.fromkeys((self.text, *self.names, *self.needs, *picture)))

    def place(self, record: Json, number: int, k: int) -> str:
        """Where picture ``k`` of a record lies, from the folder of all."""
        return self.file.format_map({**record, "number": number, "k": k})


def _by_prompt(records: Sequence[Json], paths: Sequence[str], thoughts: Sequence[str]) -> dict[str, Any]:
    """GenEval 2's ``--image_filepath_data``."""
    return {"image_paths.json": {record["prompt"]: path for record, path in zip(records, paths, strict=True)}}


def _logs(records: Sequence[Json], paths: Sequence[str], thoughts: Sequence[str]) -> dict[str, Any]:
    """What ``--model from_log`` of lmms-eval takes for a model's answers, a file a task."""
    found: dict[str, Any] = {}
    for record, path, thought in zip(records, paths, thoughts, strict=True):
        about = {"args": {"model": "unigen", "model_args": "", "limit": None}}
        configs = {"model_configs": {"task": record["task"]}}
        log = found.setdefault(f"{record['task']}.json", {**about, **configs, "logs": []})
        answer = json.dumps({"text": thought, "images": [path]}, ensure_ascii=False)
        log["logs"].append({"doc_id": record["doc_id"], "resps": [[answer]]})
    return found


LAYOUTS: dict[str, Layout] = {
    "geneval": Layout(
        "prompt", "{number:05d}/samples/{k:05d}.png", needs=("tag", "include"), several=True,
        beside={"record": lambda place: place.partition("/")[0] + "/metadata.jsonl"},
    ),
    "geneval2": Layout("prompt", "{number:05d}.png", listing=_by_prompt, one_of="prompt"),
    "wise": Layout("Prompt", "{prompt_id}.png", names=("prompt_id",)),
    "dpg": Layout("text", "{item_id}.png", names=("item_id",), grid=True),
    "imgedit": Layout("prompt", "{key}.png", names=("key",), picture="id", keyed=True),
    "gedit": Layout(
        "instruction", "fullset/{task_type}/{instruction_language}/{key}.png", picture="input_image",
        names=("task_type", "instruction_language", "key"),
        beside={"source": lambda place: place.removesuffix(".png") + "_SRCIMG.png"},
    ),
    "kris": Layout("ins_en", "{type}/{id}.png", names=("type", "id"), picture="ori_img", folder="type"),
    "rise": Layout("instruction", "{category}/{index}.png", names=("category", "index"), picture="image"),
    "lmms-eval": Layout(
        "prompt", "{task}_{doc_id}.png", names=("task", "doc_id"), picture="image", optional=True,
        listing=_logs,
    ),
}  # fmt: skip
"""By the names of ``--layout``. ``tests/evaluation/test_benchmarks.py`` reads each as its scorer does."""
LayoutName = Literal[tuple(LAYOUTS)]  # type: ignore[valid-type]


def check_record(layout: Layout, record: Any, where: str) -> None:
    """Raises BenchmarkError where a record lacks a field that the layout needs, or one cannot be a name."""
    if not isinstance(record, dict):
        raise BenchmarkError(f"{where}: is no object. Fix: an object with {', '.join(layout.fields)}")
    for name in layout.fields:
        if record.get(name) in (None, ""):
            raise BenchmarkError(
                f"{where}: field {name} is missing, and the layout needs it. Fix: give the benchmark's own"
                f" file, with {', '.join(layout.fields)}"
            )
    text = record[layout.text]
    if not isinstance(text, str) or not text.strip():
        raise BenchmarkError(f"{where}: field {layout.text} is {printable(text)}. Fix: a text")
    for name in layout.names:
        value = str(record[name])
        if isinstance(record[name], float | list | dict | bool) or not _is_name(value):
            raise BenchmarkError(
                f"{where}: field {name} is {printable(value)}, and a file is called by it. Fix: letters and"
                " digits, without / and without a dot in front"
            )


def _is_name(text: str) -> bool:
    """Can a file be called so, inside of its folder?"""
    return (
        0 < len(text.encode("utf-8", "replace")) <= 200
        and text[0] != "."
        and text.isprintable()
        and not set(text) & set('/\\:*?"<>|')
        and Path(text).name == text
    )
