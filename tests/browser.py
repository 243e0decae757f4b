"""Our pages in a real browser, where this machine has one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PHONE = 390  # points

# What is wider than the window though it does not scroll by itself, and words of tables and captions that
# stand on two lines.
FAULTS = """
const wide = [...d.querySelectorAll('body *')].filter(e => !e.closest('svg, .wide')
  && e.getBoundingClientRect().right > d.documentElement.clientWidth + 1).map(e => e.tagName + '.' + e.className);
const split = [];
for (const cell of d.querySelectorAll('td, th, figcaption')) {
  const walk = d.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/\\S+/g)) {
    const range = d.createRange();
    range.setStart(walk.currentNode, word.index);
    range.setEnd(walk.currentNode, word.index + word[0].length);
    if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) split.push(word[0]);
  }
}
document.title = JSON.stringify({wide, split, cells: d.querySelectorAll('td, th, figcaption').length});
"""


def dump(path: Path, profile: Path) -> str:
    """The page's document after its script ran."""
    assert CHROMIUM is not None
    argv = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    argv += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def framed(source: str, script: str, folder: Path, width: int = PHONE) -> str:
    """The title that a script outside the page gives; it sees the page, ``width`` points wide, as ``d``."""
    frame = folder / "frame.html"
    text = json.dumps(source).replace("</", "\\u003c/")
    frame.write_text(
        f'<body style="margin:0"><iframe id="f" style="width:{width}px;height:2000px;border:0"></iframe><script>'
        "const f = document.getElementById('f'); f.onload = () => { const d = f.contentDocument;"
        f"{script} }}; f.srcdoc = {text};</script>",
        "utf-8",
    )
    (title,) = re.findall(r"<title>(.*?)</title>", dump(frame, folder / "profile"))
    return title
