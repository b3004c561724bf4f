"""Unit features of images and prompts -> zero-shot classification accuracy."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from clipft.judge.retrieval import CHUNK_ROWS, check_finite, first_hits, hit_chance, scores, share_equal_rows


def class_prototypes(text: Float[Tensor, "C T D"]) -> Float[Tensor, "C D"]:
    """Mean of a class's prompt features, brought back to unit norm (Radford et al. 2021, section 3.1.4)."""
    return F.normalize(text.float().mean(dim=1), dim=-1)


def zero_shot_metrics(
    image: Float[Tensor, "N D"],
    prototypes: Float[Tensor, "C D"],
    label: Int64[Tensor, " N"],
    chunk_rows: int = CHUNK_ROWS,
) -> dict[str, float]:
    """Top-1, top-5, and the mean over classes of their top-1, where classes without an image are left out.

    Classes with equal scores count as in a random order, by the expected value.
    """
    check_finite("image", image)
    check_finite("class", prototypes)
    check_labels(label, len(prototypes))
    row_of_class, rows = share_equal_rows(prototypes)
    classes = torch.arange(len(prototypes), device=label.device)
    once = torch.ones_like(classes)
    hits = torch.cat(
        [
            first_hits(scores(part, rows)[:, row_of_class], part_label[:, None] == classes, once)
            for part, part_label in zip(image.split(chunk_rows), label.split(chunk_rows), strict=True)
        ],
        dim=1,
    )
    hits = hits.cpu()  # float64 from here on, which not every device has
    top1 = hit_chance(hits, 1)
    return {
        "zero_shot_top1": float(top1.mean()),
        "zero_shot_top5": float(hit_chance(hits, 5).mean()),
        "zero_shot_mean_per_class": float(mean_per_class(top1, label.cpu())),
    }


def mean_per_class(value: Float[Tensor, " N"], label: Int64[Tensor, " N"]) -> Float[Tensor, ""]:
    _, member_of, sizes = torch.unique(label, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=value.dtype, device=value.device).index_add(0, member_of, value)
    return (sums / sizes).mean()


def check_labels(label: Int64[Tensor, " N"], num_classes: int) -> None:
    if not len(label):
        raise ValueError("Zero-shot classification needs at least one image with a label; the data has none.")
    if int(label.min()) < 0 or int(label.max()) >= num_classes:
        raise ValueError(
            f"Labels run from {int(label.min())} to {int(label.max())}, but there are {num_classes} class "
            f"names. Give classnames.txt one line per class, in the order of the labels."
        )
