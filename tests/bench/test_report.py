"""Figures of a benchmark: a table, and a file that says how they were made."""

import json
import sys

import pytest

from clipft.bench.report import Spread, ratios, show, spread, write


def test_a_spread_is_the_middle_with_both_ends():
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, min=1.0, max=3.0)
    assert str(spread([1.0, 4.0])) == "2.50 (1.00 to 4.00)"


def test_ratios_are_taken_round_by_round():
    """A round in which the machine is slow counts as much as another one."""
    assert ratios([10.0, 1.0, 6.0], [5.0, 0.5, 2.0]) == Spread(median=2.0, min=2.0, max=3.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_table_has_a_column_for_each_key_of_any_row(capsys):
    show("things", [{"what": "one", "MB": 1234.5}, {"what": "two", "ratio": Spread(2.0, 1.0, 3.0)}])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "things",
        "what  MB     ratio",
        "one   1,234",
        "two          2.00 (1.00 to 3.00)",
    ]


def test_the_file_tells_command_machine_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "loss", "--width", "8"])
    write(tmp_path / "new", "loss", [{"s": Spread(2.0, 1.0, 3.0)}])
    found = json.loads((tmp_path / "new/loss.json").read_text())
    assert found["rows"] == [{"s": {"median": 2.0, "min": 1.0, "max": 3.0}}]
    assert found["command"] == "python -m clipft.bench loss --width 8" and found["benchmark"] == "loss"
    assert found["cores"] >= 1 and found["versions"]["torch"] and "gpu" in found
