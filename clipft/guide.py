"""How far an image is from a text, as a loss whose gradient moves the image."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Augment = Callable[[Float[Tensor, "3 H W"]], Float[Tensor, "3 S S"]]
GuideLoss = Callable[[Float[Tensor, "3 H W"]], Float[Tensor, ""]]

SMALLEST = 1e-12
CROP, RATIO, DEGREES, SHIFT, FLIP = (0.5, 1.0), (3 / 4, 4 / 3), 15.0, 0.1, 0.5


def great_circle(a: Float[Tensor, "*n D"], b: Float[Tensor, "*#n D"]) -> Float[Tensor, "*n"]:
    """2 arcsin(|a - b| / 2)^2 of unit vectors: half the square of the angle between them; its gradient is finite."""
    quarter = (a - b).square().sum(dim=-1) / 4
    quarter = quarter.clamp(min=SMALLEST, max=1 - torch.finfo(quarter.dtype).eps)  # the slope of sqrt, of arcsin
    return 2 * torch.arcsin(quarter.sqrt()) ** 2


def guide_loss(
    encode: Callable[[Float[Tensor, "n 3 S S"]], Float[Tensor, "n D"]],
    text: Float[Tensor, " D"],
    views: Callable[[Float[Tensor, "3 H W"]], Float[Tensor, "n 3 S S"]],
    mean: Sequence[float],
    std: Sequence[float],
) -> GuideLoss:
    """The function of an image in 0..1 that `Encoder.prompt_loss` returns."""

    shift, width = (torch.tensor(each, device=text.device).view(3, 1, 1) for each in (mean, std))

    def loss(image: Tensor) -> Float[Tensor, ""]:
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"the image must be a float tensor [3, H, W] in 0..1, and is {list(image.shape)}.")
        pixels = views(image.to(text.device))
        return great_circle(encode((pixels - shift) / width), text).mean()

    return loss


def random_views(
    side: int, num_crops: int, augment: Augment | None
) -> Callable[[Float[Tensor, "3 H W"]], Float[Tensor, "n 3 S S"]]:
    """Image -> that many random views of it, or the whole of it, resized, where it is none."""
    draw = augment or crop_affine_flip(side)

    def views(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "n 3 S S"]:
        if not num_crops:
            return F.interpolate(image[None], size=(side, side), mode="bicubic", antialias=True)
        return torch.stack([draw(image) for _ in range(num_crops)])

    return views


def crop_affine_flip(side: int) -> Augment:
    """A random view: rotated and shifted, half to all of its area, mirrored or not; differentiable in the image."""
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            # Black corners by fill=None: torchvision's own filling writes in place, which autograd refuses.
            v2.RandomAffine([-DEGREES, DEGREES], translate=(SHIFT, SHIFT), interpolation=bilinear, fill=None),
            v2.RandomResizedCrop(side, scale=CROP, ratio=RATIO, antialias=True),
            v2.RandomHorizontalFlip(FLIP),
        ]
    )
