from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

from clipft.learn.gather import all_objects, rank, world
from clipft.ranks import Ranks, check_alike, first_to_all, meet

pytestmark = pytest.mark.process


def here() -> Ranks:
    return Ranks(torch.device("cpu"), rank(), world(), world(), "32-true")


def said(function) -> str:
    try:
        return str(function())
    except ValueError as error:
        return f"error: {error}"


def compared(facts: list[dict[str, str]]) -> str:
    return said(lambda: check_alike(facts[rank()]))


def test_every_rank_names_the_rank_and_the_key_that_differ(tmp_path):
    same = {"optim.lr": "0.1", "the version of torch": "2.15"}
    assert on_ranks(3, tmp_path, compared, [same, same, same]) == ["None"] * 3
    (tmp_path / "again").mkdir()
    found = on_ranks(3, tmp_path / "again", compared, [same, same, same | {"optim.lr": "0.2"}])
    assert len(set(found)) == 1 and found[0].startswith("error: optim.lr is 0.2 on rank 2 and 0.1 on rank 0.")
    (tmp_path / "less").mkdir()
    found = on_ranks(3, tmp_path / "less", compared, [same, {"optim.lr": "0.1"}, same])
    assert "the version of torch is None on rank 1" in found[0]


def decided(folder: Path) -> list[Any]:
    def decide() -> str:
        (folder / f"decided-{rank()}").touch()
        return "mine"

    def refuse() -> str:
        raise ValueError("no")

    meet(here())
    return [said(lambda: first_to_all(here(), decide)), said(lambda: first_to_all(here(), refuse)), all_objects(rank())]


def test_the_first_rank_decides_for_all_and_its_errors_are_everybodys(tmp_path):
    assert on_ranks(2, tmp_path, decided, tmp_path) == [["mine", "error: no", [0, 1]]] * 2
    assert [path.name for path in tmp_path.glob("decided-*")] == ["decided-0"]
