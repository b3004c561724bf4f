import pytest

from clipft.files import replace_file


def test_content_takes_the_place_of_the_old_one_and_nothing_else_is_left(tmp_path):
    for content in ("first", "zwölf", b"\x00bytes"):
        replace_file(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_names_the_file_and_leaves_what_was_there(tmp_path):
    (tmp_path / "a").mkdir()  # a folder in its place refuses, as a full disk does
    with pytest.raises(OSError, match=f"{tmp_path}/a'"):
        replace_file(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
