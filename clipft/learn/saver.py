"""Writes training states beside training, one at a time; a disk that fails costs states, not the run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from clipft.learn.checkpoint import forget_old, note_in_manifest, point, read_state, saved_steps, write_state
from clipft.learn.memory import host_memory
from clipft.learn.nested import copied, size_of
from clipft.report import RunFailed, megabytes

MOST_FAILURES = 3  # saves in a row
ROOM = 1.05  # bytes on disk against bytes of tensors


class Saver(CheckpointIO):
    """Lightning's way to the disk: copies the tensors, so that training may change them, and writes in a thread."""

    def __init__(self, keep: int, about: dict[str, Any], say: Callable[[str], None]):
        """`about` goes into the manifest with each state; `say` gets one line for each save that fails."""
        self.keep, self.about, self.say = keep, about, say
        self.thread: Thread | None = None
        self.failures = 0  # in a row
        self.why = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        if self.failures >= MOST_FAILURES:
            raise RunFailed(f"{self.failures} states in a row could not be saved. {self.why}")
        path = Path(path)
        if host_memory() < 2 * size_of(checkpoint):
            self._write(checkpoint, path)
            return
        self.thread = Thread(target=self._write, args=(copied(checkpoint), path), name="clipft-saver")
        self.thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self) -> None:
        """Waits for the last state; raises when it is not on disk."""
        self.wait()
        if self.failures:
            raise RunFailed(self.why)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _write(self, state: dict[str, Any], path: Path) -> None:
        try:
            self._write_or_raise(state, path)
            self.failures = 0
        except Exception as error:  # in a thread nobody would see it; finish() and the next save do
            self.failures += 1
            steps = saved_steps(path.parent)
            last = f"the newest whole state is step {steps[-1]}" if steps else "there is no saved state yet"
            self.why = f"The state of step {state['clipft']['step']} was not saved: {error}; {last}."
            self.say(f"warning: {self.why}")

    def _write_or_raise(self, state: dict[str, Any], path: Path) -> None:
        folder, of = path.parent, state["clipft"]
        check_room(folder, round(ROOM * size_of(state)))
        sha256 = write_state(state, path)
        names = ["last"]
        if of["best_step"] == of["step"] or not (folder / "best.ckpt").exists():
            names.insert(0, "best")
        for name in names:
            point(folder, name, path)
        forget_old(folder, self.keep)
        try:
            self._describe(path, names, sha256, of)
        except OSError as error:
            self.say(f"warning: {folder}/manifest.json was not written ({error}); the state itself is saved")

    def _describe(self, path: Path, names: list[str], sha256: str, of: dict[str, Any]) -> None:
        used = {"used": of["ledger"]["used"], "dropped": of["ledger"]["dropped"]}
        entry = {"step": of["step"], "sha256": sha256, "bytes": path.stat().st_size, **used, **self.about}
        note_in_manifest(path.parent, [path.name, *(f"{name}.ckpt" for name in names)], entry)


def check_room(folder: Path, needed: int) -> None:
    """Raises when the disk has no room for so many bytes: a full disk would stop other programs too."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {megabytes(free)} of room left and a state needs {megabytes(needed)}")
