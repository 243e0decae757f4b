"""Which files are opened as pictures: every trick with a path is either a picture that lies where it must, or
refused unopened.

What is opened is seen by an audit hook of the interpreter, so "never opened" is observed and not inferred
from an error.
"""

import errno
import io
import os
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unigen import foreign
from unigen.sequence.images import MAX_BYTES, Confined, PictureError, image_size, open_image, read_picture

LOOK = getattr(os, "O_PATH", 0)
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the paths of this test exist on Linux"
)

_watched: list[str] | None = None


def _hook(event: str, arguments: tuple) -> None:
    if event != "open" or _watched is None:
        return
    path, _, flags = arguments
    if LOOK and isinstance(flags, int) and flags & LOOK:
        return  # takes hold of a file without opening it
    path = os.fsdecode(path) if isinstance(path, str | bytes) else f"/proc/self/fd/{path}"
    _watched.append(os.readlink(path) if path.startswith("/proc/self/fd/") else os.path.realpath(path))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """The real paths of the files that this process opens, but for the kernel's list of what is mounted."""
    global _watched
    foreign._is_kernel.cache_clear()
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None
        mounts = os.path.realpath("/proc/self/mountinfo")
        seen[:] = [path for path in seen if path != mounts]


def picture(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


INSIDE, OUTSIDE = picture((0, 255, 0)), picture((255, 0, 0))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``root`` (its pictures are green) and things outside of it (red), links between them, and
    what is no file."""
    for folder in ("root/sub", "root2", "outside", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (
        "root/a.png",
        "root/sub/b.png",
        "root/é.png",
        "root/．．.png",
        "root/\u202egnp.a",
        "root/ a.png ",
        "root/a.png.",
        "root/..png",
    ):
        (tmp_path / name).write_bytes(INSIDE)
    for name in ("root2/a.png", "outside/a.png", "root.png", "elsewhere/a.png"):
        (tmp_path / name).write_bytes(OUTSIDE)
    for name in (" a.png ", "a.png.", "..png", os.fsdecode(b"\xff.png")):
        (tmp_path / "root" / name).write_bytes(INSIDE)
    links = {
        "root/in": "a.png", "root/out": "../outside/a.png", "root/abs_in": tmp_path / "root/a.png",
        "root/abs_out": tmp_path / "outside/a.png", "root/folder_in": "sub", "root/folder_out": "../outside",
        "root/chain": "chain2", "root/chain2": "folder_out/a.png",
        "root/chain_in": "in", "root/loop": "loop2", "root/loop2": "loop", "root/self": "self",
        "root/dangling": "nothing.png",
        "root/dangling_out": "../outside/nothing.png", "root/top": "/", "root/up": "..",
        "root/zero": "/dev/zero",
        "root/environ": "/proc/self/environ", "root/stdin": "/dev/stdin", "root/magic": "/proc/self/root",
        "root/cwd": "/proc/self/cwd",
        "outside/in": "../root/a.png", "root_link": "root", "root/to_link": "../root_link/a.png",
        "elsewhere/root": "../root",
    }  # fmt: skip
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "root/pipe")
    os.mkfifo(tmp_path / "outside/pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("root/socket")  # relative: the whole path would be too long for a socket
        yield tmp_path


# Path, as joined to the folder of the files -> the verdict without a root, and with root/. "in" and "out":
# that picture is opened.
SAME = ("in", "in")
ESCAPES = ("out", "outside_root")
NO_FILE = ("not_a_file", "not_a_file")
KERNEL = ("not_a_file", "outside_root")
MISSING = ("missing_picture", "missing_picture")
GONE = ("missing_picture", "outside_root")
UNREADABLE = ("unreadable_picture", "unreadable_picture")
NOWHERE = ("unreadable_picture", "outside_root")
TRICKS: dict[str, tuple[str, str]] = {
    "root/a.png": SAME, "root/sub/b.png": SAME, "root/./a.png": SAME, "root//a.png": SAME,
    "root/sub/../a.png": SAME,
    "root/é.png": SAME, "root/e\u0301.png": MISSING, "root/．．.png": SAME, "root/．．/outside/a.png": MISSING,
    "root/\u202egnp.a": SAME,
    "root/ a.png ": SAME, "root/a.png.": SAME, "root/..png": SAME, os.fsdecode(b"root/\xff.png"): SAME,
    "root／a.png": GONE,
    "root∕..∕outside∕a.png": GONE,
    "root/../root/a.png": SAME, "root/../outside/a.png": ESCAPES, "root/sub/../../outside/a.png": ESCAPES,
    "outside/a.png": ESCAPES,
    "root2/a.png": ESCAPES, "root.png": ESCAPES, "root/../root2/a.png": ESCAPES,
    "root/....//outside/a.png": MISSING,
    "root/%2e%2e/outside/a.png": MISSING, "root/..\\outside\\a.png": MISSING, "root/in": SAME,
    "root/out": ESCAPES, "root/abs_in": SAME,
    "root/abs_out": ESCAPES, "root/folder_in/b.png": SAME, "root/folder_out/a.png": ESCAPES,
    "root/folder_out/../a.png": GONE,
    "root/folder_in/../a.png": SAME, "root/chain": ESCAPES, "root/chain_in": SAME, "root/loop": UNREADABLE,
    "root/self": UNREADABLE,
    "root/dangling": MISSING, "root/dangling_out": GONE, "root/up/outside/a.png": ESCAPES,
    "root/up/root/a.png": SAME,
    "outside/in": SAME, "root_link/a.png": SAME, "root/to_link": SAME, "elsewhere/root/a.png": SAME,
    "elsewhere/root/../root2/a.png": ESCAPES,
    "root/pipe": NO_FILE, "outside/pipe": KERNEL, "root/socket": NO_FILE, "root": KERNEL, "root/": KERNEL,
    "root/.": KERNEL,
    "root/sub": NO_FILE, "root/sub/..": KERNEL, "root/a.png/": MISSING, "root/a.png/.": MISSING,
    "root/a.png/../a.png": MISSING,
    "root/zero": KERNEL, "root/environ": KERNEL, "root/stdin": ("not_a_file", "*"),
    "root/magic/{top}/root/a.png": NO_FILE,
    "root/magic/{top}/outside/a.png": KERNEL, "root/cwd/root/a.png": NO_FILE,
    "root/top/{top}/root/a.png": SAME,
    "root/top/{top}/outside/a.png": ESCAPES, "root/top/proc/self/environ": KERNEL,
    "root/top/dev/zero": KERNEL,
    "root/a.png\0": NOWHERE, "root/a.png\0.jpg": NOWHERE, "root/\0": NOWHERE, chr(0xD800): NOWHERE,
    "root/" + chr(0xDFFF): NOWHERE,
    "root/" + "a" * 256: UNREADABLE, "root/" + "a/" * 3000: UNREADABLE, "root/" + "é" * 200: UNREADABLE,
    "root/\x1b[2J.png": MISSING,
    "root/a\n.png": MISSING, "root/none.png": MISSING, "none/a.png": GONE, "outside/none.png": GONE,
    "root/sub/../../outside/none": GONE,
    "/dev/zero": KERNEL, "/dev/null": KERNEL, "/dev/stdin": ("not_a_file", "*"), "/dev/fd/0": ("not_a_file",
    "*"), "/dev/full": KERNEL,
    "/proc/self/environ": KERNEL, "/proc/self/mem": KERNEL, "/proc/self/fd/0": ("not_a_file", "*"),
    "/proc/kmsg": KERNEL,
    "/proc/self/root/{top}/root/a.png": NO_FILE, "/proc/self/cwd/root/a.png": NO_FILE,
    "/proc/self/cwd/outside/a.png": KERNEL,
    "/proc/self/exe": KERNEL, "/proc/version": KERNEL, "/proc/../dev/zero": KERNEL,
    "/sys/kernel/notes": KERNEL, "/sys": KERNEL,
    "//dev//zero": KERNEL, "/dev/../{top}/root/a.png": NO_FILE, "/dev/shm/../zero": KERNEL, "/": KERNEL,
    "/..": KERNEL,
    "": ("*", "outside_root"), ".": KERNEL, "..": KERNEL,
}  # fmt: skip


def fate(source: str | Confined) -> tuple[str, list[str]]:
    """``in`` or ``out`` (the picture that was opened) or the code of the refusal, and the real paths that
    were opened."""
    with watched() as opened:
        try:
            colour = open_image(source).getpixel((0, 0))
        except PictureError as error:
            assert (
                str(error) == f"{error.name}: {error.problem}. Fix: {error.fix}"
                and error.problem
                and error.fix
            )
            assert str(error).isprintable() and len(str(error)) < 2000
            assert error.name == str(source) or len(str(source)) > 1000 or not str(source).isprintable()
            return error.code, opened
    return {(0, 255, 0): "in", (255, 0, 0): "out"}[colour], opened


def ordinary(path: str) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/", "/sys/"))


@linux
@pytest.mark.parametrize(
    "root",
    [None, "root", "root/", "{top}/root", "root_link", "elsewhere/root", "root/sub/..", "./root2/../root"],
)
@pytest.mark.timeout(60)
def test_every_trick_with_a_path(place: Path, root: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened only where it lies right, else refused with the expected code, and then nothing at all was
    opened."""
    assert len(TRICKS) >= 100
    wrong = []
    for trick, expected in TRICKS.items():
        for start in ("", str(place) + "/") if not trick.startswith("/") else ("",):
            if not trick and start:
                continue
            path = start + trick.replace("{top}", str(place).lstrip("/"))
            folder = None if root is None else root.replace("{top}", str(place))
            wanted = expected[folder is not None]
            found, opened = fate(path if folder is None else Confined(path, folder))
            if wanted != "*" and found != wanted:
                wrong.append(f"{path!r}: {found} in place of {wanted}")
            if found in ("in", "out"):
                assert opened and all(ordinary(name) for name in opened), f"{path!r} opened {opened}"
                if folder is not None and any(not name.startswith(f"{place}/root/") for name in opened):
                    wrong.append(f"{path!r} opened {opened}")
            elif opened:
                wrong.append(f"{path!r} was refused, but {opened} was opened")
    assert not wrong, "\n".join(wrong)


@linux
def test_the_detector_sees_an_ordinary_open(place: Path) -> None:
    with watched() as opened:
        (place / "outside/a.png").read_bytes()
        os.close(os.open("root/out", os.O_RDONLY))
        os.close(os.open("root/pipe", os.O_RDONLY | os.O_NONBLOCK))
    assert opened == [f"{place}/outside/a.png"] * 2 + [f"{place}/root/pipe"]


@linux
@pytest.mark.parametrize(
    "root", ["/", "{top}", "/proc", "/dev", "/sys", "none", "root/a.png", "", "root\0", "\ud800", "root/loop"]
)
def test_unusual_roots(place: Path, root: str) -> None:
    folder = root.replace("{top}", str(place))
    wanted = "in" if root in ("/", "{top}") else "outside_root"
    assert fate(Confined(f"{place}/root/a.png", folder))[0] == wanted
    for path in ("/proc/self/environ", "/dev/zero"):
        found, opened = fate(Confined(path, folder))
        assert found in ("not_a_file", "outside_root") and not opened


def test_without_a_hold_on_files_the_rules_are_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without O_PATH."""
    monkeypatch.setattr(foreign, "_LOOK", None)
    for trick, (free, confined) in TRICKS.items():
        if trick.startswith("root/") and "{top}" not in trick and "stdin" not in trick:
            for source, wanted in ((trick, free), (Confined(trick, "root"), confined)):
                found, opened = fate(source)
                assert found == wanted, trick
                assert not opened or found in ("in", "out"), trick


@pytest.mark.parametrize("hold", [True, False])
def test_a_link_that_is_turned_while_it_is_opened_never_leads_outside(
    place: Path, hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hold:
        monkeypatch.setattr(foreign, "_LOOK", None)
    stop, targets = threading.Event(), ("a.png", "../outside/a.png", "pipe", "/dev/zero")

    def turn() -> None:
        while not stop.is_set():
            for target in targets:
                os.symlink(target, "root/next")
                os.replace("root/next", "root/turning")

    os.symlink("a.png", "root/turning")
    thread = threading.Thread(target=turn)
    thread.start()
    try:
        read, refused, tries, end = 0, set(), 0, time.monotonic() + 20
        while tries < 2000 or (not (read and refused) and time.monotonic() < end):
            tries += 1
            try:
                assert read_picture(Confined("root/turning", "root")) == INSIDE
                read += 1
            except PictureError as error:
                refused.add(error.code)
    finally:
        stop.set()
        thread.join()
    assert refused <= {"outside_root", "not_a_file", "unreadable_picture"} and refused
    assert read


def exchanged_after(look: Callable, replace: Callable[[], None]) -> Callable:
    def looked(*arguments, **options):
        found = look(*arguments, **options)
        replace()
        return found

    return looked


@linux
def test_what_was_looked_at_is_what_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is exchanged after the last look at it: the one that was looked at is read, or nothing."""
    check = foreign._check
    monkeypatch.setattr(
        foreign, "_check", exchanged_after(check, lambda: os.replace("outside/a.png", "root/a.png"))
    )
    assert read_picture(Confined("root/a.png", "root")) == INSIDE
    assert (place / "root/a.png").read_bytes() == OUTSIDE
    monkeypatch.setattr(foreign, "_LOOK", None)
    monkeypatch.setattr(
        foreign, "_check", exchanged_after(check, lambda: os.replace("root2/a.png", "root/a.png"))
    )
    with pytest.raises(PictureError, match="exchanged"):
        read_picture("root/a.png")


def test_a_hard_link_cannot_be_told_from_its_file(place: Path) -> None:
    os.link("outside/a.png", "root/hard.png")
    assert read_picture(Confined("root/hard.png", "root")) == OUTSIDE  # as documented


def test_read_bytes_gives_what_open_image_decodes(place: Path) -> None:
    for source in (
        "root/a.png",
        place / "root/a.png",
        Confined("root/a.png", "root"),
        Confined(place / "root/in", place / "root"),
    ):
        assert read_picture(source) == INSIDE
        assert image_size(source) == open_image(source).size == (8, 8)
    assert read_picture(INSIDE) is INSIDE
    with pytest.raises(PictureError) as missing:
        read_picture("root/none.png")
    assert missing.value.code == "missing_picture"


@pytest.mark.parametrize("read", [read_picture, open_image, image_size])
def test_huge_files_are_refused_unread(place: Path, read: Callable) -> None:
    with open("root/huge.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWEBP")
        file.truncate(MAX_BYTES + 1)  # sparse: it takes no room
    with watched() as opened, pytest.raises(PictureError) as huge:
        read("root/huge.webp")
    assert huge.value.code == "huge_picture" and f"{MAX_BYTES:,}" in str(huge.value) and not opened


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(place: Path) -> None:
    os.chmod("root/a.png", 0)
    assert fate("root/a.png")[0] == "unreadable_picture"  # the system refuses it: looking does not show that


def test_a_disk_that_fails_is_explained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("unigen.sequence.images.open_file", lambda path: Failing())
    for read, code in ((read_picture, "unreadable_picture"), (open_image, "broken_picture")):
        with pytest.raises(PictureError, match="Input/output error") as failed:
            read("root/a.png")
        assert failed.value.code == code


def test_no_descriptor_is_left_open(place: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))

    before = count()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for trick in TRICKS:
            for source in (trick, Confined(trick, "root")):
                if "{top}" not in trick:
                    fate(source)
    assert count() == before


def test_confined_is_a_value() -> None:
    a = Confined("a.png", "root")
    assert str(a) == "a.png" and a == Confined("a.png", "root") and hash(a) == hash(Confined("a.png", "root"))
    assert a != Confined("a.png", "root2")
    with pytest.raises(AttributeError):
        a.path = "b.png"


def test_shared_memory_is_an_ordinary_folder() -> None:
    """/dev/shm is where users keep data in memory; its regular files are pictures as others are."""
    if not os.path.ismount("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no writable /dev/shm")
    path = Path(f"/dev/shm/unigen-test-{os.getpid()}-{np.random.default_rng().integers(1 << 60)}.png")
    try:
        path.write_bytes(INSIDE)
        assert read_picture(path) == INSIDE
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("data", "said", "fix"),
    [
        (b"", "empty", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page", "download"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC", "pillow-heif"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "video", "frames"),
        (b'<?xml version="1.0"?>\n<svg></svg>', "SVG", "PNG"),
        (b"%PDF-1.7", "PDF", "PNG"),
        (b"nothing that anybody knows", "not a picture of a known format", "PNG"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, data: bytes, said: str, fix: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (tmp_path / "a.jpg", data):
        with pytest.raises(PictureError) as caught:
            open_image(source)
        assert caught.value.code == "not_a_picture"
        assert said in caught.value.problem and fix in caught.value.fix
