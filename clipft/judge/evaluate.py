"""A model and the samples of a split -> retrieval and zero-shot metrics, equal on any number of ranks.

Three steps, each done as seldom as it can be: what is asked (once per data set), the features (once per
set of weights), the metrics.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clipft.data.caption import normalise_caption, question_of
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples
from clipft.data.loader import WAIT, eval_images
from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS, BadSample, failing_at, image_of
from clipft.data.waiting import Wait, naming_lost_workers
from clipft.judge.retrieval import retrieval_metrics
from clipft.judge.zero_shot import class_prototypes, zero_shot_metrics
from clipft.learn.gather import gather_rows, rank, world
from clipft.learn.ledger import note
from clipft.model.encode import encode_image, encode_text
from clipft.model.load import Clip

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked about one data set: N images, M caption instances, U distinct texts, C classes."""

    name: str
    samples: Samples
    images: Int64[np.ndarray, " N"]
    """Positions in `samples`, ascending."""
    label: Int64[Tensor, " N"]
    """Class of each image; -1 where it has none or there are no class names."""
    texts: list[str]
    """Captions and prompts, each exact text once."""
    tokens: Int64[Tensor, "U L"]
    group_of: Int64[Tensor, " U"]
    """Texts that are equal but for case and spaces have the same number."""
    caption_of: Int64[Tensor, " M"]
    image_of: Int64[Tensor, " M"]
    prompt_of: Int64[Tensor, "C T"]
    """The text of each class in each template; C is 0 without class names."""
    dropped: dict[str, int]
    """Reason -> samples of the split that take no part."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys of some of them."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Unit features of a task's images that could be decoded (n of N) and of all its texts."""

    image: Float[Tensor, "n D"]
    text: Float[Tensor, "U D"]
    kept: Int64[Tensor, " n"]
    """Rows of Task.images, ascending."""
    dropped: dict[str, int]
    """Reason -> images that could not be decoded."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys of some of them."""


@dataclass(frozen=True)
class Evaluation:
    name: str
    metrics: dict[str, float]
    """Under "<data set>/<metric>"."""
    gallery: dict[str, Any]
    """What they were made on: indexed, used, dropped; images, captions, distinct_captions; labelled_images, classes;
    examples of what was dropped."""
    embedded: Embedded = field(repr=False)


def build_task(
    name: str,
    samples: Samples,
    classnames: list[str] | None,
    templates: list[str],
    tokenize: Callable[[list[str]], Int64[Tensor, "U L"]],
    text_errors: str = "strict",
) -> Task:
    """The captions, labels and prompts of the samples, read and tokenized."""
    if classnames and not templates:
        raise ValueError(
            f"{name} has class names and no prompts for them. Write lines such as 'a photo of a {{c}}.' into "
            f"zeroshot_classification_templates.txt beside its shards."
        )
    images, labels, captions, dropped, examples = read_questions(samples, bool(classnames), text_errors)
    check_labels(name, samples, images, labels, classnames or [])
    prompts = [[template.replace("{c}", each) for template in templates] for each in classnames or []]
    flat = [text for texts in captions for text in texts] + [text for texts in prompts for text in texts]
    # Texts of about the same length share a batch, so that trimming cuts most.
    texts = sorted(set(flat), key=lambda text: (len(text), text))
    if not texts:
        raise ValueError(
            f"{name}: none of the {len(samples)} samples has a caption or a label with class names "
            f"({in_words(dropped)}). Write captions in key.txt or key.json, or labels in key.cls with "
            f"classnames.txt beside the shards."
        )
    row = {text: i for i, text in enumerate(texts)}
    groups = {text: i for i, text in enumerate(dict.fromkeys(normalise_caption(text) for text in texts))}
    return Task(
        name=name,
        samples=samples,
        images=np.array(images, dtype=np.int64),
        label=torch.tensor(labels, dtype=torch.long),
        texts=texts,
        tokens=tokenize(texts),
        group_of=torch.tensor([groups[normalise_caption(text)] for text in texts]),
        caption_of=torch.tensor([row[text] for each in captions for text in each], dtype=torch.long),
        image_of=torch.tensor([i for i, each in enumerate(captions) for _ in each], dtype=torch.long),
        prompt_of=torch.tensor([[row[text] for text in each] for each in prompts], dtype=torch.long).reshape(
            len(prompts), len(templates)
        ),
        dropped=dropped,
        examples=examples,
    )


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def read_questions(
    samples: Samples, labelled: bool, text_errors: str
) -> tuple[list[int], list[int], list[list[str]], dict[str, int], dict[str, list[str]]]:
    """Positions, labels and captions of the samples that have one of the two; what the others lack, and some keys."""
    images, labels, captions, dropped = [], [], [], Counter(samples.dropped)
    examples = {reason: [key] for reason, key in samples.examples.items()}
    for i in range(len(samples)):
        try:
            with failing_at(lambda i=i: samples.key(i)):
                label, texts = question_of(samples.read(i, TEXT_KINDS), labelled, text_errors)
        except BadSample as bad:
            dropped[bad.reason] += 1
            note(examples, bad.reason, [samples.key(i)])
            continue
        images.append(i)
        labels.append(label)
        captions.append(texts)
    return images, labels, captions, dict(dropped), examples


def check_labels(name: str, samples: Samples, images: list[int], labels: list[int], classnames: list[str]) -> None:
    for image, label in zip(images, labels, strict=True):
        if label >= len(classnames):
            raise ValueError(
                f"{name}: sample {samples.key(image)} has label {label}, but classnames.txt names the "
                f"classes 0 to {len(classnames) - 1}. Give it one line per class, in the order of the labels."
            )


def embed(
    clip: Clip,
    task: Task,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    max_pixels: int,
    trim: bool,
    autocast: Autocast = nullcontext,
    wait: Wait = WAIT,
) -> Embedded:
    """The features of all ranks' parts, on every rank.

    Batches are cut before they are dealt to the ranks, so that what is encoded together, and with it every
    bit of the features, is the same on any number of ranks.
    """
    with evaluating(clip.model), torch.inference_mode():
        batches = deal(torch.from_numpy(task.images), batch_size)
        images, places = [], []
        mine = [batch.numpy() for batch in batches]
        loader = eval_images(task.samples, clip.preprocess, max_pixels, workers, mine, wait)
        with naming_lost_workers(loader):
            for indices, pixels, valid in loader:
                with autocast():
                    images.append(encode_image(clip.model, pixels.to(device))[valid.to(device)])
                places.append(torch.from_numpy(indices)[valid])
        image, place = gather_in_order(images, places, device)
        texts, rows = [], deal(torch.arange(len(task.texts)), batch_size)
        for batch in rows:
            with autocast():
                texts.append(encode_text(clip.model, task.tokens[batch].to(device), trim))
        text, _ = gather_in_order(texts, rows, device)
    kept = torch.searchsorted(torch.from_numpy(task.images), place.cpu())
    dropped, examples = why_dropped(task, kept, max_pixels)
    return Embedded(image=image, text=text, kept=kept, dropped=dropped, examples=examples)


def why_dropped(task: Task, kept: Int64[Tensor, " n"], max_pixels: int) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Reasons of the images that did not come back, with examples: the same few are read again on every rank."""
    reasons, examples = Counter[str](), dict[str, list[str]]()
    for i in np.delete(task.images, kept.numpy()).tolist():
        reason = "unread"  # it can be read now
        try:
            decode_rgb(image_of(task.samples.read(i, IMAGE_KINDS)), max_pixels)
        except BadSample as bad:
            reason = bad.reason
        reasons[reason] += 1
        note(examples, reason, [task.samples.key(i)])
    return dict(reasons), examples


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module gets its own mode back, also where parts of the model are frozen."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def deal(items: Int64[Tensor, " N"], batch_size: int) -> list[Tensor]:
    """This rank's batches of consecutive items: batch b goes to rank b % world."""
    return list(items.split(batch_size))[rank() :: world()] if len(items) else []


def gather_in_order(
    features: Sequence[Tensor], places: Sequence[Tensor], device: torch.device
) -> tuple[Float[Tensor, "N D"], Int64[Tensor, " N"]]:
    """The features of all ranks by ascending place, and the places; a rank may have none."""
    width = gather_rows(torch.tensor([part.shape[1] for part in features[:1]], dtype=torch.long, device=device))
    nothing = torch.zeros(0, int(width.max()) if len(width) else 0, device=device)
    rows = gather_rows(torch.cat([nothing, *features]))
    place = gather_rows(torch.cat([torch.zeros(0, dtype=torch.long), *places]).to(device))
    order = place.argsort()
    return rows[order], place[order]


def judge(task: Task, embedded: Embedded, relevance: str) -> Evaluation:
    """The metrics of these features; images that could not be decoded are left out with their captions."""
    if not len(embedded.kept):
        raise ValueError(
            f"{task.name}: none of its {len(task.images)} images could be decoded "
            f"({in_words(embedded.dropped)}). Look at the first: {task.samples.key(int(task.images[0]))}."
        )
    ledger = account(task, embedded)
    retrieval, pairs = judge_retrieval(task, embedded, relevance)
    zero_shot, classes = judge_zero_shot(task, embedded)
    metrics = {f"{task.name}/{metric}": value for metric, value in (retrieval | zero_shot).items()}
    return Evaluation(name=task.name, metrics=metrics, gallery=ledger | pairs | classes, embedded=embedded)


def account(task: Task, embedded: Embedded) -> dict[str, Any]:
    """What became of the split's samples: indexed = used + dropped, of which some are named."""
    indexed = len(task.samples) + sum(task.samples.dropped.values())
    dropped = dict(Counter(task.dropped) + Counter(embedded.dropped))
    if indexed != len(embedded.kept) + sum(dropped.values()):
        raise RuntimeError(f"{task.name}: {len(embedded.kept)} used and {dropped} dropped are not {indexed} samples")
    examples = {**task.examples}
    for reason, keys in embedded.examples.items():
        note(examples, reason, keys)
    counts = {"indexed": indexed, "used": len(embedded.kept), "dropped": dropped}
    return counts | ({"examples": examples} if examples else {})


def judge_retrieval(task: Task, embedded: Embedded, relevance: str) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics and sizes on the images with captions; nothing where there are none."""
    row_of = torch.full((len(task.images),), -1)
    row_of[embedded.kept] = torch.arange(len(embedded.kept))
    there = row_of[task.image_of] >= 0
    if not there.any():
        return {}, {}
    images, image_of = torch.unique(row_of[task.image_of[there]], return_inverse=True)
    texts, caption_of = torch.unique(task.caption_of[there], return_inverse=True)
    device = embedded.image.device
    metrics = retrieval_metrics(
        embedded.image[images.to(device)],
        embedded.text[texts.to(device)],
        caption_of.to(device),
        image_of.to(device),
        relevance,
        group_of=task.group_of[texts].to(device),
    )
    return metrics, {"images": len(images), "captions": len(caption_of), "distinct_captions": len(texts)}


def judge_zero_shot(task: Task, embedded: Embedded) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics and sizes on the images with labels; nothing where there are none."""
    label = task.label[embedded.kept]
    labelled = (label >= 0).nonzero().flatten()
    if not len(labelled):
        return {}, {}
    device = embedded.image.device
    prototypes = class_prototypes(embedded.text[task.prompt_of.to(device)])
    metrics = zero_shot_metrics(embedded.image[labelled.to(device)], prototypes, label[labelled].to(device))
    return metrics, {"labelled_images": len(labelled), "classes": len(prototypes)}
