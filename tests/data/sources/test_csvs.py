"""CSV as people and programs write it: found out, or refused with what to say."""

import csv
from pathlib import Path

import pytest
from forms import captioned, put_images, run

from clipft.config import ColumnsConfig, CsvConfig
from clipft.data.rows import by_reason, read_rows
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Bad, Row

ITEMS = captioned(4)


def rows_of(folder: Path, text: str | bytes, name: str = "table.csv", **csv_options) -> list[Row | Bad]:
    """The rows of a table beside four images, 0.jpg to 3.jpg."""
    put_images(folder, ITEMS)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(open_source(Ask(str(folder / name), csv=CsvConfig(**csv_options))).rows())


def captions(rows: list[Row | Bad]) -> list[list[str]]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.captions for row in rows if isinstance(row, Row)]


def test_reads_what_pythons_writer_writes_in_every_dialect(tmp_path: Path):
    """The oracle is the csv module's writer, with cells that need quotes in each of them."""
    texts = ["plain", 'with "quotes"', "a, b; c | d", "two\nlines", "tab\there", "crlf\r\nhere", "ä ö ü 漢字"]
    for n, (delimiter, all_quoted, ending) in enumerate(
        (d, q, e) for d in ",;\t|" for q in (False, True) for e in ("\n", "\r\n")
    ):
        put_images(tmp_path / str(n), ITEMS)
        with open(tmp_path / str(n) / "t.csv", "w", newline="", encoding="utf-8") as file:
            quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
            writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ending)
            writer.writerows([["image", "caption"], *(["0.jpg", text] for text in texts)])
        source = open_source(Ask(str(tmp_path / str(n) / "t.csv")))
        assert captions(list(source.rows())) == [[text] for text in texts], source.said


def test_a_row_has_the_line_it_begins_in(tmp_path: Path):
    rows = rows_of(tmp_path, 'image,caption\n0.jpg,"two\nlines"\n\n1.jpg,one\n')
    assert [row.where for row in rows] == [[2], [5]]


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("image,caption\n0.jpg,ein Mädchen\n".encode("utf-8-sig"), None),
        ("image;caption\r\n0.jpg;ein Mädchen\r\n".encode("utf-16"), None),
        ("image\tcaption\n0.jpg\tein Mädchen\n".encode("utf-16-be"), "utf-16-be"),
        ("image,caption\n0.jpg,ein Mädchen\n".encode("latin-1"), "latin-1"),
        ("image,caption\n0.jpg,ein Mädchen\n".encode("cp1252"), "cp1252"),
    ],
)
def test_marks_tell_the_encoding_and_the_user_tells_others(tmp_path: Path, text: bytes, encoding: str | None):
    assert captions(rows_of(tmp_path, text, encoding=encoding)) == [["ein Mädchen"]]


def test_rows_that_are_not_utf8_are_bad_and_the_others_are_read(tmp_path: Path):
    text = "image,caption\n0.jpg,ein Mädchen\n1.jpg,a dog\n".encode("latin-1")
    bad, good = rows_of(tmp_path, text)
    assert bad == Bad(2, "bad_utf8") and isinstance(good, Row) and good.captions == ["a dog"]
    report = run(tmp_path / "table.csv", tmp_path / "out")
    assert "csv.encoding" in report.source.hints["bad_utf8"]


def test_quotes_are_letters_where_they_close_no_cell(tmp_path: Path):
    """As in Conceptual Captions: tab-separated, nothing is quoted."""
    rows = rows_of(tmp_path, '0.jpg\t"big" dog on a lawn\n1.jpg\t"never closed\n2.jpg\t5" wide\n', name="t.tsv")
    assert captions(rows) == [['"big" dog on a lawn'], ['"never closed'], ['5" wide']]


def test_every_line_that_an_open_quote_swallows_is_counted(tmp_path: Path):
    lines = [f'{i % 4}.jpg,"caption, {i}"' for i in range(50)]
    lines[20] = '0.jpg,"never closed'
    rows = rows_of(tmp_path, "\n".join(["image,caption", *lines]) + "\n")
    bad = [row for row in rows if isinstance(row, Bad)]
    assert {row.reason for row in bad} == {"bad_quotes"} and 22 in [row.where for row in bad]
    assert len(rows) == 50 and len(bad) <= 2


def test_a_quote_that_is_open_to_the_end_costs_its_lines_and_no_others(tmp_path: Path):
    lines = [f"{i % 4}.jpg,caption {i}" for i in range(60)]
    lines[3], lines[57] = '3.jpg,"quoted, 3"', '0.jpg,"never closed'
    rows = rows_of(tmp_path, "\n".join(["image,caption", *lines]) + "\n")
    assert [row.where for row in rows if isinstance(row, Bad)] == [59, 60, 61]
    assert sum(isinstance(row, Row) for row in rows) == 57


def test_rows_with_more_or_fewer_cells_are_bad(tmp_path: Path):
    rows = rows_of(tmp_path, "image,caption\n0.jpg,a dog\n1.jpg,a dog, running\n2.jpg\n")
    assert rows[1:] == [Bad(3, "wrong_number_of_columns"), Bad(4, "wrong_number_of_columns")]


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "None", "null", '""'])
def test_what_stands_for_a_missing_caption_is_none(tmp_path: Path, missing: str):
    rows = rows_of(tmp_path, f"image,caption\n0.jpg,{missing}\n1.jpg,Nonesuch\n")
    assert rows[0] == Bad(2, "no_caption_or_label") and captions(rows[1:]) == [["Nonesuch"]]


def test_a_table_without_a_header_is_read_by_the_number_of_the_column(tmp_path: Path):
    rows = rows_of(tmp_path, "0.jpg,a dog\n1.jpg,a cat\n")
    assert captions(rows) == [["a dog"], ["a cat"]]
    source = open_source(Ask(str(tmp_path / "table.csv")))
    assert "no header" in source.said and "image=1 caption=2" in source.said
    swapped = open_source(Ask(str(tmp_path / "table.csv"), columns=ColumnsConfig(image="2", caption="1")))
    assert captions(list(swapped.rows())) == [["0.jpg"], ["1.jpg"]]


def test_the_numbers_behind_flickrs_image_names_are_cut_off(tmp_path: Path):
    rows = rows_of(tmp_path, '0.jpg#0\tA dog , running .\n0.jpg#1\t"Stop" .\n1.jpg#0\tA cat .\n', name="x.token.txt")
    assert [(Path(str(row.image)).name, row.captions[0]) for row in rows if isinstance(row, Row)] == [
        ("0.jpg", "A dog , running ."),
        ("0.jpg", '"Stop" .'),
        ("1.jpg", "A cat ."),
    ]


def test_flickr30ks_bars_and_spaces(tmp_path: Path):
    rows = rows_of(tmp_path, "image_name| comment_number| comment\n0.jpg| 0| Two men , outside .\n1.jpg| 1| A dog .\n")
    assert captions(rows) == [["Two men , outside ."], ["A dog ."]]


@pytest.mark.parametrize(
    "text, says",
    [
        ("only one column\nand text\n", "does not look like a table"),
        ("a,b;c\nd,e;f\n", "csv.delimiter=',' or csv.delimiter=';'"),
        ("image,image,caption\n0.jpg,1.jpg,x\n", "'image' stands twice"),
        ("image,caption\n", "it is empty"),
        ("", "it is empty"),
    ],
)
def test_what_cannot_be_decided_is_refused_with_the_choices(tmp_path: Path, text: str, says: str):
    put_images(tmp_path, ITEMS)
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_rows(open_source(Ask(str(tmp_path / "table.csv"))))
    assert says in str(error.value)


def test_the_user_overrides_what_was_found(tmp_path: Path):
    text = "image;note;caption\n0.jpg;a,b;a dog\n"
    assert captions(rows_of(tmp_path, text, delimiter=";")) == [["a dog"]]
    rows = rows_of(tmp_path, 'image,caption\n0.jpg,"a dog"\n', quotes=False)
    assert captions(rows) == [['"a dog"']]


def test_rows_of_one_image_are_one_sample_and_repeats_are_counted(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    text = "image,caption\n0.jpg,a dog\n1.jpg,a cat\n0.jpg,one dog\n0.jpg,a dog\n"
    (tmp_path / "table.csv").write_text(text)
    rows = read_rows(open_source(Ask(str(tmp_path / "table.csv"))))
    assert [(row.where, row.captions, row.key) for row in rows.usable] == [
        ([2, 4, 5], ["a dog", "one dog", "a dog"], "000001-0"),
        ([3], ["a cat"], "000002-1"),
    ]
    assert (rows.num_rows, rows.num_repeated, by_reason(rows.dropped)) == (4, 1, {})
