"""Libraries that only some sources need; a missing one is answered with the line that installs it."""

from functools import lru_cache
from typing import Any

PYARROW = "pyarrow>=15"
DATASETS = "datasets>=3"


def load_parquet() -> Any:
    """The module pyarrow.parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"Parquet files are read with pyarrow, which is not installed: {pip(PYARROW)}") from error
    return pyarrow.parquet


@lru_cache(4)
def load_datasets(path: str) -> dict[str, Any]:
    """The datasets of a folder that datasets.save_to_disk wrote, by split; of a folder without splits by ""."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path} is a folder of Hugging Face's datasets, which is not installed: {pip(DATASETS)}"
        ) from error
    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: datasets.load_from_disk cannot read it ({error}).") from error
    return {str(split): part for split, part in loaded.items()} if isinstance(loaded, dict) else {"": loaded}


def pip(requirement: str) -> str:
    return f'pip install "{requirement}"'
