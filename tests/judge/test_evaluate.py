import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from clipft.data.index import Samples, index_shards
from clipft.judge.evaluate import build_task, embed, judge
from clipft.judge.retrieval import retrieval_metrics
from clipft.judge.zero_shot import class_prototypes, zero_shot_metrics
from clipft.model.load import Clip

CLASSES = ["red", "green", "blue"]
TEMPLATES = ["a {c} one", "{c}!"]
LENGTH = 16


class Towers(nn.Module):
    """As little of a CLIP as the encoders need; the dropout tells training mode from evaluation mode."""

    context_length = LENGTH

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), nn.Dropout(0.5))
        self.words = nn.EmbeddingBag(128, 12)

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, tokens):
        return self.words(tokens)


def tokenize(texts: list[str]) -> torch.Tensor:
    rows = [[ord(char) % 128 for char in text[:LENGTH]] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def preprocess(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.resize((8, 8)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def towers() -> Towers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Towers()


def stand_in(model: Towers) -> Clip:
    return Clip(model, tokenize, preprocess, model_cfg={}, preprocess_cfg={}, name="stand-in")


def drawn(i: int) -> bytes:
    """A picture of its own colours; lossless, so that a test sees the same pixels."""
    pixels = np.random.default_rng(i).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, rows: list[dict[str, bytes]]) -> Samples:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(rows):
            for kind, raw in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{kind}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return index_shards([str(path)])


def row(i: int, captions: list[str] | None = None, label: int | None = None) -> dict[str, bytes]:
    members = {"png": drawn(i), "json": json.dumps({"captions": captions or []}).encode()}
    return members | ({} if label is None else {"cls": str(label).encode()})


def captioned(num: int) -> list[dict[str, bytes]]:
    return [row(i, [f"number {i}", f"thing {i % 7}", "same for all"][: 1 + i % 3], i % 3) for i in range(num)]


def measured(samples: Samples, model: Towers | None = None, relevance: str = "caption", **changes):
    options = {
        "batch_size": 4,
        "device": torch.device("cpu"),
        "workers": 0,
        "max_pixels": 10_000,
        "trim": False,
        **changes,
    }
    classnames, templates = options.pop("classnames", CLASSES), options.pop("templates", TEMPLATES)
    task = build_task("toys", samples, classnames, templates, tokenize)
    return judge(task, embed(stand_in(model or towers()), task, **options), relevance)


@torch.no_grad()
def feature_of_image(model: Towers, i: int) -> torch.Tensor:
    pixels = preprocess(Image.open(io.BytesIO(drawn(i))))
    return nn.functional.normalize(model.eval().visual(pixels[None]), dim=-1)[0]


@torch.no_grad()
def feature_of_text(model: Towers, text: str) -> torch.Tensor:
    return nn.functional.normalize(model.words(tokenize([text])), dim=-1)[0]


@pytest.mark.parametrize("relevance", ["caption", "pair"])
@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (64, 1)])
def test_metrics_are_those_of_features_computed_one_by_one(tmp_path, relevance, batch_size, workers):
    captions = [["a cat", "A  cat"], ["a dog"], ["a cat", "a red one"], ["the sea"], ["a bird", "a dog"]]
    labels = [0, 1, 2, 0, 0]
    samples = write_shard(
        tmp_path / "a.tar", [row(i, *each) for i, each in enumerate(zip(captions, labels, strict=True))]
    )
    found = measured(samples, relevance=relevance, batch_size=batch_size, workers=workers)

    model = towers()
    image = torch.stack([feature_of_image(model, i) for i in range(5)])
    flat = [text for texts in captions for text in texts]
    groups = ["cat", "cat", "dog", "cat", "red", "sea", "bird", "dog"]
    expected = retrieval_metrics(
        image,
        torch.stack([feature_of_text(model, text) for text in flat]),
        torch.arange(len(flat)),
        torch.tensor([0, 0, 1, 2, 2, 3, 4, 4]),
        relevance,
        group_of=torch.tensor([groups.index(group) for group in groups]),
    )
    prompts = [[feature_of_text(model, t.replace("{c}", c)) for t in TEMPLATES] for c in CLASSES]
    prototypes = class_prototypes(torch.stack([torch.stack(each) for each in prompts]))
    expected |= zero_shot_metrics(image, prototypes, torch.tensor(labels))
    assert found.metrics == pytest.approx({f"toys/{name}": value for name, value in expected.items()}, abs=1e-12)
    assert found.gallery == {
        "indexed": 5,
        "used": 5,
        "images": 5,
        "captions": 8,
        "distinct_captions": 6,
        "labelled_images": 5,
        "classes": 3,
        "dropped": {},
    }


def test_what_cannot_be_used_is_counted_by_reason_and_takes_no_part(tmp_path):
    good = captioned(9)
    bad = [
        {"png": drawn(50), "json": b'{"captions": []}'},
        {"png": drawn(51), "txt": b"\xff\xfe caf\xe9"},
        {"png": drawn(52)[:60], "txt": b"half an image"},
        {"png": b"not an image", "txt": b"no image at all"},
        {"png": drawn(53), "txt": b"a caption", "cls": b"three"},
        {"txt": b"a caption alone"},
    ]
    clean = measured(write_shard(tmp_path / "clean.tar", good))
    mixed = [member for pair in zip(good, bad, strict=False) for member in pair] + good[len(bad) :]
    found = measured(write_shard(tmp_path / "mixed.tar", mixed))
    assert found.metrics == pytest.approx(clean.metrics, abs=1e-12)
    dropped, indexed, examples = (found.gallery.pop(name) for name in ("dropped", "indexed", "examples"))
    assert clean.gallery == found.gallery | {"indexed": len(good), "dropped": {}}
    assert indexed == len(good) + len(bad)
    assert sum(dropped.values()) == len(bad)
    assert {"no_caption": 1, "bad_utf8": 1, "bad_label": 1, "no_image": 1}.items() <= dropped.items()
    assert {reason: len(keys) for reason, keys in examples.items()} == dropped
    assert len({key for keys in examples.values() for key in keys}) == len(bad)


def test_images_over_max_pixels_are_dropped(tmp_path):
    samples = write_shard(tmp_path / "a.tar", captioned(4))
    with pytest.raises(ValueError, match=r"none of its 4 images could be decoded \(4 too_large\)"):
        measured(samples, max_pixels=99)


def test_labels_without_captions_give_zero_shot_only_and_the_reverse(tmp_path):
    labelled = measured(write_shard(tmp_path / "a.tar", [row(i, None, i % 3) for i in range(6)]))
    assert {name.partition("_")[0] for name in labelled.metrics} == {"toys/zero"}
    assert labelled.gallery == {"indexed": 6, "used": 6, "labelled_images": 6, "classes": 3, "dropped": {}}
    paired = measured(write_shard(tmp_path / "b.tar", captioned(6)), classnames=None, templates=[])
    assert not any("zero_shot" in name for name in paired.metrics)
    assert paired.gallery.keys() == {"indexed", "used", "dropped", "images", "captions", "distinct_captions"}


def test_an_image_without_a_caption_is_not_in_the_retrieval_gallery(tmp_path):
    pairs = captioned(6)
    alone = measured(write_shard(tmp_path / "a.tar", pairs), classnames=None)
    more = measured(write_shard(tmp_path / "b.tar", [*pairs, *(row(i, None, 1) for i in range(20, 30))]))
    assert more.gallery["images"] == 6 and more.gallery["labelled_images"] == 16
    assert {name: more.metrics[name] for name in alone.metrics} == pytest.approx(alone.metrics, abs=1e-12)


def test_data_that_cannot_be_measured_is_named(tmp_path):
    samples = write_shard(tmp_path / "a.tar", [row(i, None, i) for i in range(4)])
    with pytest.raises(ValueError, match=r"toys: none of the 4 samples has a caption.*4 no_caption"):
        measured(samples, classnames=None)
    with pytest.raises(ValueError, match=r"a/0003 has label 3, but classnames\.txt names the classes 0 to 2"):
        measured(samples)
    with pytest.raises(ValueError, match=r"toys has class names and no prompts.*zeroshot_classification_templates"):
        measured(samples, templates=[])


def test_each_module_gets_its_mode_back_and_is_measured_in_evaluation_mode(tmp_path):
    samples = write_shard(tmp_path / "a.tar", captioned(8))
    model = towers().train()
    model.words.eval()  # such as a frozen part
    before = [part.training for part in model.modules()]
    assert measured(samples, model).metrics == measured(samples, model).metrics
    assert [part.training for part in model.modules()] == before
    assert sorted(set(before)) == [False, True]


def test_the_precision_is_the_callers_and_scores_stay_fp32(tmp_path):
    samples = write_shard(tmp_path / "a.tar", captioned(8))
    plain = measured(samples).embedded
    low = measured(samples, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)).embedded
    assert low.image.dtype == low.text.dtype == torch.float32
    assert 1e-4 < (low.image - plain.image).abs().max() < 0.05


def test_a_task_is_read_once_and_measured_often(tmp_path):
    samples = write_shard(tmp_path / "a.tar", captioned(8))
    model = towers()
    clip, task = stand_in(model), build_task("toys", samples, CLASSES, TEMPLATES, tokenize)
    options = {
        "batch_size": 4,
        "device": torch.device("cpu"),
        "workers": 0,
        "max_pixels": 10_000,
        "trim": False,
    }
    first = judge(task, embed(clip, task, **options), "caption")
    assert first.metrics == measured(samples).metrics
    with torch.no_grad():
        model.words.weight.neg_()
    second = judge(task, embed(clip, task, **options), "caption")
    assert second.metrics != first.metrics and second.gallery == first.gallery


def on_rank(rank: int, world: int, folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)  # threads of the parent are gone after a fork
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = measured(index_shards([str(folder / "a.tar")]), batch_size=batch_size)
    saved = {"metrics": found.metrics, "gallery": found.gallery}
    embedded = {"image": found.embedded.image, "text": found.embedded.text, "kept": found.embedded.kept}
    torch.save(saved | embedded, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("batch_size, num", [(4, 27), (64, 10)])
def test_two_ranks_give_every_bit_of_what_one_gives(tmp_path, batch_size, num):
    """With 10 images in batches of 64 the second rank has nothing to encode."""
    write_shard(tmp_path / "a.tar", [*captioned(num), {"png": b"broken", "txt": b"broken"}])
    fork = multiprocessing.get_context("fork")
    for world in (1, 2):
        ranks = [fork.Process(target=on_rank, args=(r, world, tmp_path, batch_size)) for r in range(world)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(30)
            each.kill()  # one that waits for a rank that is gone
        assert [each.exitcode for each in ranks] == [0] * world
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        assert two["metrics"] == one["metrics"] and two["gallery"] == one["gallery"]
        for name in ("image", "text", "kept"):
            assert torch.equal(two[name], one[name])
