"""``unigen generate --prompts_file`` on the tiny checkpoint: the public scorers find what they look for, nothing is
drawn twice, and neither shards nor processes nor what was lost changes a byte."""

import json
import os
import re
from pathlib import Path

import pytest
from kills import become_rank
from pictures import noise
from processes import run_ranks

from unigen import cli
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import Guidance
from unigen.inference.pieces import Pieces
from unigen.sequence.images import open_image

TINY = ["--device", "cpu", "--num_timesteps", "2", "--max_new_tokens", "3"]
SMALL = ["--height", "32", "--width", "32"]
PROMPTS = {
    "geneval": [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": f"a photo of {n}"}
        for n in range(3)
    ],
    "geneval2": [{"prompt": f"{n} metal toys", "vqa_list": []} for n in range(2)],
    "wise": [{"Prompt": f"food {n}", "Explanation": "", "prompt_id": 10 + n} for n in range(2)],
    "dpg": [{"item_id": f"p{n}", "text": f"a long text {n}"} for n in range(2)],
    "imgedit": {"12": {"id": "sub/cat.png", "prompt": "Make it red", "edit_type": "adjust"}},
    "gedit": [
        {"task_type": "color_alter", "key": f"k{n}", "instruction": "red", "instruction_language": "en",
         "input_image": "sub/cat.png"}
        for n in range(2)
    ],
    "kris": [{"id": "3", "type": "sub", "ori_img": ["dog.png", "cat.png"], "ins_en": "Join them"}],
    "rise": [{"index": "causal_1", "category": "causal", "instruction": "later", "image": "sub/cat.png"}],
    "lmms-eval": [{"task": "t2i", "doc_id": n, "prompt": f"cat {n}"} for n in range(2)],
}  # fmt: skip


def write_prompts(folder: Path, name: str) -> Path:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    noise(48, 32, 1).save(folder / "sub" / "cat.png")
    noise(32, 48, 2).save(folder / "sub" / "dog.png")
    held = PROMPTS[name]
    if name in ("geneval", "geneval2", "dpg", "gedit", "lmms-eval"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in held), encoding="utf-8")
    else:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(held, indent=1), encoding="utf-8")
    return path


@pytest.fixture
def draw(golden, tmp_path, capsys):
    """Runs the command; (exit code, all that it said, the folder)."""

    def run(name: str, *argv: str, out: str = "out", layout: str = ""):
        path = write_prompts(tmp_path, layout or name)
        sizes = SMALL if (layout or name) in ("geneval", "geneval2", "wise", "dpg", "lmms-eval") else []
        given = ["--model_path", str(golden / "model"), "--prompts_file", str(path), "--preset", name]
        code = cli.main(["generate", *given, "--output_dir", str(tmp_path / out), *TINY, *sizes, *argv])
        captured = capsys.readouterr()
        return code, captured.out + captured.err, tmp_path / out

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- how the public scorers find the files, each with the place where it stands


def geneval(folder: Path):
    """djghosh13/geneval, evaluation/evaluate_images.py, main."""
    for name in sorted(os.listdir(folder)):
        if (folder / name).is_dir() and name.isdigit():
            metadata = json.loads((folder / name / "metadata.jsonl").read_text())
            for image in sorted(os.listdir(folder / name / "samples")):
                if re.match(r"\d+\.png", image):
                    yield metadata["prompt"], folder / name / "samples" / image


def geneval2(folder: Path):
    """facebookresearch/GenEval2, evaluation.py: --image_filepath_data."""
    paths = json.loads((folder / "image_paths.json").read_text())
    return [(one["prompt"], Path(paths[one["prompt"]])) for one in PROMPTS["geneval2"]]


def wise(folder: Path):
    """PKU-YuanGroup/WISE, vllm_eval.py and WISE_legacy/gpt_eval.py."""
    return [(one["Prompt"], folder / f"{one['prompt_id']}.png") for one in PROMPTS["wise"]]


def dpg(folder: Path):
    """TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py: all files of a folder by their names up to a dot; four
    crops of --resolution."""
    texts = {one["item_id"]: one["text"] for one in PROMPTS["dpg"]}
    return [
        (texts[path.name.split(".")[0]], path)
        for path in sorted(folder.iterdir())
        if path.name.split(".")[0] in texts
    ]


def imgedit(folder: Path):
    """PKU-YuanGroup/ImgEdit, Benchmark/Basic/basic_bench.py."""
    return [(one["prompt"], folder / f"{key}.png") for key, one in PROMPTS["imgedit"].items()]


def gedit(folder: Path):
    """ByteDance-Seed/Bagel, eval/gen/gedit/test_gedit_score.py: both files must be there."""
    for one in PROMPTS["gedit"]:
        stem = f"fullset/{one['task_type']}/{one['instruction_language']}/{one['key']}"
        assert open_image(folder / f"{stem}_SRCIMG.png").size == (48, 32)
        yield one["instruction"], folder / f"{stem}.png"


def kris(folder: Path):
    """mercurystraw/Kris_Bench, metrics_common.py: RESULTS_DIR/model/category/id.png."""
    return [(one["ins_en"], folder / one["type"] / f"{one['id']}.png") for one in PROMPTS["kris"]]


def rise(folder: Path):
    """ByteDance-Seed/Bagel, eval/gen/rise/gpt_eval.py, find_image (PhoenixZ810/RISEBench: below images/)."""
    return [(o["instruction"], folder / o["category"] / f"{o['index']}.png") for o in PROMPTS["rise"]]


def lmms_eval(folder: Path):
    """EvolvingLMMs-Lab/lmms-eval, models/simple/from_log.py, and what tasks make of an answer."""
    log = json.loads((folder / "t2i.json").read_text())
    assert log["args"]["limit"] is None and log["model_configs"]["task"] == "t2i"
    answers = {one["doc_id"]: one["resps"][0][0] for one in log["logs"]}
    return [(o["prompt"], Path(json.loads(answers[o["doc_id"]])["images"][0])) for o in PROMPTS["lmms-eval"]]


SCORERS = {
    "geneval": (geneval, 12), "geneval2": (geneval2, 2), "wise": (wise, 2), "dpg": (dpg, 2),
    "imgedit": (imgedit, 1), "gedit": (gedit, 2), "kris": (kris, 1), "rise": (rise, 1),
    "lmms-eval": (lmms_eval, 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
def test_the_scorer_finds_every_picture(draw, name):
    code, said, out = draw(name)
    assert code == 0, said
    scorer, count = SCORERS[name]
    found = list(scorer(out))
    assert len(found) == count and all(text for text, _ in found)
    sizes = [open_image(path).size for _, path in found]
    if name == "dpg":
        quarter = [open_image(path).crop((32, 0, 64, 32)).tobytes() for _, path in found]
        assert sizes == [(64, 64)] * 2 and quarter[0] != quarter[1]
    thoughts = list(out.rglob("*.txt"))
    assert len(thoughts) == (count if name in ("wise", "kris", "rise") else 0)
    if name == "kris":  # in the size of the first of the two pictures
        width, height = sizes[0]
        assert width < height
    about = json.loads((out / ".unigen" / "answers.json").read_text())
    assert about["preset"] == name and about["sampling"]["num_timesteps"] == 2
    assert "num_timesteps 2 wins over 50 of preset" in said and about["source"] in said.replace("\n", " ")


@pytest.mark.slow
def test_what_is_there_is_not_drawn_again_and_what_was_lost_is_the_same(draw, monkeypatch):
    _, _, out = draw("dpg", "--batch_size", "2")
    _, _, other = draw("geneval", out="other")
    before, others = contents(out), contents(other)
    for gone in (
        out / "p1.png",
        other / "00001" / "samples" / "00002.png",
        other / "00002" / "metadata.jsonl",
    ):
        gone.unlink()
    for gone in (other / "00002" / "samples").iterdir():
        gone.unlink()
    asked = []
    real = InterleaveInferencer.unified_generate_batch
    monkeypatch.setattr(
        InterleaveInferencer, "unified_generate_batch",
        lambda self, prompts, **options: asked.append(len(prompts)) or real(self, prompts, **options),
    )  # fmt: skip
    assert draw("dpg", "--batch_size", "2")[0] == 0 and asked == [2, 2] and contents(out) == before
    asked.clear()
    assert draw("geneval", out="other")[0] == 0 and asked == [1] * 5 and contents(other) == others
    asked.clear()
    code, said, _ = draw("geneval", "--cfg_text_scale", "3", out="other")
    assert code == 2 and "--cfg_text_scale" in said and asked == [] and contents(other) == others


@pytest.mark.slow
def test_shards_draw_what_one_process_draws(draw):
    _, _, whole = draw("geneval", out="whole")
    for part in ("2/2", "1/2"):
        code, said, out = draw("geneval", "--shard", part)
        assert code == 0 and ("1 of 3 prompts" in said) == (part == "2/2"), said
    assert contents(out) == contents(whole)
    drawn = {data for name, data in contents(whole).items() if name.endswith(".png")}
    assert len(drawn) == 12  # every picture has its own noise


def draw_as_rank(rank: int, world: int, port: int, argv: list[str], log: str) -> None:
    become_rank(rank, world, port, log)
    os._exit(cli.main(["generate", *argv]))


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(draw, golden, tmp_path):
    _, _, whole = draw("dpg", out="whole")
    argv = [
        "--model_path", str(golden / "model"), "--prompts_file", str(tmp_path / "dpg.jsonl"), "--preset", "dpg",
        "--output_dir", str(tmp_path / "out"), *TINY, *SMALL,
    ]  # fmt: skip
    run_ranks(draw_as_rank, 2, argv, str(tmp_path / "log"))
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_thoughts_enter_where_the_scripts_put_them_and_are_kept(draw, monkeypatch):
    seen, real = [], Pieces.draw_in

    def noted(self, contexts, *rest):
        seen.append((self.builder.guidance, contexts[0].no_text.length))
        return real(self, contexts, *rest)

    monkeypatch.setattr(Pieces, "draw_in", noted)
    assert draw("wise", out="wise")[0] == 0 and seen[0] == (Guidance(system=False), 0)
    seen.clear()
    assert draw("kris", out="kris")[0] == 0 and seen[0][0] == Guidance(thought=True) and seen[0][1] > 0
    seen.clear()
    code, said, out = draw("dpg", "--think", "--num_images", "2", "--samples", "1", out="dpg")
    assert code == 0 and seen[0][0] == Guidance(), said
    assert sorted(p.name for p in out.iterdir()) == [".unigen", "p0-0.txt", "p0-1.txt", "p0.png"]


@pytest.mark.slow
def test_one_seed_for_all_where_the_scripts_set_it_anew_for_each(draw):
    _, _, out = draw("gedit")
    first, second = (path for _, path in gedit(out))
    assert first.read_bytes() == second.read_bytes()  # the same picture, text and noise


def test_a_preset_works_for_a_single_prompt_too(golden, tmp_path, capsys):
    given = [
        "--model_path",
        str(golden / "model"),
        "--prompt",
        "a cat",
        "--mode",
        "image",
        "--preset",
        "geneval",
    ]
    assert cli.main(["generate", *given, "--output_dir", str(tmp_path / "out"), *TINY, *SMALL]) == 0
    assert "height 32 wins over 1024 of preset geneval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "a"], "prompt is given beside prompts_file"),
        (["--num_images", "3"], "num_images is 3"),
        (["--seed", "none"], "seed is none"),
        (["--shard", "3/2"], "shard is 3/2"),
        (["--shard", "0/2"], "--shard is '0/2'"),
        (["--layout", "kris"], "field ins_en is missing"),
        (["--layout", "wize"], "--layout is 'wize'"),
        (["--preset", "gedit", "--layout", "wise", "--batch_size", "2"], "batch_size is 2"),
        (["--prompts_file", "none.json"], "none.json"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(draw, monkeypatch, argv, words):
    monkeypatch.setattr(InterleaveInferencer, "from_pretrained", None)  # a call would raise
    code, said, out = draw("wise", *argv)
    assert code == 2 and said.count("\n") == 1 and words in said and not out.exists()


def test_pictures_of_somebody_else_are_not_taken_for_ours(draw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "10.png").write_bytes(b"mine")
    code, said, out = draw("wise")
    assert code == 2 and "10.png that is not ours" in said and (out / "10.png").read_bytes() == b"mine"


@pytest.mark.slow
def test_pictures_of_other_pictures_are_not_taken_for_these(draw, tmp_path):
    assert draw("rise")[0] == 0
    before = contents(tmp_path / "out")
    (tmp_path / "others" / "sub").mkdir(parents=True)
    noise(48, 32, 3).save(tmp_path / "others" / "sub" / "cat.png")
    code, said, out = draw("rise", "--image_root", str(tmp_path / "others"))
    assert code == 2 and "another content of the pictures given" in said and contents(out) == before


@pytest.mark.parametrize("argv", [["--layout", "wise"], ["--shard", "1/2"], ["--batch_size", "2"]])
def test_options_of_many_prompts_are_refused_for_one(golden, capsys, argv):
    code = cli.main(["generate", "--model_path", str(golden / "model"), "--prompt", "a", *argv])
    assert code == 2 and "without prompts_file" in capsys.readouterr().err
