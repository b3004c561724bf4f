import torch
from torch import nn
from weight_files import OPENAI, OPENAI_RESNET, drawn

from clipft.model.build import build
from clipft.model.options import keep_all_layers, set_checkpointing
from clipft.model.reach import freeze_unreached


def trainable(clip) -> set[str]:
    return {name for name, parameter in clip.model.named_parameters() if parameter.requires_grad}


def test_a_parameter_that_no_feature_depends_on_is_frozen_and_named():
    clip = drawn(OPENAI)
    before = trainable(clip)
    clip.model.visual.spare = nn.Linear(2, 3)
    freeze_unreached(clip)
    assert trainable(clip) == before
    assert clip.notes == ["frozen, as no feature depends on them: visual.spare.weight, visual.spare.bias"]


def test_what_is_left_is_what_a_backward_pass_reaches():
    clip = drawn(OPENAI)
    clip.model.transformer.spare = nn.Linear(2, 3)
    freeze_unreached(clip)
    image = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    (image.sum() + clip.model.encode_text(clip.tokenize(["a", "b"])).sum()).backward()
    reached = {name for name, parameter in clip.model.named_parameters() if parameter.grad is not None}
    assert reached == trainable(clip) - {"logit_scale"}


def test_looking_leaves_no_trace_in_statistics_or_mode():
    clip = drawn(OPENAI_RESNET)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    freeze_unreached(clip)
    assert clip.model.training and not clip.notes
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())


def test_a_frozen_tower_and_recomputed_activations_leave_the_answer():
    clip = drawn(OPENAI)
    clip.model.visual.requires_grad_(False)
    set_checkpointing(clip.model, True)
    before = trainable(clip)
    freeze_unreached(clip)
    assert trainable(clip) == before and not clip.notes


def test_layers_that_would_be_left_out_at_random_are_kept():
    clip = build("small", OPENAI, {})
    clip.model.transformer.layerdrop = 0.05
    keep_all_layers(clip)
    assert clip.model.transformer.layerdrop == 0 and "LayerDrop" in clip.notes[0]
