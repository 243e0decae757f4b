import io
import json
import logging
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigen.config import Config, known_options
from unigen.runs.secrets import HIDDEN, HideSecrets, environment_secrets, hide, hide_in_logs, redacted

HEX = "0123456789abcdef0123456789abcdef01234567"

# (text with {} for the secret, the secret)
SECRETS = [
    ("https://{}@host.example/model", "me:pass"),
    ("cannot read ftp://{}@host:21/a.jsonl: refused", "me:p@ss"),
    ("git+https://{}@github.com/a/b", "x0123token"),
    ("https://bucket.s3.example/a.png?X-Amz-Signature={}&X-Amz-Date=20260101", "a1b2c3"),
    ("https://blob.example/a?sv=2022&sig={}", "abc%2Fdef%3D"),
    ("the token {} was refused", "hf_" + "aB3" * 12),
    ("{}", "sk-" + "a1B2" * 12),
    ("key={}.", "sk-proj-Ab_1-" + "x9" * 12),
    ("wandb: key {} is not valid", HEX),
    ("({})", HEX),
    ("login {}", "local-" + HEX),
    ("AWS: {} is unknown", "AKIA" + "ABCD1234" * 2),
    ("Authorization: {}", "Bearer abcDEF123456"),
    ("{{'Authorization': '{}'}}", "Basic bWU6cGFzc3dvcmQ="),
    ("got 401 for Bearer {}", "abcDEF.123-456"),
    ("--api-key {} --steps 3", "s3cr3t"),
    ("--token={}", "s3cr3t"),
    ("WANDB_API_KEY={} python train.py", "s3cr3t"),
    ('{{"password": "{}", "n": 1}}', "s3cr3t"),
    ("apiKey: {}", "s3cr3t"),
    ("gh says {}", "ghp_" + "a1B2" * 9),
    ("see eyJ{}", "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9"),
    ("-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----", "MIIEow\nIBAAKC"),
]

HARMLESS = [
    "outputs/unified_training/step_500",
    "/data/token=a/part-0.parquet",
    f"models--org--name/snapshots/{HEX}/model.safetensors",
    f"/cache/snapshots/{HEX}",
    f"model-{HEX}.safetensors and org/name@{HEX}",
    f"commit {HEX}, revision='{HEX}', sha1: {HEX}",
    HEX + "0123456789abcdef01234567",  # SHA-256
    "ssh://git@host.example/a.git git@github.com:a/b.git abfss://box@account.example/x",
    "https://host.example:8080/a?page=2&keyword=cats#top",
    "https://example.com/@someone/post",
    "max_num_tokens=4096 text_tokens: 17 tokens_per_second 3.5",
    "eos_token: <|im_end|> pad_token=None token: 5",
    "a secret garden, the password is needed; basic understanding; the bearer of news",
    "step 7/10  loss 1.2345  text 0.9000  lr 1.00e-05  ETA 1:02:03",
    "me@example.com wrote disk-usage-of-the-folder-by-day-2026",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_what_looks_like_a_secret_is_hidden_and_the_rest_stays(text: str, secret: str):
    whole = text.format(secret)
    shown = hide(whole, [])
    assert secret not in shown and HIDDEN in shown
    for part in secret.split(":"):
        assert len(part) < 5 or part not in shown
    assert hide(shown, []) == shown
    if "BEGIN" in text:
        return
    words = [
        word
        for word in text.replace("{{", "{").replace("}}", "}").split()
        if "{}" not in word and "KEY" not in word
    ]
    assert all(word.strip("{}',\"") in shown for word in words)


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_texts_stay_as_they_are(text: str):
    assert hide(text, []) == text
    assert redacted({"x": [text], "y": {"z": text}}) == {"x": [text], "y": {"z": text}}


NAMES = st.text(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. 猫", min_size=1, max_size=24
)
HASHES = st.text("0123456789abcdef", min_size=40, max_size=40)
PART = NAMES | HASHES.map("model-{}".format) | HASHES.map("{}.bin".format) | HASHES.map("snapshots/{}".format)
PATHS = st.tuples(
    st.sampled_from(["/", "./", "../", "C:\\", "data/", "hf://org/", "s3://bucket/"]),
    st.lists(PART, min_size=1, max_size=6),
)


@given(PATHS)
def test_ordinary_paths_stay_as_they_are(path):
    """Pass: no path of ordinary names is changed, with git hashes in them or not."""
    start, parts = path
    text = start + "/".join(parts)
    assert hide(text, []) == text and redacted({"train_data_path": [text], "model_path": text}) == {
        "train_data_path": [text],
        "model_path": text,
    }


@given(
    st.sampled_from(known_options()), st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
)
def test_numbers_of_our_options_stay(name: str, value):
    assert redacted({name: value}) == {name: value}


def test_an_ordinary_config_is_saved_as_it_is():
    config = Config(
        model_path="models/BAGEL-7B-MoT",
        train_data_path=["a.jsonl", "/data/b"],
        wandb_project="cats",
        max_num_tokens=4096,
    ).to_dict()
    assert redacted(config) == config and redacted(config) is not config


def test_names_hide_their_values_also_in_lists_and_nested():
    values = {
        "api_key": "a", "HF_TOKEN": "b", "db.password": 1234, "clientSecret": "c",
        "keys": {"access-key": ["d", "e"]},
        "sources": [{"path": "x", "token": "f"}, ("--password", "g", "--steps", "3")],
        "eos_token": "<|im_end|>", "image_token": 5, "max_num_tokens": 6, "secret": None, "commit": HEX,
        "other": HEX, "path": Path("/a/b"),
        "link": Path("/a") / HEX,
    }  # fmt: skip
    before = json.dumps(values, default=str)
    shown = redacted(values)
    assert shown == {
        "api_key": HIDDEN, "HF_TOKEN": HIDDEN, "db.password": HIDDEN, "clientSecret": HIDDEN,
        "keys": {"access-key": [HIDDEN, HIDDEN]},
        "sources": [{"path": "x", "token": HIDDEN}, ("--password", HIDDEN, "--steps", "3")],
        "eos_token": "<|im_end|>", "image_token": 5, "max_num_tokens": 6, "secret": None, "commit": HEX,
        "other": HIDDEN,
        "path": Path("/a/b"), "link": Path("/a") / HEX,
    }  # fmt: skip
    assert json.dumps(values, default=str) == before, "the values themselves were changed"


def test_values_of_the_environment_are_hidden_in_every_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", 'quo"te/s&me thing')
    monkeypatch.setenv("MY_LONG_KEY", "first line of it\nsecond line of it")
    monkeypatch.setenv("MY_SHORT_KEY", "train")
    monkeypatch.setenv("MY_TOKENS", "not a secret")
    for text in [
        'quo"te/s&me thing',
        'quo\\"te/s&me thing',
        "quo%22te%2Fs%26me%20thing",
        "second line of it",
    ]:
        assert hide(f"a {text} b") == f"a {HIDDEN} b" and redacted({"x": f"a {text} b"}) == {
            "x": f"a {HIDDEN} b"
        }
    assert hide("train not a secret") == "train not a secret"
    assert environment_secrets() == sorted(environment_secrets(), key=len, reverse=True)


def test_of_two_values_one_inside_the_other_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert hide("abcdefgh-and-more") == HIDDEN


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch):
    """A root logger with one handler; gives the logger and what it wrote."""
    monkeypatch.setenv("MY_TOKEN", "hush-hush-4711")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    hide_in_logs()
    hide_in_logs()
    assert sum(isinstance(f, HideSecrets) for f in handler.filters) == 1
    return logging.getLogger("a.library"), stream


def test_logs_show_no_secret_in_message_arguments_traceback_and_stack(logged):
    log, stream = logged
    log.warning("token hush-hush-4711")
    log.warning("%s of %d", "https://me:pass@host/x", 3)
    log.warning("dict %(password)s", {"password": "hush-hush-4711"})
    try:
        raise OSError("cannot open https://me:pass@host/x with hush-hush-4711")
    except OSError:
        log.exception("failed", stack_info=True)
    text = stream.getvalue()
    assert "hush" not in text.replace('log.warning("token hush-hush-4711")', "") and "pass@" not in text
    assert text.splitlines()[:3] == [f"token {HIDDEN}", f"https://{HIDDEN}@host/x of 3", f"dict {HIDDEN}"]
    assert "Traceback" in text and "OSError: cannot open" in text and "Stack (most recent call last)" in text


def test_ordinary_records_and_wrong_formats_pass_unchanged(logged):
    log, stream = logged
    records = []
    logging.getLogger().handlers[0].addFilter(lambda record: bool(records.append(record)) or True)
    log.warning("%s of %d", "one", 3)
    assert records[0].args == ("one", 3) and stream.getvalue() == "one of 3\n"
    assert (
        HideSecrets().filter(logging.LogRecord("a", logging.INFO, "b", 1, "%d", ("no number",), None)) is True
    )


def test_the_time_grows_with_the_length_alone():
    """Pass: texts of 100 kB that mislead the search take under half a second each, the best of three
    (quadratic: 50 s)."""
    parts = [
        "a",
        "token",
        "a.b-c_d",
        "https://",
        "-",
        "x=",
        "eyJ",
        "a:",
        " ",
        "token ",
        "--token ",
        "?key",
        "://a:",
        "Bearer ",
        "0123456789",
    ]
    for part in parts:
        text, best = part * (100_000 // len(part)), 1e9
        for _ in range(3):
            began = time.perf_counter()
            hide(text, [])
            best = min(best, time.perf_counter() - began)
            if best < 0.5:
                break
        assert best < 0.5, (part, best)
