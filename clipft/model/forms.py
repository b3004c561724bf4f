"""What kind of weight file a path holds, from its first bytes; torch is not imported."""

import json
import os
import zipfile
from pathlib import Path

SAFETENSORS, STATE, TORCHSCRIPT, NUMPY, PICKLE = "safetensors", "torch.save", "TorchScript", "NumPy", "old torch.save"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz")
FOREIGN = {
    b"\x93NUMPY": "a single NumPy array; big_vision's weights come as .npz",
    b"\x1f\x8b": "packed with gzip: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from",
    b"<": "a web page or XML: the download of the weights went wrong",
    b"{": "JSON: give the weights that belong to it",
}
MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def form_of(path: Path) -> str:
    """One of the constants above; raises for anything else, and for files that are cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    if head[:4] == b"PK\x03\x04":
        return form_of_zip(path)
    if head[:2] == b"\x80\x02":
        return PICKLE
    if head[8:9] == b"{" and size > (length := int.from_bytes(head[:8], "little")) <= MOST_HEADER_BYTES:
        check_safetensors(path, length)
        return SAFETENSORS
    known = next((why for start, why in FOREIGN.items() if head.lstrip().startswith(start)), "")
    what = "empty" if not size else known or "no weight file that clipft knows"
    raise ValueError(
        f"{path} is damaged: {size:,} bytes, {what}. Use safetensors, a file of torch.save, OpenAI's TorchScript "
        "archive, or big_vision's .npz."
    )


def form_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(no_whole_archive(path, error)) from error
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return TORCHSCRIPT
    if "data.pkl" in inside:
        return STATE
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    raise ValueError(f"{path} is a zip file without weights. If it is packed, unpack it and give the file inside.")


def check_safetensors(path: Path, length: int) -> None:
    """Raises unless the file is as long as its header says."""
    with path.open("rb") as file:
        header = file.read(8 + length)[8:]
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its safetensors header cannot be read ({error!r}).") from error
    if (size := path.stat().st_size) != 8 + length + end:
        raise ValueError(f"{path} is damaged: {size:,} bytes, and its header says {8 + length + end:,}.")


def check_archive(path: Path) -> None:
    """Raises unless every byte of a zip file is there as it was written (the format keeps a CRC of each part).

    torch.load itself does not look at them: a flipped bit in a tensor would load as another weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except Exception as error:  # zipfile raises half a dozen types, by where the damage lies
        raise ValueError(no_whole_archive(path, error)) from error
    if damaged:
        raise ValueError(f"{path} is damaged: the bytes of {damaged} are not those that were written.")


def no_whole_archive(path: Path, error: Exception) -> str:
    return f"{path} is damaged: {os.path.getsize(path):,} bytes that are no whole archive ({error})."
