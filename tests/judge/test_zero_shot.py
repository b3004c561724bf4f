import pytest
import torch

from clipft.judge.zero_shot import class_prototypes, zero_shot_metrics


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=-1)


def slow_metrics(image, prototypes, label) -> dict[str, float]:
    tops, top1_of_class = {1: [], 5: []}, {}
    for features, own in zip(image.double(), label.tolist(), strict=True):
        score = [float(features @ prototype) for prototype in prototypes.double()]
        above = sum(s > score[own] for s in score)
        tied = sum(s == score[own] for s in score)
        for k, hits in tops.items():
            hits.append(min(max(k - above, 0) / tied, 1.0))  # one place of `tied`, each as likely
        top1_of_class.setdefault(own, []).append(tops[1][-1])
    means = [sum(values) / len(values) for values in top1_of_class.values()]
    return {
        "zero_shot_top1": sum(tops[1]) / len(label),
        "zero_shot_top5": sum(tops[5]) / len(label),
        "zero_shot_mean_per_class": sum(means) / len(means),
    }


def test_a_prototype_is_the_renormalised_mean_over_templates():
    text = unit(12, 8).reshape(4, 3, 8)
    prototypes = class_prototypes(text)
    for each, prompts in zip(prototypes, text, strict=True):
        mean = (prompts[0] + prompts[1] + prompts[2]) / 3
        assert each.tolist() == pytest.approx((mean / mean.square().sum().sqrt()).tolist(), abs=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_metrics_equal_a_slow_loop_with_uneven_and_absent_classes(rows):
    image, prototypes = unit(40, 8), unit(9, 8, seed=1)
    label = torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(2)) ** 2 % 9
    assert len(label.unique()) < 9
    fast = zero_shot_metrics(image, prototypes, label, chunk_rows=rows)
    assert fast == pytest.approx(slow_metrics(image, prototypes, label), abs=1e-12)


def test_ties_between_classes_count_by_chance():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (30, 3), generator=generator).float()
    prototypes = torch.randint(-1, 2, (11, 3), generator=generator).float()
    label = torch.randint(0, 11, (30,), generator=generator)
    fast = zero_shot_metrics(image, prototypes, label)
    assert fast == pytest.approx(slow_metrics(image, prototypes, label), abs=1e-12)


def test_constant_features_give_chance():
    metrics = zero_shot_metrics(unit(1, 8).expand(30, 8), unit(1, 8).expand(10, 8), torch.arange(30) % 10)
    assert metrics == pytest.approx(
        {"zero_shot_top1": 0.1, "zero_shot_top5": 0.5, "zero_shot_mean_per_class": 0.1}, abs=1e-15
    )


def test_labels_beyond_the_class_names_raise():
    with pytest.raises(ValueError, match="Labels run from 0 to 3, but there are 3 class names"):
        zero_shot_metrics(unit(4, 8), unit(3, 8), torch.arange(4))


def test_features_that_are_not_finite_raise():
    prototypes = unit(3, 8)
    prototypes[1] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 class features are NaN"):
        zero_shot_metrics(unit(4, 8), prototypes, torch.zeros(4, dtype=torch.long))
