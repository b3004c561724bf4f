"""No torch here: these checks run in the process that the user starts."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clipft.model.forms import NUMPY, PICKLE, SAFETENSORS, STATE, check_archive, form_of

STATE_DICT = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(3)}


def test_forms_are_told_by_the_first_bytes_whatever_the_name(tmp_path):
    path = tmp_path / "weights.bin"
    save_file(STATE_DICT, path)
    assert form_of(path) == SAFETENSORS
    torch.save(STATE_DICT, path)
    assert form_of(path) == STATE
    torch.save(STATE_DICT, path, _use_new_zipfile_serialization=False)
    assert form_of(path) == PICKLE
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))
    assert form_of(path) == NUMPY


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b'{"model_cfg": {}}', "JSON"),
        (b"\x1f\x8b\x08\x00 and so on", "gzip"),
        (b"\x93NUMPY\x01\x00", ".npz"),
        (b"nothing of that kind, but long enough", "no weight file that clipft knows"),
    ],
)
def test_what_is_no_weight_file_is_named_for_what_it_is(tmp_path, content, said):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pt is damaged") as error:
        form_of(path)
    assert said in str(error.value)


@pytest.mark.parametrize("keep", [20, 150, -1])
def test_a_safetensors_file_that_is_cut_off_is_named(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_file(STATE_DICT, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        form_of(path)


def test_a_zip_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save(STATE_DICT, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.pt is damaged: .* no whole archive"):
        form_of(path)


def test_a_zip_without_weights_is_answered_with_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model/weights.pt", b"x")
    with pytest.raises(ValueError, match=r"a zip file without weights\. If it is packed, unpack it"):
        form_of(tmp_path / "a.zip")


def test_a_header_of_safetensors_without_offsets_is_named(tmp_path):
    header = json.dumps({"weight": {"dtype": "F32"}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 9)
    with pytest.raises(ValueError, match="its safetensors header cannot be read"):
        form_of(path)


def test_one_flipped_bit_in_an_archive_is_found(tmp_path):
    path = tmp_path / "flipped.pt"
    torch.save(STATE_DICT, path)
    check_archive(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"flipped\.pt is damaged: the bytes of .*data/0"):
        check_archive(path)


def test_telling_a_form_imports_no_torch():
    source = (Path(__file__).parents[2] / "clipft" / "model" / "forms.py").read_text()
    assert "torch" not in [line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))]
