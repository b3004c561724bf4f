"""How many pairs of a batch belong together though a contrastive loss takes them for negatives. Pure numpy."""

import numpy as np
from jaxtyping import Int64


def expected_in_batch(pairs: float, number: int, batch_size: int) -> float:
    """Of so many pairs among `number` samples, those whose two samples a batch has both, on average: a batch is drawn
    without repeats, so a pair is in it with chance B(B-1) / (N(N-1))."""
    if number < 2:
        return 0.0
    return pairs * batch_size * (batch_size - 1) / (number * (number - 1))


def pairs_within(groups: Int64[np.ndarray, " n"]) -> int:
    """Pairs with the same value: the sum of n(n-1)/2 over the groups."""
    sizes = np.unique(groups, return_counts=True)[1].astype(object)  # whole numbers of any size
    return int((sizes * (sizes - 1) // 2).sum()) if len(sizes) else 0


def pairs_drawn_equal(owner: Int64[np.ndarray, " captions"], ids: Int64[np.ndarray, " captions"]) -> float:
    """Pairs of images whose captions are equal, on average, when one caption of each image is drawn.

    With one caption an image this is pairs_within. Else it is, over the texts, the sum over pairs of images of the
    product of the shares that the text has of their captions.
    """
    if not len(owner):
        return 0.0
    per_image = np.bincount(owner)
    keys, number = np.unique(np.stack([ids, owner], axis=1), axis=0, return_counts=True)
    share = number / per_image[keys[:, 1]]
    _, text = np.unique(keys[:, 0], return_inverse=True)
    sums, squares = np.bincount(text, share), np.bincount(text, share**2)
    return float(np.maximum(sums**2 - squares, 0).sum() / 2)
