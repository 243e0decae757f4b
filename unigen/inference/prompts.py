"""The prompts that a model answers while it trains (``sample_prompts``): texts, a file of one a line, or a
JSONL file with options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unigen.config import ConfigError, SamplingOptions, UserError
from unigen.data.json_text import parse_json
from unigen.inference.options import NAMES, InferenceError, sampling_options
from unigen.inference.requests import check_text
from unigen.sequence.images import image_size
from unigen.sequence.types import BadRecord
from unigen.values import PathText, read_keys

# The settings of samples where a line sets none. What is named here differs from everywhere else, to save
# time.
SAMPLES = SamplingOptions(max_new_tokens=200, num_timesteps=30)


class PromptError(UserError):
    """A prompt cannot be used; the message says which, in which file and line, why, and the fix."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: pictures, then a text.

    ``kind`` is draw (one picture; with a picture given, an edit of it), answer (one text), decide (what the
    model decides) or auto (one of these, by what the model can). ``options`` are the fields of
    :class:`SamplingOptions` that the line sets. ``where`` is its place, for messages.
    """

    text: str
    where: str
    seed: int
    images: tuple[str, ...] = ()
    kind: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[Any]:
        """As the model gets them."""
        return [*map(Path, self.images), *([self.text] if self.text else [])]

    @property
    def sampling(self) -> SamplingOptions:
        """How it is answered."""
        return sampling_options(SAMPLES, seed=self.seed, **self.options)


@dataclass
class PromptLine(SamplingOptions):
    """What a line of a JSONL file may say: any setting, and these.

    Args:
        prompt: The text.
        image: Paths of pictures before it.
        kind: As :class:`Prompt` has it.
    """

    prompt: str = ""
    image: list[PathText] = field(default_factory=list)
    kind: Literal["draw", "answer", "decide", "auto"] = "auto"  # as the option sample_kind


def read_prompts(given: str | list[str], seed: int) -> list[Prompt]:
    """The prompts of ``sample_prompts``: every entry is a text, or names a file of prompts (``.txt``,
    ``.jsonl``).

    Prompt i draws its noise from ``seed + i`` where its line sets no seed of its own. Pictures' paths are
    relative to the file.

    Raises:
        PromptError: a file, a line or one of its values cannot be used, or a picture cannot be read; says
            file and line.
    """
    found: list[Prompt] = []
    for number, entry in enumerate([given] if isinstance(given, str) else given, 1):
        path = _file(entry)
        if path is None:
            if not entry.strip():
                raise PromptError(
                    f"sample_prompts: text {number} is empty. Fix: write the prompt, or leave it out"
                )
            found.append(Prompt(entry, f"sample_prompts, text {number}", seed + len(found)))
            continue
        lines = _lines(path)
        for line, data in lines:
            where, own = f"{path}:{line}", seed + len(found)
            if path.suffix == ".jsonl":
                found.append(_record(data, line, where, path.parent, own))
            else:
                found.append(Prompt(_text(data, where), where, own))
        if not lines:
            raise PromptError(f"sample_prompts: {path} holds no prompt. Fix: write one a line")
    for prompt in found:
        try:
            if prompt.text:
                check_text(prompt.text, f"{prompt.where}: the prompt")
        except InferenceError as error:
            raise PromptError(str(error)) from None
    if not found:
        raise PromptError(
            'sample_prompts is empty. Fix: --sample_prompts "a red house", or a file of prompts'
        )
    return found


def _file(entry: str) -> Path | None:
    """The file that an entry names; None for a text."""
    path = Path(entry)
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # a text too long for a name, or with a NUL
        return None
    named = path.suffix in (".txt", ".jsonl", ".json") and not any(c.isspace() for c in entry)
    if named and not exists:
        raise PromptError(f"sample_prompts: there is no file {entry}. Fix: check the path")
    if named and path.suffix == ".json":
        raise PromptError(f"sample_prompts: {entry} is JSON. Fix: write one object a line and call it .jsonl")
    return path if exists else None


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Number and bytes of the lines that are not blank."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptError(
            f"sample_prompts: {path} cannot be read ({error.strerror}). Fix: check the permissions"
        ) from None
    return [(number, line.strip()) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise PromptError(f"{where}: the line is not UTF-8. Fix: save the file as UTF-8") from None


def _record(data: bytes, line: int, where: str, folder: Path, seed: int) -> Prompt:
    """The prompt of a line of a JSONL file."""
    try:
        values = parse_json(data, line)
    except BadRecord as error:
        raise PromptError(f"{where}: {error.found}. Fix: {error.fix}") from None
    if not isinstance(values, dict):
        raise PromptError(f'{where}: the line is no JSON object. Fix: {{"prompt": "a red house"}}')
    if missing := [key for key, value in values.items() if value is None]:
        raise PromptError(f"{where}: {missing[0]} is None. Fix: leave it out")
    try:
        held = PromptLine(**read_keys(PromptLine, values, where))
    except ConfigError as error:
        raise PromptError(str(error)) from None
    options = {key: value for key, value in values.items() if key in NAMES and key != "seed"}
    images = tuple(str(folder / path) for path in held.image)
    prompt = Prompt(held.prompt, where, values.get("seed", seed), images, held.kind, options)
    _check(prompt)
    return prompt


def _check(prompt: Prompt) -> None:
    """Raises PromptError where the values of a line do not go together, or a picture cannot be read."""
    where, options = prompt.where, prompt.options
    if not prompt.text.strip() and not prompt.images:
        raise PromptError(f"{where}: neither prompt nor image says what to answer. Fix: give one, or both")
    try:
        sampling_options(SAMPLES, **options)
    except InferenceError as error:
        raise PromptError(f"{where}: {error}") from None
    if "height" in options and prompt.kind == "answer":
        raise PromptError(
            f"{where}: height and width are those of a drawn picture, and kind is answer. Fix: leave them out"
        )
    for path in prompt.images:
        try:
            image_size(path)
        except UserError as error:
            raise PromptError(f"{where}: {error}") from None
