"""Public data sets whose fields have names of their own: told by their keys, and answered with the line that
makes them work. None of it is a guess: what is told was tried on the record."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import combinations, islice, product
from pathlib import Path
from typing import NamedTuple

from unigen.data.captions import PICTURES, is_picture
from unigen.data.keys import RECORD, is_empty
from unigen.data.layouts import CAPTION, pictures_unread
from unigen.data.mapping import ReadOptions, found_at
from unigen.data.words import Json, cut
from unigen.printing import typed


def _flags(fields: dict[str, str]) -> str:
    return "--fields " + " ".join(typed(f"{new}={old}") for new, old in fields.items())


def _is_pictured(record: Json, url: str) -> bool:
    """Is an address that of a picture, and not of the page that a text is from?"""
    return is_picture(Path(url.partition("?")[0])) or any(name.lower().endswith("width") for name in record)


def _picture_beside(file: Path) -> Path | None:
    """The picture that has the name of a file of one record."""
    if file.suffix.lower() != ".json":
        return None
    return next((path for end in PICTURES if (path := file.with_suffix(end)).is_file()), None)


class Hint(NamedTuple):
    """A data set, or several with the same names, and how they are read."""

    name: str
    fields: dict[str, str]  # the mapping, of which a record has every place
    also: tuple[str, ...] = ()  # further fields that it has
    web: bool = False  # its pictures are addresses


class Rewritten(NamedTuple):
    """A layout that no mapping makes one of ours, and the program of jq that does."""

    name: str
    field: str
    inside: tuple[str, ...]  # that the objects of the list in ``field`` have; none: a text
    program: str


def _pairs(asked: str, said: str, before: str = "") -> str:
    turns = f'{{role: "user", content: .{asked}}}, {{role: "assistant", content: .{said}}}'
    return f"{{messages: [.conversation[] | {before}{turns}]}}"


REWRITTEN = (
    Rewritten(
        "XTuner", "conversation", ("input", "output"),
        _pairs("input", "output", '(select(.system) | {role: "system", content: .system}), '),
    ),
    Rewritten(
        "Gemini", "contents", ("role", "parts"),
        '{system: (.systemInstruction.parts[0].text // null), messages: [.contents[] | {role: .role,'
        ' content: ([.parts[].text] | join(""))}]}',
    ),
    Rewritten("Firefly, MOSS", "conversation", ("human", "assistant"), _pairs("human", "assistant")),
    Rewritten(
        "TRL (prompt and completion as messages)", "completion", ("role", "content"),
        "{messages: ((.prompt | map(. + {target: false})) + .completion)}",
    ),
    Rewritten(
        "CoMM (a text with tags)", "text", (), '{messages: [{role: "assistant", content: .text}], images}'
    ),
    Rewritten("texts alone (format 6)", "text", (), "{sequence: [{content: .text}]}"),
)  # fmt: skip
"""Of CoMM ``images`` stand beside the text, with its tags."""
_NOT_ALONE = frozenset(("image", "images", "image_path", "file_name", "label", "labels"))


HINTS = (
    Hint("Geometry3K, R1-V", {"query": "problem", "response": "answer"}),
    Hint("OpenR1-Math, NuminaMath", {"query": "problem", "response": "solution"}),
    Hint("VQAv2, TextVQA, DocVQA", {"query": "question", "response": "answers.0"}),
    Hint("A-OKVQA", {"query": "question", "response": "direct_answers.0"}),
    Hint("ChartQA", {"image": "imgname", "response": "label"}, ("query",)),
    Hint("ChartQA (Hugging Face)", {"response": "label.0"}, ("query",)),
    Hint(
        "questions with reasoning",
        {"query": "question", "response": "answer", "reasoning_content": "reasoning"},
    ),
    Hint("DeepSeek-R1, distilled", {"query": "input", "response": "content"}, ("reasoning_content",)),
    Hint("OpenOrca", {"system": "system_prompt", "query": "question", "response": "response"}),
    Hint("Mantis", {"messages": "conversation"}),
    Hint("VQAv2 (multiple_choice_answer)", {"query": "question", "response": "multiple_choice_answer"}),
    Hint("PixMo", {"image": "image_url", "query": "question", "response": "answer"}, web=True),
    Hint("VizWiz", {"query": "question", "response": "answers.0.answer"}),
    Hint("VQA (answers as a text)", {"query": "question", "response": "answers"}),
    Hint("GQA, GSM8K, MathVision", {"query": "question", "response": "answer"}),
    Hint("Dolly", {"input": "context", "output": "response"}, ("instruction",)),
    Hint("Evol-Instruct", {"output": "response"}, ("instruction",)),
    Hint("FLAN, P3", {"query": "inputs", "response": "targets"}),
    Hint("pairs of input and output", {"query": "input", "response": "output"}),
    Hint("turns as user and assistant", {"query": "user", "response": "assistant"}),
    Hint("DOCCI, ImageInWords", {"text": "description"}, ("image",)),
    Hint("COCO captions (Karpathy)", {"text": "sentences.raw"}, ("image",)),
    Hint("COCO captions (dataset_coco.json)", {"image": "filename", "text": "sentences.0.raw"}),
    *(Hint("a list with one picture, and a text", {"image": "images", "text": name}) for name in CAPTION),
    Hint("TextCaps", {"captions": "caption_str"}, ("image",)),
    Hint("captions called sentences", {"text": "sentences"}, ("image",)),
    Hint("JourneyDB, MJHQ", {"image": "img_path", "text": "prompt"}),
    Hint("JourneyDB (Task2)", {"image": "img_path", "text": "Task2.Caption"}),
    Hint("JourneyDB (caption)", {"image": "img_path", "text": "caption"}),
    Hint("PixArt (path, prompt)", {"image": "path", "text": "prompt"}),
    Hint("img2dataset (Parquet)", {"image": "jpg", "text": "caption"}),
    Hint("Flickr30k (nlphuji)", {"image": "filename", "text": "raw"}),
    Hint("COCO captions (sentences)", {"image": "filename", "text": "sentences"}),
    Hint("Flickr30k (results.csv)", {"image": "image_name", "text": "comment"}),
    Hint("LAION-COCO", {"image": "URL", "text": "top_caption"}, web=True),
    Hint("LAION, CC12M with URL and TEXT", {"image": "URL", "text": "TEXT"}, web=True),
    Hint("PixelProse", {"image": "url", "text": "vlm_caption"}, web=True),
    Hint("Recap-DataComp", {"image": "url", "text": "re_caption"}, web=True),
    Hint("COYO", {"image": "url", "text": "text"}, web=True),
    Hint("CC12M, img2dataset's metadata", {"image": "url", "text": "caption"}, web=True),
    Hint("Midjourney v6", {"image": "url", "text": "prompt"}, web=True),
    Hint("Conceptual Captions", {"image": "image_url", "text": "caption"}, web=True),
    Hint("WIT", {"image": "image_url", "text": "caption_reference_description"}, web=True),
    Hint("AnyEdit", {"input_image": "image_file", "output_image": "edited_file", "instruction": "edit"}),
    Hint(
        "AnyEdit (Hugging Face)",
        {"input_image": "image_file", "output_image": "edited_file"},
        ("edit_instruction",),
    ),
    Hint("ControlNet pairs (fill50k)", {"input_image": "source", "output_image": "target"}, ("prompt",)),
    Hint(
        "image folders with two pictures",
        {"input_image": "input_file_name", "output_image": "output_file_name"},
    ),
)


def hint_for(
    record: Json, file: Path, refused: Callable[[Json], str | None], known: Collection[str]
) -> str | None:
    """What to write for a record that no format reads; None where it is of no known data set. ``refused``
    gives the code of what is wrong with a record, and None for one of a format; ``known`` are the fields that
    formats read."""
    beside = _picture_beside(file)
    if beside and refused({**record, "image": beside.name}) is None:
        packed = "tar --sort=name -cf data.tar -C FOLDER ., and name data.tar"
        return f"it describes {beside.name} beside it: pack them with {packed}"
    named = {name.removesuffix("_file_name"): name for name in record if name.endswith("_file_name")}
    if named and refused(ReadOptions(fields=named).renamed(record)[0]) is None:
        return f"it has the fields of an image folder: give {_flags(named)}"
    return (
        _program_for(record, file)
        or _mapping_for(record, file, refused)
        or _near_miss(record, refused, known)
        or _program_for(record, file, True)
    )


_WORDS = {
    **dict.fromkeys(("img", "pic", "picture", "photo", "imagefile", "filepath"), "image"),
    **dict.fromkeys(("txt", "desc", "description", "alt", "title"), "text"),
    "q": "query", "a": "response", "instr": "instruction",
}  # fmt: skip
"""What a field is called where it is meant as one of ours."""
_ALIKE = 0.75  # of 1
_NOT_MEANT = re.compile(
    r"(?:^|[^a-z])(?:chosen|rejected|negative|neg|wrong|incorrect|bad|worse|better|mask|depth|condition|control)"
    r"(?:[^a-z]|$)|[^a-z][ab]$|\d"
)
"""What a field is called that stands beside another of its kind, of which one alone is meant, or neither."""
_TRIED = 30  # mappings of a record, of which there may be many


def _near_miss(record: Json, refused: Callable[[Json], str | None], known: Collection[str]) -> str | None:
    """The mapping for a record whose fields have nearly the names of a format, tried from the most fields to
    one."""
    others = [name for name in record if name not in (*known, *RECORD) and not is_empty(record[name])]
    if any(_NOT_MEANT.search(name.lower()) for name in others):
        return None
    others = [name for name in others if name == cut(name)][:8]  # one that can be typed
    alike = {old: _alike(old, frozenset(known), _pictured(record[old])) for old in others}
    meant = {old: free for old, news in alike.items() if (free := [new for new in news if new not in record])}
    groups = (names for n in range(len(meant), 0, -1) for names in combinations(meant, n))
    ways = (dict(zip(new, old)) for old in groups for new in product(*(meant[name] for name in old)))
    for fields in islice(ways, _TRIED):
        if refused(ReadOptions(fields=fields).renamed(record)[0]) is None:
            ours, theirs = ", ".join(fields), ", ".join(fields.values())
            return (
                f"did you mean {ours} in place of {theirs}? Give {_flags(fields)} where all records have it"
                " so, or rename it in these"
            )
    return None


def _pictured(value: object) -> bool | None:
    """Does a value look like a picture? None: a list may hold some."""
    if isinstance(value, list):
        return None
    return isinstance(value, dict) or (isinstance(value, str) and is_picture(Path(value)))


@lru_cache(1024)
def _alike(old: str, known: frozenset[str], pictured: bool | None) -> list[str]:
    """The fields of formats that one may be meant as, the most alike first; pictures stand in those of
    pictures alone."""
    words = {_WORDS.get(word, word) for word in (old.lower(), *re.split(r"[^a-z]+", old.lower()))}
    alike = {
        new: SequenceMatcher(None, old.lower(), new).ratio()
        for new in sorted(known)
        if pictured in (None, "image" in new)
    }
    found = [new for new, share in alike.items() if share >= _ALIKE or new in words]
    return sorted(found, key=lambda new: -alike[new])


def _program_for(record: Json, file: Path, alone: bool = False) -> str | None:
    """The line of jq for a record of :data:`REWRITTEN`, or with ``alone`` for a text alone."""
    kind = file.suffix.lower()
    for name, field, inside, program in REWRITTEN if kind in (".json", ".jsonl") else ():
        value = record.get(field)
        if inside:
            fits = isinstance(value, list) and bool(value)
            fits = fits and all(isinstance(item, dict) and item.keys() >= set(inside) for item in value)
        elif "images" in program:
            fits = isinstance(value, str) and "<image>" in value and bool(record.get("images"))
        else:
            fits = alone and isinstance(value, str) and record.keys().isdisjoint(_NOT_ALONE)
        if fits and not (alone and pictures_unread(record)):
            each = ".[] | " if kind == ".json" else ""
            return f"it has the fields of {name}: jq -c '{each}{program}' OLD > NEW.jsonl"
    return None


def _mapping_for(record: Json, file: Path, refused: Callable[[Json], str | None]) -> str | None:
    """The line with the mapping for a record of :data:`HINTS`."""
    for hint in sorted(HINTS, key=lambda hint: -len(hint.fields) - len(hint.also)):  # who says most first
        values = {name: found_at(record, place) for name, place in hint.fields.items()}
        said = {name for name, value in values.items() if isinstance(value, dict) and "image" not in name}
        if said or None in values.values() or any(found_at(record, name) is None for name in hint.also):
            continue
        if hint.web and hint.fields.get("text") == "text" and not _is_pictured(record, str(values["image"])):
            continue
        fields = hint.fields
        mapped, _ = ReadOptions(fields=fields).renamed(record)
        if fields.keys() & {"query", "output"} and len(pictures := pictures_unread(mapped)) == 1:
            fields = {**fields, "image": pictures[0]}
            mapped, _ = ReadOptions(fields=fields).renamed(record)
        code = refused(mapped)
        # of names that say enough, what stands beside them is told when they are given
        if code is None or (code == "unexpected_field" and len(fields) + len(hint.also) > 2):
            line = (
                f"run unigen fetch {typed(file)} {_flags(fields)}" if hint.web else f"give {_flags(fields)}"
            )
            return f"it has the fields of {hint.name}: {line}"
    return None
