"""Rows -> findings.parquet: a row per item, with the picture as Hugging Face stores one, so that viewers show it."""

import json
from io import BytesIO

import numpy as np

from clipft.data.check.figures import Figures
from clipft.data.check.items import Contents
from clipft.data.check.rows import Rows
from clipft.data.sources.extras import load_parquet

FEATURES = {"info": {"features": {"image": {"_type": "Image"}}}}


def findings_of(rows: Rows, figures: Figures, contents: Contents) -> bytes:
    """The file's bytes. Numbers are null of items that cannot be used."""
    parquet = load_parquet()
    import pyarrow as pa

    looks, unknown = rows.seen.looks, ~rows.usable
    columns = {
        "key": pa.array([item.key for item in rows.items]),
        "split": pa.array([item.split for item in rows.items]),
        "shard": pa.array([plain(item.shard) for item in rows.items], pa.string()),
        "byte": pa.array([item.byte if item.byte >= 0 else None for item in rows.items], pa.int64()),
        "dropped": pa.array([reason or None for reason in rows.seen.reasons], pa.string()),
        "captions": pa.array(rows.seen.captions, pa.list_(pa.string())),
        "tokens": pa.array(rows.seen.tokens, pa.list_(pa.int32())),
        "label": pa.array([name_of(label, contents.classnames) for label in rows.seen.labels], pa.string()),
    }
    for name in ("width", "height", "bytes", "mode", "format", "light", "contrast", "sharpness"):
        columns[name] = pa.array(looks[name], mask=unknown)
    columns["digest"] = pa.array([f"{value:016x}" for value in looks["digest"].tolist()], mask=unknown)
    hashes = np.ascontiguousarray(looks["hash"]).view(np.uint8).reshape(len(looks), 16)
    columns["hash"] = pa.array([each.tobytes().hex() for each in hashes], mask=unknown | ~looks["hashed"])
    columns["same"] = pa.array([rows.items[i].key for i in rows.same.tolist()], mask=unknown)
    columns["group"] = pa.array([rows.items[i].key for i in rows.alike.tolist()], mask=unknown)
    columns["leak"] = pa.array(leak_column(rows, figures), pa.string())
    columns |= {name: pa.array(flag, mask=unknown) for name, flag in figures.flags.items()}
    columns["image"] = image_column(rows)
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(FEATURES)})
    file = BytesIO()
    parquet.write_table(table, file, compression="zstd", row_group_size=1000)
    return file.getvalue()


def plain(text: str) -> str | None:
    """The text without what is no Unicode, as in names of files; None for an empty one."""
    return text.encode("utf-8", "replace").decode() or None


def name_of(label: int, classnames: list[str]) -> str | None:
    if label < 0:
        return None
    return plain(classnames[label]) if label < len(classnames) else str(label)


def leak_column(rows: Rows, figures: Figures) -> list[str | None]:
    """The key of an image of an earlier split that is the same or looks the same, train before the others."""
    found: list[str | None] = [None] * len(rows.items)
    for pairs in figures.leaked.values():
        for here, there in pairs:
            found[here] = found[here] or rows.items[there].key
    return found


def image_column(rows: Rows):
    """A small JPEG each, or the path of the file where there is one."""
    import pyarrow as pa

    values = [
        {"bytes": thumb or None, "path": plain(item.image) if isinstance(item.image, str) else None}
        for item, thumb in zip(rows.items, rows.seen.thumbs, strict=True)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([value if any(value.values()) else None for value in values], kind)
