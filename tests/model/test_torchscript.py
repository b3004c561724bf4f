import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from weight_files import Nested, Payload, pickled, with_program

from clipft.model.torchscript import read_torchscript


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Nested()).save("nested.pt")
    return tmp_path / "nested.pt"


def test_tensors_are_those_that_torch_reads_and_numbers_come_along(archive):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = torch.jit.load(archive).state_dict()
    found = read_torchscript(archive)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == expected.keys() and len(expected) == 11
    assert all(value.dtype == expected[name].dtype for name, value in tensors.items())
    assert_close(tensors, dict(expected), rtol=0, atol=0)
    assert found["resolution"] == 224


FOREIGN = {
    "it calls ": lambda: pickled(Payload()),
    "it calls 'os.system'": lambda: b"\x80\x02cos\nsystem\nX\x11\x00\x00\x00touch payload-ran\x85R.",
    "it makes an object of Global(name='subprocess.Popen')": lambda: b"\x80\x02csubprocess\nPopen\n)\x81.",
    "it sets attributes of Global": lambda: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "the instruction FRAME": lambda: pickle.dumps(Payload(), protocol=4),
    "the instruction EXT1": lambda: b"\x80\x02\x82\x01.",
    "the instruction INST": lambda: b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.",
}


def test_the_payload_of_these_tests_runs_where_it_is_unpickled_without_care(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(Payload()))
    assert Path("payload-ran").exists()


@pytest.mark.parametrize("why", FOREIGN)
def test_a_program_that_does_more_than_tensors_is_refused_and_not_run(archive, why):
    with pytest.raises(
        ValueError, match=r"nested\.pt is a TorchScript archive that clipft does not read.*jit\.load"
    ) as e:
        read_torchscript(with_program(archive, FOREIGN[why]()))
    assert why in str(e.value) and not Path("payload-ran").exists()


def test_a_module_that_holds_something_else_than_weights_is_refused_by_name(archive):
    program = b"\x80\x02c__torch__\nM\n)\x81}X\x03\x00\x00\x00oddccollections\nOrderedDict\nsb."
    with pytest.raises(ValueError, match="odd is a Global"):
        read_torchscript(with_program(archive, program))


def tensor_program(size: str, stride: str, count: bytes = b"K\x0c", key: bytes = b"0") -> bytes:
    """A module with one tensor of a storage of twelve halves, by these sizes and strides."""
    numbers = ["".join(f"K{chr(int(n))}" for n in text.split()).encode("latin-1") for text in (size, stride)]
    storage = b"(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu" + count
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\x00(" + numbers[0] + b"t(" + numbers[1] + b"t"
    return b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00w" + tensor + b"\x89ccollections\nOrderedDict\n)RtRsb."


@pytest.fixture
def halves(archive) -> Path:
    """The archive with one storage: 0, of twelve halves."""
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("constants.pkl", "code/x.py", "version"):
            file.writestr(f"nested/{name}", b"")
        file.writestr("nested/data/0", torch.arange(12, dtype=torch.float16).numpy().tobytes())
        file.writestr("nested/data.pkl", b"")
    return archive


def test_strides_are_kept(halves):
    found = read_torchscript(with_program(halves, tensor_program("3 4", "1 3")))
    assert torch.equal(found["w"], torch.arange(12).half().view(4, 3).t())


@pytest.mark.parametrize(
    "size, stride, count, key",
    [
        ("3 5", "5 1", b"K\x0c", b"0"),  # more numbers than the storage has
        ("3 4", "9 1", b"K\x0c", b"0"),  # beyond its end
        ("12 9", "1 0", b"K\x0c", b"0"),  # grows without bytes
        ("3 4", "4 1", b"K\x0d", b"0"),  # says another length
        ("3 4", "4 1", b"K\x0c", b"7"),  # no such part
    ],
)
def test_tensors_that_their_bytes_do_not_hold_are_refused(halves, size, stride, count, key):
    with pytest.raises(ValueError, match="clipft does not read"):
        read_torchscript(with_program(halves, tensor_program(size, stride, count, key)))


def test_modules_nested_without_end_are_refused(archive):
    """Seventeen modules, each twice in the next: 131,072 names."""
    level = b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00aK\x01ub"
    program = b"\x80\x02" + level + b"q\x00"
    for _ in range(17):
        program += b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
    with pytest.raises(ValueError, match="it has more than 100,000 values"):
        read_torchscript(with_program(archive, program + b"."))
