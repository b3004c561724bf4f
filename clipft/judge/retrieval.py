"""Unit features -> recall and rank of image-text retrieval, in both directions.

A caption instance is one caption of one image; instances with the same text share one row of features. Here a
query is answered by the gallery items that share its key: the image's number (relevance "pair") or also the
group of texts that count as equal (relevance "caption").
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

KS = (1, 5, 10)
CHUNK_ROWS = 128  # queries scored at a time: 128 x 1M gallery items in fp32 are 0.5 GB


def retrieval_metrics(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "U D"],
    caption_of: Int64[Tensor, " M"],
    image_of: Int64[Tensor, " M"],
    relevance: str,
    group_of: Int64[Tensor, " U"] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> dict[str, float]:
    """R@1, 5, 10 (share of queries with any relevant item in the top k) and median rank, both ways.

    Queries and gallery are all M caption instances and all N images; an image without a caption is gallery
    only. Under "caption", texts of one group (each its own when `group_of` is None) are relevant for each
    other's images. Equal scores count as in a random order, by the expected value.
    """
    check_finite("image", image)
    check_finite("text", text)
    check_instances(len(image), len(text), caption_of, image_of)
    key_of = instance_keys(caption_of, image_of, relevance, group_of)
    card_key, card_text, card_count = distinct_cards(key_of, caption_of)
    links = torch.unique(torch.stack([key_of, image_of]), dim=1)
    row_of_image, image_rows = share_equal_rows(image)
    row_of_text, text_rows = share_equal_rows(text)
    every_image = torch.ones(len(image), dtype=torch.int32, device=image.device)

    def texts_to_images() -> Iterator[Tensor]:
        for chunk in torch.arange(len(card_key), device=image.device).split(chunk_rows):
            key = card_key[chunk]  # ascending, so the keys of a chunk are a range no longer than the chunk
            score = scores(text[card_text[chunk]], image_rows)[:, row_of_image]
            linked = link_matrix(links[0], links[1], int(key[0]), int(key[-1]) + 1, len(image))
            yield first_hits(score, linked[key - key[0]], every_image)

    def images_to_texts() -> Iterator[Tensor]:
        num_keys, row_of_card = int(card_key[-1]) + 1, row_of_text[card_text]
        for start in range(0, len(image), chunk_rows):
            stop = min(start + chunk_rows, len(image))
            linked = link_matrix(links[1], links[0], start, stop, num_keys)
            asked = linked.any(dim=1)
            if asked.any():
                score = scores(image[start:stop][asked], text_rows)[:, row_of_card]
                yield first_hits(score, linked[asked][:, card_key], card_count)

    by_text = torch.cat(list(texts_to_images()), dim=1).repeat_interleave(card_count, dim=1)
    by_image = torch.cat(list(images_to_texts()), dim=1)
    return direction("text_to_image", by_text) | direction("image_to_text", by_image)


def check_finite(name: str, features: Float[Tensor, "N D"]) -> None:
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(features)} {name} features are NaN or infinite (first: row {bad[0]}): such "
            f"a model cannot be measured. Check its weights; if they were just trained, lower optim.lr."
        )


def check_instances(
    num_images: int, num_texts: int, caption_of: Int64[Tensor, " M"], image_of: Int64[Tensor, " M"]
) -> None:
    if not len(caption_of):
        raise ValueError("Retrieval needs at least one image with a caption; the data has none.")
    for name, rows, size in (("caption_of", caption_of, num_texts), ("image_of", image_of, num_images)):
        if int(rows.min()) < 0 or int(rows.max()) >= size:
            raise ValueError(f"{name} must number rows of 0..{size - 1}; got {int(rows.min())}..{int(rows.max())}.")


def instance_keys(
    caption_of: Int64[Tensor, " M"],
    image_of: Int64[Tensor, " M"],
    relevance: str,
    group_of: Int64[Tensor, " U"] | None,
) -> Int64[Tensor, " M"]:
    """Numbers 0..K-1: an image is relevant for an instance if one of its own instances has the same."""
    if relevance not in ("caption", "pair"):
        raise ValueError(f"eval.relevance={relevance!r} is unknown. Use caption or pair.")
    if relevance == "pair":
        keys = image_of
    else:
        keys = caption_of if group_of is None else group_of[caption_of]
    return torch.unique(keys, return_inverse=True)[1]


def distinct_cards(
    key_of: Int64[Tensor, " M"], caption_of: Int64[Tensor, " M"]
) -> tuple[Int64[Tensor, " C"], Int64[Tensor, " C"], Int[Tensor, " C"]]:
    """Keys (ascending), text rows and counts of the distinct instances; equal ones have equal scores."""
    cards, counts = torch.unique(torch.stack([key_of, caption_of]), dim=1, return_counts=True)
    return cards[0], cards[1], counts.int()


def share_equal_rows(features: Float[Tensor, "N D"]) -> tuple[Int64[Tensor, " N"], Float[Tensor, "R D"]]:
    """For each row its number among the distinct ones, and those: equal gallery items then tie exactly.

    A matrix product may round equal columns differently by their position.
    """
    distinct, row_of = torch.unique(features, dim=0, return_inverse=True)
    return row_of, distinct


def scores(queries: Float[Tensor, "q D"], gallery: Float[Tensor, "G D"]) -> Float[Tensor, "q G"]:
    """Cosines with at least fp32's precision, also under autocast and where fp32 products may lose bits."""
    # Below "highest", fp32 matrix products keep 10 bits (TF32) or 7 (bf16), which makes ties and swaps ranks.
    exact = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(exact) @ gallery.to(exact).T


def link_matrix(
    rows: Int64[Tensor, " P"], columns: Int64[Tensor, " P"], start: int, stop: int, width: int
) -> Bool[Tensor, "r {width}"]:
    """True at (row - start, column) of the pairs whose row is in start..stop-1."""
    inside = (rows >= start) & (rows < stop)
    linked = torch.zeros(stop - start, width, dtype=torch.bool, device=rows.device)
    linked[rows[inside] - start, columns[inside]] = True
    return linked


def first_hits(
    score: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"], count: Int[Tensor, " G"]
) -> Int64[Tensor, "3 q"]:
    """Per query, items above the best relevant score, items that tie with it, and relevant ones among those.

    A gallery column stands for `count` equal items; every query has a relevant one.
    """
    best = score.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    above = (score > best) * count
    tied = (score == best) * count
    return torch.stack([above.sum(dim=1), tied.sum(dim=1), (tied * relevant).sum(dim=1)])


def hit_chance(hits: Int64[Tensor, "3 q"], k: int) -> Float[Tensor, " q"]:
    """Chance of a relevant item in the top k when the tied ones are in random order.

    With `room` places left for t tied items, r of them relevant: 1 - C(t - r, room) / C(t, room), as a
    product.
    """
    above, tied, relevant = hits.double()
    room = k - above
    miss = torch.ones_like(tied)
    for place in range(k):
        misses_here = (tied - relevant - place).clamp(min=0) / (tied - place).clamp(min=1)
        miss = torch.where(place < room, miss * misses_here, miss)
    return 1 - miss


def expected_rank(hits: Int64[Tensor, "3 q"]) -> Float[Tensor, " q"]:
    """Rank from 1 of the best answer: the least of r random places of t has mean (t + 1) / (r + 1)."""
    above, tied, relevant = hits.double()
    return above + (tied + 1) / (relevant + 1)


def median(values: Float[Tensor, " q"]) -> float:
    """The middle value, or the mean of both middle ones (torch.median takes the lower)."""
    ordered = values.sort().values
    return float((ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2)


def direction(name: str, hits: Int[Tensor, "3 Q"]) -> dict[str, float]:
    hits = hits.cpu()  # float64 from here on, which not every device has
    recalls = {f"{name}_recall@{k}": float(hit_chance(hits, k).mean()) for k in KS}
    return recalls | {f"{name}_median_rank": median(expected_rank(hits))}
