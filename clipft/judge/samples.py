"""What the model finds for a few captions, to be looked at."""

import numpy as np
import torch
from jaxtyping import UInt8

from clipft.data.decode import decode_rgb
from clipft.data.sample import IMAGE_KINDS, image_of, printable
from clipft.judge.evaluate import Embedded, Task
from clipft.learn.loggers import Retrieved

NUM_CAPTIONS = 16
NUM_FOUND = 3


def sample_retrievals(task: Task, embedded: Embedded) -> list[Retrieved]:
    """The images found for captions spread evenly over the task; none where there are no captions."""
    row_of = {int(place): row for row, place in enumerate(embedded.kept)}
    captions = [
        (int(c), row_of[int(i)]) for c, i in zip(task.caption_of, task.image_of, strict=True) if int(i) in row_of
    ]
    every = max(1, len(captions) // NUM_CAPTIONS)
    return [retrieve(task, embedded, caption, own) for caption, own in captions[::every][:NUM_CAPTIONS]]


def retrieve(task: Task, embedded: Embedded, caption: int, own: int) -> Retrieved:
    scores = embedded.image @ embedded.text[caption]
    found = scores.topk(min(NUM_FOUND, len(scores))).indices.tolist()
    rank = int((scores > scores[own]).sum()) + 1
    return Retrieved(
        printable(task.texts[caption]), picture(task, embedded, own), [picture(task, embedded, i) for i in found], rank
    )


def picture(task: Task, embedded: Embedded, row: int) -> UInt8[np.ndarray, "H W 3"]:
    sample = int(task.images[int(embedded.kept[row])])
    raw = image_of(task.samples.read(sample, IMAGE_KINDS))
    return decode_rgb(raw, max_pixels=torch.iinfo(torch.int64).max)
