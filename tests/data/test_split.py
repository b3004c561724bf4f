import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shards import list_shards, pairs, write_shards, write_tar

from clipft.config import DataConfig
from clipft.data.index import Samples, index_shards, load_index
from clipft.data.split import expand_shards, find_shards, hold_out, load_splits


def keys(samples: Samples | None) -> list[str]:
    assert samples is not None
    return [samples.key(i).rpartition("/")[2] for i in range(len(samples))]


def packed(folder: Path) -> dict[str, list[Path]]:
    """A folder with 6 + 4 training, 3 val and 2 test samples and its shards.json."""
    shards = {
        "train": [Path(path) for path in write_shards(folder, 6, 4, prefix="train-")],
        "val": [Path(write_tar(folder / "val-000.tar", pairs(10, 3)))],
        "test": [Path(write_tar(folder / "test-000.tar", pairs(13, 2)))],
    }
    list_shards(folder, shards)
    return shards


def test_the_manifest_says_what_each_split_holds(tmp_path: Path):
    packed(tmp_path / "birds")
    manifest = json.loads((tmp_path / "birds/shards.json").read_text())
    assert manifest["version"] == 1 and manifest["name"] == "birds"
    train = manifest["splits"]["train"]
    assert [shard["samples"] for shard in train["shards"]] == [6, 4] and train["samples"] == 10
    assert train["bytes"] == sum((tmp_path / "birds" / shard["name"]).stat().st_size for shard in train["shards"])


def test_a_packed_folder_gives_its_splits_name_classes_and_templates(tmp_path: Path):
    packed(tmp_path / "birds")
    (tmp_path / "birds/classnames.txt").write_text("blue tit\nwren\n\n")
    (tmp_path / "birds/zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    splits = load_splits(DataConfig(path=f"{tmp_path}/birds/"))
    assert splits.name == "birds" and splits.notes == []
    assert [len(keys(part)) for part in (splits.train, splits.val, splits.test)] == [10, 3, 2]
    assert splits.classnames == ["blue tit", "wren"]
    assert splits.templates == ["a photo of a {c}.", "a {c}"]
    assert load_splits(DataConfig(path=str(tmp_path / "birds"), name="b")).name == "b"


def test_names_and_subfolders_give_the_splits_of_a_folder_without_manifest(tmp_path: Path):
    for n, name in enumerate(["train-000.tar", "train_001.tar", "validation.0.tar", "test/0.tar"]):
        write_tar(tmp_path / name, pairs(10 * n, 2))
    write_tar(tmp_path / "other.tar", pairs(50, 2))
    found = find_shards(DataConfig(path=str(tmp_path)))
    assert {split: len(shards) for split, shards in found.shards.items()} == {"train": 2, "val": 1, "test": 1}
    assert found.notes == [f"{tmp_path}: 1 tars belong to no split: {tmp_path}/other.tar, ..."]


def test_a_folder_of_plain_tars_is_training_data(tmp_path: Path):
    write_shards(tmp_path, 20, 20)
    splits = load_splits(DataConfig(path=str(tmp_path)))
    assert splits.test is None and len(keys(splits.train)) == 38 and len(keys(splits.val)) == 2
    assert splits.classnames is None and splits.templates == []


def test_data_with_only_test_has_nothing_held_out(tmp_path: Path):
    write_tar(tmp_path / "test-0.tar", pairs(0, 2))
    splits = load_splits(DataConfig(path=str(tmp_path)))
    assert (splits.train, splits.val, keys(splits.test)) == (None, None, ["00000", "00001"])


def test_named_shards_win_over_the_folder_and_name_the_data(tmp_path: Path):
    packed(tmp_path / "birds")
    other = write_tar(tmp_path / "other/train/x.tar", pairs(90, 5))
    splits = load_splits(DataConfig(path=str(tmp_path / "birds"), train=other))
    assert keys(splits.train) == [f"{i:05d}" for i in range(90, 95)]
    assert len(keys(splits.val)) == 3 and splits.name == "birds"
    assert find_shards(DataConfig(train=other)).name == "other"


def test_the_holdout_is_disjoint_complete_and_the_same_in_any_order_of_the_shards(tmp_path: Path):
    shards = write_shards(tmp_path, 30, 50, 20)
    train, val = hold_out(index_shards(shards), 0.1)
    assert len(val) == 10 and sorted(keys(train) + keys(val)) == [f"{i:05d}" for i in range(100)]
    assert set(keys(hold_out(index_shards(shards[::-1]), 0.1)[1])) == set(keys(val))
    assert set(keys(val)) < set(keys(hold_out(index_shards(shards), 0.2)[1]))
    assert train.fingerprint != val.fingerprint != index_shards(shards).fingerprint


def test_a_missing_val_is_said_with_counts_and_what_was_left_out_too(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [*pairs(0, 40), ("broken.jpg", b"")])
    splits = load_splits(DataConfig(path=str(tmp_path), val_frac=0.25))
    assert splits.train is not None and splits.train.dropped == {"no_text": 1}
    assert splits.notes == [
        f"train: 1 sample left out (no_text, such as broken (byte {40 * 2560} of {tmp_path}/a.tar))",
        "no val given: 10 of 40 training samples held out by a hash of their keys (data.val_frac=0.25), "
        "30 left to train on",
    ]


def test_a_split_of_which_too_much_is_incomplete_is_refused_with_an_example(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [*pairs(0, 40), ("x.jpg", b""), ("y.jpg", b""), ("z.txt", b"")])
    expected = r"data\.train: 3 of 43 .* \(2 no_text, such as x \(byte .*; 1 no_image, such as z .*max_bad_frac=0\.05"
    with pytest.raises(ValueError, match=expected):
        load_splits(DataConfig(path=str(tmp_path)))
    splits = load_splits(DataConfig(path=str(tmp_path), max_bad_frac=0.07))
    assert splits.train is not None and splits.val is not None and len(splits.train) + len(splits.val) == 40


def test_shards_without_any_sample_are_said(tmp_path: Path):
    for n, members in enumerate([pairs(0, 20), [], pairs(20, 2), []]):
        write_tar(tmp_path / f"{n}.tar", members)
    notes = load_splits(DataConfig(path=str(tmp_path))).notes
    assert notes[0] == f"train: 2 of 4 shards without any sample, such as {tmp_path}/1.tar"


def test_a_holdout_that_leaves_nothing_raises(tmp_path: Path):
    samples = index_shards(write_shards(tmp_path, 1))
    with pytest.raises(ValueError, match=r"data\.val_frac=0\.05 of 1 samples leaves none"):
        hold_out(samples, 0.05)


def test_measuring_on_training_shards_is_said(tmp_path: Path):
    shards = write_shards(tmp_path, 2, 2)
    notes = find_shards(DataConfig(train=shards, val=shards[1])).notes
    assert notes == [f"1 shards are both trained on and measured on: {shards[1]}, ..."]


def test_folders_globs_braces_files_and_lists_stand_for_shards_in_natural_order(tmp_path: Path):
    names = [write_tar(tmp_path / f"x-{n}.tar", []) for n in (1, 2, 10)]
    odd = write_tar(tmp_path / "odd/{a}[1].tar", [])
    for pattern in ("", "*.tar", "x-[12]*.tar", "x-{1,2,10}.tar", "x-{1..2}*.tar"):
        expected = [names[0], names[2], names[1]] if ".." in pattern else names
        assert expand_shards("data.train", [f"{tmp_path}/{pattern}"]) == expected, pattern
    assert expand_shards("data.train", [odd, names[1], names[0]]) == [odd, names[1], names[0]]
    assert expand_shards("data.train", [f"{tmp_path}/x-{{1..2}}.tar"]) == names[:2]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("x-*.tgz", r"matches no shard.*/ holds: x-0\.tar, x-1\.tar"),
        ("x-9.tar", r"matches no shard.*/ holds: x-0\.tar, x-1\.tar"),
        ("nowhere/x-0.tar", r"data\.train=.*matches no shard.*holds: "),
        ("x-{0..3}.tar", r"2 of 4 shards do not exist, the first is \S*x-2\.tar"),
        ("x-{0..1}{.tar", r"unbalanced braces"),
        ("x-{0,1,0}.tar", r"names \S*x-0\.tar more than once"),
        ("empty", r"matches no shard.*empty/ is empty"),
        ("layout", r"folder with splits of its own \(train, test\)\. Write data="),
    ],
)
def test_what_matches_nothing_or_too_much_raises_with_the_key_and_what_is_there(
    tmp_path: Path, pattern: str, says: str
):
    for name in ("x-0.tar", "x-1.tar", "layout/train-0.tar", "layout/test-0.tar"):
        write_tar(tmp_path / name, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says) as error:
        expand_shards("data.train", [str(tmp_path / pattern)])
    assert "data.train=" in str(error.value)


def test_remote_shards_are_refused_where_only_local_ones_are_read():
    with pytest.raises(ValueError, match="Download them"):
        expand_shards("source", ["https://example.org/x.tar"])


def test_no_data_and_nothing_at_the_path_say_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match="Give data=NAME"):
        find_shards(DataConfig())
    (tmp_path / "mydata").mkdir()
    for name, says in (("mydata", "holds no shards"), ("mydota", r"does not exist.*\n.*holds: mydata")):
        with pytest.raises(ValueError, match=says) as error:
            find_shards(DataConfig(path=str(tmp_path / name)))
        assert f"clipft data pack source=FOLDER out={tmp_path / name}" in str(error.value)
    (tmp_path / "mydata/metadata.jsonl").touch()
    with pytest.raises(ValueError, match=f"clipft data pack source={tmp_path}/mydata out="):
        find_shards(DataConfig(path=str(tmp_path / "mydata")))


def test_a_manifest_that_does_not_fit_its_folder_raises(tmp_path: Path):
    shards = packed(tmp_path)
    config = DataConfig(path=str(tmp_path))
    with open(shards["val"][0], "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"val-000\.tar has \d+ bytes; .*shards\.json lists it with \d+ bytes"):
        find_shards(config)
    shards["val"][0].unlink()
    with pytest.raises(ValueError, match=r"val-000\.tar does not exist"):
        find_shards(config)
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "splits": {"train": {}}}'):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a list of shards.*clipft data pack"):
            find_shards(config)


def test_shards_are_found_without_torch(tmp_path: Path):
    write_shards(tmp_path, 2)
    code = (
        "import sys; from clipft.config import DataConfig; from clipft.data.split import find_shards; "
        f"print(len(find_shards(DataConfig(path={str(tmp_path)!r})).shards['train']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


def test_about_the_asked_share_is_held_out_of_every_shard(tmp_path: Path):
    samples = index_shards(write_shards(tmp_path, 100, 100))
    val = hold_out(samples, 0.5)[1]
    assert 25 < np.sum(val.rows[:, 0] == 0) < 75


def test_a_packed_shard_with_another_number_of_samples_than_was_written_is_refused(tmp_path: Path):
    """Of the same size, and with an end of zeros as tar writes it."""
    shard = packed(tmp_path / "birds")["train"][0]
    raw, places = shard.read_bytes(), [offset for offset in load_index(shard).offsets]
    shard.write_bytes(raw[: places[-2] - 512].ljust(len(raw), b"\0"))
    assert load_index(shard).problems == []
    for data in (DataConfig(path=str(tmp_path / "birds")), DataConfig(train=str(shard))):
        with pytest.raises(ValueError, match=rf"{shard} holds 5 usable samples; shards\.json lists it with 6\. Copy"):
            load_splits(data)
    (tmp_path / "birds/shards.json").write_text('{"version": 2, "shards": []}')  # another program's
    assert load_splits(DataConfig(train=str(shard), val=str(shard))).train is not None


def test_shards_that_may_be_cut_are_said_unless_shards_json_knows_their_samples(tmp_path: Path):
    shards = packed(tmp_path / "birds")["train"]
    raw = shards[1].read_bytes()
    (tmp_path / "odd").mkdir()
    odd = tmp_path / "odd/train-0.tar"
    odd.write_bytes(raw[:17408])
    assert load_index(odd).doubts != []
    notes = load_splits(DataConfig(train=[str(odd), str(shards[0])], val=str(shards[0]))).notes
    assert notes[1].startswith("train: 1 of 2 shards may be cut: nothing but ") and str(odd) in notes[1]
    list_shards(odd.parent, {"train": [odd]})
    assert load_splits(DataConfig(train=str(odd), val=str(shards[0]))).notes == []


def test_a_shard_under_two_spellings_is_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "a", 20, 20)
    (tmp_path / "b").symlink_to("a")
    for other in (f"{tmp_path}/a/000.tar", "a/../a/000.tar", "b/000.tar"):
        with pytest.raises(ValueError, match=r"names a/000\.tar more than once \(also as .*000\.tar\)"):
            expand_shards("data.train", ["a", other])
        assert find_shards(DataConfig(train="a", val=other)).notes == [
            "1 shards are both trained on and measured on: a/000.tar, ..."
        ]


@pytest.mark.parametrize(
    "kind, is_a", [("pipe", "no plain file"), ("folder", "a folder"), ("link", "a link to nothing")]
)
def test_a_name_of_a_shard_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, is_a: str):
    write_shards(tmp_path, 3, prefix="train-")
    odd = tmp_path / "train-9.tar"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("nowhere", path)}[kind](odd)
    for data in (
        DataConfig(path=str(tmp_path)),
        DataConfig(train=str(tmp_path)),
        DataConfig(train=f"{tmp_path}/train-*.tar"),
        DataConfig(train=f"{tmp_path}/train-{{000,9}}.tar"),
        *([] if kind == "folder" else [DataConfig(train=str(odd))]),
    ):
        with pytest.raises(ValueError, match=rf"data\.(path|train): {odd} is {is_a}, and no shard"):
            find_shards(data)


@pytest.mark.parametrize("name", [b"train-\xff.tar", b"train-\x1b[31mred\x07.tar", "train-\u202e.tar".encode()])
def test_names_of_shards_are_printable_wherever_they_are_said(tmp_path: Path, name: bytes):
    shard = os.fsencode(tmp_path) + b"/" + name
    os.rename(write_tar(tmp_path / "a.tar", [*pairs(0, 40), ("x.jpg", b""), ("notes", b"")]), shard)
    write_tar(tmp_path / "other.tar", [])
    os.rename(write_tar(tmp_path / "c.tar", []), shard.replace(b"train-", b"train-b"))
    splits = load_splits(DataConfig(path=str(tmp_path)))
    assert len(splits.notes) == 5 and all(note.isprintable() for note in splits.notes)
    with open(shard, "r+b") as file:
        file.truncate(700)
    for data in (DataConfig(path=str(tmp_path)), DataConfig(train=f"{tmp_path}/train-[!b]*.tar")):
        with pytest.raises(ValueError, match="should run to byte") as error:
            load_splits(data)
        assert str(error.value).isprintable() and "\\" in str(error.value)
