"""A web server in this process that serves a folder, and fails as it is told to."""

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from clipft.data.remote.fetch import Patience


@dataclass
class Fail:
    """What the server does with one request; the fields that are set say what differs from a good answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Bytes of the body that are sent before the connection ends."""
    length: bool = True
    """Whether the answer has a Content-Length."""
    reset: bool = False
    """Whether the connection ends with a reset."""
    slow_s: float = 0
    """Seconds before each byte of the body."""
    hold_s: float = 0
    """Seconds that the connection stays open behind what is sent."""
    body: bytes | None = None
    """Instead of the file's bytes."""


@dataclass
class Site:
    folder: Path
    url: str
    fails: dict[str, list[Fail]]
    """Path -> what happens to the next requests for it, one after the other; after them all goes well."""
    always: dict[str, Fail]
    asked: list[tuple[str, str | None]]
    """Path and Range of each request."""
    ranges: bool = True
    sleeps: list[float] = field(default_factory=list)

    def count(self, path: str) -> int:
        return sum(name == path for name, _ in self.asked)

    def patience(self, **changed: Any) -> Patience:
        """That of the program, but for the time: what it would sleep is noted."""
        options = {"tries": 4, "wait_s": 1.0, "timeout_s": 0.5, "sleep": self.sleeps.append}
        return Patience(**(options | changed))


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Serves the folder at a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            here.asked.append((path, self.headers.get("Range")))
            fail = here.fails[path].pop(0) if here.fails[path] else here.always.get(path, Fail())
            file = folder / path.lstrip("/")
            if fail.status is None and fail.body is None and not file.is_file():
                fail = Fail(status=404)
            raw = (fail.body or b"no such thing") if fail.status or fail.body is not None else file.read_bytes()
            self.answer(fail, raw)

        def answer(self, fail: Fail, raw: bytes) -> None:
            wanted = self.headers.get("Range")
            start = int(wanted.split("=")[1].split("-")[0]) if wanted and here.ranges and not fail.status else 0
            tag = md5(raw).hexdigest()
            if start and start >= len(raw):
                fail, raw = Fail(status=416, headers={"Content-Range": f"bytes */{len(raw)}"}), b""
                start = 0
            self.send_response(fail.status or (206 if start else 200))
            headers = {"ETag": f'"{tag}"', **fail.headers}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
            part = raw[start:]
            if fail.length:
                headers["Content-Length"] = str(len(part))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            part = part if fail.cut is None else part[: fail.cut]
            if fail.slow_s:
                for n in range(len(part)):
                    self.wfile.write(part[n : n + 1])
                    time.sleep(fail.slow_s)
            self.wfile.write(b"" if fail.slow_s else part)
            time.sleep(fail.hold_s)
            if fail.reset:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Of a client that went away in the middle."""

    server = Server(("127.0.0.1", 0), Handler)
    here = Site(folder, f"http://127.0.0.1:{server.server_address[1]}", defaultdict(list), {}, [])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
