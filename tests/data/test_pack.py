import hashlib
import json

import numpy as np
import pytest
from forms import bytes_of, read, run
from PIL import Image

from clipft.cli import main
from clipft.config import DataConfig, DrawConfig, PackConfig
from clipft.data import pack as module
from clipft.data import rows
from clipft.data.caption import captions_of
from clipft.data.draw import Shared
from clipft.data.pack import Report, describe, said_of_shared
from clipft.data.rows import by_reason
from clipft.data.split import load_splits
from clipft.report import RunFailed


def write_source(folder, rows, kind="png"):
    """A folder with metadata.jsonl and a distinct image for each row that names one."""
    (folder / "images").mkdir(parents=True)
    for number, row in enumerate(rows):
        path = folder / str(row.get("image", f"images/{number}.{kind}"))
        if "image" in row and path.suffix == f".{kind}" and not path.exists() and ".." not in row["image"]:
            Image.new("RGB", (4, 3), (number % 256, number // 256, 7)).save(path)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def captioned(num, split="train", start=0):
    return [
        {
            "image": f"images/{i}.png",
            "captions": [f"picture {i}", f"number {i}"],
            "split": split,
            "licence": "CC0",
        }
        for i in range(start, start + num)
    ]


def counts(report: Report, what: str) -> dict[str, int]:
    """Shards, samples or captions by split."""
    splits = report.packed.splits
    if what == "shards":
        return {split: len(shards) for split, shards in splits.items()}
    return {split: sum(getattr(shard, what) for shard in shards) for split, shards in splits.items()}


def test_webdataset_reads_back_every_row_with_its_own_image_and_captions(tmp_path):
    rows = captioned(7) + captioned(3, "test", start=7)
    source = write_source(tmp_path / "source", rows)
    run(source, tmp_path / "out", shard_samples=4)
    samples = {sample["__key__"]: sample for sample in read(tmp_path / "out")}
    assert len(samples) == 10
    for number, row in enumerate(rows):
        sample = samples[f"{number + 1:06d}-{number}"]
        assert sample["png"] == (source / row["image"]).read_bytes()
        assert json.loads(sample["json"]) == row
        assert sample["txt"].decode() == f"picture {number}\nnumber {number}\n"
        assert "cls" not in sample
        text = {kind: sample[kind] for kind in ("json", "txt")}
        assert captions_of(text) == captions_of({"txt": sample["txt"]}) == row["captions"]


def test_the_packed_folder_loads_as_splits(tmp_path):
    source = write_source(tmp_path / "source", captioned(7) + captioned(3, "dev", 7) + captioned(2, "test", 10))
    run(source, tmp_path / "out")
    splits = load_splits(DataConfig(path=str(tmp_path / "out")))
    assert splits.train is not None and splits.val is not None and splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [7, 3, 2]
    assert splits.val.key(0).endswith("000008-7")


def test_shards_are_balanced_and_keep_the_order_of_the_rows(tmp_path):
    source = write_source(tmp_path / "source", captioned(23))
    packed = run(source, tmp_path / "out", shard_samples=5)
    sizes = [len(read(tmp_path / "out", path.name)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert counts(packed, "shards") == {"train": 5} and sum(sizes) == 23 and max(sizes) - min(sizes) <= 1
    keys = [sample["__key__"] for sample in read(tmp_path / "out")]
    assert keys == sorted(keys)


def test_split_names_are_mapped_and_strange_ones_kept(tmp_path):
    names = ["train", "Training", "dev", "valid", "validation", "val", "test", "extra", "my split", None]
    rows = [{"image": f"images/{i}.png", "text": "x", "split": name} for i, name in enumerate(names)]
    rows.append({"image": "images/last.png", "text": "x"})
    packed = run(write_source(tmp_path / "source", rows), tmp_path / "out")
    assert counts(packed, "samples") == {"train": 4, "val": 4, "test": 1, "extra": 1, "my-split": 1}
    assert list(packed.packed.splits)[:3] == ["train", "val", "test"]


@pytest.mark.parametrize("image", ["image", "file_name", "filepath", "path"])
@pytest.mark.parametrize("caption", ["captions", "caption", "text", "title"])
def test_columns_are_found_by_name_and_get_the_usual_names(tmp_path, image, caption):
    source = write_source(tmp_path / "source", [{"image": "images/0.png"}])
    (source / "metadata.jsonl").write_text(json.dumps({image: "images/0.png", caption: "a dog", "id": 3}))
    run(source, tmp_path / "out")
    [sample] = read(tmp_path / "out")
    assert json.loads(sample["json"]) == {"captions": ["a dog"], "image": "images/0.png", "id": 3}


@pytest.mark.parametrize(
    "labels, classnames",
    [
        (["tulip", "daisy", " rose ", "daisy"], ["daisy", "rose", "tulip"]),
        ([10, 9, 2, 9], ["2", "9", "10"]),
        (["10", "nine", "2", "2"], ["10", "2", "nine"]),
    ],
)
def test_labels_are_numbered_in_class_order(tmp_path, labels, classnames):
    rows = [{"image": f"images/{i}.png", "label": label} for i, label in enumerate(labels)]
    templates = ["a photo of a {c}.", "{c}"]
    run(write_source(tmp_path / "source", rows), tmp_path / "out", templates=templates)
    assert (tmp_path / "out/classnames.txt").read_text().splitlines() == classnames
    assert (tmp_path / "out/zeroshot_classification_templates.txt").read_text().splitlines() == templates
    for sample, label in zip(read(tmp_path / "out"), labels, strict=True):
        assert classnames[int(sample["cls"])] == str(label).strip()
        assert "txt" not in sample


def test_newlines_in_a_caption_become_spaces_in_the_text_only(tmp_path):
    rows = [{"image": "images/0.png", "captions": ["two\nlines\u2028and a\r\nthird", "ein Mädchen"]}]
    run(write_source(tmp_path / "source", rows), tmp_path / "out")
    [sample] = read(tmp_path / "out")
    assert sample["txt"].decode() == "two lines and a third\nein Mädchen\n"
    assert json.loads(sample["json"])["captions"] == rows[0]["captions"]


def test_packing_twice_gives_the_same_bytes_and_changes_nothing(tmp_path):
    source = write_source(tmp_path / "source", [{**row, "label": "x"} for row in captioned(9)])
    run(source, tmp_path / "a/set", shard_samples=4)
    run(source, tmp_path / "b/set", shard_samples=4)
    assert bytes_of(tmp_path / "a/set") == bytes_of(tmp_path / "b/set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/set").iterdir()}
    run(source, tmp_path / "a/set", shard_samples=4)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a/set").iterdir()}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["set"]


def test_the_indexes_beside_the_shards_are_fresh(tmp_path):
    run(write_source(tmp_path / "source", captioned(5)), tmp_path / "out")
    [shard] = (tmp_path / "out").glob("*.tar")
    index = json.loads((tmp_path / "out" / (shard.name + ".index.json")).read_text())
    assert (index["size"], index["mtime_ns"]) == (shard.stat().st_size, shard.stat().st_mtime_ns)


def test_another_set_under_the_same_name_is_refused_and_the_old_one_kept(tmp_path):
    run(write_source(tmp_path / "one", captioned(3)), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    other = write_source(tmp_path / "two", captioned(4))
    with pytest.raises(ValueError, match="holds another packed set"):
        run(other, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before
    labelled = write_source(tmp_path / "three", [{"image": "images/0.png", "label": "x"}])
    run(labelled, tmp_path / "classes")
    with pytest.raises(ValueError, match=r"templates\.txt differs"):
        run(labelled, tmp_path / "classes", templates=["{c}"])


def test_a_folder_with_other_files_is_refused(tmp_path):
    source = write_source(tmp_path / "source", captioned(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        run(source, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        run(source, tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot be made: .*/file is no folder"):
        run(source, tmp_path / "file/out")
    (tmp_path / "empty").mkdir()
    assert counts(run(source, tmp_path / "empty"), "samples") == {"train": 2}


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(ValueError, match="source='' is empty"):
        PackConfig(source="", out="x")
    with pytest.raises(ValueError, match="out='' is empty"):
        PackConfig(source="x", out="")


def test_a_set_is_not_packed_into_its_own_source(tmp_path):
    source = write_source(tmp_path / "source", captioned(2))
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "data", tmp_path / "link/data"):
        with pytest.raises(ValueError, match=r"out=.* lies in source=.*outside of it, or give the table itself"):
            run(source, out)
    assert counts(run(source / "metadata.jsonl", source / "data"), "samples") == {"train": 2}


def test_every_row_that_is_left_out_is_named_with_its_line_and_reason(tmp_path):
    rows = [
        {"image": "images/0.png", "text": "fine"},
        {"image": "images/missing.jpg", "text": "x"},
        {"image": "images", "text": "x"},
        {"image": "../outside.png", "text": "x"},
        {"image": None, "text": "x"},
        {"text": "x"},
        {"image": "images/6.png", "text": " "},
        {"image": "images/7.png", "label": [1]},
        {"image": "images/8.png", "text": "\ud800"},
        {"image": "notes.txt", "text": "x"},
        {"image": "images/cut.png2", "text": "x"},
    ]
    source = write_source(tmp_path / "source", rows)
    Image.new("RGB", (4, 3)).save(tmp_path / "outside.png")
    (source / "notes.txt").write_text("no image")
    (source / "images/cut.png2").write_bytes((source / "images/0.png").read_bytes()[:20])
    with open(source / "metadata.jsonl", "ab") as file:
        file.write(b'\n{"image": "cut\n[1, 2]\n{"image": "M\xe4dchen"}\n')
    packed = run(source, tmp_path / "out")
    assert counts(packed, "samples") == {"train": 1} and counts(packed, "captions") == {"train": 1}
    assert by_reason(packed.rows.dropped) == {
        "image_missing": [2, 3],
        "image_outside_source": [4],
        "no_image": [5, 6],
        "no_caption_or_label": [7],
        "bad_label": [8],
        "bad_utf8": [9, 15],
        "format_not_allowed": [10],
        "image_header_damaged": [11],
        "bad_json": [13],
        "not_an_object": [14],
    }
    lines = (tmp_path / "out/dropped.tsv").read_text().splitlines()[1:]
    assert [int(line.split("\t")[1]) for line in lines] == [*range(2, 12), 13, 14, 15]
    table = describe(packed)
    assert "left out: 2 image_missing (metadata.jsonl lines 2, 3)" in table
    assert "left out: 1 bad_json (metadata.jsonl line 13)" in table


def test_a_source_that_cannot_be_packed_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist. Expected a folder with metadata.jsonl"):
        run(tmp_path / "nothing", tmp_path / "out")
    source = write_source(tmp_path / "source", [{"picture": "one", "text": "x"}])
    with pytest.raises(ValueError, match=r"no column for the image.*found picture, text"):
        run(source, tmp_path / "out")
    (source / "metadata.jsonl").write_text('{"image": "gone.png", "text": "x"}\n{broken\n')
    with pytest.raises(ValueError, match=r"image_missing: metadata.jsonl line 1; bad_json: metadata.jsonl line 2"):
        run(source, tmp_path / "out")
    (source / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="it is empty"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_vanishes_halfway_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", captioned(3))
    look = rows.look_at_rows

    def look_and_remove(*arguments):
        seen = look(*arguments)
        (source / "images/2.png").unlink()
        return seen

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"2\.png cannot be read any more"):
        patch.setattr(module, "look_at_rows", look_and_remove)
        run(source, tmp_path / "out", shard_samples=1)
    assert not (tmp_path / "out").exists()
    assert counts(run(source, tmp_path / "out", shard_samples=1), "samples") == {"train": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_images_keep_their_bytes_and_take_the_extension_of_their_content(tmp_path):
    source = write_source(tmp_path / "source", [{"image": "images/wrong.gif", "text": "x"}])
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(source / "images/wrong.gif", "JPEG")
    run(source, tmp_path / "out")
    [sample] = read(tmp_path / "out")
    assert sample["jpg"] == (source / "images/wrong.gif").read_bytes()


def test_labels_become_captions_by_templates_where_there_are_none(tmp_path):
    rows = [{"image": "images/0.png", "label": "cat"}, {"image": "images/1.png", "label": "dog", "text": "a wet dog"}]
    source = write_source(tmp_path / "source", rows)
    templates = ["a photo of a {c}.", "art of the {}."]
    report = run(source, tmp_path / "out", captions_from_labels=True, templates=templates)
    cat, dog = read(tmp_path / "out")
    assert cat["txt"] == b"a photo of a cat.\nart of the cat.\n" and dog["txt"] == b"a wet dog\n"
    assert json.loads(cat["json"])["label"] == "cat" and (cat["cls"], dog["cls"]) == (b"0", b"1")
    assert "loss.positives=group loss.group=label" in describe(report)
    run(source, tmp_path / "openai", captions_from_labels=True, templates="openai")
    captions = read(tmp_path / "openai")[0]["txt"].decode().splitlines()
    assert len(set(captions)) == 80 and "a bad photo of a cat." in captions
    lines = (tmp_path / "openai/zeroshot_classification_templates.txt").read_text().splitlines()
    assert [line.replace("{c}", "cat") for line in lines] == captions
    with pytest.raises(ValueError, match="captions_from_labels=true: the source has no labels"):
        run(write_source(tmp_path / "plain", captioned(2)), tmp_path / "none", captions_from_labels=True)


def test_shards_json_has_totals_and_what_was_dropped_and_shared(tmp_path):
    rows = [*captioned(6), *captioned(4, "val", 6)]
    rows[7]["image"] = "images/gone.jpg"
    source = write_source(tmp_path / "source", [*rows, {"image": None, "captions": "x"}])
    (source / "images/9.png").write_bytes((source / "images/0.png").read_bytes())
    report = run(source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/shards.json").read_text())
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (train["samples"], train["captions"], train["dropped"]) == (6, 12, {})
    assert (val["samples"], val["captions"], val["dropped"]) == (3, 6, {"image_missing": 1})
    assert manifest["dropped"] == {"no_image": 1, "image_missing": 1}
    assert manifest["shared"]["train/val"]["images"] == 1
    assert "val: 1 image also in train, such as 000010-9 and 000001-0" in describe(report)
    for shard in train["shards"]:
        raw = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_a_drawn_split_says_so_in_the_shards_too(tmp_path):
    rows = [{"image": f"images/{i}.png", "text": str(i), "split": "train"} for i in range(20)]
    run(write_source(tmp_path / "source", rows), tmp_path / "out", split=DrawConfig(val=0.2))
    found = [json.loads(sample["json"])["split"] for sample in read(tmp_path / "out", "val-*.tar")]
    assert found == ["val"] * 4


def test_what_splits_share_is_said_without_zeros():
    shared = [Shared(2, 0, 0, ("a", "b")), Shared(0, 3, 1, ("a", "b")), Shared(1, 1, 0, ("a", "b"))]
    assert [said_of_shared("train/val", each) for each in shared] == [
        ["val: 2 images also in train, such as b and a"],
        ["val: 3 look-alikes of images in train, such as b and a", "val: 1 caption also in train"],
        ["val: 1 image also in train, 1 look-alike of images in train, such as b and a"],
    ]


@pytest.mark.parametrize("drawn", [False, True])
def test_the_command_line_takes_odd_names(tmp_path, drawn, capsys):
    folder = tmp_path / "my photos, 2024"
    write_source(folder, captioned(4))
    rows = ["my image;the text; kind #1", *(f"images/{i}.png;text {i};a" for i in range(4))]
    (folder / "table (1).csv").write_text("\n".join(rows))
    (folder / "metadata.jsonl").unlink()
    arguments = [f"source={folder}/table (1).csv", f"out={tmp_path}/out", "columns.image=my image", "csv.delimiter=;"]
    arguments += ["columns.caption=[the text]", "columns.label=kind #1", "workers=0"]
    arguments += ["split.val=0.5", "split.by=label"] if drawn else []
    assert main(["data", "pack", *arguments]) == (2 if drawn else 0)
    said = capsys.readouterr()
    assert "CSV, semicolon in table (1).csv, columns image=my image caption=the text label=kind #1" in said.out
    assert ("in 1 groups by label, is none" in said.err) == drawn
