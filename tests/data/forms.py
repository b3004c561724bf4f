"""One small set in every form that packing reads, and what a packed set holds, to be compared."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shards import write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from clipft.config import PackConfig
from clipft.data.pack import Report, pack


@dataclass(frozen=True)
class Item:
    name: str
    raw: bytes
    captions: tuple[str, ...]
    label: str | None
    split: str


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (20, 24)) -> bytes:
    """Noise on a ramp, so that no two look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def captioned(num: int = 9) -> list[Item]:
    """Images with two captions each, with commas, quotes and letters beyond ASCII in them, in three splits."""
    splits = ["train", "train", "val", "train", "test", "train", "train", "val", "train"]
    return [
        Item(f"{i}.jpg", picture(i), (f'image {i}, "quoted"', f"Nummer {i}: ein Mädchen"), None, splits[i % 9])
        for i in range(num)
    ]


def labelled(num: int = 9) -> list[Item]:
    return [
        Item(f"{i}.jpg", picture(i), (), ("cat", "dog", "eel")[i % 3], ("train", "test")[i // 6]) for i in range(num)
    ]


def put_images(folder: Path, items: list[Item]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        (folder / item.name).write_bytes(item.raw)


def columns(item: Item, image: str = "image") -> dict[str, Any]:
    """The row of an item as JSON has it."""
    row: dict[str, Any] = {image: item.name}
    row |= {"captions": list(item.captions)} if item.captions else {}
    return row | ({"label": item.label} if item.label else {}) | {"split": item.split}


def jsonl(folder: Path, items: list[Item]) -> Path:
    put_images(folder, items)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(columns(item)) + "\n" for item in items))
    return folder


def json_list(folder: Path, items: list[Item]) -> Path:
    put_images(folder, items)
    (folder / "list.json").write_text(json.dumps([columns(item, "path") for item in items], indent=1))
    return folder / "list.json"


def csv_rows(folder: Path, items: list[Item], name: str = "table.csv", delimiter: str = ",") -> Path:
    """A row for each caption, as open_clip reads it."""
    put_images(folder, items)
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["filepath", "title", "label", "split"])
        for item in items:
            for caption in item.captions or ("",):
                writer.writerow([item.name, caption, item.label or "", item.split])
    return folder / name


def tsv_rows(folder: Path, items: list[Item]) -> Path:
    return csv_rows(folder, items, "table.tsv", "\t")


def utf16_rows(folder: Path, items: list[Item]) -> Path:
    """What spreadsheets call Unicode text, with semicolons."""
    table = csv_rows(folder, items, "table.txt", ";")
    table.write_text(table.read_text("utf-8").replace("\n", "\r\n"), "utf-16", newline="")
    return table


def csv_by_split(folder: Path, items: list[Item]) -> Path:
    """train.csv, val.csv, test.csv with captions in numbered columns."""
    put_images(folder, items)
    for split in {item.split for item in items}:
        part = [item for item in items if item.split == split]
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", *(f"caption_{n}" for n in range(len(part[0].captions))), "class"])
            writer.writerows([item.name, *item.captions, item.label] for item in part)
    return folder


def metadata_by_split(folder: Path, items: list[Item]) -> Path:
    """Hugging Face's image folder: train/metadata.csv beside its images; lists of captions as pandas prints them."""
    for split in {item.split for item in items}:
        part = [item for item in items if item.split == split]
        put_images(folder / split, part)
        with open(folder / split / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "text", "label"])
            writer.writerows([item.name, str(list(item.captions)), item.label] for item in part)
    return folder


def parquet(folder: Path, items: list[Item]) -> Path:
    import pyarrow
    import pyarrow.parquet

    put_images(folder, items)
    rows = [columns(item, "img_path") for item in items]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet", row_group_size=4)
    return folder / "table.parquet"


def features(items: list[Item]) -> Any:
    import datasets

    kinds: dict[str, Any] = {"image": datasets.Image()}
    if items[0].captions:
        kinds["caption"] = datasets.List(datasets.Value("string"))
    if items[0].label:
        kinds["label"] = datasets.ClassLabel(names=["dog", "cat", "eel"])
    return datasets.Features(kinds)


def dataset(items: list[Item]) -> Any:
    import datasets

    values: dict[str, Any] = {"image": [{"bytes": item.raw, "path": item.name} for item in items]}
    if items[0].captions:
        values["caption"] = [list(item.captions) for item in items]
    if items[0].label:
        values["label"] = [item.label for item in items]
    return datasets.Dataset.from_dict(values, features=features(items))


def parquet_with_bytes(folder: Path, items: list[Item]) -> Path:
    """As the Hub stores it: data/train-00000-of-00001.parquet, with class numbers and their names."""
    (folder / "data").mkdir(parents=True)
    names = {"train": "train", "val": "validation", "test": "test"}
    for split in {item.split for item in items}:
        part = dataset([item for item in items if item.split == split])
        part.to_parquet(str(folder / "data" / f"{names[split]}-00000-of-00001.parquet"), batch_size=2)
    return folder


def huggingface(folder: Path, items: list[Item]) -> Path:
    import datasets

    splits: dict[Any, Any] = {}
    for split in {item.split for item in items}:
        splits[split] = dataset([item for item in items if item.split == split])
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def pairs_txt(folder: Path, items: list[Item]) -> Path:
    for item in items:
        put_images(folder / item.split, [item])
        (folder / item.split / item.name).with_suffix(".txt").write_text("".join(f"{c}\n" for c in item.captions))
    return folder


def pairs_json(folder: Path, items: list[Item]) -> Path:
    put_images(folder, items)
    for item in items:
        row = {"captions": list(item.captions), "split": item.split}
        (folder / item.name).with_suffix(".json").write_text(json.dumps(row))
    return folder


def coco(folder: Path, items: list[Item]) -> Path:
    """annotations/captions_train2017.json and images in train2017."""
    (folder / "annotations").mkdir(parents=True)
    for split in {item.split for item in items}:
        part = [item for item in items if item.split == split]
        put_images(folder / f"{split}2017", part)
        images = [{"id": i, "file_name": item.name} for i, item in enumerate(part)]
        annotations = [{"id": 0, "image_id": i, "caption": c} for i, item in enumerate(part) for c in item.captions]
        text = json.dumps({"images": images, "annotations": annotations})
        (folder / "annotations" / f"captions_{split}2017.json").write_text(text)
    return folder


def flickr_tokens(folder: Path, items: list[Item]) -> Path:
    put_images(folder / "Flicker8k_Dataset", items)
    lines = [f"{item.name}#{n}\t{caption}\n" for item in items for n, caption in enumerate(item.captions)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))
    return folder


def flickr_kaggle(folder: Path, items: list[Item]) -> Path:
    put_images(folder / "Images", items)
    with open(folder / "captions.txt", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "caption"], *([item.name, c] for item in items for c in item.captions)])
    return folder


def json_map(folder: Path, items: list[Item]) -> Path:
    put_images(folder, items)
    (folder / "captions.json").write_text(json.dumps({item.name: item.captions for item in items}))
    return folder / "captions.json"


def tars(folder: Path, items: list[Item]) -> Path:
    names = sorted({item.label for item in items if item.label})
    for split in {item.split for item in items}:
        members = []
        for item in [item for item in items if item.split == split]:
            key = item.name.removesuffix(".jpg")
            members.append((f"{key}.jpg", item.raw))
            if item.captions:
                members.append((f"{key}.txt", "".join(f"{c}\n" for c in item.captions).encode()))
            if item.label:
                members.append((f"{key}.cls", str(names.index(item.label)).encode()))
        write_tar(folder / f"{split}-000.tar", members)
    if names:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def img2dataset(folder: Path, items: list[Item]) -> Path:
    """What img2dataset leaves of a Parquet list with further columns; the row that failed is in its own list alone."""
    rows, members = [], []
    for i, item in enumerate(items):
        row = {"caption": list(item.captions) or None, "label": item.label, "split": item.split}
        row |= {"url": f"https://example.org/{item.name}", "key": f"{i:09d}", "status": "success"}
        row |= {"error_message": None, "width": 24, "height": 20, "exif": "{}", "sha256": "0"}
        rows.append(row)
        text = str(list(item.captions)) if item.captions else ""
        members += [(f"{i:09d}.jpg", item.raw), (f"{i:09d}.txt", text.encode())]
        members.append((f"{i:09d}.json", json.dumps(row, indent=4).encode()))
    rows.append({**rows[0], "key": "000000099", "status": "failed_to_download", "error_message": "HTTP Error 404"})
    write_tar(folder / "00000.tar", members)
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(rows), "successes": len(items)}))
    return folder


def classes(folder: Path, items: list[Item]) -> Path:
    for item in items:
        put_images(folder / item.split / str(item.label), [item])
    return folder


WITH_CAPTIONS: list[Callable[[Path, list[Item]], Path]] = [
    jsonl,
    json_list,
    csv_rows,
    tsv_rows,
    utf16_rows,
    csv_by_split,
    metadata_by_split,
    parquet,
    parquet_with_bytes,
    huggingface,
    pairs_txt,
    pairs_json,
    coco,
    tars,
    img2dataset,
]
WITHOUT_SPLITS: list[Callable[[Path, list[Item]], Path]] = [flickr_tokens, flickr_kaggle, json_map]
WITH_LABELS: list[Callable[[Path, list[Item]], Path]] = [
    jsonl,
    json_list,
    csv_rows,
    csv_by_split,
    parquet,
    parquet_with_bytes,
    huggingface,
    tars,
    img2dataset,
    classes,
]


def run(source: Path, out: Path, **options: Any) -> Report:
    return pack(PackConfig(source=str(source), out=str(out), **{"workers": 0, **options}))


def read(folder: Path, pattern: str = "*.tar") -> list[dict[str, Any]]:
    """All samples in order, as webdataset groups them; its own opener leaves the files open."""
    samples = []
    for shard in sorted(folder.glob(pattern)):
        with open(shard, "rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))
    return samples


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".index.json")}


def content(folder: Path) -> dict[str, set[tuple[str, tuple[str, ...], str | None]]]:
    """By split, each sample's image, captions and label."""
    names = (folder / "classnames.txt").read_text().splitlines() if (folder / "classnames.txt").exists() else []
    found: dict[str, set[tuple[str, tuple[str, ...], str | None]]] = {}
    for shard in folder.glob("*.tar"):
        for sample in read(folder, shard.name):
            captions = tuple(json.loads(sample["json"]).get("captions", []))
            label = names[int(sample["cls"])] if "cls" in sample else None
            image = hashlib.sha256(sample["jpg"]).hexdigest()
            found.setdefault(shard.name.rpartition("-")[0], set()).add((image, captions, label))
    return found


def expected(items: list[Item], splits: bool = True) -> dict[str, set[tuple[str, tuple[str, ...], str | None]]]:
    """What `content` has to find."""
    found: dict[str, set[tuple[str, tuple[str, ...], str | None]]] = {}
    for item in items:
        image = hashlib.sha256(item.raw).hexdigest()
        found.setdefault(item.split if splits else "train", set()).add((image, item.captions, item.label))
    return found
