"""Folders of images -> rows: captions from the text beside each image, or labels from the folders they lie in."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.caption import caption_list, parse_json, read_utf8
from clipft.data.names import SPLIT_OF, natural, ordered
from clipft.data.sample import IMAGE_KINDS, BadSample
from clipft.data.sources.paths import is_inside
from clipft.data.sources.row import Ask, Bad, Raw, Source
from clipft.data.sources.tables import Part, split_name, table_source
from clipft.data.split import counted

TEXTS = (".json", ".txt")
NOT_NAMED = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass
class Tree:
    """The files below a folder, as paths from it on, in the order in which people count them."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)
    """Suffix -> number of files that are neither."""
    outside: list[str] = field(default_factory=list)
    """Links that lead out of the folder."""


def walk(folder: Path, trusted: bool) -> Tree:
    """All files below the folder; links that lead out of it are followed only where the user trusts them."""
    tree, limit, seen = Tree(folder), os.path.realpath(folder), set()
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        here = os.path.realpath(folder / inner)
        if here in seen:
            continue  # a link to a folder above
        seen.add(here)
        for entry in sorted(os.scandir(folder / inner), key=lambda entry: entry.name):
            path = f"{inner}/{entry.name}" if inner else entry.name
            if entry.name.startswith((".", "__MACOSX")) or entry.name in NOT_NAMED:
                continue
            if entry.is_symlink() and not trusted and not is_inside(os.path.realpath(entry.path) + "/", limit):
                tree.outside.append(path)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # to nothing, or to itself
                tree.others["broken link or other special file"] += 1
            elif entry.is_dir():
                waiting.append(path)
            elif entry.is_file():
                add(tree, path)
            else:
                tree.others["broken link or other special file"] += 1
    tree.images.sort(key=natural_path)
    tree.outside.sort(key=natural_path)
    return tree


def add(tree: Tree, path: str) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix.lstrip(".") in IMAGE_KINDS:
        tree.images.append(path)
    elif suffix in TEXTS:
        tree.texts.add(path)
    else:
        tree.others[suffix or "without a suffix"] += 1


def natural_path(path: str) -> list[list[str | int]]:
    return [natural(part) for part in path.split("/")]


def has_text(tree: Tree, image: str) -> bool:
    return any(stem_of(image) + suffix in tree.texts for suffix in TEXTS)


def folder_source(ask: Ask, folder: Path) -> Source:
    """Pairs where most images have a text beside them, classes where none has and all lie in folders."""
    tree = walk(folder, trusted=ask.root is not None)
    num_texts = sum(has_text(tree, image) for image in tree.images)
    nested = [image for image in tree.images if "/" in image]
    kind = ask.format
    if kind is None and 0 < num_texts < len(tree.images) / 2:
        raise ValueError(
            f"source={ask.source!r}: {num_texts} of {len(tree.images)} images have a text of the same name beside "
            "them. Decide: format=pairs (the others are left out) or format=classes (folders are labels)."
        )
    if kind is None:
        kind = "pairs" if num_texts or not nested else "classes"
    if not tree.images or (kind == "pairs" and not num_texts) or (kind == "classes" and not nested):
        raise ValueError(
            f"source={ask.source!r}: {len(tree.images)} images found, beside {unread(tree) or 'no other file'}. "
            "Expected images with a text of the same name (1.jpg and 1.txt), a folder for each class (cat/1.jpg), "
            "or a table of images and captions."
        )
    splits = split_folders(tree.images)
    read = partial(read_pairs if kind == "pairs" else read_classes, tree=tree, splits=splits)
    return described(ask, tree, kind, splits, read)


def described(ask: Ask, tree: Tree, kind: str, splits: dict[str, str], read: Any) -> Source:
    text = "images with captions in files of the same name" if kind == "pairs" else "a folder per class"
    if splits:
        text += f", splits {' '.join(ordered(set(splits.values())))} by folder"
    source = table_source(ask, text, [Part(tree.folder / "images")], read, "image", captioned=True)
    other = "classes" if kind == "pairs" else "pairs"
    return replace(
        source,
        said=f"read as: {text}, {counted(len(tree.images), 'image')} (override with format={other} or another)",
        limit=None if ask.root is not None else str(tree.folder),
        hints={"image_outside_source": f"a link leads out of {tree.folder}; root={ask.source} allows it"},
        notes=[f"not read: {files}"] if (files := unread(tree)) else [],
    )


def unread(tree: Tree) -> str:
    """The files that are no images and no texts beside one, counted by suffix."""
    stems = {stem_of(image) for image in tree.images}
    lone = Counter(f"{os.path.splitext(text)[1]} without an image" for text in tree.texts if stem_of(text) not in stems)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted((tree.others + lone).items()))


def stem_of(path: str) -> str:
    return os.path.splitext(path)[0]


def split_folders(images: list[str]) -> dict[str, str]:
    """Folder -> split, where the first folders are splits: all of them, or train with val or test among them.

    A class may be called train.
    """
    tops = list(dict.fromkeys(image.split("/")[0] for image in images if "/" in image))
    known = {top: SPLIT_OF.get(top.lower()) for top in tops}
    whole = len(tops) > 0 and all(known.values()) and all("/" in image for image in images)
    if whole or ("train" in known.values() and {"val", "test"} & set(known.values())):
        return {top: known[top] or split_name(top) or "train" for top in tops}
    return {}


def read_pairs(_: Path, tree: Tree, splits: dict[str, str]) -> Iterator[Raw | Bad]:
    """Rows of images with the texts beside them."""
    for image in tree.images:
        values: dict[str, Any] = {"image": image}
        top = image.split("/")[0]
        if top in splits:
            values["split"] = top
        try:
            yield beside(tree, image, values)
        except BadSample as bad:
            yield Bad(image, bad.reason, splits.get(top))
        except OSError:
            yield Bad(image, "text_unreadable", splits.get(top))
    yield from (Bad(path, "image_outside_source") for path in tree.outside)


def beside(tree: Tree, image: str, values: dict[str, Any]) -> Raw:
    """The image with the columns of its .json, and the lines of its .txt where these have no caption."""
    stem, captions = stem_of(image), []
    if f"{stem}.txt" in tree.texts:
        captions = caption_list(read_utf8((tree.folder / f"{stem}.txt").read_bytes()).split("\n"))
    if f"{stem}.json" in tree.texts:
        found = parse_json((tree.folder / f"{stem}.json").read_bytes())
        if isinstance(found, dict):
            values = {**found, **values}
        else:
            captions = caption_list(found) or captions
    return Raw(image, values, image=path_of(tree, image), captions=captions)


def path_of(tree: Tree, image: str) -> str:
    return os.path.join(os.path.abspath(tree.folder), image)


def read_classes(_: Path, tree: Tree, splits: dict[str, str]) -> Iterator[Raw | Bad]:
    """Rows of images with the first folder they lie in as label, below that of the split."""
    for image in tree.images:
        folders = image.split("/")[:-1]
        values: dict[str, Any] = {"image": image}
        split = folders.pop(0) if splits and folders and folders[0] in splits else None
        if folders:
            values["label"] = folders[0]
        if split is not None:
            values["split"] = split
        yield Raw(image, values, image=path_of(tree, image))
    yield from (Bad(path, "image_outside_source") for path in tree.outside)
