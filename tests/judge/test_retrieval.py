import math
from itertools import product
from statistics import median

import pytest
import torch
from torch.overrides import TorchFunctionMode

import clipft.judge.retrieval as retrieval
from clipft.judge.retrieval import hit_chance, retrieval_metrics

KS = (1, 5, 10)


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=-1)


def coarse(rows: int, width: int, seed: int) -> torch.Tensor:
    """Small whole numbers: their products are exact in any order of summation, and many are equal."""
    return torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def chance_of_a_hit(above: int, tied: int, relevant: int, k: int) -> float:
    if above >= k:
        return 0.0
    if above + tied <= k:
        return 1.0
    return 1 - math.comb(tied - relevant, k - above) / math.comb(tied, k - above)


def slow_direction(score, relevant) -> dict[str, float]:
    """From the definitions: score and relevance of each query with each gallery item, as lists."""
    hits, ranks = {k: [] for k in KS}, []
    for row, is_relevant in zip(score, relevant, strict=True):
        if not any(is_relevant):
            continue
        best = max(s for s, r in zip(row, is_relevant, strict=True) if r)
        above = sum(s > best for s in row)
        tied = sum(s == best for s in row)
        good = sum(s == best and r for s, r in zip(row, is_relevant, strict=True))
        for k in KS:
            hits[k].append(chance_of_a_hit(above, tied, good, k))
        ranks.append(above + (tied + 1) / (good + 1))
    return {f"recall@{k}": sum(hits[k]) / len(hits[k]) for k in KS} | {"median_rank": median(ranks)}


def slow_metrics(image, text, caption_of, image_of, relevance, group_of) -> dict[str, float]:
    instances = list(zip(caption_of.tolist(), image_of.tolist(), strict=True))
    groups_of_image = {n: {int(group_of[u]) for u, i in instances if i == n} for n in range(len(image))}
    cosine = (text.double() @ image.double().T).tolist()

    def is_relevant(u: int, i: int, n: int) -> bool:
        return i == n or (relevance == "caption" and int(group_of[u]) in groups_of_image[n])

    score = [[cosine[u][n] for n in range(len(image))] for u, _ in instances]
    relevant = [[is_relevant(u, i, n) for n in range(len(image))] for u, i in instances]
    transposed = [list(column) for column in zip(*score, strict=True)]
    answers = [list(column) for column in zip(*relevant, strict=True)]
    return {f"text_to_image_{k}": v for k, v in slow_direction(score, relevant).items()} | {
        f"image_to_text_{k}": v for k, v in slow_direction(transposed, answers).items()
    }


def random_set(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """caption_of, image_of, group_of: images with none to four captions of few texts, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    num_images, num_texts = 17, 12
    counts = torch.randint(0, 5, (num_images,), generator=generator)
    image_of = torch.arange(num_images).repeat_interleave(counts)
    caption_of = torch.randint(0, num_texts, (len(image_of),), generator=generator)
    order = torch.randperm(len(image_of), generator=generator)
    return caption_of[order], image_of[order], torch.randint(0, 9, (num_texts,), generator=generator)


@pytest.mark.parametrize("relevance, seed", [*product(["caption", "pair"], range(6))])
def test_metrics_equal_a_slow_loop_with_ties_duplicates_and_several_captions(relevance, seed):
    image, text = coarse(17, 4, seed), coarse(12, 4, seed + 100)
    image[3], image[9], text[5] = image[4], image[4], text[2]
    caption_of, image_of, group_of = random_set(seed)
    fast = retrieval_metrics(image, text, caption_of, image_of, relevance, group_of)
    slow = slow_metrics(image, text, caption_of, image_of, relevance, group_of)
    assert fast == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("relevance", ["caption", "pair"])
def test_metrics_equal_a_slow_loop_on_features_without_ties(relevance):
    image, text = unit(17, 8), unit(12, 8, seed=1)
    caption_of, image_of, group_of = random_set(0)
    fast = retrieval_metrics(image, text, caption_of, image_of, relevance, group_of)
    slow = slow_metrics(image, text, caption_of, image_of, relevance, group_of)
    assert fast == pytest.approx(slow, abs=1e-12)


def test_each_text_is_a_group_of_its_own_unless_told():
    image, text = unit(17, 8), unit(12, 8, seed=1)
    caption_of, image_of, _ = random_set(0)
    told = retrieval_metrics(image, text, caption_of, image_of, "caption", torch.arange(12))
    assert retrieval_metrics(image, text, caption_of, image_of, "caption") == told


@pytest.mark.parametrize("num_items", [13, 130, 1001])
def test_constant_features_give_one_over_n(num_items):
    same = unit(1, 48).expand(num_items, 48)
    each = torch.arange(num_items)
    metrics = retrieval_metrics(same, same, each, each, "pair")
    for way, k in product(["text_to_image", "image_to_text"], KS):
        assert metrics[f"{way}_recall@{k}"] == pytest.approx(k / num_items, abs=1e-15)
        assert metrics[f"{way}_median_rank"] == (num_items + 1) / 2


def test_equal_images_tie_wherever_they_stand_in_the_gallery():
    image, text = unit(1001, 48), unit(1001, 48, seed=1)
    image[[0, 500, 1000]] = text[0]
    chance = {
        own: retrieval_metrics(image, text[:1], torch.tensor([0]), torch.tensor([own]), "pair")
        for own in (0, 500, 1000)
    }
    for metrics in chance.values():
        assert metrics["text_to_image_recall@1"] == pytest.approx(1 / 3, abs=1e-15)


def clip_benchmark_recall(score: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """As CLIP_benchmark defines it in metrics/zeroshot_retrieval.py: queries with a positive in the top k."""
    hits = 0
    for row, is_positive in zip(score, positive, strict=True):
        hits += bool(is_positive[row.topk(k).indices].any())
    return hits / len(score)


def five_captions_each(num_images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    image = unit(num_images, 16)
    image_of = torch.arange(num_images).repeat_interleave(5)
    text = torch.nn.functional.normalize(image[image_of] + 0.5 * unit(5 * num_images, 16, seed=1), dim=-1)
    return image, text, torch.arange(5 * num_images), image_of


def test_pair_recall_is_the_one_of_clip_benchmark():
    image, text, caption_of, image_of = five_captions_each(60)
    score = text @ image.T
    positive = torch.zeros_like(score, dtype=torch.bool)
    positive[torch.arange(len(text)), image_of] = True
    metrics = retrieval_metrics(image, text, caption_of, image_of, "pair")
    for k in KS:
        assert abs(metrics[f"text_to_image_recall@{k}"] - clip_benchmark_recall(score, positive, k)) < 1e-6
        assert abs(metrics[f"image_to_text_recall@{k}"] - clip_benchmark_recall(score.T, positive.T, k)) < 1e-6


def test_pair_recall_is_what_the_installed_clip_benchmark_computes():
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    image, text, caption_of, image_of = five_captions_each(60)
    score = text @ image.T
    positive = torch.zeros_like(score, dtype=torch.bool)
    positive[torch.arange(len(text)), image_of] = True
    metrics = retrieval_metrics(image, text, caption_of, image_of, "pair")
    for k in KS:
        recall = theirs.batchify(theirs.recall_at_k, score, positive, 16, "cpu", k=k)
        assert abs(metrics[f"text_to_image_recall@{k}"] - (recall > 0).float().mean().item()) < 1e-6
        recall = theirs.batchify(theirs.recall_at_k, score.T, positive.T, 16, "cpu", k=k)
        assert abs(metrics[f"image_to_text_recall@{k}"] - (recall > 0).float().mean().item()) < 1e-6


@pytest.mark.parametrize("relevance", ["caption", "pair"])
def test_the_size_of_the_chunks_does_not_matter(relevance):
    image, text = coarse(17, 4, 0), coarse(12, 4, 1)
    caption_of, image_of, group_of = random_set(3)
    whole, *others = [
        retrieval_metrics(image, text, caption_of, image_of, relevance, group_of, chunk_rows=rows)
        for rows in (1000, 1, 2, 5, 12)
    ]
    assert all(metrics == whole for metrics in others)


def test_memory_grows_with_the_gallery_and_not_with_its_square():
    """The largest tensor that any operation makes, at fixed chunk rows."""

    class Largest(TorchFunctionMode):
        numel = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor):
                    self.numel = max(self.numel, each.numel())
            return out

    largest = {}
    for num_items in (250, 1000):
        each = torch.arange(num_items)
        with Largest() as seen:
            retrieval_metrics(unit(num_items, 4), unit(num_items, 4, seed=1), each, each, "pair", chunk_rows=32)
        largest[num_items] = seen.numel
    assert largest == {250: 32 * 250, 1000: 32 * 1000}


def test_a_repeated_caption_is_scored_once():
    image, text = unit(50, 8), unit(3, 8, seed=1)
    caption_of, image_of = torch.arange(5000) % 3, torch.arange(5000) % 50
    rows = []
    original = retrieval.scores

    def counted(queries, gallery):
        rows.append(len(queries))
        return original(queries, gallery)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "scores", counted)
        retrieval_metrics(image, text, caption_of, image_of, "caption")
    assert sum(rows) == 3 + 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["image", "text"])
def test_features_that_are_not_finite_raise(which, bad):
    features = {"image": unit(4, 8), "text": unit(4, 8)}
    features[which][2, 3] = bad
    each = torch.arange(4)
    with pytest.raises(ValueError, match=f"1 of 4 {which} features are NaN or infinite .first: row 2"):
        retrieval_metrics(features["image"], features["text"], each, each, "pair")


def test_wrong_input_is_named():
    features, each = unit(4, 8), torch.arange(4)
    with pytest.raises(ValueError, match=r"eval\.relevance='exact'"):
        retrieval_metrics(features, features, each, each, "exact")
    with pytest.raises(ValueError, match=r"image_of must number rows of 0\.\.3; got 1\.\.4"):
        retrieval_metrics(features, features, each, each + 1, "pair")
    with pytest.raises(ValueError, match="at least one image with a caption"):
        retrieval_metrics(features, features, each[:0], each[:0], "pair")


def test_scores_keep_fp32_under_autocast_and_reduced_precision():
    image, text, caption_of, image_of = five_captions_each(60)
    plain = retrieval_metrics(image, text, caption_of, image_of, "pair")
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval_metrics(image, text, caption_of, image_of, "pair") == plain
    finally:
        torch.set_float32_matmul_precision("highest")


def test_hit_chance_is_the_hypergeometric_one():
    cases = [(a, t, r) for a in range(12) for t in range(1, 14) for r in range(1, t + 1)]
    for k in KS:
        expected = [chance_of_a_hit(*case, k) for case in cases]
        assert hit_chance(torch.tensor(cases).T, k).tolist() == pytest.approx(expected, abs=1e-12)
