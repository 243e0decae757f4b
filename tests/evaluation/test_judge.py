"""The judge, asked over a real connection: a small server on 127.0.0.1 answers as OpenAI-compatible ones do."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pictures import noise
from PIL import Image as Pillow

from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import Case
from unigen.evaluation.judge import Judge
from unigen.evaluation.material import Material, Tools
from unigen.evaluation.results import CannotRun
from unigen.evaluation.statistics import compare
from unigen.evaluation.views import judge as judge_metric


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "seer"}, {"id": "other"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, said = self.server.answer(body)
        self.reply(status, {"choices": [{"message": {"role": "assistant", "content": said}}]})

    def reply(self, status, held):
        data = json.dumps(held).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 302:
            self.send_header("Location", "/v1/models")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    """Says how bright the last picture is, of 10."""

    def bright(body):
        url = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"][-1]
        data = base64.b64decode(url["image_url"]["url"].partition(",")[2])
        return 200, json.dumps({"score": round(Pillow.open(io.BytesIO(data)).getpixel((0, 0))[0] / 25.5)})

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.answer = [], bright
    found.url = f"http://127.0.0.1:{found.server_port}/v1"
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def gray(level: int):
    return Pillow.new("RGB", (8, 8), (level,) * 3)


CASES = [
    Case(0, "v:1", "generate", ("a cat",), ("image",), (gray(0),)),
    Case(1, "v:2", "edit", (gray(9), "brighter"), ("image",), (gray(0),)),
    Case(2, "v:3", "text", ("hm",), ("text",), (("x",),)),
]
ANSWERS = {
    0: Prediction(0, "", "generate", 0, (gray(255),)), 1: Prediction(1, "", "edit", 0, (gray(51),)),
    2: Prediction(2, "", "text", 0, ("x",)),
}  # fmt: skip


@pytest.mark.slow
def test_pictures_are_sent_with_their_text_and_edits_with_their_source(server):
    judge = Judge(server.url + "/")
    judge.meet()
    assert judge.model == "seer"
    rows = judge.judged(CASES, ANSWERS)
    assert [[one["score"] for one in row["pictures"]] for row in rows] == [[1.0], [0.2], []]
    drawn, edited = sorted((body["messages"][0]["content"] for body in server.asked), key=len)
    assert [part["type"] for part in drawn] == ["image_url", "text"] and "a cat" in drawn[-1]["text"]
    assert [part["type"] for part in edited] == ["image_url"] * 2 + ["text"] and "brighter" in edited[-1][
        "text"
    ]
    said = {"judge": {-1: judge.about(), **{row["number"]: row for row in rows}}}
    result = judge_metric(Material("generate", CASES[:1], [ANSWERS[0]], Tools(), said))
    assert result.value == 1.0 and result.name.startswith("judge[seer|asked=")


def test_checkpoints_are_compared_on_the_pictures_that_both_got_a_score_for():
    """Two pictures for one text are two prompts."""
    cases = [Case(n, f"v:{n}", "generate", ("a cat",), ("image",), (gray(0),)) for n in range(3)]
    answers = [Prediction(n, "", "generate", 0, (gray(9),)) for n in range(3)]

    def scored(*scores):
        rows = {n: {"pictures": [{"score": one, "said": ""}]} for n, one in enumerate(scores)}
        said = {"judge": {-1: {"model": "seer", "asked": "how"}, **rows}}
        return judge_metric(Material("generate", cases, answers, Tools(), said))

    base = scored(0.1, 0.5, None)
    assert compare(base, scored(0.2, 0.6, None)).n == 2
    assert compare(base, scored(None, 0.5, 0.1)).verdict == "not compared"  # one in common is no pair of sets
    rest = compare(scored(0.1, 0.5, 0.9), scored(None, 0.6, 0.9))
    assert (rest.n, rest.a, rest.b) == (2, pytest.approx(0.7), pytest.approx(0.75)) and "|n=2]" in rest.name
    assert "over the samples that both have" in rest.sentence()
    assert compare(base, base).reason == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("7", 0.7),
        ("8/10", 0.8),
        ('Sure: {"score": 3.5}', 0.35),
        ("fine", None),
        ('{"score": 11}', None),
        ("", None),
    ],
)
def test_scores_are_read_or_there_is_none(server, said, score):
    server.answer = lambda body: (200, said)
    judge = Judge(server.url, "other")
    assert judge.judged(CASES[:1], ANSWERS)[0]["pictures"] == [{"score": score, "said": said}]


@pytest.mark.slow
def test_a_server_that_refuses_redirects_or_is_gone_is_told(server):
    judge = Judge(server.url, "seer", timeout=5)
    server.answer = lambda body: (400, "no")
    with pytest.raises(CannotRun, match="400"):
        judge.judged(CASES[:1], ANSWERS)
    server.answer = lambda body: (302, "elsewhere")
    with pytest.raises(CannotRun, match="302"):
        judge.judged(CASES[:1], ANSWERS)
    with pytest.raises(CannotRun, match="no model nobody"):
        Judge(server.url, "nobody").meet()
    with pytest.raises(CannotRun, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", timeout=2).meet()


@pytest.mark.slow
def test_noise_is_a_picture_too(server):
    answers = {0: Prediction(0, "", "generate", 0, (noise(8, 8, 1),))}
    assert Judge(server.url, "seer").judged(CASES[:1], answers)[0]["pictures"][0]["score"] is not None
