"""Where the paths of a table may lead."""

import json
import os
from pathlib import Path

import pytest
from forms import captioned, content, expected, put_images, run

from clipft.data.rows import by_reason
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask

ITEMS = captioned(4)


def table(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": name, "captions": list(ITEMS[i % 4].captions)} for i, name in enumerate(names)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "table.jsonl"


def dropped(report) -> dict[str, list]:
    return by_reason(report.rows.dropped)


def test_paths_that_leave_the_folder_of_the_table_are_left_out(tmp_path: Path):
    put_images(tmp_path / "set", ITEMS[:1])
    put_images(tmp_path / "other", ITEMS[1:])
    names = ["0.jpg", "../other/1.jpg", str(tmp_path / "other/2.jpg"), "~/3.jpg", "x/../../other/3.jpg", "/", ".."]
    report = run(table(tmp_path / "set", *names), tmp_path / "out")
    assert dropped(report) == {"image_outside_source": [2, 3, 4, 5, 6, 7]}
    assert "root=" in report.source.hints["image_outside_source"]


def test_a_root_that_the_user_names_may_be_wider(tmp_path: Path):
    put_images(tmp_path / "other", ITEMS)
    names = ["other/0.jpg", "../other/1.jpg", str(tmp_path / "other/2.jpg"), "other/3.jpg", "../../etc/passwd.jpg"]
    report = run(table(tmp_path / "set", *names), tmp_path / "out", root=str(tmp_path))
    assert dropped(report) == {"image_outside_source": [5]}
    assert content(tmp_path / "out") == expected(ITEMS, splits=False)
    with pytest.raises(ValueError, match="root='nowhere' is no folder"):
        open_source(Ask(str(tmp_path / "set/table.jsonl"), root="nowhere"))


def test_links_that_leave_the_folder_need_a_root_too(tmp_path: Path):
    put_images(tmp_path / "other", ITEMS)
    source = table(tmp_path / "set", "0.jpg", "linked/1.jpg", "inner/2.jpg", "3.jpg")
    put_images(tmp_path / "set/real", ITEMS)
    (tmp_path / "set/0.jpg").symlink_to(tmp_path / "other/0.jpg")
    (tmp_path / "set/linked").symlink_to(tmp_path / "other")
    (tmp_path / "set/inner").symlink_to(tmp_path / "set/real")
    (tmp_path / "set/3.jpg").symlink_to(tmp_path / "set/real/3.jpg")
    report = run(source, tmp_path / "out")
    assert dropped(report) == {"image_outside_source": [1, 2]}
    assert not dropped(run(source, tmp_path / "all", root=str(tmp_path / "set")))
    assert content(tmp_path / "all") == expected(ITEMS, splits=False)


def test_a_folder_is_not_left_through_links_either(tmp_path: Path):
    put_images(tmp_path / "other/cat", ITEMS)
    put_images(tmp_path / "set/dog", ITEMS[:1])
    (tmp_path / "set/cat").symlink_to(tmp_path / "other/cat")
    (tmp_path / "set/dog/round").symlink_to(tmp_path / "set")
    report = run(tmp_path / "set", tmp_path / "out")
    assert dropped(report) == {"image_outside_source": ["cat"]} and report.packed.classnames == ["dog"]
    assert run(tmp_path / "set", tmp_path / "all", root=str(tmp_path / "set")).packed.classnames == ["cat", "dog"]


def test_paths_of_other_systems_and_homes_are_understood(tmp_path: Path, monkeypatch):
    put_images(tmp_path / "images/a", ITEMS)
    monkeypatch.setenv("HOME", str(tmp_path / "images"))
    source = table(tmp_path, "images\\a\\0.jpg", "~/a/1.jpg", " images/a/2.jpg ", "./images//a/../a/3.jpg")
    report = run(source, tmp_path / "out")
    assert not dropped(report) and content(tmp_path / "out") == expected(ITEMS, splits=False)
    assert [json.loads(row.rest)["image"] for row in report.rows.usable] == [f"images/a/{i}.jpg" for i in range(4)]


def test_images_that_all_lie_in_one_folder_beside_the_table_are_found(tmp_path: Path):
    put_images(tmp_path / "Images", ITEMS)
    source = open_source(Ask(str(table(tmp_path, *(item.name for item in ITEMS)))))
    assert f"images in {tmp_path}/Images" in source.said
    put_images(tmp_path / "thumbs", ITEMS)
    with pytest.raises(ValueError, match=r"several folders. Decide: root=.*Images or root=.*thumbs"):
        open_source(Ask(str(tmp_path / "table.jsonl")))


def test_what_is_no_image_file_is_left_out_by_its_reason(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(ITEMS[1].raw[:15])
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = [
        "0.jpg",
        "folder.jpg",
        "empty.jpg",
        "text.jpg",
        "cut.jpg",
        "broken.jpg",
        "gone.jpg",
        "\0.jpg",
        "",
        "pipe.jpg",
    ]
    report = run(table(tmp_path, *names, "0.jpg/x.jpg", "https://example.org/1.jpg"), tmp_path / "out")
    assert dropped(report) == {
        "no_image": [8, 9],
        "image_url": [12],
        "image_missing": [2, 6, 7, 10, 11],
        "image_empty": [3],
        "format_not_allowed": [4],
        "image_header_damaged": [5],
    }
    lines = (tmp_path / "out/dropped.tsv").read_text().splitlines()
    assert len(lines) == 12 and lines[0] == "reason\trow\tsplit" and "image_url\t12\t" in lines
    assert report.rows.num_rows == 12 == 11 + sum(shard.samples for shard in report.packed.splits["train"])


def test_a_file_that_may_not_be_read_is_left_out(tmp_path: Path, monkeypatch):
    put_images(tmp_path, ITEMS)
    source = table(tmp_path, "0.jpg", "1.jpg")
    if os.geteuid() == 0:  # root may read everything: a device of the kernel refuses instead
        (tmp_path / "1.jpg").unlink()
        (tmp_path / "1.jpg").symlink_to("/proc/self/mem")
        report = run(source, tmp_path / "out", root=str(tmp_path))
    else:
        (tmp_path / "1.jpg").chmod(0)
        report = run(source, tmp_path / "out")
    assert dropped(report) == {"image_unreadable": [2]}


@pytest.mark.parametrize("column", ["url", "image"])
def test_addresses_are_answered_with_the_command_that_downloads_them(tmp_path: Path, column: str):
    rows = ["label,caption," + column, "cat,a cat,https://example.org/cat.jpg", "dog,a dog,http://example.org/dog"]
    (tmp_path / "my table.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError) as error:
        open_source(Ask(str(tmp_path / "my table.csv")))
    lines = str(error.value).splitlines()
    assert lines[2] == (
        f"img2dataset --url_list '{tmp_path}/my table.csv' --url_col {column} --input_format csv --caption_col caption "
        f"--save_additional_columns '[\"label\"]' --output_format webdataset --output_folder '{tmp_path}/my "
        "table-downloaded' --image_size 512 --resize_mode keep_ratio --resize_only_if_bigger True"
    )
    assert lines[3] == f"clipft data pack source='{tmp_path}/my table-downloaded' out=OUT"


@pytest.mark.parametrize(
    "delimiter, encoding, kind, told",
    [("\t", "utf-8", "tsv", False), (";", "utf-8", "csv", True), (",", "utf-16", "csv", True)],
)
def test_the_command_fits_how_the_table_is_written(tmp_path: Path, delimiter, encoding, kind: str, told: bool):
    rows = ["url,caption", "https://example.org/cat.jpg,a cat", "http://example.org/dog,a dog"]
    (tmp_path / "table.csv").write_text("\n".join(rows).replace(",", delimiter), encoding)
    with pytest.raises(ValueError, match=f"--url_col url --input_format {kind} --caption_col caption") as error:
        open_source(Ask(str(tmp_path / "table.csv")))
    (tmp_path / "rows.ndjson").write_text('{"url": "https://example.org/cat.jpg", "caption": "a cat"}\n' * 2)
    with pytest.raises(ValueError, match=r"then pack what arrives:\npip .*\nimg2dataset .* --input_format jsonl "):
        open_source(Ask(str(tmp_path / "rows.ndjson")))
    assert ("write table.csv as UTF-8 with commas and a header" in str(error.value)) is told


def test_images_are_found_in_folders_two_deep_beside_links_to_themselves(tmp_path: Path):
    source = table(tmp_path / "set", "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    put_images(tmp_path / "set/images/all", ITEMS)
    (tmp_path / "set/self").symlink_to("self")
    (tmp_path / "set/images/self").symlink_to("self")
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == expected(ITEMS, splits=False)


def test_an_image_that_a_link_to_itself_names_is_not_called_missing(tmp_path: Path):
    source = table(tmp_path / "set", "0.jpg", "1.jpg")
    put_images(tmp_path / "set", ITEMS[:1])
    (tmp_path / "set/1.jpg").symlink_to("1.jpg")
    assert dropped(run(source, tmp_path / "out")) == {"image_unreadable": [2]}
