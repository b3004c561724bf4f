"""The supervisor, with ranks that are small scripts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clipft import launch
from clipft.launch import Watched
from clipft.report import PIPE

pytestmark = pytest.mark.process

TELL = (
    "import json, os\n"
    "def tell(**words):\n"
    "    os.write(int(os.environ['{pipe}']), (json.dumps(words) + chr(10)).encode())\n"
)
SLEEP = "import time; time.sleep(60)"


def start(script: str) -> Watched:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    process = subprocess.Popen(
        [sys.executable, "-c", TELL.format(pipe=PIPE) + script],
        env={**os.environ, PIPE: str(writing)},
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    return Watched(process, reading)


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    monkeypatch.setattr(launch, "STACK_S", 0.3)


def supervised(*scripts: str) -> int:
    job = launch.Job(start(script) for script in scripts)
    code = launch.supervise(job)
    assert all(rank.code is not None for rank in job.ranks)
    return code


def last_line(capfd) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def test_all_done_is_zero(capfd):
    assert supervised("", "tell(step=3)") == 0
    assert capfd.readouterr().err == ""


def test_the_first_failure_ends_the_others_and_gives_the_code(short_grace, capfd):
    assert supervised(SLEEP, "tell(error='error: the reason', through_another=False); raise SystemExit(2)") == 2
    assert last_line(capfd) == "rank 1 of 2: error: the reason"


def test_the_cause_is_said_last_and_not_what_the_others_lost_by_it(short_grace, capfd):
    lost = "tell(error='Connection closed by peer', through_another=True); raise SystemExit(1)"
    late = "import time; time.sleep(0.3); tell(error='ZeroDivisionError', through_another=False); raise SystemExit(1)"
    assert supervised(lost, late) == 1
    assert last_line(capfd) == "rank 1 of 2: ZeroDivisionError"


def test_what_all_ranks_meet_is_said_once(short_grace, capfd):
    both = "tell(error='error: bad data', through_another=False); raise SystemExit(2)"
    assert supervised(both, both) == 2
    assert capfd.readouterr().err.splitlines() == ["error: bad data"]


def test_a_killed_rank_is_named_with_its_step_and_gives_the_shells_code(short_grace, capfd):
    assert supervised("tell(step=7); os.kill(os.getpid(), 9)", SLEEP) == 128 + 9
    assert "rank 0 of 2 was ended by SIGKILL after step 7" in last_line(capfd)


def test_a_rank_that_hangs_is_named_and_shows_its_stack(short_grace, capfd):
    hung = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2); tell(step=4)\n"
    hung += "def stuck():\n    time.sleep(60)\nstuck()"
    lost = "import time; time.sleep(0.5); tell(error='Timed out', through_another=True); raise SystemExit(1)"
    assert supervised(lost, hung) == 1
    said = capfd.readouterr().err
    assert "in stuck" in said and "rank 1 after step 4 did not answer" in said.splitlines()[-1]


def test_a_rank_that_stopped_as_asked_takes_the_others_along_without_an_error(short_grace, capfd):
    polite = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(60)"
    assert supervised("import time; time.sleep(0.5); raise SystemExit(143)", polite) == 143
    assert capfd.readouterr().err == ""


def test_what_a_failed_rank_has_started_is_ended_with_it(short_grace, tmp_path):
    child = f"import pathlib, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{SLEEP}'])\n"
    child += f"pathlib.Path('{tmp_path}/pid').write_text(str(p.pid)); os.kill(os.getpid(), 9)"
    assert supervised(child) == 137
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_messages_arrive_whole_however_they_are_cut():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    rank = Watched(subprocess.Popen(["true"]), reading)
    raw = "".join(json.dumps(words) + "\n" for words in ({"step": 1}, {"step": 2, "error": "x"})).encode()
    for start_at in range(0, len(raw), 5):
        os.write(writing, raw[start_at : start_at + 5])
        rank.listen()
    assert rank.said == {"step": 2, "error": "x"}
    rank.process.wait()
    os.close(writing)
    os.close(reading)


def test_a_signal_reaches_every_rank_and_their_code_comes_back(monkeypatch, tmp_path):
    script = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "pathlib.Path({path!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def stop_when_ready():
        while not all((tmp_path / name).exists() for name in "01"):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(
        launch, "start_rank", lambda command, file, rank, *_: start(script.format(path=str(tmp_path / str(rank))))
    )
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    assert launch.launch("train", tmp_path, 2) == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
