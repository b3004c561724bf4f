"""Features of towers that are locked as a whole: made once before the first step, found again by later runs."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from clipft.config import Config
from clipft.data.augment import Augment
from clipft.data.kept import Kept
from clipft.data.pairs import Units, build_units
from clipft.data.progress import Progress
from clipft.data.sides import Side, images_of, side_batches, texts_of
from clipft.data.waiting import naming_lost_workers
from clipft.files import user_cache
from clipft.fit import Job, image_features, text_features, tokenizer
from clipft.judge.evaluate import evaluating
from clipft.learn.gather import all_objects
from clipft.learn.stop import STOPS, StopRequest
from clipft.measure import PACKAGES, Measure, code_hash, naming_memory
from clipft.model.build import description
from clipft.model.groups import TOWERS, in_tower, is_frozen
from clipft.model.towers import of_transformers
from clipft.ranks import first_to_all
from clipft.report import RunFailed, megabytes, tell

NOUNS = {"image": "images", "text": "captions"}
MAKERS = ("data", "model")  # our code that decides what a feature is
READERS = ("Pillow", "simplejpeg", "ftfy")  # and that of others, beside PACKAGES


def locked_towers(config: Config, model: nn.Module, augment: Augment) -> list[str]:
    """The towers whose features are to be kept; raises where there are none, or the next epoch's would be others."""
    if not config.train.cache_features:
        return []
    locked = [tower for tower in TOWERS if is_frozen(model, tower)]
    if not locked:
        raise ValueError(
            "train.cache_features=true would be ignored: tune.rules trains something of both towers, and only a tower "
            "that is locked as a whole has the same features at every step. Use tune=lit, or leave it out."
        )
    if "image" in locked and augment.is_random:
        raise ValueError(
            "train.cache_features=true keeps one feature of each image, and the image tower sees other pixels each "
            f"epoch: data.augment={config.data.augment} with crop_min={augment.crop_min}, affine_degrees="
            f"{augment.affine_degrees}, flip_prob={augment.flip_prob}. Use data.augment=none, or leave it out."
        )
    return locked


def kept_features(job: Job, state: str | None) -> dict[str, Kept]:
    """Where the features of locked towers lie, or will, with a note of each for the plan; nothing is made yet.

    `state` is what the run goes on from. Raises where its weights are others, or the disk has no room.
    """
    model, ranks = job.measure.clip.model, job.measure.ranks
    kept = {tower: place_of(tower, job) for tower in locked_towers(job.config, model, job.augment)}
    for tower in kept:
        check_state(tower, model, state)
    for tower, note in first_to_all(ranks, lambda: notes_of(kept)).items():
        job.measure.clip.notes.append(f"the {tower} tower is locked: {note}")
    return kept


def place_of(tower: str, job: Job) -> Kept:
    """A tower's features are those of a folder whose name is the hash of all that they depend on."""
    config, clip, ranks = job.config, job.measure.clip, job.measure.ranks
    units, seen = Units(job.units.samples, None), [str(job.augment), config.data.max_pixels]
    if tower == "text":
        units, seen = build_units(units.samples, "all", config.data.text_errors), [config.data.text_errors]
    packages = [*PACKAGES, *READERS, *(["transformers"] if of_transformers(clip.model_cfg) else [])]
    facts = {
        "tower": tower,
        "model": description(clip),
        "weights": weights_hash(clip.model, tower),
        "data": [units.samples.fingerprint, units.samples.stamps.tolist(), len(units)],
        "seen": seen,
        # Another number of rows at a time is another order of sums.
        "encoded": [ranks.precision, ranks.device.type, job.measure.batch_size, job.measure.trim],
        "code": [code_hash(*MAKERS), *(version(name) for name in packages)],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Kept(user_cache() / "features" / digest[:32], units, clip.model_cfg["embed_dim"])


def weights_hash(model: nn.Module, tower: str) -> str:
    digest = hashlib.sha256()
    for name, value in in_tower(model.state_dict().items(), tower):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_state(tower: str, model: nn.Module, path: str | None) -> None:
    """Raises where the run goes on with other weights in the locked tower than its config loads (resume=force)."""
    if path is None:
        return
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for name, value in in_tower(model.state_dict().items(), tower):
        if not torch.equal(saved[name].to(value.dtype), value.cpu()):
            raise ValueError(
                f"train.cache_features=true: {name} of the locked {tower} tower is another one in {path} than in what "
                "model= loads, and the features of which of them are meant cannot be told. Leave train.cache_features "
                "out, or train from that state in a new run."
            )


def notes_of(kept: Mapping[str, Kept]) -> dict[str, str]:
    """Of each tower what will be made, or was found; raises where the disk has no room for it."""
    notes, wanted = {}, 0
    for tower, each in kept.items():
        missing = [part for part in range(each.num_parts) if not each.is_there(part)]
        size = sum(map(each.num_bytes, missing))
        notes[tower] = f"features of {len(each.units):,} {NOUNS[tower]} are in {each.folder}"
        if missing:
            count = sum(len(each.rows_of(part)) for part in missing)
            what = f"{count:,} of {len(each.units):,} {NOUNS[tower]} ({megabytes(size)})"
            notes[tower] = f"features of {what} are made before the first step, in {each.folder}"
        wanted += size
    folder = user_cache()
    if not wanted:
        return notes
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted * 1.05:
        raise ValueError(
            f"train.cache_features=true: {folder} has {megabytes(free)} of room and the features need "
            f"{megabytes(wanted)}. Make room, set XDG_CACHE_HOME to a folder on another disk, or leave it out."
        )
    return notes


def make_features(job: Job, stop: StopRequest) -> None:
    """Makes what is missing of job.kept, each rank its share; every rank has to come."""
    clip, ranks, config = job.measure.clip, job.measure.ranks, job.config
    for tower, kept in job.kept.items():
        if tower == "image":
            side = images_of(kept.units, job.augment, config.data.max_pixels)
            encode = partial(image_features, clip)
        else:
            side = texts_of(kept.units, tokenizer(clip, job.measure.trim), config.data.text_errors)
            encode = partial(text_features, clip)
        maker = Maker(kept, side, encode, job.measure, stop, NOUNS[tower])
        maker.make(ranks.rank, ranks.world)
        if ranks.world > ranks.local_world:  # another machine may keep its own on a disk of its own
            maker.make(ranks.rank % ranks.local_world, ranks.local_world)
        if not all(map(kept.is_there, range(kept.num_parts))):
            raise RunFailed(
                f"{kept.folder}: features that were made there are gone. The same command makes them again."
            )


@dataclass(frozen=True)
class Maker:
    """How the parts of a tower's features are made."""

    kept: Kept
    side: Side
    encode: Callable[[Tensor], Tensor]
    measure: Measure
    stop: StopRequest
    noun: str

    @property
    def size(self) -> int:
        """Rows that are encoded at a time."""
        return min(self.measure.batch_size, self.kept.part_rows, len(self.kept.units))

    def make(self, number: int, of: int) -> None:
        """Makes the parts number, number + of, ... that are not whole; the ranks go from part to part together."""
        missing = [part for part in range(number, self.kept.num_parts, of) if not self.kept.is_whole(part)]
        batches = [self.batches_of(part) for part in missing]
        every, workers, wait = [each for part in batches for each in part], self.measure.workers, self.measure.wait
        loader = side_batches(self.side, every, self.size, workers, wait)
        inputs = iter(loader) if missing else iter(())
        total = sum(len(self.kept.rows_of(part)) for part in missing)
        progress = Progress(f"features of {self.noun}", self.noun if of == 1 else f"{self.noun} of rank 0", total)
        for turn in range(max(all_objects(len(missing)))):
            if turn < len(missing):
                with naming_lost_workers(loader):
                    self.kept.write(missing[turn], *self.encoded(inputs, batches[turn], progress))
            self.stop_together()
        progress.end()

    def batches_of(self, part: int) -> list[range]:
        rows = self.kept.rows_of(part)
        return [rows[start : start + self.size] for start in range(0, len(rows), self.size)]

    def encoded(
        self, inputs: Iterator[Any], batches: list[range], progress: Progress
    ) -> tuple[list[str], Float32[np.ndarray, "n D"]]:
        """Reasons and features of the next batches of the inputs."""
        clip, ranks, reasons, features = self.measure.clip, self.measure.ranks, [], []
        with evaluating(clip.model), torch.inference_mode():
            for batch in batches:
                rows, why = next(inputs)
                with naming_memory(f"features of {self.noun} were made", self.size), ranks.autocast():
                    found = self.encode(rows.to(ranks.device))
                features.append(found[: len(batch)].cpu().numpy())
                reasons += why
                progress.add(len(batch) if ranks.first else 0)
        return reasons, np.concatenate(features)

    def stop_together(self) -> None:
        """Ends the run, on all ranks, where one of them is to stop: what is made stays."""
        wishes = [wish for wish in all_objects(self.stop.wish()) if wish]
        if wishes:
            self.stop.agreed = wishes[0]
            tell(reason=wishes[0])
            raise SystemExit(STOPS[wishes[0]])
