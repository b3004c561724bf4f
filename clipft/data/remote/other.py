"""Files of object stores by way of fsspec, and the output of commands, as bodies like those of http."""

import os
import select
import signal
import subprocess
import tempfile
from contextlib import suppress

from clipft.data.remote.addresses import words_of
from clipft.data.remote.body import Body, Fault

BLOCK = 8 << 20  # bytes that fsspec asks for at a time
LATE = "The credentials and the network of this machine decide: try the store's own program."


def open_store(address: str, start: int, timeout_s: float) -> Body:
    """A file of an object store from this byte on; the store's own library has the time limits."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(address)
        store.invalidate_cache()
        about = store.info(path)
        file = store.open(path, "rb", block_size=BLOCK)
        file.seek(start)
    except (FileNotFoundError, PermissionError) as error:
        said = "there is no such file" if isinstance(error, FileNotFoundError) else "access is denied"
        raise Fault(said, final=True, absent=True, advice="Check the address and your credentials.") from error
    except Exception as error:  # each library has errors of its own
        raise Fault(named(error), advice=LATE) from error

    def read(most: int) -> bytes:
        try:
            return file.read(most)
        except Exception as error:
            raise Fault(named(error), advice=LATE) from error

    stamp = next((str(about[key]) for key in ("ETag", "etag", "LastModified", "mtime") if about.get(key)), None)
    return Body(read, file.close, start, about.get("size"), stamp)


def named(error: Exception) -> str:
    """The kind of the error alone: the text of some libraries holds signed addresses."""
    return type(error).__name__


def open_pipe(address: str, timeout_s: float) -> Body:
    """What a command writes to its standard output; it is ended where nothing comes in time."""
    told = tempfile.TemporaryFile()
    words = words_of(address)
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, start_new_session=True
        )
    except OSError as error:
        told.close()
        raise Fault(f"{words[0]} cannot be started ({error.strerror})", final=True) from error
    assert process.stdout is not None
    output = process.stdout.fileno()

    def read(most: int) -> bytes:
        if not select.select([output], [], [], timeout_s)[0]:
            raise Fault(f"the command has written nothing for {timeout_s:g} s")
        if raw := os.read(output, most):
            return raw
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Fault(f"the command has closed its output and not ended in {timeout_s:g} s") from error
        if code:
            raise Fault(f"the command ended with code {code}{last_line(told)}")
        return b""

    def close() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        told.close()

    return Body(read, close, 0, None, None)


def last_line(told) -> str:
    """The last line of what the command has written to its standard error."""
    told.seek(max(0, told.seek(0, os.SEEK_END) - 1000))
    lines = told.read().decode("utf-8", "replace").strip().splitlines()
    return f" ({lines[-1]})" if lines else ""
