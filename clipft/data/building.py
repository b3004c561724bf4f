"""A packed set while it is being written: beside its final place, kept over a kill, moved there in one move."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clipft.data.manifest import MANIFEST, SMALL_FILES
from clipft.report import RunFailed

AGAIN = "Run the same command again when the cause is gone: what is finished is kept."


@dataclass(frozen=True)
class Building:
    """Folders beside the final place: the set as it will be, and notes on what is done."""

    place: Path

    @property
    def set(self) -> Path:
        return self.place / "set"

    @property
    def notes(self) -> Path:
        return self.place / "notes"


@contextmanager
def building(out: str) -> Iterator[Building]:
    """The only process that builds this set. After an error in what the user gave nothing stays behind; after any
    other end, a kill included, what is finished stays for the next run."""
    # Absolute, since "." has no name to build beside.
    folder = Path(os.path.abspath(Path(out).expanduser()))
    place = Building(folder.with_name(f".{folder.name}.building"))
    with locked(place.place):
        try:
            place.set.mkdir(exist_ok=True)
            place.notes.mkdir(exist_ok=True)
            yield place
        except ValueError:
            shutil.rmtree(place.place, ignore_errors=True)
            raise
        except OSError as error:  # such as a full disk
            raise RunFailed(f"{error.filename or folder}: {error.strerror or error}. {AGAIN}") from error
        except KeyboardInterrupt:
            print("stopped: the same command goes on with what is not finished", file=sys.stderr, flush=True)
            raise
        shutil.rmtree(place.place, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made where it is missing; waits where another process holds it."""
    file = claim(folder)
    try:
        yield
    finally:
        file.close()


def claim(folder: Path) -> IO[str]:
    """The folder's lock file, locked; the process before may have removed it together with the folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file = (folder / "lock").open("w")
            wait_for_lock(file, folder)
            if is_at(file, folder / "lock"):
                return file
            file.close()


def is_at(file: IO[str], path: Path) -> bool:
    """Whether this is the file of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def wait_for_lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that is packing ({folder})", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return


def move_into_place(name: str, place: Building) -> None:
    """Give the finished folder its name, unless the same already has it."""
    out = Path(os.path.abspath(Path(name).expanduser()))
    try:
        os.rename(place.set, out)  # also onto an empty folder
    except OSError:
        if not (out / MANIFEST).is_file():
            raise
        # The first of them has the shards' hashes: equal ones, equal sets.
        differing = [file for file in SMALL_FILES if content_at(place.set / file) != content_at(out / file)]
        if differing:
            raise ValueError(
                f"out={name!r} holds another packed set ({differing[0]} differs). Remove it or choose another out."
            ) from None


def content_at(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
