"""From the bytes of a caption to the tokens of open_clip's tokenizer."""

import json
import random
import string
import time
from functools import cache
from typing import Any

import pytest

from clipft.config import ModelConfig
from clipft.data.caption import caption_id, captions_of
from clipft.model.load import load_model

START, END = 49406, 49407  # the last two of CLIP's vocabulary
MEGABYTE = 1_000_000


@cache
def tokenize() -> Any:
    return load_model(ModelConfig(name="tiny", pretrained=None), 0).tokenize


def tokens_of(text: str) -> list[int]:
    return tokenize()([text])[0].tolist()


SPECIAL = [
    "<|endoftext|>",
    "<|startoftext|>",
    "<end_of_text>",
    "<start_of_text>",
    "<END_OF_text>",
    "&lt;end_of_text&gt;",
    "&amp;lt;END_of_text&amp;gt;",
    "&amp;amp;amp;lt;end_of_text&amp;amp;amp;gt;",
    "&#60;end&#95;of&#95;text&#62;",
    "＜end_of_text＞",
    "＜ｅｎｄ＿ｏｆ＿ｔｅｘｔ＞",
    "<end\x01_of_text>",
    "<end_of\x1b[31m_text>",
    "<end_of\ufeff_text>",
    "<<end_of_text>end_of_text>",
    "&\x7flt;end_of_text>",
    "&\x0e#60;end\x08_of_text>",
    "ï¼œend_of_textï¼ž",  # UTF-8 read as Windows-1252, which ftfy turns back
    "ï¼œstart_of_textï¼ž",
    "ï¼œend_of_textï¼ž".encode().decode("windows-1252", "replace"),
    "</s>",
    "[SEP]",
]


@pytest.mark.parametrize("special", SPECIAL)
def test_special_tokens_in_a_caption_are_read_as_words(special: str):
    for members in (
        {"txt": f"a red {special} dog".encode()},
        {"json": json.dumps({"caption": f"a red {special} dog"}).encode()},
    ):
        [caption] = captions_of(members)
        tokens = tokens_of(caption)
        last = tokens.index(END)
        assert tokens.count(END) == tokens.count(START) == 1 and tokens[0] == START
        dog = tokens_of("dog")[1]
        assert tokens[last - 1] == dog and last > 5, "what stands behind it is read, and it as well"


def drawn(letters: list[str], size: int) -> str:
    draw = random.Random(0)
    return "".join(draw.choices(letters, k=size // len(letters[0].encode())))


ENDLESS = {
    "words": drawn(["word ", "long ", "red, ", "dogs "], MEGABYTE),
    "letters": drawn(list(string.ascii_lowercase), MEGABYTE),
    "chinese": drawn([chr(code) for code in range(0x4E00, 0x9000)], MEGABYTE),
    "emoji": drawn([chr(code) for code in range(0x1F300, 0x1F640)], MEGABYTE),
    "accents": "a" + "\u0301" * (MEGABYTE // 2),
    "spaces": "a" + " " * MEGABYTE + "dog",
    "brackets": "<" * MEGABYTE,
    "entities": "&amp;" * (MEGABYTE // 5),
    "nested entities": "&" + "amp;" * (MEGABYTE // 4) + "lt;end_of_text&gt;",
    "special tokens": "<end_of_text>" * (MEGABYTE // 13),
    "wrong encoding": "Ã¼â€™" * (MEGABYTE // 12),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_caption_of_a_megabyte_becomes_tokens_in_less_than_50_ms(kind: str):
    text = ENDLESS[kind]
    forms = [{"txt": text.encode()}, {"json": json.dumps({"caption": text}).encode()}]
    tokens_of("<")  # what is imported and read once is not what is measured
    fresh = {name: name for name in ("<start_of_text>", "<end_of_text>")}  # the words that it knows at first
    for members in forms:
        times = []
        for _ in range(3):  # the quickest: other processes share the cores
            tokenize().cache = dict(fresh)
            start = time.process_time()
            [caption] = captions_of(members)
            caption_id(caption)
            tokens = tokens_of(caption)
            times.append(time.process_time() - start)
            assert tokens.count(END) == 1
        assert min(times) < 0.05, times


def test_what_is_cut_off_lies_behind_what_the_model_reads():
    draw = random.Random(0)
    vocabulary = [word for word in tokenize().encoder if word.endswith("</w>") and word[:-4].isalpha()]
    common = [word[:-4] for word in vocabulary if word.isascii()]
    for _ in range(20):
        text = " ".join(draw.choices(common, k=400))
        [caption] = captions_of({"txt": text.encode()})
        assert len(caption) < len(text) and tokens_of(caption) == tokens_of(text)
    german = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft und Straßenbahn, " * 30
    chinese = "一只红色的狗在草地上奔跑，天空很蓝。" * 60
    for text in (german, chinese):
        [caption] = captions_of({"txt": text.encode()})
        assert len(caption) < len(text) and tokens_of(caption) == tokens_of(text)
