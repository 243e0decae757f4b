"""``unigen preview`` as its user meets it: which records, exit codes, the terminal, and a page that data
cannot break."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import FAULTS, framed, in_browser
from pages import Page
from PIL import Image as PILImage
from previews import EXAMPLES, HOUSE, PICTURES, SAY, packed, page_of, record, sample_page, write

from unigen import cli
from unigen.commands.preview import command as preview
from unigen.commands.preview.chips import Chip, Chips, signs_named
from unigen.commands.preview.page import write_preview
from unigen.commands.preview.pick import PreviewOptions, pick
from unigen.commands.preview.pictures import BLOCKS, mask_picture, tile_side
from unigen.commands.preview.view import look
from unigen.config import DataOptions
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.loader import LoaderState, PackStream
from unigen.data.mixing import DataSource, Mixture
from unigen.evaluation.cases import cases_of
from unigen.model.weights import load_planner
from unigen.sequence.draw import RandomKey
from unigen.sequence.types import Image, Origin, Record, Text
from unigen.show.language import texts

# ---- the command


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["preview", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_as_it_is_written_in_the_help(tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").symlink_to(PICTURES)
    (tmp_path / "data.json").write_text(EXAMPLES.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "data.json", "-n", 2, "--output", "preview.html", "--max_image_tokens", 64)
    assert (
        code == 0 and out.splitlines()[-1] == "Written to preview.html" and "estimate" in out.splitlines()[0]
    )
    page = Page((tmp_path / "preview.html").read_text(encoding="utf-8"))
    assert page.text.count("Record ") == 2 and "texts are cut into words, an estimate" in page.text
    assert len(page.of("img")) == len(page.of("div", "tile")) + len(page.of("div", "mask")) > 2


def test_the_short_form(tmp_path, capsys):
    path = write(tmp_path, {"image_path": str(HOUSE), "caption": "A small house."})
    code, out, _ = run(capsys, path, "--output", "none", "--max_image_tokens", 64)
    lines = out.splitlines()
    assert code == 0 and lines[1:] == [
        f"record 0  {path}:1  image_to_text",
        "  [image 128x128 -> vit 16x16=256] -> [text 4 *loss*]",
        "  264 tokens, 0.8% of 32,768; loss on 7 text labels, 0 image tokens",
    ]
    assert not (tmp_path / "preview.html").exists()


def test_weights_and_fields_that_nothing_reads_are_shown(tmp_path, capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    path = write(tmp_path, {"messages": turns, "source \x1b[2J": "web"})
    code, out, _ = run(capsys, path, "--output", tmp_path / "a.html")
    assert code == 0 and "x 0.5*" in out and "nothing reads: source" in out and "\x1b" not in out
    text = Page((tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert "× 0.5" in text and "fields that nothing reads" in text


def test_data_cannot_steer_the_terminal(tmp_path, capsys):
    folder = tmp_path / "\x1b[2J\u202e"
    folder.mkdir()
    path = write(
        folder,
        {"image_path": "\x1b[2Jevil\u202e.png", "caption": "a"},
        {"image_path": str(HOUSE), "caption": "a"},
    )
    code, out, _ = run(capsys, path, "--output", "none")
    assert code == 1 and "evil" in out and "loss on" in out and "\x1b" not in out and "\u202e" not in out


def test_a_bad_record_stands_in_its_place_and_the_rest_go_on(tmp_path, capsys):
    path = write(
        tmp_path,
        {"text_prompt": "a", "image_path": "no.png"},
        '{"caption": <b>}',
        {"image_path": str(HOUSE), "caption": "A house."},
    )
    code, out, _ = run(capsys, path, "--output", tmp_path / "p.html")
    assert code == 1
    assert (
        f"{path}:1: missing_picture in field 'image_path'" in out
        and f"{path}:2: bad_json" in out
        and "loss on" in out
    )
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    places = [
        page.text.index(part)
        for part in (
            "2 of them cannot be used",
            "Record 0",
            "missing_picture",
            "Record 1",
            "bad_json",
            "Record 2",
        )
    ]
    assert places == sorted(places) and '{"caption": <b>}' in page.text


def test_a_broken_picture_and_a_broken_file_are_told(tmp_path, capsys):
    data = HOUSE.read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    good = write(tmp_path, {"image_path": "half.png", "caption": "A house."})
    (tmp_path / "bad.json").write_text('[{"caption": 1},', encoding="utf-8")
    code, out, _ = run(capsys, tmp_path / "bad.json", good, "--output", tmp_path / "p.html")
    assert code == 1 and "broken_picture" in out and "bad.json" in out and "bad_json" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no data is named"),
        (["gone.jsonl"], "there is no such file"),
        (["data.jsonl", "-n", "0"], "samples is 0"),
        (["data.jsonl", "--records", "7"], "there is no record 7: the data has 1"),
        (["data.jsonl", "--records", "-1"], "records is -1"),
        (["data.jsonl", "--records", "0", "--shuffled"], "exclude each other"),
        (["data.jsonl", "--text_cond_dropout_prob", "2"], "text_cond_dropout_prob is 2.0"),
        (["data.jsonl", "--epoch", "-1"], "epoch is -1"),
        (["data.jsonl", "--max_sequence_length", "0"], "max_sequence_length is 0"),
        (["data.jsonl", "--max_image_tokens", "0"], "max_image_tokens is 0"),
        (["data.jsonl", "--timestep_shift", "0"], "timestep_shift is 0"),
        (["data.jsonl", "--model_path", "gone"], "gone is not a folder"),
        (
            ["data.jsonl", "--output", "data.jsonl/p.html"],
            "output is data.jsonl/p.html, which cannot be written",
        ),
        (["empty.jsonl"], "there is no record in empty.jsonl"),
    ],
)
def test_what_cannot_run_is_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    write(
        tmp_path, {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / "data.jsonl").read_text().startswith('{"conv')


def numbered(tmp_path: Path, n: int) -> Path:
    turns = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(n)
    ]
    return write(tmp_path, *({"conversations": turn} for turn in turns))


def test_which_records_are_picked(tmp_path):
    path = str(numbered(tmp_path, 40))

    def numbers(**options) -> list[int]:
        return [found.number for found in pick(PreviewOptions(paths=[path], **options))]

    assert numbers() == [0, 1, 2, 3, 4] and numbers(samples=100) == list(range(40))
    assert numbers(records=[17, 3, 3]) == [3, 17]
    first = numbers(shuffled=True, samples=6)
    assert first == numbers(shuffled=True, samples=6) == sorted(first) and len(set(first)) == 6
    assert (
        first
        != numbers(shuffled=True, samples=6, seed=1)
        != numbers(shuffled=True, samples=6, seed=1, epoch=1)
    )
    counts = np.zeros(40, int)
    for seed in range(400):
        counts[numbers(shuffled=True, samples=4, seed=seed)] += 1
    assert counts.min() > 15 and counts.max() < 75  # 40 expected of each


def test_a_records_number_decides_its_pass(tmp_path, golden):
    """Record 4 of a list looks as record 4 of all does: the number names the random numbers."""
    options = PreviewOptions(paths=[str(EXAMPLES)], records=[4], max_image_tokens=16)
    planner = load_planner(golden / "model", options)
    (found,) = pick(options)
    view = preview.look_at(found, options, planner, 1.0).view
    entry = list(UnifiedGenerationDataset(EXAMPLES))[4]
    assert view.number == 4 and torch.equal(view.pack.u, packed(entry, 4, planner).u)
    assert torch.equal(view.pack.noise, packed(entry, 4, planner).noise)


def test_a_record_has_one_number_whatever_was_left_out_before_it(tmp_path, golden):
    """Preview, training and evaluation count bad records and those that are not learnt."""
    picture = {"image_path": str(HOUSE), "text_prompt": "A house."}
    rows = [picture | {"weight": 0}, {"no": "format"}, picture, {"text_prompt": "x"}, picture]
    files = [write(tmp_path / name, *rows) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    options = PreviewOptions(paths=list(map(str, files)), records=[2, 4, 7, 9], max_image_tokens=16)
    planner = load_planner(golden / "model", options)
    dataset = UnifiedGenerationDataset(
        files, on_bad_record="skip", max_bad_share=0.5, token_lengths=planner.token_lengths
    )
    assert dataset.numbers.tolist() == options.records and dataset.held == 10
    cases, _ = cases_of(dataset, numbers=dataset.numbers.tolist())
    assert [case.number for case in cases] == options.records
    mixture = Mixture([DataSource("a", dataset, planner)] * 2, options.seed)
    assert mixture.numbers.tolist() == [2, 4, 7, 9, 12, 14, 17, 19]
    for i, found in enumerate(pick(options)):
        view = preview.look_at(found, options, planner, 1.0).view
        pack = PackStream(mixture).build_samples([mixture.key(i, 0)], LoaderState()).pack
        assert pack.origins == [str(view.record.origin)] and torch.equal(view.pack.noise, pack.noise)
    length = len(PackStream(mixture).build_samples([mixture.key(5, 0)], LoaderState()).pack)
    assert mixture.lengths(np.array([5]), np.array([0])).tolist() == [length]


def test_the_options_of_training_reach_the_planner(tmp_path, capsys):
    assert issubclass(PreviewOptions, DataOptions)
    picture = {"image_path": str(HOUSE)}
    path = write(tmp_path, {"text_prompt": "A house.", **picture}, {**picture, "caption": "A house."})
    argv = (path, "--output", "none", "--max_image_tokens", 4, "--visual_gen", "false")
    code, out, _ = run(capsys, *argv)
    assert code == 1 and f"{path}:1: image_target_without_visual_gen" in out and "-> vit 16x16" in out
    code, out, _ = run(capsys, *argv[:-2], "--visual_und", "false", "--no_train_transitions")
    assert code == 1 and f"{path}:2: image_without_visual_und" in out and "noised 2x2=4" in out


def test_the_time_law_is_the_checkpoints(golden, tmp_path):
    assert preview.time_shift(PreviewOptions()) == 1.0
    assert preview.time_shift(PreviewOptions(model_path=str(golden / "model"))) == 1.0
    assert preview.time_shift(PreviewOptions(model_path=str(golden / "model"), timestep_shift=3.0)) == 3.0
    for path in (golden / "model").glob("*_config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"timestep_shift": 4.0}')
    assert preview.time_shift(PreviewOptions(model_path=str(tmp_path))) == 4.0


# ---- the page


def test_hostile_texts_are_shown_not_obeyed(tmp_path, estimate):
    evil = (
        '<script>alert(1)</script> " onload="x\' </span></p><img src=http://x> \u202etxt.exe\u2066 \x00\x07'
        " \u200b\ufeff\u3000\u00a0\u00ad"
    )
    entry = Record(
        [Text(evil), Text(evil, target=True)], Origin(Path(f"{evil}.jsonl"), 3), "direct", {"k": evil}
    )
    page = sample_page(tmp_path, entry, estimate)  # Page refuses scripts, handlers and links
    assert "<script>alert(1)</script>" in page.text.replace("\u2009", "")
    source = (tmp_path / "preview.html").read_text(encoding="utf-8")
    options = PreviewOptions(paths=["\u202e<b>.jsonl"], model_path="\u202e<b>")
    source += write_preview(tmp_path / "named.html", [], options, estimate).read_text(encoding="utf-8")
    assert "<b>.jsonl" not in source and not set("\u202e\u2066\x00\x07\u200b\ufeff\u00ad\u3000") & set(source)
    for name in ("RLO", "LRI", "ZWSP", "BOM", "NBSP", "SHY", "U+3000", "␀", "␇"):
        assert name in page.text, name


def test_invisible_characters_have_names_and_visible_ones_stay():
    def parts(text: str) -> list[tuple[str, str]]:
        return Chip(text).parts

    assert parts("ab c") == [("ab", ""), (" ", "space"), ("c", "")]
    assert parts("a\n\t") == [("a", ""), ("↵", "U+000A"), ("\n", ""), ("⇥", "U+0009")]
    assert parts("👩\u200d👧") == [("👩\u200d👧", "")] and parts("\u200dx")[0] == (
        "ZWJ",
        "U+200D Zero Width Joiner",
    )
    assert parts("مرحبا你好é") == [("مرحبا你好é", "")]
    assert signs_named("a\u202eb <c>\n") == "a⟨RLO⟩b <c>\n"


@pytest.mark.slow
def test_a_page_of_five_large_samples_is_small(tmp_path, capsys):
    """Below 3 MB, with pictures that compress as badly as pictures can, and long texts."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    PILImage.fromarray(noise).save(tmp_path / "n.png", compress_level=1)
    pictures = [
        {"type": "image", "image_path": "n.png"},
        {"type": "text", "content": "Then what? " * 500},
    ] * 2
    path = write(tmp_path, *[{"sequence": [{"type": "text", "content": "Look."}, *pictures]}] * 5)
    code, _, _ = run(capsys, path, "--output", tmp_path / "p.html", "--max_image_tokens", 256)
    assert code == 0 and (tmp_path / "p.html").stat().st_size < 3_000_000


@pytest.mark.slow
def test_many_pictures_get_small_tiles_and_many_blocks_a_bare_mask(tmp_path, estimate):
    images = [Image(HOUSE) for _ in range(30)]
    view = look(record(*images, Text("a", target=True)), 0, estimate, RandomKey(42, 0, 0))
    assert tile_side(view.blocks) < tile_side(view.blocks[:3])
    many = look(record(*[Text("a"), Text("b", target=True)] * 200), 0, estimate, RandomKey(42, 0, 0))
    picture = mask_picture(many)
    assert len(picture.blocks) == len(picture.sizes) == BLOCKS and min(picture.sizes) > 0
    page = sample_page(tmp_path, record(*[Text("a"), Text("b", target=True)] * 200), estimate)
    assert "Only the first 96 of 400 blocks are drawn." in page.text
    assert (tmp_path / "preview.html").stat().st_size < 900_000


def test_the_page_speaks_chinese(tmp_path, estimate, records):
    view = look(records[4], 4, estimate, RandomKey(42, 0, 4))
    page = page_of(
        tmp_path, estimate, preview.Look(4, records[4].origin, view, None), language="zh", model=None
    )
    assert page.of("html")[0]["lang"] == "zh-CN"
    for key in ("legend", "mask_blocks", "dropout", "words_note", "illustration", "sequence"):
        assert texts("zh")["preview"][key] in page.text and texts("en")["preview"][key] not in page.text


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_on_a_phone_words_stay_whole_and_nothing_leaves_its_card(tmp_path, capsys, language):
    code, _, _ = run(capsys, EXAMPLES, "-n", 2, "--output", tmp_path / "p.html", "--language", language)
    source, cells = (tmp_path / "p.html").read_text("utf-8"), "td, th, figcaption"
    if language == "en":  # a Chinese sentence is no word
        cells += ", dt, dd, .num, .tag, .tiles *, .note"
    faults = json.loads(framed(source, FAULTS.replace("td, th, figcaption", cells), tmp_path))
    assert code == 0 and faults["cells"] > 20 and (faults["wide"], faults["split"]) == ([], [])
    beyond = """document.title = JSON.stringify([...d.querySelectorAll('section *')].filter(e =>
      !e.closest('svg, .wide') && e.getBoundingClientRect().right > e.closest('section').getBoundingClientRect().right
    ).map(e => e.className))"""
    assert json.loads(framed(source, beyond, tmp_path)) == []


def test_tooltips_are_spent_once_a_sample(planner):
    chips = Chips(planner.tokenizer, SAY)
    view = look(record(Text("a " * 1500), Text("b " * 1500, target=True)), 0, planner, RandomKey(42, 0, 0))
    for shown in view.blocks:
        chips.text(shown)
    assert -2 <= chips.left <= 0


def test_a_picture_outside_the_root_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(HOUSE.read_bytes())
    (tmp_path / "b.png").write_bytes(HOUSE.read_bytes())
    path = write(tmp_path, *[{"image_path": name, "caption": "A house."} for name in ("in/a.png", "b.png")])
    code, out, _ = run(capsys, path, "--output", "none", "--data_root", tmp_path / "in")
    assert (
        code == 1
        and "record 0" in out
        and "loss on" in out
        and f"{path}:2: outside_root in field 'image_path'" in out
    )
    assert run(capsys, path, "--output", "none")[0] == 0


def test_the_recipe_of_a_training_shows_the_first_records_of_each_source(tmp_path, golden, capsys):
    talks = [{"query": f"why {i}", "response": "so"} for i in range(3)]
    write(tmp_path, *talks).rename(tmp_path / "a.jsonl")
    write(tmp_path, *({"asked": f"how {i}", "response": "thus"} for i in range(3)))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"model_path: {golden / 'model'}\nlearning_rate: 1e-4\nmax_sequence_length: 99\ntrain_sources:\n"
        f"- {{path: {tmp_path / 'a.jsonl'}}}\n- {{path: {tmp_path / 'data.jsonl'}, fields: {{query: asked}}}}\n"
    )
    code, out, _ = run(capsys, "--config", recipe, "-n", 2, "--output", "none")
    heads = [line.split()[:3] for line in out.splitlines() if line.startswith("record ")]
    places = [f"{tmp_path / name}.jsonl:{line}" for name in ("a", "data") for line in (1, 2)]
    # numbers go over all sources, as the passes of a training depend on them
    assert code == 0 and heads == [["record", str(n), at] for n, at in zip((0, 1, 3, 4), places)]
    assert out.count("of 99;") == 4
    code, out, _ = run(capsys, tmp_path / "a.jsonl", "--config", recipe, "--records", 2, "--output", "none")
    assert code == 0 and f"record 2  {tmp_path / 'a.jsonl'}:3" in out
