import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from weight_files import (
    OPENAI,
    OPENAI_RESNET,
    SIZES,
    Payload,
    drawn,
    features,
    in_mixed_precision,
    model,
    pickled,
    save_torchscript,
    with_program,
)

from clipft.model.load import load_model
from clipft.model.weights import read_weights


@pytest.fixture(scope="module")
def clip():
    return drawn(OPENAI)


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def wrapped(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def trained(state):
    """As open_clip's trainer saves it."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    return {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer, "scaler": None}


FORMS = {
    "safetensors": lambda state, path: save_file(state, path),
    "state dict": torch.save,
    "state dict of an old torch": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "trainer's checkpoint": lambda state, path: torch.save(trained(state), path),
    "trainer's checkpoint of several GPUs": lambda state, path: torch.save(trained(wrapped(state, "module.")), path),
    "of a compiled and wrapped model": lambda state, path: torch.save(wrapped(state, "module._orig_mod."), path),
    "of a LightningModule": lambda state, path: torch.save({"state_dict": wrapped(state, "model.")}, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(tmp_path, clip, form):
    state = clip.model.state_dict()
    FORMS[form](state, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert_close(found.state, dict(state), rtol=0, atol=0)
    assert not found.openai and not found.mixed


def test_weights_in_half_precision_become_fp32(tmp_path, clip):
    state = in_mixed_precision(clip)
    assert {value.dtype for value in state.values()} == {torch.float16, torch.float32}
    torch.save(state, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert {value.dtype for value in found.state.values()} == {torch.float32} and found.mixed and not found.openai
    assert_close(found.state, {name: value.float() for name, value in state.items()}, rtol=0, atol=0)
    torch.save(trained(state), tmp_path / "w.pt")
    assert not read_weights(tmp_path / "w.pt").mixed  # open_clip's trainer saves other models like this


@pytest.mark.parametrize("cfg", [OPENAI, OPENAI_RESNET], ids=["ViT", "ResNet"])
def test_an_archive_of_openai_gives_the_model_that_open_clip_makes_of_it(tmp_path, cfg):
    import open_clip

    path = save_torchscript(drawn(cfg), tmp_path / "small.pt")
    loaded = load_model(model(path), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip calls torch.jit.load, which torch deprecates
        theirs = open_clip.openai.load_openai_model(str(path), precision="fp32", device="cpu")
    assert_close(loaded.model.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert_close(features(loaded), features(loaded, theirs), rtol=0, atol=0)
    assert loaded.model_cfg["quick_gelu"] is True
    assert any("of OpenAI's layout" in note for note in loaded.notes)


def test_a_plain_state_dict_of_openai_is_known_by_its_sizes(tmp_path, clip):
    from open_clip.model import build_model_from_openai_state_dict

    state = in_mixed_precision(clip) | {name: torch.tensor(size) for name, size in SIZES.items()}
    torch.save(state, tmp_path / "openai.pt")
    loaded = load_model(model(tmp_path / "openai.pt"), 0)
    theirs = build_model_from_openai_state_dict(dict(state)).float()
    assert_close(features(loaded), features(loaded, theirs), rtol=0, atol=0)


def test_openais_weights_switch_quick_gelu_on_and_say_so(tmp_path):
    """Of an architecture of ours, which has GELU: what is not said in the file stays as it is."""
    state = load_model(model("small"), 0).model.state_dict()
    for sizes, quick in ((SIZES, True), ({}, False)):
        torch.save(state | {name: torch.tensor(size) for name, size in sizes.items()}, tmp_path / "w.pt")
        loaded = load_model(model("small", tmp_path / "w.pt"), 0)
        assert bool(loaded.model_cfg.get("quick_gelu")) == quick
        assert any("QuickGELU switched on" in note for note in loaded.notes) == quick


def test_an_archive_of_openai_of_another_size_than_the_architecture_is_answered_with_itself(tmp_path, clip):
    path = save_torchscript(clip, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=rf"another model than small: .*Or use model={path} alone"):
        load_model(model("small", path), 0)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: Path(path).write_bytes(pickled(value))])
def test_a_pickled_object_is_refused_in_every_form_with_the_way_to_convert_and_never_run(tmp_path, clip, save):
    state = dict(clip.model.state_dict())
    for content in ({**state, "more": Payload()}, {**trained(state), "args": Payload()}, Payload(), [Payload()]):
        save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"w\.pt cannot be read as weights.*convert it: python -c") as error:
            load_model(model(tmp_path / "w.pt"), 0)
        assert "\x1b" not in str(error.value) and "safe_globals" not in str(error.value)
        with pytest.raises(ValueError, match=r"w\.pt cannot be read as weights"):
            load_model(model("tiny", tmp_path / "w.pt"), 0)
    assert not Path("payload-ran").exists()


def test_a_foreign_object_in_an_archive_is_refused_and_never_run(tmp_path, clip):
    path = with_program(save_torchscript(clip, tmp_path / "small.pt"), pickled(Payload()))
    for config in (model(path), model("ViT-B-32", path)):
        with pytest.raises(ValueError, match=r"small\.pt is a TorchScript archive that clipft does not read: it calls"):
            load_model(config, 0)
    assert not Path("payload-ran").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "it has epoch"),
        ({"weights": {"a": torch.zeros(1)}}, "it has weights"),
        ({}, "it has nothing"),
    ],
)
def test_a_file_without_weights_says_what_it_has(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds") as error:
        read_weights(tmp_path / "w.pt")
    assert said in str(error.value)


def test_a_flipped_bit_in_an_archive_of_openai_is_found(tmp_path, clip):
    path = save_torchscript(clip, tmp_path / "small.pt")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"small\.pt is damaged: the bytes of"):
        load_model(model(path), 0)
