"""Tokens are counted as the model's own tokenizer makes them."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from small import make_model

from clipft.config import ModelConfig
from clipft.model.load import load_model
from clipft.model.tokens import ALONE, count_tokens, load_tokenizer, reader_of

CAPTIONS = ["a", "A red boat, isn't it?", "12345 !!", "&lt;b&gt; x\u00a0y", "一只红色的船", "красная лодка", "🦜🦜"]
CAPTIONS += ["word " * 90]


@pytest.mark.parametrize("context_length", [None, 7, 200])
def test_counts_are_those_of_the_tokens_that_the_model_gets(context_length: int | None):
    config = ModelConfig(name="tiny", pretrained=None, context_length=context_length)
    reader = reader_of(config)
    tokens = load_model(config, 0).tokenize(CAPTIONS)
    assert tokens.shape[1] == reader.context_length == (context_length or 32)
    counts = reader.count(CAPTIONS)
    for row, number in zip(tokens.tolist(), counts, strict=True):
        end = row.index(max(row)) + 1  # the end token has the highest number
        assert end == min(number, reader.context_length)
    assert counts[-1] == 92 and reader.count([]) == [] and reader.english


def test_a_folder_is_described_by_its_config_and_sizes_follow_the_options(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    reader = reader_of(ModelConfig(name=str(folder), pretrained=None))
    assert (reader.image_size, reader.context_length) == (16, 12)
    reader = reader_of(ModelConfig(name=str(folder), pretrained=None, image_size=24, context_length=9))
    assert (reader.image_size, reader.context_length) == (24, 9)
    assert pickle.loads(pickle.dumps(reader)).count(["a red ball"]) == [5]


@pytest.mark.parametrize("mode", [None, "clips"])
def test_tokenizers_of_transformers_are_counted_before_they_cut(tmp_path: Path, mode: str | None):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "[EOS]", "a", "red", "boat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = {"hf_tokenizer_name": "elsewhere", "context_length": 6, "tokenizer_mode": mode}
    tokenizer = load_tokenizer(json.dumps(text), tmp_path)
    captions = ["a", "a red boat", "a red boat a red boat"]
    counts = count_tokens(tokenizer, captions)
    assert counts == ([4, 6, 9] if mode else [3, 5, 8])
    padding = words.index("[PAD]")
    for row, number in zip(tokenizer(captions).tolist(), counts, strict=True):
        assert sum(token != padding for token in row) == min(number, 6)
    assert count_tokens(tokenizer, []) == []


@pytest.mark.process
def test_counting_does_not_import_open_clip():
    code = (
        "import sys\n"
        "from clipft.config import ModelConfig\n"
        "from clipft.model.tokens import reader_of\n"
        "reader = reader_of(ModelConfig(name='ViT-B-32', pretrained='openai'))\n"
        "assert 'torch' not in sys.modules\n"
        "assert reader.count(['a red boat']) == [5]\n"
        f"assert {ALONE!r} in sys.modules and 'open_clip' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
