import torch

from clipft.ship.card import card_text, leaf
from clipft.ship.folder import Reloaded


def reloaded(causes=None):
    return Reloaded(
        difference=3e-8,
        image=torch.eye(2),
        text=torch.eye(2),
        cosine=torch.tensor([0.9995, 0.8 if causes else 1.0]),
        causes=causes or {},
        versions={},
    )


def card(**change):
    facts = {
        "name": "emoji",
        "base": "/home/anna/runs/flickr8k",
        "data": "data/emoji",
        "split": "test",
        "galleries": {"emoji images": 400},
        "before": {"emoji/text_to_image_recall@1": 0.01},
        "exported": {"emoji/text_to_image_recall@1": 0.25, "eurosat/zero_shot_top1": 0.5},
        "plain": {"emoji/text_to_image_recall@1": 0.252},
        "reloaded": reloaded(),
        "versions": {"clipft": "0.1.0", "open_clip": "3.3.0"},
    }
    return card_text(**{**facts, **change})


def test_a_card_shows_base_exported_and_plain_results_with_split_and_gallery():
    text = card()
    assert "| emoji/text_to_image_recall@1 | 0.0100 | 0.2500 | 0.2520 |" in text
    assert "| eurosat/zero_shot_top1 |  | 0.5000 |  |" in text
    assert "test split (400 emoji images)" in text
    assert "clipft 0.1.0, open_clip 3.3.0" in text


def test_a_card_shows_no_path_of_the_machine():
    text = card()
    assert "from flickr8k on emoji" in text
    assert "anna" not in text
    assert leaf("C:\\Users\\anna\\runs\\x") == "x"


def test_a_card_counts_the_causes_with_an_example_and_names_the_changed_metric():
    text = card(reloaded=reloaded({"test-000/7": "EXIF orientation 6"}), plain={"emoji/text_to_image_recall@1": 0.2})
    assert "lowest cosine 0.8000, 1 below 0.999" in text
    assert "- 1 files (such as test-000/7): EXIF orientation 6." in text
    assert "emoji/text_to_image_recall@1 differs by -5.0 points with plain open_clip: the files named above" in text


def test_the_loading_code_of_a_card_is_python():
    code = card().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "local-dir:" in code
