"""What the program says in Chinese: each sentence of the source has its row, and values stay to the letter."""

import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from unigen import messages
from unigen.cli import main
from unigen.messages import in_language, keep, listed, preferred, sentences, speaking, spoken, values_of

ROOT = Path(__file__).parents[1]
HELD = sentences("zh")
ROWS = {english: chinese for part in HELD.values() for english, chinese in part.items() if chinese}
ODD = [
    "数据/一 二.jsonl",
    "{0} {x} {{",
    "'it''s'",
    'a "b"',
    "C:\\n\\d",
    "—",
    "1,234.5",
    "a\tb",
    "%s",
    "x" * 300,
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_messages", ROOT / "tools" / "write_messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(sentence: str) -> list[int]:
    return sorted(number for _, number in values_of(sentence) if number is not None)


@pytest.mark.slow
def test_every_sentence_of_the_source_has_its_chinese_and_no_row_is_dead(tool):
    said = tool.sentences()
    assert len(said) > 1500
    lacking = sorted(f"{said[text]}: {text}" for text in said if HELD["program"].get(text, "") == "")
    dead = sorted(set(HELD["program"]) - set(said))
    advice = "run python tools/write_messages.py, then write the Chinese"
    assert (lacking, dead) == ([], []), advice


def test_both_languages_have_the_same_values():
    assert [english for english, chinese in ROWS.items() if numbers(english) != numbers(chinese)] == []
    same = [english for english, chinese in ROWS.items() if english == chinese]
    assert same == [], "null stands for what stays English"


def test_commands_say_what_they_say_in_the_language_of_their_user():
    """``print`` is for data, and for what a model wrote."""
    import ast

    printed = []
    for path in sorted((ROOT / "unigen" / "commands").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                said = ast.unparse(node)
                if not any(call in said for call in ("json.dumps(", "in_language(", "words(")):
                    printed.append((path.name, said))
    assert printed == [("command.py", r"print('\n ]\n}', flush=True)"), ("one.py", "print(piece)")]


def test_what_a_plan_of_memory_has_is_told_in_chinese():
    import json

    def words(held, found):
        for key, value in held.items():
            words(value, found) if isinstance(value, dict) else found.append((key, value))
        return found

    shown = words(json.loads((ROOT / "unigen/assets/text/zh.json").read_text("utf-8")), [])
    named = [(key[6:], text) for key, text in shown if key.startswith("point_")]
    assert len(named) == 8 and all(in_language(name, "zh") == text for name, text in named)


def test_what_is_found_in_the_source(tool):
    import ast

    source = """
def f(x, n):
    \"\"\"A docstring is not said.\"\"\"
    log.warning("%s has %d rows, %.1f %% of all", x, n, 2.0)
    raise UserError(f"{x} is no file{f'; did you mean {n}?' if n else ''}." " Fix: name another")
    say("metric", table(["verdict"], rows))
    return "kept {} of {n}".format(x, n=n), {"key": 1}, re.compile("a b c")
"""
    found = {text for _, text in tool.Reader().read(ast.parse(source))}
    assert found == {
        "{} has {} rows, {} % of all",
        "{} is no file; did you mean {}?. Fix: name another",
        "{} is no file. Fix: name another",
        "; did you mean {}?",
        "metric",
        "verdict",
        "kept {} of {}",
    } - {"; did you mean {}?"}


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(3))
def test_values_stay_to_the_letter(shift):
    """Each sentence, filled with odd values, is its Chinese with these values."""
    wrong = []
    for english, chinese in ROWS.items():
        if "{#}" in english:
            continue  # takes figures alone
        count = len(numbers(english))
        literals = [text for text, _ in values_of(english)]
        values = [ODD[(shift + 3 * n) % len(ODD)] for n in range(count)]
        unclear = re.search(r"[A-Za-z]\{\d*\}", english) or any(
            literal in value for literal in literals[1:-1] for value in values
        )
        if unclear or sum(c.isalpha() for c in "".join(literals)) < 12:
            continue  # where one value ends and the next begins, or whose sentence it is, nobody can tell
        parts = values_of(chinese)
        made = "".join(text + ("" if n is None else values[n]) for text, n in parts)
        found = in_language(english.format(*values), "zh")
        if found.replace(" ", "") != made.replace(" ", ""):
            wrong.append((english, found))
    assert wrong == []


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("unknown option --lerning_rate; did you mean --learning_rate?", "没有参数 --lerning_rate；是不是 --learning_rate？"),
        (
            "--batch_size is 0; it is out of range. Fix: give a whole number of at least 1",
            "--batch_size 是 0；它超出范围。解决办法：给出不小于 1 的整数",
        ),
        (
            "model_path is missing. Fix: give the folder of a BAGEL checkpoint (--model_path ...)",
            "model_path 没有给出。解决办法：给出 BAGEL 检查点的文件夹（--model_path ...）",
        ),
        (
            "output_dir is /a/b, which is a folder. Fix: name a file (--output_dir ...)",
            "output_dir 是 /a/b，它是文件夹。解决办法：给出一个文件（--output_dir ...）",
        ),
        ("a.json: [Errno 13] Permission denied: 'a.json'", "a.json: 没有权限（errno 13）：'a.json'"),
        (
            "output is 图.png, and a .png file is no place for what is written there. Fix: name a file of another"
            " kind (--output ...)",
            "output 是 图.png，而 .png 文件不是写这种内容的地方。解决办法：换一种文件（--output ...）",
        ),
        (
            "html is 文件/x.html, which cannot be written (Not a directory). Fix: name another file (--html ...)",
            "html 是 文件/x.html，它无法写入（不是文件夹）。解决办法：换一个文件名（--html ...）",
        ),
        (
            "An evaluation takes about 0.7 s (losses 0.3 s, answers to 3 records 0.4 s, probe 0.1 s); with one in"
            " 5 steps (about 3.0 s) it adds 20.0 % of the time, predicted",
            "一次评估约需 0.7 秒（损失 0.3 秒，3 条记录的回答 0.4 秒，探针 0.1 秒）；每 5 步（约 3.0 秒）一次，"
            "预计增加 20.0% 的用时",
        ),
        ("Adapters: lora rank 4, alpha 8, 21 matrices", "适配器：lora，秩 4，alpha 8，21 个矩阵"),
        (
            "--batch_size is 0; it is out of range. Fix: give a whole number of at least 1 and at most 10^12, or none",
            "--batch_size 是 0；它超出范围。解决办法：给出 1 到 10^12 的整数，或 none",
        ),
        (
            "Cache c2: VAE posteriors and features of the frozen ViT are used where they are there",
            "缓存 c2：VAE 后验和冻结的 ViT 的特征若已在其中则直接使用",
        ),
        (
            "Cache: 3 pictures found in the cache (100.0%), 0 missing and encoded",
            "缓存：找到 3 张图片（100.0%），缺的 0 张已现场编码",
        ),
        (
            "/tmp/small: the next checkpoint takes 24.4 MB, 1 GB are to stay free (min_free_gb), and 41.9 MB are"
            " free on /tmp/small. Nothing was trained. Earlier checkpoints are untouched. Fix: free it",
            "/tmp/small：下一个检查点需要 24.4 MB，要保留 1 GB 空闲（min_free_gb），而 /tmp/small 上只剩 41.9 MB。"
            "什么也没有训练。Earlier checkpoints are untouched. Fix: free it",
        ),
        (
            "output_dir /a/b is in use by process 7 on vm: two runs in one folder would overwrite each other. Fix:"
            " wait for its end or stop it, or choose another --output_dir",
            "output_dir /a/b 正被 vm 上的进程 7 使用：两次训练写同一个文件夹会互相覆盖。"
            "解决办法：等它结束或停止它，或换一个 --output_dir",
        ),
        ("unigen generate did not write it as it is now", "它不是 unigen generate 写下的样子"),
        (
            "This run's base was as it is stored and is nf4 now: its losses change from here on. Fix: --quantize none",
            "这次训练的基座模型原为按存储的样子，现在是 nf4：此后的损失会变。解决办法：--quantize none",
        ),
        ("found UTF-16 text; expected UTF-8 text", "发现 UTF-16 文本；应为 UTF-8 文本"),
        ("tasks     understand 16, edit 18", "任务      理解 16，编辑 18"),
        ("ETA 0:12", "剩余 0:12"),
        ("a sentence that nobody ever wrote", "a sentence that nobody ever wrote"),
        ("", ""),
    ],
)  # fmt: skip
def test_sentences_within_sentences(english, chinese):
    assert in_language(english, "zh") == chinese and in_language(english, "en") == english


def test_values_of_options_and_names_of_commands_are_never_translated():
    """They are typed again: --quantize none, unigen generate."""
    from unigen.commands.table import COMMANDS
    from unigen.config import Config

    def choices(kind: object) -> list[str]:
        held = get_args(kind)
        own = held if get_origin(kind) is Literal else ()
        return [*own, *(c for one in held if not isinstance(one, str) for c in choices(one))]

    typed = [
        f"--{name} {value}"
        for name, kind in get_type_hints(Config, include_extras=True).items()
        for value in {*choices(kind), "none"}
    ]
    said = {"quantize is nf4. Fix: {}, or leave it out": typed, "Fix: {} of this run": typed}
    said["real is a/b.html, and {} did not write it as it is now. Fix: name another file (--html ...)"] = [
        f"unigen {name}" for name in COMMANDS
    ]
    lost = [
        one
        for sentence, values in said.items()
        for one in values
        if one not in in_language(sentence.format(one), "zh")
    ]
    assert len(typed) > 150 and lost == []


def test_names_beside_each_other_are_listed_in_the_language_of_the_command():
    names = ["a", "b", "c"]
    assert [listed(names[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    with speaking("zh"):
        assert (listed(names), listed(names, "or"), listed(["a"])) == ("a、b、c", "a、b 或 c", "a")
    joined = re.compile(r"""["'] (and|or) ["']\.join\(""")
    assert [
        path.name for path in (ROOT / "unigen").rglob("*.py") if joined.search(path.read_text("utf-8"))
    ] == []


def test_what_follows_a_sentence_that_ends_with_a_value_stays_behind_it():
    """Chinese may put the value earlier, and must not take what follows along."""
    moved = [english for english, chinese in ROWS.items() if english[-1] == "}" and chinese[-1] != "}"]
    wrong = []
    for english in moved:
        values = [str(7 + n) if "{#}" in english else f"v{n}" for n in range(len(numbers(english)))]
        sentence = english.replace("{#}", "{}").format(*values)
        for tail, chinese in (
            (". More words. Fix: do it", "。More words。解决办法：do it"),
            ("; do it", "；do it"),
        ):
            if (found := in_language(sentence + tail, "zh")) != in_language(sentence, "zh") + chinese:
                wrong.append((english, found))
    assert len(moved) > 60 and wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/data (old)/m{}",
        "/table of 5 records/x{}.jsonl",
        "/what holds data{}/and more/f{}",
        "/run/m{}",
        "run/m{}",
    ],
)
def test_no_path_is_altered_in_any_sentence(path):
    lost, same = [], 0
    for english in ROWS:
        values = [path.replace("{}", str(n)) for n in range(len(numbers(english)))]
        text = english.replace("{#}", "{}").format(*values)
        found = in_language(text, "zh")
        lost += [(english, found)] * any(value not in found for value in values)
        same += found == text and bool(values)
    assert lost == [] and same < 90, "a value must stand whole, and most sentences are known with it"


@pytest.mark.parametrize(
    ("given", "english", "chinese"),
    [
        ("my records", "my records: it has no line", "my records"),
        ("a table of 5 records", "a table of 5 records holds no checkpoints. Fix: name another folder", ""),
        ("no such records of it/x (is a copy)", "model_path is no such records of it/x (is a copy)", ""),
        ("runs (1)/a", "Samples of step 0: runs (1)/a/samples/step_0 (0.4 s)", "第 0 步的样例："),
        ("--run_name=in 3 of 4: steps", "in 3 of 4: steps is no file", ""),
    ],
)
def test_what_a_user_gave_stays_as_it_is(given, english, chinese):
    value = given.partition("=")[2] or given
    with speaking("zh"):
        keep([{"option": value}])
        found = in_language(english)
    assert value in found and chinese in found and "（1）" not in found
    keep(value)
    assert messages._given == (), "English has nothing to keep"


def test_options_of_a_command_stay_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a table of 5 records", "my records (is a copy)"):
        assert main(["ckpt", "ls", name, "--language", "zh"]) == 2
        err = capsys.readouterr().err
        assert name in err and "解决办法" in err


@pytest.mark.slow
def test_a_long_text_takes_no_time():
    text = "{} is {}, {}. Fix: {} ; " * 300
    assert in_language(text, "zh") and in_language("a of b, " * 900, "zh")


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, "zh"),
        ({"LANG": "C.UTF-8", "LANGUAGE": "zh_CN"}, "en"),
        ({"LANG": "", "LC_ALL": ""}, "en"),
        ({"LANG": "zha_XX"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "UNIGEN_LANGUAGE": "en"}, "en"),
        ({"UNIGEN_LANGUAGE": "zh"}, "zh"),
    ],
)
def test_the_locale_is_the_default(environ, language):
    assert preferred(environ) == language


def test_log_lines_and_errors_speak_the_language_of_the_command(capsys, caplog, monkeypatch):
    with caplog.at_level(logging.INFO), speaking("zh"):
        logging.getLogger("unigen.data").info("Reading %s MB of data from %d file(s)", "1,0", 3)
        logging.getLogger("others").info("Reading %s MB of data from %d file(s)", "1,0", 3)
    assert caplog.messages[0].startswith("正在读取 1,0 MB") and caplog.messages[1].startswith("Reading")
    assert spoken() == "en" and logging.getLogRecordFactory() is logging.LogRecord
    for argv in (["trian", "--language", "zh"], ["--language=zh", "trian"], ["trian"]):
        monkeypatch.setenv("UNIGEN_LANGUAGE", "zh" if len(argv) == 1 else "en")
        assert main(argv) == 2
        assert capsys.readouterr().err.startswith("unigen: 错误：没有命令 'trian'；是不是 train？")
    monkeypatch.setenv("UNIGEN_LANGUAGE", "en")
    for argv in (["train", "--language"], ["train", "--language", "fr"]):
        assert main(argv) == 2 and "--language" in capsys.readouterr().err
    assert main(["trian", "--language", "en"]) == 2 and "did you mean train?" in capsys.readouterr().err


def test_a_table_is_quick_to_make():
    messages._table.cache_clear()
    assert messages._table("zh").said("unigen: interrupted") == "unigen: 已中断"
