"""Architectures told from the names and shapes of weights alone: nothing here has numbers."""

from pathlib import Path

import pytest
import torch
from weight_files import OPENAI, OPENAI_RESNET, drawn, features, in_mixed_precision, model

from clipft.model.build import build_model
from clipft.model.load import load_model
from clipft.model.names import architecture_cfg, architecture_names
from clipft.model.outline import outline_of, outline_of_state
from clipft.model.recognize import recognize, suggestion
from clipft.model.towers import unsupported
from clipft.model.weights import Weights

FILE = Path("w.pt")


def weights(cfg, openai=False, mixed=False) -> Weights:
    with torch.device("meta"):
        return Weights(build_model(cfg).state_dict(), openai, mixed)


def without(cfg, *names):
    return {key: value for key, value in cfg.items() if key not in names}


@pytest.mark.parametrize("name", ["ViT-S-32", "tiny", "small", "ViT-B-16-SigLIP-i18n-256"])
def test_shapes_that_one_architecture_has_name_it(name):
    found, cfg, notes = recognize(weights(architecture_cfg(name)), FILE)
    assert found == name and cfg == architecture_cfg(name) and notes == [f"w.pt fits {name} by its shapes"]


@pytest.mark.parametrize("marks, chosen", [({}, 0), ({"mixed": True}, 1), ({"openai": True}, 1)])
def test_of_two_that_differ_in_their_activation_the_likelier_is_chosen_and_the_other_said(marks, chosen):
    pair = ["RN50", "RN50-quickgelu"]
    found, cfg, notes = recognize(weights(architecture_cfg("RN50"), **marks), FILE)
    assert found == pair[chosen] and bool(cfg.get("quick_gelu")) == bool(chosen)
    assert f"model={pair[1 - chosen]} model.pretrained=w.pt takes that" in notes[0]


@pytest.mark.process  # no processes, but five large models without numbers
def test_shapes_that_two_architectures_have_are_answered_with_both():
    with pytest.raises(ValueError, match=r"cannot be told.*SigLIP-378 or ViT-SO400M-14-SigLIP-384.*Use one of them"):
        recognize(weights(architecture_cfg("ViT-SO400M-14-SigLIP-384")), FILE)


def test_weights_at_another_size_are_known_with_that_size():
    cfg = architecture_cfg("ViT-M-32")
    cfg = {**cfg, "vision_cfg": {**cfg["vision_cfg"], "image_size": 288}}
    cfg["text_cfg"]["context_length"] = 40
    found, chosen, notes = recognize(weights(cfg), FILE)
    assert found == "ViT-M-32" and chosen == cfg and "at 288 pixels and 40 tokens" in notes[0]


@pytest.mark.parametrize("cfg", [OPENAI, OPENAI_RESNET], ids=["ViT", "ResNet"])
def test_openais_layout_gives_the_config_that_open_clip_takes_from_it(cfg):
    from open_clip.model import build_model_from_openai_state_dict

    clip = drawn(cfg)
    state = in_mixed_precision(clip)
    _, found, notes = recognize(Weights(state, openai=True, mixed=False), FILE)
    mine = build_model(found).eval()
    mine.load_state_dict(state)
    theirs = build_model_from_openai_state_dict(dict(state)).float()
    torch.testing.assert_close(features(clip, mine), features(clip, theirs), rtol=0, atol=0)
    assert "OpenAI's layout" in notes[0]


def test_sizes_of_no_architecture_are_answered_with_the_nearest():
    cfg = architecture_cfg("ViT-M-32")
    cfg["vision_cfg"]["layers"] = 11
    with pytest.raises(
        ValueError, match=r"cannot be told.*nearest to ViT-M-32.*model=ViT-M-32 model\.pretrained=w\.pt"
    ):
        recognize(weights(cfg), FILE)


FOREIGN = {
    "vision_model.embeddings.class_embedding": "transformers' names",
    "image_encoder.model.stem.weight": "Apple's names",
    "blocks.0.attn.qkv.weight": "a timm image tower alone",
    "base_model.model.visual.lora_A.weight": "a LoRA adapter",
    "encoder.weight": "no two towers of open_clip, but encoder.weight",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_other_libraries_are_known(name):
    with pytest.raises(ValueError) as error:
        recognize(Weights({name: torch.zeros(1)}, openai=False, mixed=False), FILE)
    assert FOREIGN[name] in str(error.value)


def test_weights_of_another_architecture_are_refused_with_the_first_differences_and_the_right_one(tmp_path):
    torch.save(load_model(model("small"), 0).model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        load_model(model("tiny", tmp_path / "w.pt"), 0)
    said = str(error.value)
    assert "w.pt holds the weights of another model than tiny: visual.trunk.conv_stem.weight is missing; " in said
    assert f"Its shapes are those of small. Use model=small model.pretrained={tmp_path / 'w.pt'}." in said


ODD = {
    "a ResNet": lambda: drawn(OPENAI_RESNET).model.state_dict(),
    "a convolution without axes": lambda: drawn(OPENAI).model.state_dict() | {"visual.conv1.weight": torch.zeros(())},
    "no positions": lambda: drawn(OPENAI).model.state_dict() | {"visual.positional_embedding": torch.zeros(0, 64)},
    "projections without axes": lambda: {"text_projection": torch.zeros(()), "logit_scale": torch.zeros(())},
}


@pytest.mark.parametrize("what", ODD)
def test_weights_of_no_known_shape_are_refused_in_words_wherever_they_are_given(tmp_path, what):
    torch.save(ODD[what](), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"the weights of another model than small: .* is missing"):
        load_model(model("small", tmp_path / "w.pt"), 0)
    with pytest.raises(ValueError, match="the architecture cannot be told from the weights"):
        load_model(model(tmp_path / "w.pt"), 0)


def test_a_file_alone_is_enough_where_its_shapes_are_those_of_one_architecture(tmp_path):
    clip = load_model(model("small"), 0)
    torch.save({"epoch": 1, "state_dict": clip.model.state_dict()}, tmp_path / "w.pt")
    loaded = load_model(model(tmp_path / "w.pt"), 7)
    torch.testing.assert_close(features(loaded), features(clip), rtol=0, atol=0)
    assert loaded.model_cfg == clip.model_cfg


def test_a_bias_that_comes_with_the_weights_is_kept_where_the_architecture_has_none(tmp_path):
    state = load_model(model("small"), 0).model.state_dict() | {"logit_bias": torch.tensor(-7.5)}
    torch.save(state, tmp_path / "w.pt")
    for config in (model("small", tmp_path / "w.pt"), model(tmp_path / "w.pt")):
        loaded = load_model(config, 0)
        assert loaded.model.logit_bias.item() == -7.5 and "init_logit_bias" in loaded.model_cfg
        assert any("logit_bias comes with the weights" in note for note in loaded.notes)


def test_pixels_are_prepared_as_all_tags_of_the_architecture_want_them():
    import open_clip

    from clipft.model.load import usual_preprocessing

    found, notes = usual_preprocessing("ViT-B-16-SigLIP")
    assert found.items() <= open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli").items()
    assert found["mean"] == (0.5, 0.5, 0.5) and "squash" in notes[0]
    assert usual_preprocessing("ViT-B-32") == ({}, []) and usual_preprocessing("tiny") == ({}, [])
    assert usual_preprocessing("ViT-L-14")[0] == {} and "some tags" in usual_preprocessing("ViT-L-14")[1][0]


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "convnext_tiny", "ViT-B-16-SigLIP"])
def test_the_sizes_in_a_config_are_those_in_the_shapes_of_its_weights(name):
    outline = outline_of(architecture_cfg(name))
    assert outline.items() <= outline_of_state(weights(architecture_cfg(name)).state).items()


@pytest.mark.slow
@pytest.mark.parametrize("name", architecture_names()[::8])  # each builds all that have its text tower
def test_the_suggestion_for_weights_of_an_architecture_names_it(name):
    cfg = architecture_cfg(name)
    if unsupported(cfg) or "hf_model_name" in cfg["text_cfg"]:
        pytest.skip("is not built here")
    said = suggestion(weights(cfg).state, FILE, "tiny")
    assert said.startswith("Its shapes are those of") and name in said.replace(".", "").split()
