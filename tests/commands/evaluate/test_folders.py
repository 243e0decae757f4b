"""``unigen evaluate --layout geneval``: a folder of pictures is measured and compared, and what lacks is said."""

import json

import pytest
import tiny_towers
from pictures import noise

from unigen import cli

WANTED = [
    {"tag": "counting", "include": [{"class": "dog", "count": n}], "exclude": [{"class": "dog", "count": n + 1}],
     "prompt": f"a photo of {n} dogs"}
    for n in (1, 2, 3)
] + [{"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}]  # fmt: skip
COLOURED = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}


def write_folder(folder, wanted, start=0):
    for number, one in enumerate(wanted):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(one))
        for k in range(2):
            noise(32, 32, start + 2 * number + k).save(samples / f"{k:05d}.png")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """It finds two dogs in every picture."""
    return str(tiny_towers.write_detr(tmp_path_factory.mktemp("detr"), always=1))


@pytest.fixture
def evaluate(tmp_path, capsys):
    def run(folder, *argv):
        given = ["--layout", "geneval", "--data_path", str(folder), "--output_dir", str(tmp_path / "out")]
        code = cli.main(["evaluate", *given, "--device", "cpu", *argv])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_folder_is_measured_task_by_task_and_over_all(evaluate, detector, tmp_path):
    folder = write_folder(tmp_path / "drawn", WANTED)
    (folder / ".unigen").mkdir()
    (folder / ".unigen" / "answers.json").write_text('{"preset": "geneval", "sampling": {"seed": 42}}')
    code, said = evaluate(folder, "--detector", detector, "--language", "zh")
    assert code == 0, said
    held = json.loads((tmp_path / "out" / "metrics.json").read_text())
    values = {
        task: {one["name"].partition("[")[0]: one["value"] for one in ones}
        for task, ones in held["tasks"].items()
    }
    assert values["counting"]["geneval"] == pytest.approx(1 / 3) and values["two_object"]["geneval"] == 1
    assert values["overall"]["geneval"] == pytest.approx(2 / 3)  # the mean of the tasks, not of the prompts
    low, high = held["tasks"]["overall"][0]["interval"]
    assert 0 <= low <= 2 / 3 <= high <= 1
    assert held["about"]["preset"] == "geneval" and held["about"]["sampling"] == {"seed": 42}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>数目</h2>" in page and "各任务的平均" in page and "参考" not in page
    assert "geneval" in page and "a photo of 2 dogs" in page and 'lang="zh-CN"' in page
    assert "CLIP 分数" in said and "--clip" in said


def test_two_folders_are_compared_prompt_by_prompt(evaluate, detector, tmp_path):
    folder = write_folder(tmp_path / "a", WANTED)
    other = write_folder(tmp_path / "b", WANTED, start=50)
    code, said = evaluate(folder, "--compare", str(other), "--detector", detector)
    assert code == 0, said
    held = json.loads((tmp_path / "out" / "compare.json").read_text())["against"][str(other)]
    assert {one["verdict"] for one in held["counting"]} == {"no difference shown"}
    another = write_folder(tmp_path / "c", WANTED[::-1])
    code, said = evaluate(folder, "--compare", str(another), "--detector", detector)
    assert code == 2 and "holds other prompts" in said


@pytest.mark.slow
def test_what_cannot_be_measured_is_null_and_the_exit_code_says_so(evaluate, detector, tmp_path):
    folder = write_folder(tmp_path / "drawn", [*WANTED, COLOURED])
    code, said = evaluate(folder, "--detector", detector)
    assert code == 1 and "no CLIP is given" in said
    held = json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"]
    values = {task: {one["name"][:7]: one["value"] for one in ones} for task, ones in held.items()}
    assert values["counting"]["geneval"] == pytest.approx(1 / 3)
    assert values["colors"]["geneval"] is None and values["overall"]["geneval"] is None
    code, said = evaluate(folder, "--check", "--detector", detector)
    assert code == 1 and "no CLIP is given" in said
    clip = str(tiny_towers.write_clip(tmp_path / "clip"))
    assert evaluate(folder, "--check", "--detector", detector, "--clip", clip)[0] == 0
    code, said = evaluate(folder)
    assert code == 2 and "none is given. Fix: --detector" in said
    code, said = evaluate(folder, "--metrics", "geneval")
    assert code == 1 and "no object detector is given" in said and "overall" not in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model_path", "m"], "model_path has no effect with layout"),
        (["--num_timesteps", "3"], "num_timesteps has no effect"),
        (["--metrics", "fd"], "metrics names fd"),
        (["--detector", "./none"], "none"),
        (["--compare", "none"], "none"),
    ],
)
def test_options_that_cannot_be_together_are_one_line(evaluate, tmp_path, argv, words):
    code, said = evaluate(write_folder(tmp_path / "drawn", WANTED), *argv)
    assert code == 2 and words in said and "Fix:" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("[]", "field include is None"),
        ('{"prompt": "a", "tag": "t"}', "field include is None"),
        ('{"prompt": "a", "tag": "t", "include": [{"class": "dog"}]}', "field include"),
        ('{"prompt": "a", "tag": "t", "include": [{"class": "a", "count": 1, "position": ["above", 0]}]}', "include"),
        ("{", "cannot be read"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none_of_geneval_is_refused_with_file_and_field(evaluate, tmp_path, written, words):
    folder = write_folder(tmp_path / "drawn", WANTED)
    (folder / "00001" / "metadata.jsonl").write_text(written)
    code, said = evaluate(folder)
    assert code == 2 and words in said and "00001/metadata.jsonl" in said
    assert evaluate(tmp_path / "none")[0] == 2
