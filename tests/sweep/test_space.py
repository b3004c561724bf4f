"""Hydra's search-space syntax, read as axes."""

import pytest

from clipft.sweep.search import build_space
from clipft.sweep.space import end_points, grid_points, parse_axes


def axis(override: str):
    (found,) = parse_axes([override], None)
    return found


@pytest.mark.parametrize(
    "override, values",
    [
        ("optim.lr=1e-4,3e-4", ("0.0001", "0.0003")),
        ("train.batch_size=64,128", ("64", "128")),
        ("loss.name=clip,siglip", ("clip", "siglip")),
        ("loss.name=choice(clip, siglip)", ("clip", "siglip")),
        ("train.seed=range(3)", ("0", "1", "2")),
        ("train.epochs=range(2, 9, 3)", ("2", "5", "8")),
        ("data.captions='one','all'", ("'one'", "'all'")),
        ("eval.also=[a],[a,b]", ("[a]", "[a,b]")),
    ],
)
def test_values_are_those_of_hydras_grammar(override, values):
    assert axis(override).values == values


def test_what_has_one_value_is_no_axis():
    assert parse_axes(["optim.lr=1e-4", "eval.also=[a,b]", "data.train='a,b'", "hydra.verbose=true"], None) == []


def test_a_grid_is_the_product_with_the_last_key_fastest():
    axes = parse_axes(["optim.lr=1,2", "model=tiny", "train.seed=3,4"], None)
    points = [tuple(point.values()) for point in grid_points(axes)]
    assert points == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")]
    assert grid_points([]) == [{}]


@pytest.mark.parametrize(
    "override, kind, facts",
    [
        ("a=interval(1e-6, 1e-4)", "FloatDistribution", {"low": 1e-6, "high": 1e-4, "log": False, "step": None}),
        ("a=tag(log, interval(1e-6, 1e-4))", "FloatDistribution", {"low": 1e-6, "high": 1e-4, "log": True}),
        ("a=int(interval(1, 10))", "IntDistribution", {"low": 1, "high": 10, "log": False, "step": 1}),
        ("a=tag(log, int(interval(8, 512)))", "IntDistribution", {"low": 8, "high": 512, "log": True}),
        ("a=range(1, 10, 4)", "IntDistribution", {"low": 1, "high": 9, "step": 4}),
        ("a=range(9, 0, -4)", "IntDistribution", {"low": 1, "high": 9, "step": 4}),
        ("a=range(0.1, 0.5, 0.1)", "FloatDistribution", {"low": 0.1, "high": 0.4, "step": 0.1}),
        ("a=64,128", "CategoricalDistribution", {"choices": ("64", "128")}),
        ("a=choice(clip, siglip)", "CategoricalDistribution", {"choices": ("clip", "siglip")}),
    ],
)
def test_every_form_has_its_distribution(override, kind, facts):
    found = build_space([axis(override)])["a"]
    assert type(found).__name__ == kind
    assert {name: getattr(found, name) for name in facts} == facts


def test_the_ends_of_a_search_are_the_first_and_last_values():
    axes = parse_axes(["a=interval(1e-6, 1e-4)", "b=x,y,z", "c=int(interval(2, 5))"], None)
    assert end_points(axes) == [{"a": "1e-06", "b": "x", "c": "2"}, {"a": "0.0001", "b": "z", "c": "5"}]


@pytest.mark.parametrize(
    "override, message",
    [
        ("a=interval(2, 1)", "end must be greater"),
        ("a=tag(log, interval(0, 1))", "must start above 0"),
        ("a=tag(logarithmic, interval(1, 2))", "logarithmic is unknown"),
        ("a=range(3, 1)", "has no value"),
        ("name=a,b", "cannot be swept"),
        ("runs_dir=a,b", "cannot be swept"),
        ("eval.select=mean_recall@1,mean_recall@5", "cannot be swept"),
    ],
)
def test_what_cannot_be_swept_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        axis(override)


def test_an_interval_has_no_place_in_a_grid_and_a_search_needs_something_to_search():
    with pytest.raises(ValueError, match="hydra/sweeper=optuna"):
        grid_points([axis("a=interval(1, 2)")])
    with pytest.raises(ValueError, match="nothing to search"):
        build_space([])
    with pytest.raises(ValueError, match="equal steps"):
        build_space([axis("a=tag(log, range(1, 100))")])
