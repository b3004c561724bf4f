"""Which parameters the features of a model depend on."""

import torch
from torch import Tensor, nn

from clipft.model.build import Clip
from clipft.model.encode import encode_image, encode_text
from clipft.model.groups import NO_TOWER


def freeze_unreached(clip: Clip) -> None:
    """Freezes, and names in a note, the parameters that no feature depends on: DDP would wait for their gradients."""
    model = clip.model
    device, was_training = next(model.parameters()).device, model.training
    model.eval()  # statistics of BatchNorm must not move
    with torch.enable_grad():
        image = encode_image(model, torch.zeros(1, 3, clip.side, clip.side, device=device))
        text = encode_text(model, clip.tokenize(["a"]).to(device), trim=False)
    model.train(was_training)
    reached = {id(leaf) for feature in (image, text) for leaf in leaves(feature)}
    unreached = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached and name not in NO_TOWER
    ]
    for name in unreached:
        model.get_parameter(name).requires_grad_(False)
    if unreached:
        rest = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
        clip.notes.append(f"frozen, as no feature depends on them: {', '.join(unreached[:3])}{rest}")


def leaves(feature: Tensor) -> list[nn.Parameter]:
    """The parameters in the graph that made the feature."""
    waiting, seen, found = [feature.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        waiting += [other for other, _ in node.next_functions]
    return found
