"""open_clip's patch dropout with its draws on the device: open_clip draws on the host, and each step waits for that."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipft.model.encode import OpenClip


class PatchDropoutOnDevice(nn.Module):
    """Keeps a random share of the patches of each image in training (Li et al. 2023, arXiv 2212.00794)."""

    def __init__(self, prob: float, exclude_first_token: bool):
        super().__init__()
        self.prob, self.exclude_first_token = prob, exclude_first_token

    def forward(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b kept width"]:
        if not self.training or self.prob == 0.0:
            return x
        first = int(self.exclude_first_token)
        kept = max(1, int((x.shape[1] - first) * (1 - self.prob)))
        drawn = torch.randn(len(x), x.shape[1] - first, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return torch.cat([x[:, :first], x[rows, first + drawn.topk(kept, dim=-1).indices]], dim=1)


def draw_patches_on_device(model: OpenClip) -> None:
    """Puts it in the place of open_clip's, which has no weights either; on a CPU the draws stay the same."""
    from open_clip.transformer import PatchDropout

    for part in model.visual.modules():
        for name, child in part.named_children():
            if type(child) is PatchDropout:
                setattr(part, name, PatchDropoutOnDevice(child.prob, child.exclude_first_token))
