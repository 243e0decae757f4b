"""Another model as a judge of drawn pictures, asked over an OpenAI-compatible endpoint, such as a local
server's.

Only POST to ``/chat/completions`` and GET of ``/models`` of the address that the user gives; redirects are
not followed, and answers are read within bounds.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import urllib3

from unigen.evaluation.answers import Prediction, drawn_beside, rows_of_pictures
from unigen.evaluation.cases import Case
from unigen.evaluation.results import CannotRun, digest_of
from unigen.printing import first_line, typed
from unigen.sequence.images import open_image

DRAWN = (
    "The picture was drawn for this text:\n{text}\n\nHow well does it show what the text asks for, and how"
    ' well is it made? Answer with JSON alone: {{"score": N}}, N from 0 (not at all) to 10 (perfectly).'
)
EDITED = (
    "The second picture is an edit of the first, made for this instruction:\n{text}\n\nHow well does it do"
    " what the instruction asks for, and leave everything else as it was? Answer with JSON alone:"
    ' {{"score": N}}, N from 0 (not at all) to 10 (perfectly).'
)
MOST = 2**20  # bytes of an answer
AT_ONCE = 8  # requests
_SCORE = re.compile(r'"score"\s*:\s*"?(\d+(?:\.\d+)?)|^\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*$')


@dataclass
class Judge:
    """A model behind ``url``, such as ``http://127.0.0.1:8000/v1``.

    Args:
        model: its name; default the first that the server names.
        timeout: seconds for one answer.
    """

    url: str
    model: str | None = None
    timeout: float = 300.0
    _pool: urllib3.PoolManager = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        retries = urllib3.Retry(
            3, redirect=0, status_forcelist=(429, 502, 503), allowed_methods=None, backoff_factor=0.5,
            raise_on_status=False,
        )  # fmt: skip
        self._pool = urllib3.PoolManager(maxsize=AT_ONCE, retries=retries, timeout=self.timeout)

    def meet(self) -> None:
        """Asks which models there are. Raises CannotRun: the server does not answer, or has not this one."""
        found = self._json("GET", "/models").get("data")
        names = [one.get("id") for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        names = [name for name in names if isinstance(name, str)]
        if not names:
            raise CannotRun(
                f"{self.url}/models names no model", "give the address of an OpenAI-compatible server"
            )
        if self.model is None:
            self.model = names[0]
        elif self.model not in names:
            raise CannotRun(f"{self.url} has no model {self.model}", f"--judge_model {typed(names[0])}")

    def about(self) -> dict[str, Any]:
        """Which model is asked, and a digest of how."""
        return {"model": self.model, "asked": digest_of(DRAWN, EDITED)}

    def judged(self, cases: Sequence[Case], predictions: Mapping[int, Prediction]) -> list[dict[str, Any]]:
        """For each case and each picture of its answer that the record has, too: the ``score`` from 0 to 1
        (None where the judge gave none) and what it ``said``.

        Raises:
            CannotRun: the server does not answer.
            PictureError: a picture cannot be read.
        """
        answers = [(case, predictions[case.number]) for case in cases]
        jobs = [(case, found.pieces[at]) for case, found in answers for at, _ in drawn_beside(case, found)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            said = list(pool.map(lambda job: self._one(*job), jobs))
        return rows_of_pictures(cases, [case for case, _ in jobs], said)

    def _one(self, case: Case, picture: Any) -> dict[str, Any]:
        shown = [picture] if case.source is None else [case.source, picture]
        question = (DRAWN if case.source is None else EDITED).format(text=case.said_last)
        content = [{"type": "image_url", "image_url": {"url": _as_url(one)}} for one in shown]
        asked = {
            "model": self.model, "temperature": 0, "max_tokens": 64,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        }  # fmt: skip
        answer = self._json("POST", "/chat/completions", asked)
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            said = None
        if not isinstance(said, str):
            raise CannotRun(
                f"{self.url} answers without a text", "give the address of an OpenAI-compatible server"
            )
        match = _SCORE.search(said.strip())
        score = float(match[1] or match[2]) / 10 if match else None
        return {"score": score if score is not None and score <= 1 else None, "said": said[:500]}

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        fix = "start the server, or leave --judge_url out"
        try:
            response = self._pool.request(
                method, self.url + path, json=body, preload_content=False, redirect=False
            )
            data = response.read(MOST + 1)
            response.release_conn()
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise CannotRun(f"{self.url} cannot be reached ({_reason(error)})", fix) from None
        if response.status != 200:
            raise CannotRun(f"{self.url}{path} answers {response.status}", "look at what the server says")
        try:
            held = json.loads(data) if len(data) <= MOST else None
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict):
            raise CannotRun(f"{self.url}{path} answers with no JSON object", fix)
        return held


def _reason(error: BaseException) -> str:
    """What the system said, beneath what urllib3 says of it; else its own words."""
    beneath: BaseException | None = getattr(error, "reason", None) or error
    while isinstance(beneath, BaseException) and not getattr(beneath, "strerror", None):
        beneath = beneath.__cause__ or beneath.__context__
    return getattr(beneath, "strerror", None) or first_line(error)


def _as_url(picture: Any) -> str:
    """A picture within a URL, as PNG."""
    file = io.BytesIO()
    open_image(picture).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
