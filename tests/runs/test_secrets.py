"""Values of secret environment variables are hidden; everything else stays as it is."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from unigen.config import Config
from unigen.runs.secrets import HIDDEN, hide, hide_in_logs, redacted

SECRET = "hush-hush-4711"


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET", "db_password", "My_Token", "PASSWORD"]
)
def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, SECRET)
    assert hide(f"https://me:{SECRET}@host/x?key={SECRET}") == f"https://me:{HIDDEN}@host/x?key={HIDDEN}"


def test_other_variables_and_short_values_hide_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKENS", "not a secret")
    monkeypatch.setenv("KEY_FILE", "outputs/key.pem")
    monkeypatch.setenv("DEBUG_KEY", "1")
    monkeypatch.setenv("OTHER_KEY", "train")
    monkeypatch.setenv("EMPTY_KEY", "")
    text = "not a secret, outputs/key.pem, step 1 of train"
    assert hide(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "secret: the cat sat here",
        "password=red, token: 5, Authorization: Bearer abcDEF123456",
        "https://me:pass@host.example/a?sig=abc",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "sk-" + "a1B2" * 12,
    ],
)
def test_what_only_looks_like_a_secret_stays_whole(text: str):
    assert hide(text) == text and redacted({"x": [text]}) == {"x": [text]}


def test_quoted_forms_and_the_lines_of_a_long_value_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", 'quo"te/s&me thing')
    monkeypatch.setenv("MY_LONG_KEY", "first line of it\nsecond line of it")
    for text in (
        'quo"te/s&me thing',
        'quo\\"te/s&me thing',
        "quo%22te%2Fs%26me%20thing",
        "second line of it",
    ):
        assert hide(f"a {text} b") == f"a {HIDDEN} b"


def test_of_two_values_one_inside_the_other_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert hide("abcdefgh-and-more") == HIDDEN


def test_options_are_hidden_in_a_copy_also_nested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    options = Config(
        model_path="models/BAGEL-7B-MoT", train_data_path=["a.jsonl", f"/data/{SECRET}"]
    ).to_dict()
    options |= {"nested": {"x": (f"a {SECRET}", 3, None, True)}, "path": Path("/a") / SECRET}
    shown = redacted(options)
    assert shown["train_data_path"] == ["a.jsonl", f"/data/{HIDDEN}"] and shown["path"] == Path("/a") / HIDDEN
    assert shown["nested"] == {"x": (f"a {HIDDEN}", 3, None, True)}
    assert options["nested"]["x"][0] == f"a {SECRET}", "the options themselves were changed"
    changed = ("train_data_path", "nested", "path")
    assert all(shown[name] == value for name, value in options.items() if name not in changed)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch):
    """A root logger with one handler; gives a logger and what it wrote."""
    monkeypatch.setenv("MY_TOKEN", SECRET)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    hide_in_logs()
    hide_in_logs()
    return logging.getLogger("a.library"), stream


def test_logs_show_no_secret_in_message_arguments_traceback_and_stack(logged):
    log, stream = logged
    log.warning("token %s", SECRET)
    log.warning("dict %(password)s", {"password": SECRET})
    try:
        raise OSError(f"cannot open it with {SECRET}")
    except OSError:
        log.exception("failed", stack_info=True)
    text = stream.getvalue()
    assert SECRET not in text
    assert text.splitlines()[:3] == [f"WARNING token {HIDDEN}", f"WARNING dict {HIDDEN}", "ERROR failed"]
    assert "Traceback" in text and f"with {HIDDEN}" in text and "Stack (most recent call last)" in text


def test_ordinary_records_pass_unchanged(logged):
    log, stream = logged
    log.warning("%s of %d", "one", 3)
    assert stream.getvalue() == "WARNING one of 3\n"
