"""What a folder is, and what it could be."""

import subprocess
import sys
from pathlib import Path

import pytest
from forms import (
    captioned,
    coco,
    content,
    csv_rows,
    expected,
    flickr_tokens,
    huggingface,
    jsonl,
    labelled,
    parquet_with_bytes,
    put_images,
    run,
    tars,
)

from clipft.data.sources.recognise import open_source, without_split
from clipft.data.sources.row import Ask

ITEMS = captioned(4)


def test_several_tables_in_a_folder_are_not_guessed_between(tmp_path: Path):
    csv_rows(tmp_path, ITEMS, "old.csv")
    csv_rows(tmp_path, ITEMS, "new.csv")
    with pytest.raises(ValueError, match=r"several tables \(new\.csv, old\.csv\). Decide: source=.*new\.csv root="):
        open_source(Ask(str(tmp_path)))
    flickr_tokens(tmp_path / "flickr", ITEMS)
    (tmp_path / "flickr/Flickr8k.lemma.token.txt").write_text("0.jpg#0\ta dog\n")
    with pytest.raises(ValueError, match=r"Flickr8k\.lemma\.token\.txt root="):
        open_source(Ask(str(tmp_path / "flickr")))


def test_of_cocos_annotations_those_with_captions_are_read(tmp_path: Path):
    coco(tmp_path / "coco", ITEMS)
    (tmp_path / "coco/images").mkdir()
    for split in ("train", "val", "test"):
        if (tmp_path / f"coco/{split}2017").exists():
            (tmp_path / f"coco/{split}2017").rename(tmp_path / f"coco/images/{split}2017")
    for name in ("instances_train2017", "instances_val2017", "person_keypoints_val2017"):
        (tmp_path / f"coco/annotations/{name}.json").write_text('{"images": [], "annotations": [{"bbox": []}]}')
    run(tmp_path / "coco", tmp_path / "out")
    assert content(tmp_path / "out") == expected(ITEMS)


def test_the_choice_that_is_offered_works(tmp_path: Path):
    flickr_tokens(tmp_path, ITEMS)
    (tmp_path / "Flickr8k.lemma.token.txt").write_text("0.jpg#0\ta dog\n")
    source = open_source(Ask(str(tmp_path / "Flickr8k.token.txt"), root=str(tmp_path / "Flicker8k_Dataset")))
    assert "Flickr captions, tab, no header" in source.said
    assert len(run(tmp_path / "Flickr8k.token.txt", tmp_path / "out").rows.usable) == 4


def test_parts_of_one_table_belong_together(tmp_path: Path):
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test", "captions_val2017"]
    plain = [without_split(Path(f"{name}.json")) for name in names]
    assert plain[0] == plain[1] == plain[2] == plain[3] != plain[4]


def test_a_format_decides_between_what_a_folder_holds(tmp_path: Path):
    jsonl(tmp_path, labelled())
    for item in labelled():
        put_images(tmp_path / str(item.label), [item])
    assert "metadata.jsonl" in open_source(Ask(str(tmp_path))).said
    assert "a folder per class, splits" not in open_source(Ask(str(tmp_path), format="classes")).said
    with pytest.raises(ValueError, match="holds no table for format=parquet"):
        open_source(Ask(str(tmp_path), format="parquet"))


def test_tars_beside_a_table_are_not_guessed_between(tmp_path: Path):
    """An archive that was left beside its images is no set of shards."""
    jsonl(tmp_path, ITEMS)
    tars(tmp_path, ITEMS)
    with pytest.raises(ValueError, match=r"holds tars and tables \(metadata\.jsonl\)\. Decide: format=tars or source="):
        open_source(Ask(str(tmp_path)))
    assert "WebDataset" in open_source(Ask(str(tmp_path), format="tars")).said


@pytest.mark.parametrize(
    "form, says",
    [
        (
            coco,
            "read as: COCO captions in 3 parts, columns image=file_name caption=caption, splits train val test by name",
        ),
        (huggingface, "read as: Hugging Face dataset, images in column image"),
        (parquet_with_bytes, "read as: Parquet, images in column image"),
        (tars, "read as: WebDataset shards, 3 tars, splits train val test"),
        (csv_rows, "read as: CSV, comma in table.csv, columns image=filepath caption=title split=split (override with"),
    ],
)
def test_it_says_in_a_line_how_it_reads(tmp_path: Path, form, says: str, capsys):
    run(form(tmp_path / "source", captioned(9)), tmp_path / "out")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(says) and "override with" in said


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere", "does not exist. Expected a folder with metadata.jsonl"),
        ("https://example.org/x.csv", "are read from local files"),
        ("notes.xlsx", "is not one kind of table.*save a spreadsheet as CSV"),
        ("x.parquet", "is no Parquet file"),
    ],
)
def test_what_cannot_be_read_says_what_is_expected(tmp_path: Path, name: str, says: str):
    for file in ("notes.xlsx", "x.parquet"):
        (tmp_path / file).write_text("x")
    source = name if "://" in name else str(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        open_source(Ask(source))


@pytest.mark.process
@pytest.mark.parametrize("missing, form", [("pyarrow", "x.parquet"), ("datasets", "saved")])
def test_a_missing_library_is_answered_with_the_line_that_installs_it(tmp_path: Path, missing: str, form: str):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from clipft.cli import main\n"
        f"sys.exit(main(['data', 'pack', 'source={tmp_path / form}', 'out={tmp_path}/out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and f'pip install "{missing}>=' in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.process
def test_neither_torch_nor_the_readers_of_other_formats_are_imported_to_look(tmp_path: Path):
    csv_rows(tmp_path, ITEMS)
    code = (
        "import sys; from clipft.data.sources.recognise import open_source; from clipft.data.sources.row import Ask\n"
        f"print(len(list(open_source(Ask({str(tmp_path)!r})).rows())))\n"
        "print(sorted({'torch', 'pyarrow', 'datasets', 'pandas', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "8\n[]\n"
