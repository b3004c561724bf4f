import pytest
import torch
from torch import nn

from clipft.learn.memory import (
    _available,
    _below_limit,
    bytes_per_pair,
    host_memory,
    is_out_of_memory,
    largest_that_fits,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def roomy(limit: int, tries: list[int]):
    def try_pairs(pairs: int) -> None:
        tries.append(pairs)
        if pairs > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return try_pairs


@pytest.mark.parametrize("limit, found", [(1000, 100), (99, 50), (12, 12), (1, 1), (0, 0)])
def test_the_share_is_halved_until_a_pass_has_room(limit, found):
    tries: list[int] = []
    assert largest_that_fits(100, roomy(limit, tries), CUDA, ranks_here=1) == found
    assert tries == [pairs for pairs in (100, 50, 25, 12, 6, 3, 1) if pairs >= max(found, 1)]


def test_an_error_that_is_not_about_memory_is_raised():
    def try_pairs(pairs: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(100, try_pairs, CUDA, ranks_here=1)


def test_a_pair_costs_what_its_backward_keeps():
    layers = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Sigmoid())

    def try_pairs(pairs: int) -> None:
        layers(torch.zeros(pairs, 100)).sum().backward()

    assert bytes_per_pair(try_pairs) == 2 * 100 * 4  # the linear layer keeps its input, the sigmoid its output


def test_on_a_cpu_the_free_memory_is_shared_by_its_ranks(monkeypatch):
    layers = nn.Linear(1000, 1)
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 2e6)

    def try_pairs(pairs: int) -> None:
        layers(torch.zeros(pairs, 1000)).sum().backward()

    assert largest_that_fits(1000, try_pairs, CPU, ranks_here=1) == 250  # half of 2 MB for 4 kB each
    assert largest_that_fits(1000, try_pairs, CPU, ranks_here=5) == 50
    assert largest_that_fits(30, try_pairs, CPU, ranks_here=5) == 30


def test_free_memory_is_the_least_that_machine_and_container_leave(tmp_path):
    assert 1e8 < host_memory() < 1e14
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   2048 kB\n")
    assert _available(tmp_path / "meminfo") == 2048 * 1024 and _available(tmp_path / "none") == float("inf")
    names = ("memory.max", "memory.current", "inactive_file")
    assert _below_limit(tmp_path, *names) == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 2500\n")
    assert _below_limit(tmp_path, *names) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert _below_limit(tmp_path, *names) == float("inf")


def test_a_cpu_without_memory_is_known_by_its_message():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value) and is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes"))
