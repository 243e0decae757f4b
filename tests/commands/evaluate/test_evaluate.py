"""``unigen evaluate`` on the tiny checkpoint: numbers with names, the same after a second run, one line for
every mistake."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import evaluate_speed
import numpy as np
import pytest
from pages import Page
from pictures import noise
from safetensors.torch import load_file, save_file

from unigen import cli
from unigen.commands.evaluate.options import EvaluateOptions
from unigen.commands.evaluate.page import _short, write
from unigen.commands.evaluate.terminal import names_apart
from unigen.commands.evaluate.work import _names
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import Case
from unigen.evaluation.results import Result
from unigen.evaluation.score import Answered, comparisons
from unigen.evaluation.statistics import estimate
from unigen.inference.inferencer import InterleaveInferencer
from unigen.show.language import Words

TINY = ["--device", "cpu", "--num_timesteps", "3", "--max_new_tokens", "4", "--height", "32", "--width", "32"]
RECORDS = [
    {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "yes 是"}]}
    for n in range(3)
]


@pytest.fixture
def evaluate(golden, tmp_path, capsys):
    """Runs the command; (exit code, standard output, standard error)."""
    data = tmp_path / "val.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")

    def run(*argv: str):
        given = {"--model_path": golden / "model", "--data_path": data, "--output_dir": tmp_path / "out"}
        code = cli.main(["evaluate", *(str(word) for pair in given.items() for word in pair), *TINY, *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_second_run_asks_nothing_and_gives_the_same_numbers(evaluate, tmp_path, monkeypatch):
    code, said, error = evaluate("--batch_size", "2")
    assert code == 0, error
    before = contents(tmp_path / "out")
    held = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in held["tasks"]["text"]]
    assert 1 < next(e["value"] for e in held["tasks"]["text"] if e["name"].startswith("perplexity[")) < 1e7
    assert held["records"] == 3 and list(held["tasks"]) == ["text"]
    assert not any(name.startswith(("structure", "stopped")) for name in names)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "false" in page and "False" not in page and "None" not in page
    assert any(name.startswith("bleu[nrefs:1|case:mixed|eff:no|tok:zh|") for name in names)
    assert len(held["about"]["checkpoint"]) == 12 and held["about"]["sampling"]["num_timesteps"] == 3
    assert "ROUGE-L" in said and str(tmp_path / "out" / "report.html") in said
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [42, 43, 44]
    monkeypatch.setattr(InterleaveInferencer, "unified_generate_batch", None)  # a call would raise
    assert evaluate("--batch_size", "2")[0] == 0 and contents(tmp_path / "out") == before
    code, _, error = evaluate("--batch_size", "2", "--num_timesteps", "4")
    assert code == 2 and "--num_timesteps (3 -> 4)" in error and "Fix: give another folder" in error
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--batch_size", "0"], "batch_size"),
        (["--samples", "0"], "samples"),
        (["--seed", "null"], "seed"),
        (["--features", "no/such/folder"], "no/such/folder"),
        (["--clip", "./none"], "none"),
        (["--bert", "./none", "--bert_layer", "1"], "none"),
        (["--data_path", "none.jsonl"], "none.jsonl"),
        (["--num_timesteps", "0"], "num_timesteps"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(evaluate, tmp_path, argv, word):
    code, _, error = evaluate(*argv)
    assert code == 2 and word in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_what_a_training_holds_out_is_asked_and_pieces_are_measured_where_they_are_chosen(
    golden, tmp_path, capsys
):
    write_lines(tmp_path / "val.jsonl", *({"asked": "why?", "response": "so"} for _ in range(2)))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"train_data_path: none.jsonl\nval_data_path: {tmp_path / 'val.jsonl'}\nfields: {{query: asked}}\n"
        "batch_size: 9\noutput_dir: out\nlearning_rate: 1\n"
    )
    given = ["evaluate", "--config", str(recipe), "--model_path", str(golden / "model"), *TINY, "--check"]
    for more, there in ([], False), (["--pieces", "model"], True), (["--metrics", "stopped"], True):
        assert cli.main([*given, *more]) == 0
        assert ("stopped" in capsys.readouterr().out) == there


def test_records_that_ask_nothing_are_a_mistake(evaluate, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Good day."}]}\n')
    code, _, error = evaluate()
    assert code == 2 and "asks anything" in error


def test_a_token_that_the_model_writes_itself_is_found_before_anything_runs(evaluate, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>"}]
    write_lines(tmp_path / "val.jsonl", *RECORDS, {"messages": turns})
    for argv in ([], ["--check"]):
        code, _, error = evaluate(*argv)
        assert (
            code == 2 and "val.jsonl:4: control_token in field" in error and "--allow_control_tokens" in error
        )
        assert not (tmp_path / "out").exists()
    assert evaluate("--check", "--allow_control_tokens")[0] == 0


@pytest.mark.slow
def test_tokens_that_are_allowed_are_measured(evaluate, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>"}]
    write_lines(tmp_path / "val.jsonl", {"messages": turns})
    code, said, error = evaluate("--allow_control_tokens")
    assert code == 0 and "Perplexity" in said, error


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def score_given(tmp_path, capsys):
    """Runs the command on answers that are given; (exit code, standard output, standard error)."""
    write_lines(tmp_path / "val.jsonl", *RECORDS)

    def run(predictions, *argv):
        given = ["--predictions", predictions, "--data_path", str(tmp_path / "val.jsonl")]
        code = cli.main(["evaluate", *given, "--output_dir", str(tmp_path / "out"), *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_given_answers_are_scored_and_compared_without_a_model(score_given, tmp_path):
    mine = write_lines(tmp_path / "mine.jsonl", *({"index": n, "text": "yes 是"} for n in range(3)))
    others = write_lines(tmp_path / "others.jsonl", *({"index": n, "text": "no"} for n in range(3)))
    code, said, error = score_given(mine, "--compare", others)
    assert code == 0, error
    held = json.loads((tmp_path / "out" / "1-mine.jsonl" / "metrics.json").read_text(encoding="utf-8"))
    values = {entry["name"].partition("[")[0]: entry for entry in held["tasks"]["text"]}
    assert values["exact_match"]["value"] == 1 and values["perplexity"]["value"] is None
    assert "not measured: Perplexity" in said and values["stopped"]["reason"]
    compared = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert {one["name"].partition("[")[0]: one["b"] for one in compared["against"][others]["text"]}[
        "accuracy"
    ] == 0
    # what was asked for and cannot be had makes the exit code
    assert score_given(mine, "--compare", others, "--metrics", "rougeL")[0] == 0
    assert score_given(mine, "--compare", others, "--metrics", "rougeL", "perplexity")[0] == 1
    assert score_given(mine, "--compare", others, "--metrics", "fd")[0] == 1  # no record has a picture


@pytest.mark.parametrize("changed", ["asked", "answered"])
def test_answers_about_other_pictures_are_not_taken_for_these(score_given, tmp_path, changed):
    """The records and the answers are the same files, and a picture that they name is another."""
    for name in ("asked", "answered"):
        noise(8, 8, 1).save(tmp_path / f"{name}.png")
    mine = write_lines(tmp_path / "mine.jsonl", {"index": 0, "image": "answered.png"})
    turns = [{"role": "user", "content": "<image>Turn it."}, {"role": "assistant", "content": "<image>"}]
    write_lines(tmp_path / "val.jsonl", {"messages": turns, "images": ["asked.png", "asked.png"]})
    given = [mine, "--metrics", "structure"]
    assert [score_given(*given)[0::2] for _ in range(2)] == [(0, "")] * 2
    before = contents(tmp_path / "out")
    noise(8, 8, 2).save(tmp_path / f"{changed}.png")
    code, _, error = score_given(*given)
    told = {"asked": "content of the pictures given", "answered": "--predictions"}[changed]
    assert code == 2 and f"holds answers with another {told}." in error, error
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model_path", "model"], "model_path and predictions"),
        (["--metrics", "rouge"], "did you mean rouge"),
        (["--judge_model", "seer"], "judge_url"),
        (["--describe_question", "what"], "--views"),
        (["--views", "--verify_question", "is it?"], "{text}"),
        (["--real", "there"], "there"),
        (["--views"], "views is given"),
        (["--pieces", "model"], "pieces is model"),
        (["--judge_url", "http://127.0.0.1:9/v1"], "cannot be reached (Connection refused)"),
    ],
)
def test_options_that_cannot_be_together_are_one_line(score_given, tmp_path, argv, words):
    mine = write_lines(tmp_path / "mine.jsonl", *({"index": n, "text": "yes"} for n in range(3)))
    code, _, error = score_given(mine, *argv)
    assert code == 2 and words in error and "Fix:" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["--check"]])
@pytest.mark.parametrize("what", ["a folder", "a file"])
def test_whom_to_compare_with_is_looked_at_before_anybody_answers(
    evaluate, tmp_path, monkeypatch, what, argv
):
    monkeypatch.setattr(InterleaveInferencer, "from_pretrained", None)  # a call would raise
    wrong = write_lines(tmp_path / "some.jsonl", {"index": 0, "text": "yes"})
    code, _, error = evaluate("--compare", wrong if what == "a file" else str(tmp_path / "none"), *argv)
    assert code == 2 and ("2 of 3 records" if what == "a file" else "none") in error and "Fix:" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("several", [False, True])
def test_the_answers_may_lie_within_the_data(several, tmp_path):
    rows = [{"index": n, "text": "yes"} for n in range(3)]
    given = write_lines(tmp_path / "answers.jsonl", *rows)
    data = tmp_path / "own"
    data.mkdir()
    write_lines(data / "d.jsonl", *RECORDS)
    argv = ["evaluate", "--predictions", given, "--data_path", str(data)]
    argv += ["--output_dir", str(data / "eval_100"), *(["--compare", given] * several)]
    for _ in range(2):  # the second finds the first's
        assert cli.main(argv) == 0
    assert (data / "eval_100" / "report.html").is_file() and cli.main(["check", str(data)]) == 0


def test_settings_of_sampling_are_idle_where_nobody_samples(score_given, tmp_path):
    mine = write_lines(tmp_path / "mine.jsonl", *({"index": n, "text": "yes"} for n in range(3)))
    code, said, error = score_given(mine, "--num_timesteps", "7", "--max_new_tokens", "9", "--seed", "3")
    told = re.search("no effect on any record: (.*)", said + error)
    assert code == 0 and told and set(told[1].split(", ")) == {"num_timesteps", "max_new_tokens", "seed"}
    assert "no effect" not in "".join(score_given(mine)[1:])


def test_check_says_what_can_run_before_anything_is_generated(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(InterleaveInferencer, "from_pretrained", None)  # a call would raise
    code, said, error = evaluate("--check")
    assert code == 0, error
    assert re.search(r"rougeL\s+can run", said) and re.search(r"perplexity\s+can run\s+by the model", said)
    assert "not measured: bertscore" in said and "--bert" in said and not (tmp_path / "out").exists()
    assert evaluate("--check", "--metrics", "bertscore")[0] == 1
    assert evaluate("--check", "--metrics", "fd")[0] == 1
    assert evaluate("--check", "--metrics", "perplexity", "bleu")[0] == 0
    code, said, _ = evaluate("--check", "--wordnet", str(tmp_path))
    assert code == 1 and "is no WordNet" in said
    assert evaluate("--check", "--model_path", str(tmp_path / "none"))[0] == 2


def test_records_are_judged_by_every_checkpoint(evaluate, golden, tmp_path):
    """What one of them cannot hold is told before any of them answers."""
    short = tmp_path / "short"
    shutil.copytree(golden / "model", short)
    sizes = json.loads((short / "llm_config.json").read_text())
    (short / "llm_config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 8}))
    assert evaluate("--check", "--compare", str(golden / "model"))[0] == 0
    code, _, error = evaluate("--check", "--compare", str(short))
    assert code == 2 and "too_long" in error


@pytest.fixture
def other(golden, tmp_path):
    """The checkpoint with another text head."""
    folder = tmp_path / "other"
    shutil.copytree(golden / "model", folder)
    tensors = load_file(folder / "ema.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].flip(0).contiguous()
    save_file(tensors, folder / "ema.safetensors")
    return folder


@pytest.mark.slow
def test_checkpoints_are_compared_on_the_same_prompts_and_seeds(evaluate, golden, other, tmp_path):
    code, said, error = evaluate("--compare", str(golden / "model"), str(other), "--language", "zh")
    assert code == 0, error
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "1-model",
        "2-model",
        "3-other",
        "compare.json",
        "report.html",
    }
    held = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    same = held["against"][str(golden / "model")]["text"]
    shown = [one for one in same if one["verdict"] != "not compared"]  # three texts are few for some metrics
    assert len(shown) > 8 and {(one["verdict"], one["p"]) for one in shown} == {("no difference shown", 1.0)}
    seeds = [
        [json.loads(line)["seed"] for line in (out / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("1-model", "3-other")
    ]
    assert seeds[0] == seeds[1] == [42, 43, 44]
    first, last = (
        [json.loads(line)["pieces"] for line in (out / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("1-model", "3-other")
    )
    assert first != last
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'lang="zh-CN"' in page and "看不出差别" in page and "Question 1?" in page and "yes 是" in page
    assert f"{other} 与 {golden / 'model'} 相比：文本" in said
    # a page that something else left there stays
    (out / "report.html").write_text("mine")
    assert evaluate("--compare", str(golden / "model"), str(other))[0] == 2
    assert (out / "report.html").read_text() == "mine"


def result(kind: str, values: list[float]) -> Result:
    return estimate(f"{kind}[n={len(values)}]", np.array(values))


def test_what_differs_stands_first_and_what_does_not_is_one_line(tmp_path):
    cases = [Case(n, f"v:{n}", "text", ("q",), ("text",), (("r",),)) for n in range(20)]
    answers = [Prediction(n, f"v:{n}", "text", n, ("a",)) for n in range(20)]
    draws = np.random.default_rng(0).random((3, 20))
    scores = [
        [result("anls", [*draws[0]]), result("meteor", [*draws[1]]), result("rougeL", [*(draws[2] + shift)])]
        for shift in (0, 0.5)
    ]
    a, b = (
        Answered(name, {"checkpoint": name, "sampling": {}}, answers, {"text": ones})
        for name, ones in zip("ab", scores)
    )
    page = write(tmp_path / "r.html", cases, [a, b], {"b": comparisons(a, b)}, Words("en", "evaluate"))
    said = Page(page.read_text(encoding="utf-8")).text.replace("\u00a0", " ")
    assert re.search(r"ROUGE-L\s*· better by 0\.5", said)
    assert re.search(
        r"Likeness of answers \(ANLS\), METEOR\s*· no difference shown with n = 20 \(p ≥ 1\)", said
    )
    assert said.index("better by") < said.index("no difference")


def test_the_page_shows_the_best_the_worst_and_the_most_changed(tmp_path):
    cases = [
        Case(n, f"val.jsonl:{n}", "text", (f"<b>question {n}</b>",), ("text",), ((f"right {n}",),))
        for n in range(20)
    ]
    values = [np.linspace(0, 1, 20), np.linspace(0, 1, 20)]
    values[1][7] = 0.99
    answered = [
        Answered(
            name, {"checkpoint": name, "sampling": {"seed": 42}},
            [Prediction(n, f"val.jsonl:{n}", "text", 42 + n, (f"{name} {n}",)) for n in range(20)],
            {"text": [result("accuracy", list(scores)), Result("bleu[x]", None, reason="no reason", fix="none")]},
        )
        for name, scores in zip("ab", values, strict=True)
    ]  # fmt: skip
    compared = {"b": comparisons(*answered)}
    page = write(tmp_path / "report.html", cases, answered, compared, Words("en", "evaluate")).read_text()
    samples = re.findall(r"<b>(most changed|best|worst)</b> · (\S+) .*?val\.jsonl:(\d+)", page)
    assert samples[0] == ("most changed", "Accuracy", "7")
    assert [number for label, _, number in samples if label == "best"] == ["19", "18", "17"]
    assert [number for label, _, number in samples if label == "worst"] == ["0", "1", "2", "3"]
    assert "&lt;b&gt;question 7" in page and "<b>question" not in page
    assert "not compared: one has no value (no reason)" in page


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 0, 0, 0, 0], {"best": [0], "worst": [1, 2]}),  # a wrong answer is never among the best
        ([0, 1, 1, 1, 1], {"best": [4, 3], "worst": [0]}),
        ([0.5, 1, 0.5, 0, 0.5, 0.5], {"best": [1], "worst": [3]}),
        ([0.2, 0.4, 0.6], {"best": [2], "worst": [0]}),
        ([0.4, 0.4, 0.4], {"": [0, 1, 2]}),
        ([0.7], {"": [0]}),
    ],
)
def test_few_or_equal_samples_are_not_called_what_they_are_not(tmp_path, values, labels):
    cases = [Case(n, f"v:{n}", "text", ("q",), ("text",), (("r",),)) for n in range(len(values))]
    answers = [Prediction(n, f"v:{n}", "text", n, ("a",)) for n in range(len(values))]
    one = Answered("a", {"checkpoint": "a", "sampling": {}}, answers, {"text": [result("accuracy", values)]})
    page = write(tmp_path / "r.html", cases, [one], {}, Words("en", "evaluate")).read_text(encoding="utf-8")
    found: dict[str, list[int]] = {}
    for label, number in re.findall(r">(?:<b>(best|worst)</b> · )?Accuracy .*?v:(\d+)<", page):
        found.setdefault(label, []).append(int(number))
    assert found == labels


def test_the_checkpoints_of_a_run_are_curves_and_a_grid_in_both_languages(tmp_path):
    cases = [Case(n, f"v:{n}", "generate", (f"draw {n}",), ("image",), (noise(8, 8, n),)) for n in range(10)]
    answered = [
        Answered(
            f"run/step_{step}", {"checkpoint": str(step), "sampling": {}},
            [Prediction(n, f"v:{n}", "generate", n, (noise(8, 8, step + n),)) for n in range(10)],
            {"generate": [result("judge", list(np.linspace(0, step / 300, 10))),
                          Result("fd", None, reason="10 pictures are too few to extrapolate from", lacks="samples")]},
            step,
        )
        for step in (100, 200, 300)
    ]  # fmt: skip
    compared = {one.name: comparisons(answered[0], one) for one in answered[1:]}
    for language, words in (("en", "over the steps"), ("zh", "随步数的变化")):
        path = write(tmp_path / f"{language}.html", cases, answered, compared, Words(language, "evaluate"))
        page = Page(path.read_text(encoding="utf-8"))
        assert words in page.text and "draw 7" in page.text and "draw 8" not in page.text  # eight prompts
        (chart,) = page.charts
        (curve,) = chart["curves"]
        assert (chart["first"], chart["last"], curve["x"]) == (100, 300, [100, 200, 300])
        assert curve["t"] == ["0.1667", "0.3333", "0.5"]
    assert "太少，不能外推" in page.text and "too few" not in page.text
    # another run, and one checkpoint of a third, which is no curve
    others = [replace(one, name=one.name.replace("run", "next")) for one in answered[:2]]
    lone = replace(answered[2], name="third/step_300")
    path = write(tmp_path / "two.html", cases, [*answered, *others, lone], {}, Words("en", "evaluate"))
    page = Page(path.read_text(encoding="utf-8"))
    (chart,) = page.charts
    assert [(curve["n"], curve["x"]) for curve in chart["curves"]] == [
        ("run", [100, 200, 300]), ("next", [100, 200]),
    ]  # fmt: skip
    same = [replace(one, scores={"generate": answered[0].scores["generate"]}) for one in answered]
    page = Page(
        write(tmp_path / "same.html", cases, same, {}, Words("en", "evaluate")).read_text(encoding="utf-8")
    )
    assert page.charts == [] and "The same at every step: Judge's score 0.1667." in page.text
    page = Page(path.read_text(encoding="utf-8"))
    assert "run: 300" in page.text and "next: 200" in page.text and "third: " not in page.text


def test_runs_that_are_compared_answer_with_all_their_checkpoints(tmp_path):
    for name in ("a/step_2", "a/step_10", "b/step_5", "model"):
        (tmp_path / name).mkdir(parents=True)
    options = EvaluateOptions(
        data_path="v", run=str(tmp_path / "a"), compare=[str(tmp_path / "b"), str(tmp_path / "model")]
    )
    found = [str(Path(name).relative_to(tmp_path)) for name in _names(options)]
    assert found == ["a/step_2", "a/step_10", "b/step_5", "model"]


def test_the_records_whose_measuring_is_timed_ask_for_a_text_and_a_picture(tmp_path, capsys):
    data, answers = evaluate_speed.write_records(tmp_path, 3)
    given = ["--predictions", str(answers), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["evaluate", *given, "--metrics", "structure", "rougeL"]) == 0, capsys.readouterr().err
    (values,) = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["tasks"].values()
    assert values[0]["value"] == 1 and 0.5 < values[1]["value"] < 1


def test_checkpoints_are_called_by_what_tells_them_apart():
    assert list(_short(["/a/runs/x/best", "/a/runs/x/step_10"]).values()) == ["x/best", "x/step_10"]
    assert list(_short(["/a/x/best", "/b/y/best"]).values()) == ["x/best", "y/best"]
    # runs of one name are two
    assert list(_short(["a/x/step_1", "b/x/step_2"]).values()) == ["a/x/step_1", "b/x/step_2"]
    assert _short(["models/BAGEL"]) == {"models/BAGEL": "models/BAGEL"}
    assert names_apart(["a/best", "b/best"]) == ["a/best", "b/best"]
    assert names_apart(["a/x/best", "b/x/step_1"]) == ["best", "step_1"]
    assert names_apart(["x.jsonl", "/a/x.jsonl", "x.jsonl"]) == ["x.jsonl", "a/x.jsonl", "x.jsonl"]
    assert names_apart(["m", "m"]) == ["m", "m"]
