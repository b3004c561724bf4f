"""Files that are whole or not there, and where what can be made again is kept."""

import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Puts the content there in one move, so that no reader and no kill ever meets half of it.

    Raises OSError with the file's name; what was there before then stays, and nothing else is left.
    """
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # writers at the same time do not meet
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        if os.access(temporary, os.F_OK):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def user_cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipft"
