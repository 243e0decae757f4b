"""What stands in Chinese is written by the one rule of CONTRIBUTING.zh-CN.md, with one word for one thing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from unigen.messages import sentences

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "unigen" / "assets" / "text"
PAGES = [*ROOT.glob("*.zh-CN.md"), *(ROOT / "docs").glob("*.zh-CN.md")]
HAN = "[\u3400-\u9fff]"
WRONG = {
    "a half-width sign beside Chinese": rf"{HAN}[,;:!?](?![/A-Za-z0-9_])|{HAN}\(|\){HAN}",
    "no blank between Chinese and Latin": rf"{HAN}[A-Za-z0-9]|[A-Za-z0-9%]{HAN}",
    "a blank within Chinese": rf"{HAN} +{HAN}|[，。；：）、！？“] +\S|\S +[，。；：）、！？”]",
    "a blank before a per cent sign": r"[0-9}] %",
}
# What is never said -> what is said in its place.
WORDS = {
    "跟踪器": "记录器", "目录": "文件夹", "micro-batch": "微批次", "绘图": "画图", "文字损失": "文本损失",
    "文字目标": "文本目标", "文字专家": "理解专家", "运行文件夹": "训练文件夹", "说明文字": "描述文字",
    "记录工具": "记录器", "载入": "加载", "您": "你",
}  # fmt: skip
KEPT = ("仓库根目录", "仓库目录", "micro-batch, global batch")  # of git, and the glossary's English


def wrong(text: str) -> list[str]:
    """What a text does against the rule."""
    return [what for what, pattern in WRONG.items() if re.search(pattern, text)]


def leaves(held: object) -> Iterator[str]:
    """The texts of nested mappings and lists."""
    if isinstance(held, str):
        yield held
    else:
        for part in held.values() if isinstance(held, dict) else held or ():
            yield from leaves(part)


def said(name: str) -> list[str]:
    """The Chinese texts of a file of ours; of a page its prose without code and addresses."""
    if name == "messages":
        rows = [row for part in sentences("zh").items() for row in part[1].items() if row[1]]
        # columns beside each other stay so
        return [re.sub(" {2,}", "\n", chinese) if "  " in english else chinese for english, chinese in rows]
    if name == "zh.json":
        return list(leaves(json.loads((TEXTS / name).read_text("utf-8"))))
    if name == "flags.zh.yaml":
        texts = list(leaves(yaml.safe_load((TEXTS / name).read_text("utf-8"))))
    else:
        texts = [next(path for path in PAGES if path.name == name).read_text("utf-8")]
    return [plain(text) for text in texts]


def plain(markup: str) -> str:
    """The text of a page, whose code is a letter and the cells of whose tables stand on lines of their own."""
    text = re.sub(r"^```.*?^```$|^    .*$", "", markup, flags=re.M | re.S)
    return re.sub(r" *\| *|^[-#]+ ", "\n", re.sub(r"\]\([^)\s]*\)", "]", re.sub(r"`[^`]*`", "c", text)))


NAMES = ["messages", "flags.zh.yaml", "zh.json", *sorted(path.name for path in PAGES)]


@pytest.mark.parametrize("name", NAMES)
def test_the_chinese_is_written_as_chinese(name):
    lines = [line for text in said(name) for line in text.split("\n")]
    assert lines and [(line, why) for line in lines if (why := wrong(line))] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_thing_has_one_word(name):
    whole = "\n".join(said(name))
    for kept in KEPT:
        whole = whole.replace(kept, "")
    assert {old: new for old, new in WORDS.items() if old in whole} == {}


def test_no_sentence_is_left_in_english():
    english = [
        text
        for text in said("messages")
        if text != "rank {}" and not re.search("[\u4e00-\u9fff，。；：（）、]", text)
    ]
    assert english == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (plain("共 3 个 token，占 5%（见 `a.json`）。"), 0),
        ("共3 个", 1),
        ("如 a,b 与 --c d", 0),
        ("文件,然后", 1),
        ("文件(图)", 1),
        ("文件 ，然后", 1),
        ("文件  图片", 1),
        ("95 % 区间", 1),
        (plain("见`a`"), 1),
    ],
)
def test_the_rule_finds_what_breaks_it(text, count):
    assert len(wrong(text)) == count
