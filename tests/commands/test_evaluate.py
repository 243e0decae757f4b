"""``unigen evaluate`` on the tiny checkpoint: numbers with names, the same after a second run, one line for
every mistake."""

import json

import pytest

from unigen import cli
from unigen.inference.inferencer import InterleaveInferencer

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
    assert held["records"] == 3 and list(held["tasks"]) == ["text"]
    assert any(name.startswith("bleu[nrefs:1|case:mixed|eff:no|tok:zh|") for name in names)
    assert len(held["about"]["checkpoint"]) == 12 and held["about"]["sampling"]["num_timesteps"] == 3
    assert "rougeL" in said and str(tmp_path / "out" / "metrics.json") in said
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [42, 43, 44]
    monkeypatch.setattr(InterleaveInferencer, "unified_generate_batch", None)  # a call would raise
    assert evaluate("--batch_size", "2")[0] == 0 and contents(tmp_path / "out") == before
    code, _, error = evaluate("--batch_size", "2", "--num_timesteps", "4")
    assert code == 2 and "sampling" in error and "Fix: give another folder" in error
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


def test_records_that_ask_nothing_are_a_mistake(evaluate, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Good day."}]}\n')
    code, _, error = evaluate()
    assert code == 2 and "asks anything" in error
