"""JSON lines, JSON lists, JSON of image -> captions, and COCO captions -> rows."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.caption import parse_json
from clipft.data.sample import BadSample
from clipft.data.sources.row import Ask, Bad, Raw, Source
from clipft.data.sources.tables import Part, table_source

MOST_BYTES = 4 << 30  # of a JSON file that is not one object per line: it is held in memory whole


def jsonl_source(ask: Ask, parts: list[Part], kind: str = "JSON lines") -> Source:
    return table_source(ask, kind, parts, read_jsonl, "line", known_as="jsonl")


def read_jsonl(path: Path) -> Iterator[Raw | Bad]:
    """Objects by line number (from 1); blank lines are nothing."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield from as_rows(line, parse_json(raw))
            except BadSample as bad:
                yield Bad(line, bad.reason)


def as_rows(where: int, value: Any) -> Iterator[Raw | Bad]:
    yield Raw(where, value) if isinstance(value, dict) else Bad(where, "not_an_object")


def json_source(ask: Ask, parts: list[Part]) -> Source:
    """Told apart by their first value: a list of rows, lines under another suffix, COCO, or images with captions."""
    kinds = {part.path: json_kind(part.path) for part in parts}
    if len(set(kinds.values())) > 1:
        names = ", ".join(f"{path.name}: {kind}" for path, kind in kinds.items())
        raise ValueError(f"source={ask.source!r}: its JSON files are of several kinds ({names}). Name one as source=.")
    kind = kinds[parts[0].path]
    if kind == "JSON lines":
        return jsonl_source(ask, parts)
    item, known_as = ("annotation", "") if kind == "COCO captions" else ("row", "json" if "list" in kind else "")
    return table_source(ask, kind, parts, partial(read_json, kind=kind), item, known_as=known_as)


def json_kind(path: Path) -> str:
    """What the file holds, by its beginning and, but for JSON lines, its outermost value."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    try:
        if more and isinstance(parse_json(first), dict):
            return "JSON lines"
    except BadSample:
        pass
    value = load(path)
    if isinstance(value, list):
        return "a JSON list"
    if isinstance(value, dict) and isinstance(value.get("images"), list) and "annotations" in value:
        return "COCO captions"
    if isinstance(value, dict) and value and all(are_texts(captions) for captions in value.values()):
        return "JSON of images with their captions"
    raise ValueError(
        f"{path} is JSON of an unknown shape. Expected a list of objects, an object per line, COCO captions "
        '(images and annotations), or {"a.jpg": ["a red ball"]}. Where it is not what you mean: format=pairs, classes '
        "or another, or source=FILE."
    )


def are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def load(path: Path) -> Any:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than 4 GiB and would be held in memory whole. Write one object per line.")
    try:
        return parse_json(path.read_bytes())
    except BadSample as bad:
        raise ValueError(f"{path} is no JSON ({bad.reason}).") from bad


def read_json(path: Path, kind: str) -> Iterator[Raw | Bad]:
    value = load(path)
    if kind == "COCO captions":
        yield from read_coco(path, value)
    elif isinstance(value, dict):
        for number, (image, captions) in enumerate(value.items(), start=1):
            yield Raw(number, {"image": image, "captions": captions})
    else:
        for number, row in enumerate(value, start=1):
            yield from as_rows(number, row)


def read_coco(path: Path, value: dict[str, Any]) -> Iterator[Raw | Bad]:
    """A row per annotation, with the columns of its image; then those images that no annotation names.

    Format: https://cocodataset.org/#format-data, "captions".
    """
    images = {image["id"]: image for image in value["images"] if isinstance(image, dict) and "id" in image}
    annotations = value["annotations"] if isinstance(value["annotations"], list) else []
    if annotations and not any(isinstance(each, dict) and "caption" in each for each in annotations):
        raise ValueError(f"{path}: its annotations have no caption. Expected a captions file of COCO.")
    named = set()
    for number, annotation in enumerate(annotations, start=1):
        image = images.get(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if image is None:
            yield Bad(number, "no_image")
            continue
        named.add(image["id"])
        yield Raw(number, {**image, "caption": annotation.get("caption")})
    for image in images.values():
        if image["id"] not in named:
            yield Raw(f"image {image['id']}", {**image, "caption": None})
