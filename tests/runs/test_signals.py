"""Signals, with real processes and real signals. Children import no PyTorch unless they need its loader."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from children import start as start

from unigen.messages import in_language
from unigen.runs.ranks import WAITING
from unigen.runs.signals import EXIT_STOPPED, SIGNALS, SignalHandler, Stopped

PHASES = [
    ("loading", True),
    ("data", True),
    ("forward/backward", False),
    ("saving", False),
    ("validating", False),
    ("sampling", False),
]


# ---- the first signal


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: signal.Signals(n).name)
def test_a_signal_breaks_off_a_breakable_phase_at_once_and_only_asks_in_any_other(start, number: int):
    """Loading and data: Stopped within a second, out of a wait of a minute. The others, and between two
    phases: they end by themselves, ``asked`` is set; the next breakable phase does not begin. One line on
    stderr each time."""
    code = """
for name, breakable in eval(sys.argv[1]) + [("", False)]:
    done = entered = False
    with SignalHandler() as stops:
        say("ready", name)
        try:
            with stops.phase(name, breakable) if name else stops:
                end = time.monotonic() + (60 if breakable else 20)
                while time.monotonic() < end and not stops.asked:
                    time.sleep(60 if breakable else 0.01)
                done = True
        except Stopped:
            pass
        assert stops.at is None, stops.at
        try:
            with stops.phase("data", breakable=True):
                entered = True
        except Stopped:
            pass
        say(name, "finished" if done else "broken off", stops.signal, entered)
"""
    code = code.replace(
        "with stops.phase(name, breakable) if name else stops:",
        "with stops.phase(name, breakable) if name else nothing():",
    )
    code = "from contextlib import nullcontext as nothing\n" + code
    child = start(code, PHASES)
    for name, breakable in [*PHASES, ("", False)]:
        assert child.line() == f"ready {name}".strip()
        time.sleep(0.05)
        child.send(number)
        began = time.monotonic()
        assert (
            child.line() == f"{name} {'broken off' if breakable else 'finished'} {int(number)} False".strip()
        )
        assert time.monotonic() - began < 5
    code, _, err = child.end()
    assert code == 0 and err.count("\n") == len(PHASES) + 1, err
    said = err.splitlines()
    for line, (name, breakable) in zip(said, PHASES, strict=False):
        assert line.startswith(
            f"unigen: {signal.Signals(number).name}: phase {name} is {'broken off' if breakable else 'finished'}, "
        ), line
        assert f"exit code {EXIT_STOPPED}" in line and "second signal" in line
    assert "what is under way is finished" in said[-1]


def test_a_phase_inside_another_counts_and_the_outer_one_is_broken_off_after_it(start):
    """A signal during a save inside of loading: the save is finished, then Stopped leaves loading. No phase
    that can be broken off begins any more, and a copy of the signal breaks off no clean-up, also not one in
    an outer phase that could be."""
    child = start(
        """
with SignalHandler() as stops, stops.phase("outside"):
    try:
        with stops.phase("trying", breakable=True):
            try:
                with stops.phase("loading", breakable=True):
                    with stops.phase("saving"):
                        say("ready")
                        while not stops.asked:
                            time.sleep(0.01)
                        say("saved")
                    say("wrong")
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10):
                    time.sleep(0.01)
                say("clean")
    except Stopped:
        assert stops.at.name == "outside"
        try:
            with stops.phase("data", breakable=True):
                say("wrong")
        except Stopped:
            say("stopped", stops.at.name)
""",
        env={"WORLD_SIZE": "2", "RANK": "1"},
    )
    assert child.line() == "ready"
    child.send(signal.SIGTERM)
    code, out, err = child.end()
    assert err.startswith("unigen [rank 1]: SIGTERM: phase saving is finished, ")
    assert (code, out.split(), err.count("\n")) == (0, ["saved", "clean", "stopped", "outside"], 1), err


@pytest.mark.slow
def test_random_moments_never_leave_a_wrong_state(start):
    """200 signals at random moments of quickly changing phases: Stopped, or ``asked`` at the end of the
    round; and the innermost phase is then again what it was before."""
    child = start("""
import random
random.seed(1)
broken = 0
for n in range(200):
    with SignalHandler() as stops:
        with stops.phase("outer"):
            at = stops.at
            threading.Timer(random.random() * 0.003, os.kill, (os.getpid(), signal.SIGTERM)).start()
            end = time.monotonic() + 5
            try:
                while not stops.asked:
                    assert time.monotonic() < end, "the signal was lost"
                    with stops.phase("data", breakable=True):
                        with stops.phase("reading", breakable=True):
                            sum(range(20))
                    with stops.phase("forward/backward"):
                        sum(range(20))
            except Stopped:
                broken += 1
            assert stops.at is at and stops.asked, (n, stops.at and stops.at.name)
        assert stops.at is None
say(broken)
""")
    code, out, err = child.end(60)
    assert code == 0, err
    assert 40 < int(out) < 200
    assert "Traceback" not in err and err.count("\n") == 200


def test_a_raise_that_is_swallowed_comes_again_at_the_end_of_the_phase(start):
    """Where the handler runs in a ``__del__``, Python prints and forgets the exception: the phase still ends
    with Stopped."""
    child = start("""
class Slow:
    def __del__(self):
        say("ready")
        time.sleep(5)

with SignalHandler() as stops:
    try:
        with stops.phase("data", breakable=True):
            slow = Slow()
            del slow
        say("wrong")
    except Stopped:
        say("stopped")
""")
    assert child.line() == "ready"
    child.send(signal.SIGTERM)
    assert child.end()[:2] == (0, "stopped\n")


# ---- the second signal

STUCK = {
    "in Python": "for _ in range(6000): time.sleep(0.01)",
    # Locks what it holds already: no signal wakes it, and the interpreter runs none of its handlers.
    "in C": (
        "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in"
        " range(2)]"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "where"), [(signal.SIGTERM, "in Python"), (signal.SIGINT, "in C")], ids=["in Python", "in C"]
)
def test_a_second_signal_ends_the_process_at_once_but_not_one_within_a_second(start, number: int, where: str):
    """Copies of the first signal some ms later change nothing; one after a second ends with 128 + its number,
    also where the main thread never comes back from C. stderr has one line for each."""
    child = start(
        "with SignalHandler() as stops:\n    with stops.phase('forward/backward'):\n        say('ready')\n       "
        f" {STUCK[where]}"
    )
    assert child.line() == "ready"
    time.sleep(0.1)
    for pause in (0.02, 0.3):
        child.send(number)
        time.sleep(pause)
    assert child.process.poll() is None
    time.sleep(1.3)
    child.send(number)
    began = time.monotonic()
    code, _, err = child.end()
    assert code == 128 + number and time.monotonic() - began < 2
    name = signal.Signals(number).name
    assert [line.partition(",")[0] for line in err.splitlines()] == [
        f"unigen: {name}: phase forward/backward is finished",
        f"unigen: {name} again: ended at once",
    ]


@pytest.mark.slow
def test_copies_that_C_code_held_back_are_no_second_signal(start):
    """Two signals 50 ms apart, while C code holds the interpreter for two seconds: when Python sees the
    second one does not count."""
    child = start("""
with SignalHandler() as stops, stops.phase("forward/backward"):
    say("ready")
    while not stops.asked:
        time.sleep(0.001)
    ctypes.PyDLL(None).usleep(2_000_000)
    say("held")
    time.sleep(0.3)
    say("alive")
""")
    assert child.line() == "ready"
    child.send(signal.SIGINT)
    time.sleep(0.1)
    child.send(signal.SIGINT)
    child.send(signal.SIGTERM)
    code, out, _ = child.end()
    assert (code, out.split()) == (0, ["held", "alive"])


# ---- whose handlers


def test_SIGINT_and_SIGHUP_stay_ignored_where_the_program_was_started_so(start):
    """As nohup and background jobs of a script start programs; SIGTERM still asks."""
    child = start(
        "with SignalHandler() as stops:\n    say('ready')\n    while not stops.asked: time.sleep(0.01)\n   "
        " say(stops.signal)",
        before=["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"],
    )
    assert child.line() == "ready"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        child.send(number)
        time.sleep(0.1)
    assert child.end()[:2] == (0, f"{int(signal.SIGTERM)}\n")


def test_the_earlier_handlers_and_files_come_back():
    """After the run, and after a second one: the same handlers, the same wake-up file, no open file or thread
    more."""
    handlers = [signal.getsignal(n) for n in SIGNALS]
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    stops = SignalHandler()
    for _ in range(2):
        with stops:
            assert [signal.getsignal(n) for n in SIGNALS] != handlers
            assert threading.active_count() == threads + 1
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_in_another_thread_signals_stay_as_they_are_and_phases_are_tracked():
    """A notebook's or a server's thread: no handler, no error; the phases of a thread beside the run's are
    not the run's."""
    handlers = [signal.getsignal(n) for n in SIGNALS]
    seen: list[object] = []

    def run() -> None:
        with SignalHandler() as stops, stops.phase("loading", breakable=True):

            def beside() -> None:
                with stops.phase("writing"):
                    seen.append(stops.at.name)

            other = threading.Thread(target=beside)
            other.start()
            other.join()
            seen.append(stops.at.name)
            seen.append([signal.getsignal(n) for n in SIGNALS] == handlers)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["loading", "loading", True]


# ---- processes of the run's own


@pytest.mark.slow
def test_a_forked_child_has_the_earlier_handlers_and_its_signals_do_not_reach_the_run(start):
    """SIGTERM ends a forked child as ever; the parent has not been asked to stop."""
    child = start("""
with SignalHandler() as stops:
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    time.sleep(0.2)
    say(stops.asked)
""")
    code, out, err = child.end()
    assert (code, out.split(), err) == (0, [str(-signal.SIGTERM), "False"], "")


@pytest.mark.slow
def test_a_worker_ignores_all_but_its_parent(start):
    """Signals from elsewhere pass a worker by, also those that come before it is ready; SIGTERM of its parent
    ends it, as Python's own exit needs it, and so does the parent's death."""
    child = start("""
import multiprocessing
fork = multiprocessing.get_context("fork")

def work():
    time.sleep(0.3)
    worker_init(0)
    say("worker", os.getpid())
    time.sleep(60)

with SignalHandler() as stops:
    with shielded():
        process = fork.Process(target=work, daemon=True)
        process.start()
    say("started", process.pid)
    while not stops.asked:
        time.sleep(0.01)
    time.sleep(0.5)
    say("alive" if process.is_alive() else "dead")
    process.terminate()
    process.join(10)
    say(process.exitcode)
""")
    said, _, pid = child.line().partition(" ")
    assert said == "started"
    os.kill(int(pid), signal.SIGTERM)  # before worker_init
    assert child.line() == f"worker {pid}"
    for number in SIGNALS:
        os.kill(int(pid), number)
    os.killpg(child.process.pid, signal.SIGTERM)
    code, out, err = child.end()
    assert (code, out.split()) == (0, ["alive", str(128 + signal.SIGTERM)]), err


LOADER = """
import torch
from torch.utils.data import DataLoader, IterableDataset

class Rows(IterableDataset):
    def __iter__(self):
        for n in range(1000):
            if n == 3 and sys.argv[1] == "stuck":
                time.sleep(600)
            time.sleep(0.02)
            yield torch.full((300_000,), n)

if __name__ == "__main__":
    loader = DataLoader(Rows(), batch_size=None, num_workers=2, worker_init_fn=worker_init)
    stopped = False
    with SignalHandler() as stops:
        with shielded():
            rows = iter(loader)
        say(*(w.pid for w in rows._workers))
        steps = 0
        while not stops.asked:
            try:
                with stops.phase("data", breakable=True):
                    next(rows)
            except Stopped:
                break
            with stops.phase("forward/backward"):
                time.sleep(0.05)
                steps += 1
            if steps == 2:
                say("ready")
        del rows
    say("saved", steps)
"""


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_a_run_with_workers_cleanly(start):
    """To the whole group, as torchrun, SLURM and a terminal send it: the step at hand is finished, workers
    end with the loader, stderr has one line and no traceback, all within seconds. A SIGTERM to each worker
    before that changes nothing."""
    child = start(LOADER, "flowing")
    workers = [int(pid) for pid in child.line().split()]
    assert child.line() == "ready"
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    os.killpg(child.process.pid, signal.SIGTERM)
    began = time.monotonic()
    code, out, err = child.end(30)
    assert code == 0 and out.startswith("saved"), (code, out, err)
    assert int(out.split()[1]) >= 3, "the workers did not live on"
    assert err.count("\n") == 1, err
    assert time.monotonic() - began < 15
    assert not any(_lives(pid) for pid in workers)


@pytest.mark.slow
def test_no_worker_is_left_when_the_run_is_killed(start):
    """kill -9 of the main process while its workers are busy for ten minutes: they end within seconds."""
    child = start(LOADER, "stuck")
    workers = [int(pid) for pid in child.line().split()]
    assert child.line() == "ready"
    assert all(_lives(pid) for pid in workers)
    child.send(signal.SIGKILL)
    end = time.monotonic() + 15
    while any(_lives(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_lives(pid) for pid in workers)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_stopped_is_no_exception_that_a_broad_except_swallows():
    assert not issubclass(Stopped, Exception)


def test_every_phase_of_a_training_is_told_in_chinese():
    root = Path(__file__).parents[2] / "unigen" / "training"
    source = "".join(path.read_text("utf-8") for path in root.rglob("*.py"))
    names = {*re.findall(r"signals\.phase\(\"([^\"]+)", source), WAITING}
    assert names >= {"data", "loading", "saving", "forward/backward"}
    told = (f"phase {name} is {end}" for name in names for end in ("broken off", "finished"))
    for met in ("what is under way is finished", *told):
        text = f"SIGINT: {met}, then the last finished step is saved and the run ends (exit code 75)."
        said = in_language(f"{text} A second signal ends it at once, unsaved", "zh")
        assert not re.search("[A-Za-z]", said.removeprefix("SIGINT")), said
