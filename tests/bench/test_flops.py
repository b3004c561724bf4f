import torch
from open_clip import ClipLoss
from torch.utils.flop_counter import FlopCounterMode

from clipft.bench.stepping import flops, place, plain


def test_the_flops_of_a_step_are_those_of_one_forward_and_backward_pass():
    resident = place("tiny", 2, torch.device("cpu"), "32-true")
    found = flops(resident, plain, seconds=1.0)
    model = resident.clip.model
    with FlopCounterMode(display=False) as counter:
        image = model.encode_image(resident.pixels, normalize=True)
        text = model.encode_text(resident.full_tokens, normalize=True)
        ClipLoss()(image, text, model.logit_scale.exp()).backward()
    assert 1e12 * found["TFLOP a step"] == counter.get_total_flops() > 1e6
    assert "MFU" not in found  # a CPU has none
