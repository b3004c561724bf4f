import torch

from clipft.learn.nested import copied, size_of


def test_copies_share_no_memory():
    tree = {"a": [torch.ones(2), {"b": (torch.ones(3), "text")}], "c": 4}
    twin = copied(tree)
    tree["a"][0].zero_()
    assert twin["a"][0].tolist() == [1, 1] and twin["a"][1]["b"][1] == "text" and twin["c"] == 4


def test_the_size_is_the_bytes_of_all_tensors():
    tree = {"a": [torch.ones(2), {"b": (torch.ones(3, dtype=torch.bfloat16), "text")}], "c": 4}
    assert size_of(tree) == 2 * 4 + 3 * 2
