import json
import time

import pytest

from clipft.data.caption import caption_id, captions_of, normalise_caption
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
        ({"json": b'{"caption": "M\xe4dchen"}'}, "bad_utf8"),
        ({"json": rb'{"caption": "\ud800"}'}, "bad_utf8"),
        ({"json": b'{"caption": "a dog'}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": b"9" * 5000}, "bad_json"),
    ],
)
def test_unusable_captions_have_a_reason(members, reason):
    assert reason_of(members) == reason


def test_captions_that_differ_in_case_and_space_are_equal_and_others_are_not():
    assert normalise_caption("  A  red\tSTRASSE\n") == normalise_caption("a red straße") == "a red strasse"
    assert caption_id("A  dog ") == caption_id("a dog")
    texts = [f"a dog number {i}" for i in range(20_000)]
    assert len({caption_id(text) for text in texts}) == len(texts)


def test_ids_fit_a_signed_64_bit_tensor_and_use_all_63_bits():
    ids = [caption_id(str(i)) for i in range(200)]
    assert 0 <= min(ids) and 2**62 < max(ids) < 2**63


def test_a_caption_of_a_megabyte_takes_no_time():
    text = "schöne Straße " * 80_000
    start = time.perf_counter()
    captions = captions_of({"txt": text.encode()})
    caption_id(captions[0])
    assert time.perf_counter() - start < 0.5
