import json
import shutil
import subprocess
import time

import pytest

from clipft.data.caption import (
    caption_id,
    captions_of,
    checked_question,
    group_id,
    group_of,
    hash_id,
    normalise_caption,
    only_words,
    written_captions,
)
from clipft.data.sample import BadSample


def as_json(value):
    return {"json": json.dumps(value).encode()}


def reason_of(members):
    with pytest.raises(BadSample) as error:
        captions_of(members)
    return error.value.reason


@pytest.mark.parametrize(
    "row, captions",
    [
        ({"captions": ["a dog", "a brown dog"]}, ["a dog", "a brown dog"]),
        ({"captions": "a dog"}, ["a dog"]),
        ({"caption": "a dog", "url": "http://x"}, ["a dog"]),
        ({"text": " a dog\n"}, ["a dog"]),
        ({"title": "a dog"}, ["a dog"]),
        ({"captions": None, "caption": "a dog"}, ["a dog"]),
        ({"captions": ["", "  ", None, 5, {"a": 1}, "a dog"]}, ["a dog"]),
    ],
)
def test_captions_come_from_the_first_json_column_that_has_any(row, captions):
    assert captions_of(as_json(row)) == captions


@pytest.mark.parametrize("value", [None, 5, [], ["a dog"], "a dog", {}, {"caption": 5}, {"captions": [" "]}])
def test_json_without_a_caption_leaves_the_text_lines(value):
    assert reason_of(as_json(value)) == "no_caption"
    assert captions_of({**as_json(value), "txt": b"a cat\n\n a dog \r\n"}) == ["a cat", "a dog"]


def test_json_goes_before_txt():
    assert captions_of({**as_json({"captions": ["a dog"]}), "txt": b"a cat"}) == ["a dog"]


def test_a_byte_order_mark_is_no_part_of_a_caption():
    assert captions_of({"txt": "\ufeffein Mädchen".encode()}) == ["ein Mädchen"]
    assert captions_of({"json": '\ufeff{"caption": "ein Mädchen"}'.encode()}) == ["ein Mädchen"]


@pytest.mark.parametrize(
    "members, reason",
    [
        ({}, "no_caption"),
        ({"cls": b"3"}, "no_caption"),
        ({"txt": b""}, "no_caption"),
        ({"txt": b" \n\t\n"}, "no_caption"),
        ({"txt": "Mädchen".encode("latin-1")}, "bad_utf8"),
        ({"txt": "a dog".encode("utf-16")}, "bad_utf8"),
        ({"txt": "a dog".encode("utf-16-le")}, "bad_utf8"),
        ({"txt": b"a dog\0"}, "bad_utf8"),
        ({"txt": b"&nbsp;&#32;"}, "no_caption"),
        ({"txt": "\u200b\ufeff\u00a0".encode()}, "no_caption"),
        ({"txt": b"\x1b[31m"}, "no_caption"),
        ({"txt": b"\x1b[1;31m&#32;\x1b[0m"}, "no_caption"),
        ({"json": rb'{"caption": null}'}, "no_caption"),
        ({"json": rb'{"caption": [null, null]}'}, "no_caption"),
        ({"json": b'{"caption": "M\xe4dchen"}'}, "bad_utf8"),
        ({"json": rb'{"caption": "\ud800"}'}, "bad_utf8"),
        ({"json": b'{"caption": "a dog'}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": b"9" * 5000}, "bad_json"),
    ],
)
def test_unusable_captions_have_a_reason(members, reason):
    assert reason_of(members) == reason


def latin(text: str) -> bytes:
    return text.encode("latin-1")


@pytest.mark.parametrize(
    "members, captions",
    [
        ({"txt": latin("ein Mädchen")}, ["ein M\ufffddchen"]),
        ({"txt": latin("ein Mädchen\neine Straße")}, ["ein M\ufffddchen", "eine Stra\ufffde"]),
        ({"json": latin('{"caption": "Mädchen"}')}, ["M\ufffddchen"]),
        ({"json": rb'{"caption": "a \ud800 dog"}'}, ["a \ufffd\ufffd\ufffd dog"]),
        ({"txt": b"a\0dog"}, ["a\ufffddog"]),
        ({"txt": "\ufeffein Mädchen 😀".encode()}, ["ein Mädchen 😀"]),
    ],
)
def test_with_replace_what_is_no_utf8_becomes_the_replacement_character(members, captions):
    assert captions_of(members, "replace") == captions
    assert not any("\ud800" <= char <= "\udfff" for caption in captions for char in caption)


def test_a_group_in_json_that_is_no_utf8_follows_the_same_rule():
    members = {"json": latin('{"product": "Öl"}')}
    with pytest.raises(BadSample, match="bad_utf8"):
        group_of(members, "product")
    assert group_of(members, "product", "replace") == "\ufffdl"


def test_a_label_needs_a_class_where_the_set_has_classes():
    members = {"cls": b"2", "txt": b"a dog"}
    assert checked_question(members, 3, "strict") == (2, ["a dog"])
    assert checked_question(members, 0, "strict") == (-1, ["a dog"])
    with pytest.raises(BadSample, match="label_without_class"):
        checked_question(members, 2, "strict")


def test_captions_that_differ_in_case_and_space_are_equal_and_others_are_not():
    assert normalise_caption("  A  red\tSTRASSE\n") == normalise_caption("a red straße") == "a red strasse"
    assert caption_id("A  dog ") == caption_id("a dog")
    texts = [f"a dog number {i}" for i in range(20_000)]
    assert len({caption_id(text) for text in texts}) == len(texts)


def test_ids_fit_a_signed_64_bit_tensor_and_use_all_63_bits():
    ids = [caption_id(str(i)) for i in range(200)]
    assert 0 <= min(ids) and 2**62 < max(ids) < 2**63


ORDINARY = [
    "a dog",
    "Two dogs run over wet grass, and one of them carries a stick. " * 14,
    "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz",
    "狗在草地上奔跑，" * 40,
    "👩‍👩‍👧‍👦" * 9 + " 5 < 6 & 7 > 3, R&D &amp; <b>bold</b> <i>x</i>",
    "https://example.org/" + "a1b2-c3_d4/" * 40 + "?q=1",
    "----------------------------------------------------------------",
    "<unknown> <person> in <start> of text",
    "😀",
    "?!",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_captions_are_left_as_they_are(text):
    assert captions_of({"txt": text.encode()}) == [text.strip()]


def test_of_an_endless_caption_the_start_is_kept_in_words_of_a_bounded_length():
    [caption] = captions_of({"txt": b"word " * 200_000})
    assert "word " * 200_000 == caption + ("word " * 200_000)[len(caption) :] and 900 < len(caption) < 1000
    for letters in ("x" * 10**6, "图" * 10**6, "!" * 10**6, "_" * 10**6):
        [caption] = captions_of({"txt": letters.encode()})
        assert max(map(len, caption.split(" "))) <= 128 and caption.replace(" ", "") == letters[:924]
    assert captions_of({"txt": b"a" + b" " * 10**6 + b"dog"}) == ["a dog"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a <end_of_text> dog", "a < end_of_text > dog"),
        ("<START_of_text>", "< START_of_text >"),
        ("&lt;end_of_text&gt;", "< end_of_text >"),
        ("&amp;amp;lt;end_of_text&amp;amp;gt;", "< end_of_text >"),
        ("＜end_of_text＞", "< end_of_text >"),
        ("<end\x01_of\x1b[31m_text>", "< end_of_text >"),
        ("<<end_of_text>end_of_text>", "<< end_of_text >end_of_text>"),
        ("&\x7flt;end_of_text>", "< end_of_text >"),
        ("&\x08\x0elt;start_of_text>", "< start_of_text >"),
    ],
)
def test_the_names_of_special_tokens_are_spelled_apart(text, words):
    assert captions_of({"txt": text.encode()}) == captions_of(as_json({"caption": text})) == [words]


@pytest.mark.parametrize("line", ["a dog", "ein Mädchen", "é", "R&amp;D", "<e"])
def test_a_file_of_very_many_captions_is_no_sample_and_costs_little_time(line):
    most, more = ([f"{line} {i}" for i in range(count)] for count in (1000, 1001))
    assert (
        len(captions_of({"txt": "\n\n \n".join(most).encode()}))
        == len(captions_of(as_json({"captions": most})))
        == 1000
    )
    assert reason_of({"txt": "\n".join(more).encode()}) == reason_of(as_json({"caption": more})) == "too_many_captions"
    began = time.process_time()
    assert reason_of({"txt": (line + "\n").encode() * (10**6 // len(line))}) == "too_many_captions"
    assert time.process_time() - began < 0.5  # cleaning all of them takes up to 10 s


def test_captions_in_words_are_those_that_were_written_one_by_one():
    members = {"txt": "a &lt;end_of_text&gt; dog\nein Mädchen\n<start_of_text>".encode()}
    written = ["a &lt;end_of_text&gt; dog", "ein Mädchen", "<start_of_text>"]
    assert written_captions(members) == written
    assert [only_words(caption) for caption in written] == captions_of(members)


@pytest.mark.parametrize(
    "value, group",
    [("7", "7"), (" red shoe\n", "red shoe"), (7, "7"), (7.5, "7.5"), (True, "True"), (False, "False"), (0, "0")],
)
def test_the_group_of_a_sample_is_its_column_as_text(value, group):
    assert group_of(as_json({"product": value, "caption": "a dog"}), "product") == group


@pytest.mark.parametrize("row", [{"product": None}, {"product": " "}, {"product": float("nan")}, {}, ["product"], None])
def test_a_sample_whose_column_names_nothing_has_no_group(row):
    assert group_of(as_json(row), "product") is None
    assert group_of({"txt": b"a dog"}, "product") is None


@pytest.mark.parametrize("value", [["7"], [], {"id": 7}, {}])
def test_lists_and_objects_are_no_groups(value):
    with pytest.raises(BadSample, match="bad_group"):
        group_of(as_json({"product": value}), "product")


def test_groups_have_ids_of_63_bits_that_differ_as_their_names_do():
    names = ["7", "7.0", "a", "A", "\ud800", "\ud801", *(f"group {i}" for i in range(5000))]
    assert len({group_id(name) for name in names}) == len(names)
    assert all(0 <= group_id(name) < 2**63 for name in names)


@pytest.mark.skipif(not shutil.which("b2sum"), reason="b2sum")
def test_ids_are_the_first_eight_bytes_of_blake2b_without_the_lowest_bit():
    raw = b"\xff\xd8 a file"
    digest = subprocess.run(["b2sum", "--length=64"], input=raw, capture_output=True, check=True).stdout.split()[0]
    assert hash_id(raw) == sum(byte << 8 * place for place, byte in enumerate(bytes.fromhex(digest.decode()))) // 2
