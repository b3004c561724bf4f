"""data check on sets with planted faults: each found, and counted exactly."""

import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.numpy import save_file
from shards import Members, list_shards, write_shards, write_tar
from test_fingerprint import encode, scene

from clipft.cli import main
from clipft.config import CheckConfig, ColumnsConfig, DataConfig, ModelConfig, PackConfig
from clipft.data.check import run as module
from clipft.data.check.reader import Reader
from clipft.data.check.run import Report, check, refuse
from clipft.data.pack import pack


def count_words(captions: list[str]) -> list[int]:
    return [len(caption.split()) + 2 for caption in captions]


READER = Reader("words", image_size=96, context_length=12, count=count_words, english=True)
MODEL = ModelConfig(name="tiny", pretrained=None)


def checked(out: Path, reader: Reader = READER, **options) -> Report:
    """The report of a set, read in this process."""
    data = options.pop("data", DataConfig())
    return check(CheckConfig(data=data, model=MODEL, out=str(out), **options), reader)


def of_shards(folder: Path, out: Path | None = None, **options) -> Report:
    data = DataConfig(path=str(folder), **{"workers": 0, **options})
    return checked(out or folder / "out", data=data)


def sample(key: str, image: bytes, *captions: str, kind: str = "jpg") -> Members:
    return [(f"{key}.{kind}", image), (f"{key}.txt", "\n".join(captions).encode())]


def good(first: int, number: int, prefix: str = "g") -> Members:
    members: Members = []
    for i in range(first, first + number):
        members += sample(f"{prefix}{i:03d}", encode(scene(i)), f"a picture of the things numbered {i}")
    return members


def flags(report: Report) -> dict[str, set[str]]:
    """Flag -> keys, without the name of the shard."""
    items = report.rows.items
    found = {name: flag.nonzero()[0] for name, flag in report.case.figures.flags.items()}
    return {name: {items[i].key.partition("/")[2] for i in where} for name, where in found.items() if len(where)}


def said(report: Report) -> str:
    """The sentences about what it means for a run."""
    return report.text.partition("WHAT THAT MEANS FOR A RUN\n")[2]


def verdict(report: Report) -> str:
    try:
        refuse(report)
    except ValueError as error:
        return str(error)
    return ""


def spoiled(folder: Path) -> Path:
    """40 + 10 good pictures, and among them 3 exact and 2 near repeats, 4 + 1 leaks, and odd ones of each kind."""
    train = good(0, 40)
    train += [m for i in range(3) for m in sample(f"same{i}", encode(scene(i)), f"another text about {i}")]
    train += [m for i in (5, 6) for m in sample(f"near{i}", encode(scene(i), quality=60), f"again the one of {i}")]
    dark = ImageEnhance.Brightness(scene(60)).enhance(1 / 6)
    train += sample("dark", encode(dark), "a very dark picture")
    train += sample("flat", encode(Image.new("RGB", (120, 120), "olive")), "nothing but olive")
    train += sample("blurred", encode(scene(61).filter(ImageFilter.GaussianBlur(8))), "all of it blurred")
    train += sample("tiny", encode(scene(62).resize((20, 16))), "a tiny picture")
    train += sample("wide", encode(scene(63, (700, 120))), "a wide picture")
    train += sample("png", encode(scene(64).convert("L"), "PNG"), "a grey picture", kind="png")
    train += sample("long", encode(scene(65)), "word " * 11)
    train += sample("fits", encode(scene(66)), "word " * 10)
    train += sample("han", encode(scene(67)), "一只红色的船")
    train += sample("cyrillic", encode(scene(68)), "красная лодка")
    train += sample("mixed", encode(scene(69)), "the word лодка in a sentence")
    train += sample("digits", encode(scene(70)), "12345 !")
    train += sample("twins1", encode(scene(71)), "A red boat") + sample("twins2", encode(scene(72)), "a  red boat")
    train += sample("twins3", encode(scene(73)), "a red boat.")
    write_tar(folder / "train-000.tar", train)
    val = good(100, 10, "v") + [m for i in range(10, 14) for m in sample(f"leak{i}", encode(scene(i)), f"leaked {i}")]
    val += sample("looks", encode(scene(15), quality=60), "a red boat")
    write_tar(folder / "val-000.tar", val)
    return folder


def test_every_planted_oddity_is_found_and_nothing_else(tmp_path: Path):
    report = of_shards(spoiled(tmp_path))
    assert flags(report) == {
        "duplicate": {"same0", "same1", "same2"},
        "near_duplicate": {"near5", "near6", "looks"},
        "dark": {"dark"},
        "flat": {"flat"},
        "blurred": {"blurred"},
        "tiny": {"tiny"},
        "odd_aspect": {"wide"},
        "cut_caption": {"long"},
    } | {"duplicate": {"same0", "same1", "same2", "leak10", "leak11", "leak12", "leak13"}}
    figures = report.case.figures
    assert figures.modes == {"RGB": 74, "L": 1} and figures.formats == {"JPEG": 74, "PNG": 1}
    train, val = figures.splits["train"], figures.splits["val"]
    assert (train.indexed, train.usable, train.duplicates, train.near, train.equal_captions) == (60, 60, 3, 2, 1)
    assert (val.indexed, val.usable, val.duplicates, val.near) == (15, 15, 0, 0)
    scripts = {name: each.captions for name, each in figures.scripts.items()}
    assert scripts == {"Latin": 72, "Han": 1, "Cyrillic": 1, "no letters": 1}
    assert figures.lengths is not None and (figures.lengths.cut, figures.lengths.most) == (1, 13)
    assert sum(number for _, _, number in figures.lengths.bars) == 75
    assert sum(number for _, _, number in figures.sides) == 75
    assert [len(group) for group in figures.groups] == [2] * 5
    assert verdict(report) == ""


def test_what_val_shares_with_train_is_counted_and_named(tmp_path: Path):
    report = of_shards(spoiled(tmp_path))
    found = report.case.figures.shared["train/val"]
    assert (found.images, found.alike, found.captions) == (4, 1, 1)
    keys = [(report.rows.items[a].key, report.rows.items[b].key) for a, b in report.case.figures.leaked["train/val"]]
    assert keys == [
        *((f"val-000/leak{i}", f"train-000/g{i:03d}") for i in range(10, 14)),
        ("val-000/looks", "train-000/g015"),
    ]
    assert "5 of 15 val images (33.3%) are also in train: 4 with the same bytes, 1 that look the same" in said(report)
    assert "split.val=0.05" in said(report) and "split.by=caption" in said(report)


def test_every_file_is_accounted_for_and_drops_are_named_with_their_byte(tmp_path: Path):
    whole = encode(scene(50))
    members = good(0, 30) + sample("cut", whole[: len(whole) // 2], "a") + sample("text", b"<html>", "b")
    members += [("lonely.jpg", whole), *sample("blank", whole, " "), *sample("latin1", whole), ("README", b"hello")]
    members[-2] = ("latin1.txt", b"caf\xe9")
    write_tar(tmp_path / "train-000.tar", members)
    write_tar(tmp_path / "val-000.tar", good(60, 3))
    report = of_shards(tmp_path)
    dropped = {reason: [report.rows.items[i] for i in rows] for reason, rows in report.case.figures.dropped.items()}
    assert {reason: [item.key for item in items] for reason, items in dropped.items()} == {
        "image_truncated": ["train-000/cut"],
        "format_not_allowed": ["train-000/text"],
        "no_text": ["train-000/lonely"],
        "no_caption": ["train-000/blank"],
        "bad_utf8": ["train-000/latin1"],
    }
    for item in report.rows.items:
        raw = Path(item.shard).read_bytes()
        assert raw[item.byte :].startswith(item.key.partition("/")[2].encode() + b".")
    assert sum(each.indexed for each in report.case.figures.splits.values()) == 38
    assert sum(each.usable for each in report.case.figures.splits.values()) == 33
    assert "1 member without a sample (no_extension)" in report.text
    assert "train-000/cut (byte" in report.text and "data.text_errors=replace" in said(report)
    assert "train: 5 of 35 samples cannot be used, more than data.max_bad_frac=0.05" in verdict(report)
    assert verdict(of_shards(tmp_path, max_bad_frac=0.2)) == ""
    assert "bad_utf8" not in of_shards(tmp_path, text_errors="replace").case.figures.dropped
    assert len(of_shards(tmp_path, max_pixels=100).case.figures.dropped["too_large"]) == 34


def test_a_damaged_shard_makes_the_set_unusable_and_the_report_is_written_all_the_same(tmp_path: Path):
    first, second = write_shards(tmp_path, 5, 4, prefix="train-")
    Path(second).write_bytes(Path(second).read_bytes()[:5000])
    report = of_shards(tmp_path)
    assert f"{second}: cut between two members" in verdict(report) and first not in verdict(report)
    assert "Unusable as it is." in said(report)
    assert report.case.figures.dropped.keys() == {"in_damaged_shard"}
    assert "damage" in report.text and (tmp_path / "out" / "report.html").is_file()


def test_without_val_the_share_that_training_holds_out_is_compared(tmp_path: Path):
    """Each picture is there twice: of those held out nearly all have their twin in train."""
    members = good(0, 30) + [m for i in range(30) for m in sample(f"twin{i}", encode(scene(i)), f"twin {i}")]
    write_tar(tmp_path / "000.tar", members)
    report = of_shards(tmp_path, val_frac=0.1)
    assert {split: each.usable for split, each in report.case.figures.splits.items()} == {"train": 54, "val": 6}
    from clipft.data.split import load_splits

    splits = load_splits(DataConfig(path=str(tmp_path), val_frac=0.1))
    assert splits.val is not None
    held_out = {splits.val.key(i) for i in range(len(splits.val))}
    assert {item.key for item in report.rows.items if item.split == "val"} == held_out
    numbers = [int(re.sub(r"\D", "", key.partition("/")[2])) for key in held_out]
    alone = sum(numbers.count(n) == 1 for n in numbers)
    assert report.case.figures.shared["train/val"].images == alone > 0
    assert "training holds out data.val_frac=0.1" in said(report)
    write_tar(tmp_path / "val-0.tar", good(40, 3))
    (tmp_path / "000.tar").rename(tmp_path / "train-0.tar")
    with pytest.raises(ValueError, match=r"data\.val_frac=0\.1 would be ignored"):
        of_shards(tmp_path, val_frac=0.1)


def write_table(folder: Path) -> Path:
    """A source of 12 pictures with labels: one is missing, one is cut off, one is no picture, two are the same."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(12):
        raw = encode(scene(0 if i == 1 else i))
        raw = {3: raw[: len(raw) // 2], 4: b"nothing"}.get(i, raw)
        if i != 2:
            (folder / "images" / f"{i}.jpg").write_bytes(raw)
        row = {"image": f"images/{i}.jpg", "caption": f"thing {i}", "kind": "ab"[i % 2]}
        rows.append(row | {"split": "val" if i in (1, 11) else "train"})
    rows.append({"image": "images/5.jpg", "caption": "thing 5 again", "kind": "b", "split": "train"})
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return folder / "table.jsonl"


def test_a_source_is_looked_at_before_it_is_packed(tmp_path: Path):
    table = write_table(tmp_path / "source")
    options = {"source": str(table), "columns": ColumnsConfig(label="kind")}
    report = checked(tmp_path / "out", data=DataConfig(workers=0, max_bad_frac=0.2), **options)
    figures = report.case.figures
    assert {reason: len(rows) for reason, rows in figures.dropped.items()} == {
        "bad_json": 1,
        "image_missing": 1,
        "image_truncated": 1,
        "format_not_allowed": 1,
    }
    assert {split: (each.indexed, each.usable) for split, each in figures.splits.items()} == {
        "train": (11, 7),
        "val": (2, 2),
    }
    assert (figures.splits["train"].captions, figures.splits["train"].labelled) == (8, 7)
    assert figures.shared["train/val"].images == 1
    assert "read as: JSON lines" in report.text and "table.jsonl line 14" in report.text
    assert verdict(report) == "", "of the rows that packing keeps 1 of 10 is bad"
    strict = checked(tmp_path / "out", data=DataConfig(workers=0), **options)
    assert "train: 1 of 8 samples cannot be used" in verdict(strict)
    (tmp_path / "source" / "images" / "3.jpg").write_bytes(encode(scene(3)))
    pack(PackConfig(out=str(tmp_path / "packed"), **options))
    after = of_shards(tmp_path / "packed", tmp_path / "out").case.figures
    before = checked(tmp_path / "out", data=DataConfig(workers=0), **options).case.figures
    assert (after.shared["train/val"].images, after.lengths) == (1, before.lengths)
    assert after.negatives.pairs == before.negatives.pairs
    for split in ("train", "val"):
        ours, theirs = after.splits[split], before.splits[split]
        assert (ours.usable, ours.captions, ours.labelled) == (theirs.usable, theirs.captions, theirs.labelled)


def test_findings_have_a_row_per_sample_with_pictures_that_viewers_open(tmp_path: Path):
    report = of_shards(spoiled(tmp_path))
    table = pq.read_table(tmp_path / "out" / "findings.parquet")
    rows = {row["key"]: row for row in table.to_pylist()}
    assert list(rows) == [item.key for item in report.rows.items] and len(rows) == 75
    same, leak, near = rows["train-000/same1"], rows["val-000/leak12"], rows["train-000/near5"]
    assert (same["duplicate"], same["same"], same["group"]) == (True, "train-000/g001", "train-000/g001")
    assert (leak["leak"], leak["split"], leak["captions"], leak["tokens"]) == (
        "train-000/g012",
        "val",
        ["leaked 12"],
        [4],
    )
    assert (near["near_duplicate"], near["same"], near["group"]) == (True, "train-000/near5", "train-000/g005")
    assert (rows["train-000/wide"]["width"], rows["train-000/wide"]["height"]) == (700, 120)
    assert rows["train-000/png"]["mode"] == "L" and rows["train-000/flat"]["hash"] is None
    with Image.open(io.BytesIO(leak["image"]["bytes"])) as picture:
        assert max(picture.size) == 96
    features = json.loads(table.schema.metadata[b"huggingface"])
    assert features["info"]["features"]["image"] == {"_type": "Image"}


def test_rows_that_cannot_be_used_have_a_reason_and_nothing_else(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", good(0, 3) + sample("bad", b"x", "a"))
    of_shards(tmp_path, max_bad_frac=1.0)
    *_, bad = pq.read_table(tmp_path / "out" / "findings.parquet").to_pylist()
    assert bad["dropped"] == "format_not_allowed" and bad["byte"] > 0
    empty = bad.keys() - {"key", "split", "shard", "byte", "dropped", "captions", "tokens"}
    assert all(bad[name] is None for name in empty) and not bad["captions"]


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_the_page_needs_nothing_from_elsewhere_and_captions_are_text_in_it(tmp_path: Path):
    evil = '<script>alert(1)</script>"><img src=http://x.example/y onerror=z>'
    write_tar(tmp_path / "train-0.tar", good(0, 5) + sample("evil", encode(scene(9)), evil, "\u202eturned"))
    of_shards(tmp_path)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert evil in page.words and "\u202e" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 6 and all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not any(name.startswith("on") or name == "href" for _, attrs in page.tags for name in attrs)
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)


def test_names_that_are_no_unicode_are_no_trouble(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"caf\xe9\xe2\x80\xae")
    write_tar(folder / "train-0.tar", good(0, 3))
    report = of_shards(folder, tmp_path / "out")
    report.text.encode()
    assert "caf\\udce9\\u202e" in report.text and (tmp_path / "out" / "report.html").is_file()
    [first, *_] = pq.read_table(tmp_path / "out" / "findings.parquet").to_pylist()
    assert first["shard"].endswith("caf?\u202e/train-0.tar")


def test_many_shards_are_folded_away_on_the_page_and_left_out_of_the_terminal(tmp_path: Path):
    write_shards(tmp_path, *[2] * 14, prefix="train-")
    report = of_shards(tmp_path)
    assert report.case.figures.splits["train"].tars == 14 and "train-013.tar" not in report.text
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "14 rows: shard" in page.words and "train-013.tar" in page.words
    assert "details" in {tag for tag, _ in page.tags}


def test_a_split_that_nobody_reads_makes_no_set_unusable(tmp_path: Path):
    shards = [Path(path) for path in write_shards(tmp_path, 5, prefix="train-")]
    extra = Path(write_tar(tmp_path / "extra-0.tar", sample("bad", b"x", "a")))
    list_shards(tmp_path, {"train": shards, "extra": [extra]})
    report = of_shards(tmp_path)
    assert report.case.figures.splits["extra"].usable == 0 and verdict(report) == ""


def test_a_set_with_labels_alone_is_said_to_be_no_training_data(tmp_path: Path):
    members = [(f"{i}.{kind}", raw) for i in range(6) for kind, raw in (("jpg", encode(scene(i))), ("cls", b"1"))]
    write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    report = of_shards(tmp_path)
    assert "captions_from_labels=true" in said(report) and verdict(report) == ""
    assert report.case.figures.lengths is None and report.case.figures.splits["train"].labelled == 5
    assert pq.read_table(tmp_path / "out" / "findings.parquet")["label"].to_pylist() == ["bee"] * 6


def test_settings_are_advised_where_they_would_change_something(tmp_path: Path):
    members: Members = []
    for i in range(300):
        members += sample(f"{i:03d}", encode(scene(i % 100).resize((64, 48))), f"word number {i % 20}", f"a word {i}")
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", good(500, 3))
    text = said(of_shards(tmp_path))
    for setting in ("loss.duplicates=mask", "loss.positives=image", "data.captions=all"):
        assert setting in text
    assert "model.context_length" not in text and "image.max_size" not in text
    big = Reader("words", image_size=16, context_length=4, count=count_words, english=True)
    data = DataConfig(path=str(tmp_path), workers=0, captions="all")
    text = said(checked(tmp_path / "out", big, data=data))
    assert "model.context_length=8" in text and "image.max_size=32" in text and "data.captions=all makes" not in text


def test_foreign_scripts_are_advised_about_unless_the_model_reads_them(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", good(0, 5) + sample("han", encode(scene(9)), "一只红色的船"))
    assert "model=xlm-roberta-base-ViT-B-32" in said(of_shards(tmp_path))
    reader = Reader("many", 96, 12, count_words, english=False)
    assert "xlm-roberta" not in said(checked(tmp_path / "out", reader, data=DataConfig(path=str(tmp_path), workers=0)))


def test_pyarrow_is_asked_for_at_once_and_missed_only_for_its_file(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    write_shards(tmp_path, 3)
    report = of_shards(tmp_path)
    assert capsys.readouterr().out == 'findings.parquet will not be written: pip install "pyarrow>=15"\n'
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html"]
    assert "findings.parquet in" not in report.text


def test_the_command_takes_models_and_batch_sizes_and_writes_where_it_is_told(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "data/birds/train-0.tar", good(0, 12) + sample("long", encode(scene(30)), "a boat " * 10))
    arguments = ["data", "check", "data=birds", "data.workers=0", "batch_sizes=[5,9,90]"]
    assert main([*arguments, "model.context_length=16"]) == 0
    out = capsys.readouterr().out
    assert "1 (7.7%) have more than 16 tokens" in out and "224 pixels, 16 tokens" in out
    assert re.search(r"pairs with +B=5 +B=9\n", out)
    assert sorted(path.name for path in Path("checks/birds").iterdir()) == ["findings.parquet", "report.html"]
    assert main([*arguments, "model=tiny", "out=there"]) == 0
    out = capsys.readouterr().out
    assert (
        "as tiny sees it" in out and "0 (0.0%) have more than 32 tokens" in out and Path("there/report.html").is_file()
    )
    Path("data/birds/train-0.tar").write_bytes(b"<html>")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Unusable as it is." in out and err.startswith("error: data/birds/train-0.tar: not a tar archive")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "There is no data. Give data=NAME"),
        (["data=bords"], "neither conf/data/bords.yaml nor a packed folder"),
        (["data=birds", "source=x.csv"], "are two sets of data"),
        (["source=x.csv"], "source='x.csv' does not exist"),
        (["source="], "source='' is empty. Give a path."),
        (["source=x.csv", "format=xls"], "format='xls' is unknown"),
        (["source=x.csv", "data.text_errors=replace"], "data.text_errors=replace would be ignored"),
        (["data=birds", "root=x"], "root='x' would be ignored"),
        (["data=birds", "columns.caption=title"], "columns.caption=['title'] would be ignored"),
        (["data=birds", "csv.delimiter=tab"], "csv.delimiter='\\t' would be ignored"),
        (["data=birds", "batch_sizes=[1]"], "batch_sizes=[1] must be"),
        (["data=birds", "model.grad_checkpointing=true"], "model.grad_checkpointing=True would be ignored"),
        (["data=birds", "model=ViT-B-33"], "model.name='ViT-B-33'"),
        (["data=birds", "model=w.safetensors"], "weight file without a description"),
        (["data=birds", "out=file"], "out='file' cannot be written to"),
        (["data=birds", "out="], "out='' is empty. Give a path."),
        (["data=birds", "loss.name=clip"], "loss.name is no option"),
    ],
)
def test_wrong_input_says_what_to_do_before_anything_is_read(tmp_path: Path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "data/birds/train-0.tar", good(0, 2))
    save_file({"weight": np.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "file").touch()
    assert main(["data", "check", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "checks").exists()


@pytest.mark.process
def test_several_processes_see_what_one_sees(tmp_path: Path):
    write_shards(tmp_path, 90, 60, prefix="train-")
    texts = []
    for workers in (0, 2):
        report = of_shards(tmp_path, tmp_path / f"out{workers}", workers=workers)
        texts.append(report.text.rpartition("\n")[0])
        table = pq.read_table(tmp_path / f"out{workers}" / "findings.parquet")
        texts[-1] += str(table.drop_columns("image").to_pylist())
    assert texts[0] == texts[1]


def test_light_and_sharpness_are_those_of_slow_loops():
    from clipft.data.check.look import light, sharpness

    for seed, number in ((1, 7), (2, 100), (3, 4321)):
        values = np.random.default_rng(seed).integers(0, 256, number)
        slow = next(v for v in range(256) if 100 * sum(values > v) <= number)
        assert light(np.bincount(values, minlength=256).tolist()) == slow / 255
    grey = np.random.default_rng(0).random((7, 9)).astype(np.float32)
    values = [
        float(grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x])
        for y in range(1, 6)
        for x in range(1, 8)
    ]
    assert sharpness(grey) == pytest.approx(np.var(values) / np.var(grey), rel=1e-4)
    assert sharpness(np.full((7, 9), 0.5, np.float32)) == 0 and sharpness(grey[:2]) == 0
