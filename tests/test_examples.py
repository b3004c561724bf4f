import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import make_model

from clipft.examples import guide


def test_the_guiding_example_writes_a_picture_that_comes_nearer_to_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model, out = make_model(tmp_path / "model"), tmp_path / "out.png"
    arguments = [str(model), "two birds", "--out", str(out), "--side", "20", "--steps", "40", "--crops", "4"]
    monkeypatch.setattr("sys.argv", ["guide", *arguments])
    guide.main()
    cosines = [float(value) for value in re.findall(r"cosine of the whole picture (\S+)", capsys.readouterr().out)]
    assert len(cosines) == 11 and cosines[-1] > cosines[0] + 0.1
    with Image.open(out) as image:
        assert image.size == (20, 20)


def test_the_guiding_example_starts_from_a_given_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, start, out = make_model(tmp_path / "model"), tmp_path / "start.png", tmp_path / "out.png"
    pixels = np.random.default_rng(0).integers(40, 216, (3, 3, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(pixels).save(start)
    arguments = [str(model), "a dog", "--image", str(start), "--side", "24", "--steps", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["guide", *arguments])
    guide.main()
    with Image.open(out) as image:
        difference = np.abs(np.asarray(image).astype(int) - pixels)
    assert 0 < difference.mean() < 20  # the noise that the steps would change
