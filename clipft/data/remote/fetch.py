"""A remote file, whole: attempts one after the other, each going on where the last one broke off."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO

from clipft.data.remote.addresses import PACKAGES, PIPE, scheme_of, shown
from clipft.data.remote.body import Body, Fault

CHUNK = 1 << 18
LEAST_RATE = 1024  # bytes a second; what comes slower for timeout_s counts as broken off
ENOUGH = 1 << 24  # new bytes after which attempts are counted from the start
SAID_S = 4.0  # attempts and waits of this length are said
MOST_SMALL = 1 << 30  # bytes of a list or an index
AGAIN = "See whether the server can be reached, and start the same command again: it goes on."
CHANGED = (
    "It is another file than the one that was listed or indexed. Run clipft data index again, or put the files there "
    "again with their shards.json."
)


@dataclass(frozen=True)
class Patience:
    """How long a server is tried."""

    tries: int = 6
    wait_s: float = 1.0
    """After the first failure; twice as long after each further one."""
    longest_wait_s: float = 120.0
    timeout_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep


class NotFetched(Exception):
    """A file could not be had; the message says which, what came and what to do."""

    def __init__(self, message: str, fault: Fault):
        super().__init__(message)
        self.final, self.absent = fault.final, fault.absent


def nothing() -> None:
    """What a wait tells others where nobody listens."""


def open_body(address: str, start: int, patience: Patience) -> Body:
    """An attempt at the file from byte `start` on."""
    if address.startswith(PIPE):
        from clipft.data.remote.other import open_pipe

        return open_pipe(address, patience.timeout_s)
    if scheme_of(address) in PACKAGES:
        from clipft.data.remote.other import open_store

        return open_store(address, start, patience.timeout_s)
    from clipft.data.remote.http import open_http

    return open_http(address, start, patience.timeout_s)


class Fetch:
    """One file on its way into `file`."""

    def __init__(
        self,
        address: str,
        file: BufferedIOBase,
        size: int | None,
        patience: Patience,
        beat: Callable[[], None],
        most: int | None = None,
    ):
        self.address, self.file, self.patience, self.beat = address, file, patience, beat
        self.most = most
        """Bytes above which it cannot be what is looked for."""
        self.size = size
        """Bytes that are to come, where they are known beforehand."""
        self.have = 0
        self.total: int | None = size
        self.stamp: str | None = None

    def run(self, wrong: Callable[[], str], advice: str = CHANGED) -> None:
        """Brings the whole file, that `wrong` finds nothing wrong with; NotFetched after too many attempts.

        `advice` is what to do where the bytes that come stay wrong.
        """
        failures, spoiled, reached = 0, 0, 0
        while True:
            began_s = time.monotonic()
            try:
                self.attempt()
                if not (what := wrong()):
                    return
                spoiled += 1
                # What a server sends twice it will send again; without a length it may also have been cut off.
                final = spoiled > 1 and self.total is not None
                raise Fault(what, restart=self.total is not None, final=final, advice=advice)
            except Fault as fault:
                if fault.total is not None and fault.total == self.have:  # complete, and yet wrong
                    fault.final = True
                failures = 1 if self.have >= reached + ENOUGH else failures + 1
                reached = max(reached, self.have)
                wait_s = fault.wait_s if fault.wait_s is not None else self.patience.wait_s * 2 ** (failures - 1)
                if fault.final or failures >= self.patience.tries or wait_s > self.patience.longest_wait_s:
                    raise NotFetched(self.failed(fault, failures, wait_s), fault) from fault
                if fault.restart or self.address.startswith(PIPE):
                    self.restart()
                if wait_s >= SAID_S or time.monotonic() - began_s >= SAID_S:
                    again = f"again in {wait_s:.0f} s ({failures} of {self.patience.tries})"
                    print(f"warning: {shown(self.address)}: {fault}; {again}", file=sys.stderr, flush=True)
                self.wait(wait_s)

    def attempt(self) -> None:
        body = open_body(self.address, self.have, self.patience)
        try:
            if body.start not in (0, self.have):
                raise Fault(f"bytes from {body.start} on came, those from {self.have} on were asked for", restart=True)
            if body.start and (body.stamp != self.stamp or None is not body.total != self.total is not None):
                raise Fault("the file was changed while it was read", restart=True)
            if self.have and not body.start:  # the server gives no parts
                self.restart()
            self.stamp = body.stamp
            self.total = self.size if self.size is not None else body.total
            if body.total not in (None, self.total):
                what = f"it has {body.total:,} bytes, {self.total:,} are expected"
                raise Fault(what, final=True, advice=CHANGED)
            self.copy(body)
        finally:
            body.close()
        if self.total is not None and self.have != self.total:
            more = self.have > self.total
            raise Fault(f"{self.have:,} bytes came, {self.total:,} are expected", restart=more)

    def copy(self, body: Body) -> None:
        """Writes what comes, up to the end of the body."""
        marked_s, marked = time.monotonic(), self.have
        while chunk := body.read(CHUNK):
            self.file.write(chunk)
            self.have += len(chunk)
            self.beat()
            now_s = time.monotonic()
            if now_s - marked_s >= self.patience.timeout_s:
                if self.have - marked < LEAST_RATE * self.patience.timeout_s:
                    raise Fault(f"less than {LEAST_RATE} bytes a second came for {self.patience.timeout_s:g} s")
                marked_s, marked = now_s, self.have
            if self.most is not None and self.have > self.most:
                raise Fault(f"it has more than {self.most:,} bytes", final=True)
            if self.total is not None and self.have > self.total:
                return

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.have, self.stamp = 0, None
        self.total = self.size

    def wait(self, seconds: float) -> None:
        """Sleeps, in pieces, so that whoever looks at this process sees that it has a reason."""
        while seconds > 0:
            self.patience.sleep(min(seconds, 5.0))
            self.beat()
            seconds -= 5.0

    def failed(self, fault: Fault, failures: int, wait_s: float) -> str:
        tried = "" if fault.final else f" after {failures} attempts"
        if not fault.final and failures < self.patience.tries:
            tried = f", and the server asks to come back in {wait_s:,.0f} s"
        came = f" {self.have:,} of {self.total:,} bytes had come." if self.have and self.total else ""
        return f"{shown(self.address)} cannot be read: {fault}{tried}.{came} {fault.advice or AGAIN}"


def fetch_small(address: str, patience: Patience, wrong: Callable[[bytes], str]) -> bytes | None:
    """The bytes of a small file; None where there is none."""
    into = BytesIO()
    try:
        Fetch(address, into, None, patience, nothing, MOST_SMALL).run(lambda: wrong(into.getvalue()))
    except NotFetched as error:
        if error.absent:
            return None
        raise
    return into.getvalue()
