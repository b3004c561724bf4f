"""What an attempt to read a remote file gives: a body to read, or a fault."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Body:
    """An open answer."""

    read: Callable[[int], bytes]
    """Up to so many bytes; none at the end. Raises Fault."""
    close: Callable[[], None]
    start: int
    """Byte of the file that it begins with."""
    total: int | None
    """Bytes of the whole file, where the server says so."""
    stamp: str | None
    """What is another one when the file is another one: its ETag, or the time of its last change."""


class Fault(Exception):
    """What went wrong in one attempt."""

    def __init__(
        self,
        what: str,
        *,
        final: bool = False,
        absent: bool = False,
        restart: bool = False,
        wait_s: float | None = None,
        total: int | None = None,
        advice: str = "",
    ):
        super().__init__(what)
        self.final = final
        """Another attempt would end alike."""
        self.absent = absent
        """There is no such file, as far as this machine may know."""
        self.restart = restart
        """The bytes so far are of no use."""
        self.wait_s = wait_s
        """Seconds that the server asks to wait."""
        self.total = total
        """Bytes of the whole file, where the server has said so with its refusal."""
        self.advice = advice
