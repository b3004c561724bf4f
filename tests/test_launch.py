"""The supervisor, with ranks that are small scripts."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from clipft import launch

pytestmark = pytest.mark.process


def ranks(*scripts: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", script]) for script in scripts]


def test_all_done_is_zero():
    assert launch.supervise(ranks("", "")) == 0


def test_the_first_failure_ends_the_others_and_gives_the_code(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    both = ranks("import time; time.sleep(60)", "raise SystemExit(2)")
    assert launch.supervise(both) == 2
    assert all(process.poll() is not None for process in both)


def test_a_killed_rank_gives_the_shells_code(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    assert launch.supervise(ranks("import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)")) == 128 + 9


def test_a_signal_reaches_every_rank_and_their_code_comes_back(monkeypatch, tmp_path):
    script = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(60)\n"
    )

    def start(command, config_file, rank, world, port):
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / str(rank))])

    def stop_when_ready():
        while not all((tmp_path / name).exists() for name in "01"):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(launch, "start_rank", start)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    assert launch.launch("train", tmp_path, 2) == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
