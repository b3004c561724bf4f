import random
from itertools import groupby
from typing import Any

import pytest
import torch

from clipft.data.loader import Batch
from clipft.learn.ledger import Ledger, account, bad_counts, bad_run, longest_run
from clipft.report import RunFailed


def batch(bad: dict[int, str], size: int, first: int) -> Batch:
    valid = torch.tensor([row not in bad for row in range(size)])
    keys = [f"a/{first + row}" for row in range(size)]
    nothing = torch.zeros(size, 1, dtype=torch.long)
    return Batch(torch.zeros(size, 3, 1, 1, dtype=torch.uint8), nothing, valid, nothing[:, 0], keys, bad)


def new(max_bad_frac: float = 1.0, num_all: int = 1600, data: str = "birds") -> Ledger:
    return Ledger(max_bad_frac, num_all, data)


def take(ledger: Ledger, bad: dict[int, str], size: int = 8, first: int = 0) -> None:
    """A step of one rank."""
    mine = [(f"a/{first + row}", reason) for row, reason in bad.items()]
    ledger.add([size], size - len(bad), bad_counts(batch(bad, size, first)), mine)


def accounted(ledger: Ledger, **changes: Any) -> dict[str, Any]:
    """27 units are 3 steps and a remainder of 3 an epoch."""
    facts = {"num_units": 27, "per_epoch": 3, "batch_size": 8, "step": 4, "incomplete": {}, "examples": {}}
    return account(ledger.state_dict(), **facts | changes)


def test_too_many_unusable_samples_stop_the_run_with_the_reasons_and_keys():
    ledger = new(0.05)
    take(ledger, {row: "image_truncated" for row in range(0, 22, 2)}, size=190)  # too few to speak of a rate
    with pytest.raises(
        RunFailed, match=r"11 of the first 210 .*data\.max_bad_frac=0\.05 \(image_truncated 11"
    ) as error:
        take(ledger, {}, size=20)
    assert "such as a/0, a/2, a/4, a/6, a/8)" in str(error.value) and "data verify with out=FILE" in str(error.value)
    take(new(0.5), {row: "bad_json" for row in range(20)}, size=210)


def test_a_hundred_unusable_samples_in_a_row_stop_the_run_however_few_they_are_of_all():
    ledger = new()
    bad = dict.fromkeys(range(60), "read_error")
    take(ledger, {9_940 + row: reason for row, reason in bad.items()}, size=10_000)
    take(ledger, {row: "read_error" for row in range(39)}, size=40)  # 99 in a row, then a good one
    take(ledger, bad, size=60)
    with pytest.raises(RunFailed, match=r"100 samples in a row could not be used \(read_error 199, such as a/9940"):
        take(ledger, {row: "read_error" for row in range(40)}, size=60)


def test_runs_of_bad_samples_are_the_same_however_many_ranks_count_them():
    draw = random.Random(0)
    for _ in range(300):
        world, size, steps = draw.randint(1, 5), draw.randint(5, 12), draw.randint(1, 5)
        often = draw.choice([0.0, 0.5, 0.9, 1.0])
        flags = [draw.random() < often for _ in range(size * steps)]
        before = longest = 0
        for step in range(steps):
            cuts = sorted(draw.sample(range(1, size), world - 1))
            rows = [slice(*cut) for cut in zip([0, *cuts], [*cuts, size], strict=True)]
            parts = [flags[step * size : (step + 1) * size][part] for part in rows]
            runs = [n for part in parts for n in bad_run({i for i, bad in enumerate(part) if bad}, len(part))]
            most, before = longest_run(before, [len(part) for part in parts], runs)
            longest = max(longest, most)
        lengths = [len(list(run)) for bad, run in groupby(flags) if bad]
        assert longest == max(lengths, default=0)
        assert before == (lengths[-1] if flags[-1] else 0)


def test_the_ledger_accounts_for_every_sample_of_the_epochs_begun():
    ledger = new()
    for _ in range(3):
        take(ledger, {})
    take(ledger, {3: "bad_json", 5: "bad_json"}, first=24)
    ledger.meet()
    assert accounted(ledger) == {
        "epochs": 2,
        "indexed": 54,
        "used": 30,
        "dropped": {"bad_json": 2},
        "left_out": 3,
        "not_reached": 54 - 30 - 2 - 3,
        "examples": {"bad_json": ["a/27", "a/29"]},
    }
    with pytest.raises(RuntimeError, match="does not balance: 32 samples in 5 steps of 8"):
        accounted(ledger, step=5)
    ledger.num_used -= 1
    with pytest.raises(RuntimeError, match="does not balance: 29 used and 2 dropped of 32 samples"):
        accounted(ledger)


def test_samples_that_the_index_left_out_count_as_dropped_in_each_epoch():
    ledger = new()
    for _ in range(4):
        take(ledger, {0: "no_text"})
    ledger.meet()
    examples = {"no_text": "x (byte 0 of a.tar)", "duplicate_key": "y"}
    found = accounted(ledger, incomplete={"no_text": 2, "duplicate_key": 1}, examples=examples)
    assert found["indexed"] == 60 and found["dropped"] == {"no_text": 4 + 4, "duplicate_key": 2}
    assert found["indexed"] == found["used"] + 10 + found["left_out"] + found["not_reached"]
    assert found["examples"] == {"no_text": ["a/0"], "duplicate_key": ["y"]}


def test_where_there_are_no_epochs_the_ledger_says_what_was_drawn():
    """In a mix, and after resume=force with other data or another batch size."""
    ledger, forced = new(), new(data="bees")
    take(ledger, {3: "bad_json"})
    ledger.meet()
    forced.load_state_dict(ledger.state_dict())
    take(forced, {}, size=4)
    again = new(data="bees")
    again.load_state_dict(forced.state_dict())
    expected = {"drawn": 12, "used": 11, "dropped": {"bad_json": 1}, "examples": {"bad_json": ["a/3"]}}
    for late in (forced, again):
        assert accounted(late, batch_size=4, step=2) == expected | {"incomplete": {}}
    mix = accounted(ledger, num_units=None, incomplete={"no_text": 1}, examples={"no_text": "x"})
    assert mix["drawn"] == 8 and mix["incomplete"] == {"no_text": 1} and mix["examples"]["no_text"] == ["x"]


def test_a_run_too_short_for_a_rate_is_judged_at_its_end():
    ledger = new(0.05, num_all=24)
    for _ in range(2):
        take(ledger, {0: "bad_json"})
    with pytest.raises(RunFailed, match="2 of the first 24 samples"):
        take(ledger, {})


def test_a_ledger_goes_on_where_a_saved_one_stood():
    ledger, later = new(), new()
    take(ledger, {6: "bad_json", 7: "bad_json"})
    ledger.meet()
    later.load_state_dict(ledger.state_dict())
    assert later.in_a_row == 2
    take(later, {0: "bad_json"}, first=8)
    later.meet()
    assert (later.num_used, later.num_dropped, later.reasons, later.in_a_row) == (13, 3, {"bad_json": 3}, 0)
    assert later.examples == {"bad_json": ["a/6", "a/7", "a/8"]}


def test_examples_are_few_and_each_is_named_once():
    ledger = new()
    for _ in range(2):
        take(ledger, dict.fromkeys(range(2), "bad_json"))
    take(ledger, dict.fromkeys(range(8), "bad_json"), first=50)
    ledger.meet()
    assert ledger.examples == {"bad_json": ["a/0", "a/1", "a/50", "a/51", "a/52"]}


def test_the_line_of_progress_says_what_was_used_and_why_the_rest_was_not():
    ledger = new()
    take(ledger, {})
    assert ledger.line() == "used 8 of 1,600"
    take(ledger, {1: "bad_json", 2: "too_large", 3: "bad_json"})
    assert ledger.line() == "used 13 of 1,600  dropped 3 (bad_json, too_large)"
