"""Every option of clipft: its type, unit, default and one line of documentation.

Nothing else defines a default; the YAML files in conf/ state differences from these.
"""

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ADAMW = "adamw"
OF_ADAMW = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}  # where null; CLIP, table 19
DURATION_S = {"s": 1, "min": 60, "h": 3600}
UNITS = {None: 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
RECALLS = tuple(f"{side}_recall@{k}" for side in ("mean", "text_to_image", "image_to_text") for k in (1, 5, 10))
SOURCE_FORMATS = ("csv", "jsonl", "json", "parquet", "huggingface", "tars", "pairs", "classes")
ZERO_SHOTS = ("zero_shot_top1", "zero_shot_top5", "zero_shot_mean_per_class")


@dataclass(frozen=True)
class Every:
    """How often something happens: by steps or by seconds, exactly one of them set."""

    steps: int | None = None
    seconds: float | None = None


def parse_every(key: str, value: int | str | None) -> Every | None:
    """A step count (100) or a duration ("90s", "10min", "1h"); None stays None."""
    if value is None:
        return None
    text = str(value).strip()
    if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
        return Every(steps=int(text))
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h)", text)
    if match and float(match[1]) > 0:
        return Every(seconds=float(match[1]) * DURATION_S[match[2]])
    raise ValueError(f"{key}={value!r} is neither a step count such as 100 nor a duration such as 90s, 10min or 1h.")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown. Use one of: {', '.join(choices)}.")


def positive(**values: float | int | None) -> None:
    """Raise for the first value that is given and not above zero; `__` in a name stands for the dot of its key."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name.replace('__', '.')}={value} must be greater than 0.")


def fraction(**values: float | int | None) -> None:
    """Raise for the first value that is given and outside 0..1."""
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name.replace('__', '.')}={value} must lie between 0 and 1.")


def num_bytes(key: str, value: int | str) -> int:
    """A number of bytes: 500MB, 100GB, 2TB, or the number alone."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(k|M|G|T)?B?", str(value).strip())
    number = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if number <= 0:
        raise ValueError(f"{key}={value!r} must be a number of bytes such as 500MB, 100GB or 2TB.")
    return number


def as_shards(key: str, value: Any) -> list[str]:
    """A string or a list of strings (directory, glob, quoted braces), as a list."""
    values = [value] if isinstance(value, str) else list(value or [])
    if not all(isinstance(item, str) and item for item in values):
        raise ValueError(f"{key}={value!r} must be a directory, a glob, quoted braces, or a list of these.")
    return values


def as_sources(key: str, value: Any) -> list[Any]:
    """as_shards, or a list of {shards: ..., weight: ...} with shards as a list and weight a number above 0."""
    if isinstance(value, str) or not any(isinstance(item, Mapping) for item in value or []):
        return as_shards(key, value)
    sources = []
    for item in value:
        if not isinstance(item, Mapping) or item.keys() - {"shards", "weight"} or not item.get("shards"):
            raise ValueError(f"{key}: {item!r} must be {{shards: SHARDS, weight: NUMBER}}, as every source beside it.")
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{key}: weight={weight!r} must be a number greater than 0.")
        sources.append({"shards": as_shards(key, item["shards"]), "weight": float(weight)})
    return sources


def as_rules(key: str, value: Any) -> list[dict[str, Any]]:
    """A list of {match: GLOB, lr_mult: NUMBER}, with lr_mult 1 where it is not given."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'{key}={value!r} must be a list of rules, such as [{{match: image, lr_mult: 0}}, {{match: "*"}}].'
        )
    rules = []
    for number, rule in enumerate(value, 1):
        known = isinstance(rule, Mapping) and not rule.keys() - {"match", "lr_mult"}
        if not known or not isinstance(rule.get("match"), str) or not rule["match"]:
            raise ValueError(f"{key}: rule {number}, {rule!r}, must be {{match: GLOB, lr_mult: NUMBER}}.")
        factor = rule.get("lr_mult", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(f"{key}: rule {number}: lr_mult={factor!r} must be a number, 0 (frozen) or more.")
        rules.append({"match": rule["match"], "lr_mult": float(factor)})
    return rules


@dataclass(kw_only=True)
class ModelConfig:
    name: str
    """An architecture (`clipft models` lists all), a run, a weight file, an open_clip directory, or hf-hub:org/name."""
    pretrained: str | None
    """Weights for an architecture: a tag of open_clip, a file, a run, an open_clip directory; null: random ones."""
    checkpoint: str = "best"
    """Which weights of a run directory: best, last, or a step number."""
    image_size: int | None = None
    """Side of the images in pixels; null: as the model has it. Position embeddings are interpolated."""
    context_length: int | None = None
    """Tokens of a caption; null: as the model has it. Position embeddings are stretched."""
    patch_dropout: float | None = None
    """Share of the patches that a training step leaves out of each image; null: as the model has it."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same result."""

    def __post_init__(self):
        positive(model__image_size=self.image_size, model__context_length=self.context_length)
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"model.patch_dropout={self.patch_dropout} must be at least 0 and less than 1.")
        if self.checkpoint not in ("best", "last") and not self.checkpoint.isdigit():
            raise ValueError(f"model.checkpoint={self.checkpoint!r} must be best, last, or a step number.")


@dataclass(kw_only=True)
class DataConfig:
    name: str | None = None
    """Names the data in metrics; the folder's name when not given."""
    path: str | None = None
    """A packed folder (with shards.json) or its address; fills train, val and test where those are not given."""
    train: Any = None
    """Training shards: a directory, a glob, quoted braces "x-{000..009}.tar", the address of such (https, s3, gs, hf),
    or a list of these or of sources with weights: [{shards: ..., weight: 2}, ...]."""
    val: Any = None
    """Validation shards: best.ckpt and early decisions come from these."""
    test: Any = None
    """Test shards: the final table is made on these where they exist."""
    val_frac: float | None = None
    """Share of the training samples held out (by a hash of their keys) when there is no val; null: 0.05."""
    captions: str = "one"
    """one: an epoch is each image once, one of its captions drawn anew; all: every pair of image and caption once."""
    lanes: int | None = None
    """For sets larger than memory and disks that seek slowly: so many shards (times the window) are read at a time."""
    window_shards: int | None = None
    """Shards among which a lane shuffles; null: 8."""
    augment: str = "light"
    """none: resize and centre crop; light: random crop of 0.9 to 1.0; strong: light, affine and flip."""
    crop_min: float | None = None
    """Smallest area share of the random crop; null: as data.augment says (1.0 is no random crop)."""
    affine_degrees: float | None = None
    """Largest rotation and shear in degrees; null: as data.augment says."""
    flip_prob: float | None = None
    """Chance of a horizontal flip; null: as data.augment says. Captions say left and right."""
    workers: int | None = None
    """Loader processes per rank; null: its cores less one, at most 16 and what a quarter of the memory holds."""
    max_pixels: int = 64_000_000
    """Images with more pixels are dropped before they are decoded."""
    text_errors: str = "strict"
    """Captions that are not UTF-8: strict drops and counts them, replace keeps them with U+FFFD in the bad places."""
    max_bad_frac: float = 0.05
    """Stop when more than this share of the samples of a split, or of those read so far, cannot be used."""
    cache_dir: str | None = None
    """Folder for shards that lie elsewhere, shared by all processes; null: ~/.cache/clipft/shards."""
    cache_size: Any = "100GB"
    """Most bytes (500MB, 2TB) in that folder; a run needs val, test and, under data.lanes, two windows of train."""
    allow_pipe: bool = False
    """Run the commands in "pipe:COMMAND {000..009}.tar" sources; heard on the command line, not from a file."""

    def __post_init__(self):
        self.train = as_sources("data.train", self.train)
        self.val = as_shards("data.val", self.val)
        self.test = as_shards("data.test", self.test)
        one_of("data.text_errors", self.text_errors, ("strict", "replace"))
        one_of("data.captions", self.captions, ("one", "all"))
        one_of("data.augment", self.augment, ("none", "light", "strong"))
        positive(data__crop_min=self.crop_min, data__max_pixels=self.max_pixels, data__val_frac=self.val_frac)
        fraction(
            data__val_frac=self.val_frac,
            data__crop_min=self.crop_min,
            data__flip_prob=self.flip_prob,
            data__max_bad_frac=self.max_bad_frac,
        )
        if self.affine_degrees is not None and not 0 <= self.affine_degrees <= 45:
            raise ValueError(f"data.affine_degrees={self.affine_degrees} must lie between 0 and 45.")
        positive(data__lanes=self.lanes, data__window_shards=self.window_shards)
        if self.window_shards is not None and self.lanes is None:
            raise ValueError(f"data.window_shards={self.window_shards} would be ignored: it belongs to data.lanes.")
        num_bytes("data.cache_size", self.cache_size)
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 (load in the training process) or more.")


@dataclass(kw_only=True)
class LayerDecayConfig:
    image: float | None = None
    """Factor of the rate for each layer further from the head of the image tower (0.75: embed lowest); null: none."""
    text: float | None = None
    """The same for the text tower; multiplies what the rules say."""

    def __post_init__(self):
        for tower, decay in (("image", self.image), ("text", self.text)):
            if decay is not None and not 0 < decay < 1:
                raise ValueError(f"tune.layer_decay.{tower}={decay} must be greater than 0 and less than 1.")


@dataclass(kw_only=True)
class TuneConfig:
    rules: Any = field(default_factory=lambda: [{"match": "*", "lr_mult": 1.0}])
    """What is trained, as [{match: GLOB, lr_mult: FACTOR OF THE RATE}, ...]: the first match decides, 0 freezes. A glob
    names parameters (visual.conv1.*) or groups: image, text.embed, image.blocks.-1, text.last_blocks, image.head."""
    blocks: int | None = None
    """How many blocks at the end of each tower the rules call last_blocks (tune=last_blocks: 1)."""
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)

    def __post_init__(self):
        self.rules = as_rules("tune.rules", self.rules)
        positive(tune__blocks=self.blocks)
        named = [rule["match"] for rule in self.rules if "last_blocks" in rule["match"]]
        if self.blocks is not None and not named:
            raise ValueError(f"tune.blocks={self.blocks} would be ignored: no rule of tune.rules says last_blocks.")
        if self.blocks is None and named:
            raise ValueError(f"tune.rules: {named[0]!r} needs tune.blocks=N, the number of the last blocks.")


@dataclass(kw_only=True)
class LossConfig:
    name: str = "clip"
    """clip: symmetric InfoNCE over the global batch (Radford et al. 2021); siglip: sigmoids (Zhai et al. 2023)."""
    positives: str = "caption"
    """Pairs that share it belong together: caption (equal normalised text), image (equal files), group, pair (none)."""
    group: str | None = None
    """Column of key.json that names a sample's group, for loss.positives=group."""
    duplicates: str = "share"
    """Pairs that belong together share the target (share), or are left out of each other's negatives (mask)."""
    label_smoothing: float = 0.0
    """Share of a softmax's target that goes to all its pairs evenly (loss.name=clip)."""
    temperature: Any = None
    """null: learned (under loss.name=clip up to a scale of 100); a number T: the scale stays 1/T; keep: as loaded."""
    gather_dtype: str | None = None
    """bfloat16: features go to other ranks in half the bytes, the loss is that of rounded ones; null: as they are."""

    def __post_init__(self):
        one_of("loss.name", self.name, ("clip", "siglip"))
        one_of("loss.positives", self.positives, ("caption", "image", "group", "pair"))
        one_of("loss.duplicates", self.duplicates, ("share", "mask"))
        if self.positives == "group" and self.group is None:
            raise ValueError("loss.positives=group needs loss.group=COLUMN, the column of key.json that names it.")
        if self.positives != "group" and self.group is not None:
            raise ValueError(f"loss.group={self.group!r} would be ignored: it belongs to loss.positives=group.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be at least 0 and less than 1.")
        if self.label_smoothing and self.name != "clip":
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing} would be ignored: it belongs to loss.name=clip."
            )
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if self.temperature not in (None, "keep") and not (number and 0 < self.temperature < math.inf):
            raise ValueError(
                f"loss.temperature={self.temperature!r} must be null (learned), a number greater than 0, or keep."
            )
        if self.gather_dtype is not None:
            one_of("loss.gather_dtype", self.gather_dtype, ("bfloat16",))
        if self.positives == "pair" and self.duplicates == "mask":
            raise ValueError("loss.duplicates=mask would be ignored: under loss.positives=pair no pair has duplicates.")


@dataclass(kw_only=True)
class OptimConfig:
    name: str = ADAMW
    """adamw (fused), or an optimizer of timm: lion, lamb, adopt, muon, ..."""
    lr: float | None = None
    """Peak learning rate; null (adamw): 1e-5, or a tenth of what a run directory was trained with if that is more."""
    weight_decay: float = 0.1
    """Decay of parameters with two or more axes, as in open_clip; biases, gains and the scale have none."""
    beta1: float | None = None
    """Decay of the mean gradient; null: 0.9 for adamw, else the optimizer's own."""
    beta2: float | None = None
    """Decay of the squared gradient; null: 0.98 for adamw (CLIP, table 19), else the optimizer's own."""
    eps: float | None = None
    """Added to a denominator; null: 1e-6 for adamw (CLIP, table 19), else the optimizer's own."""
    momentum: float | None = None
    """Decay of the sum of gradients, for optimizers such as sgd and muon; null: timm's 0.9."""
    schedule: str = "cosine"
    """cosine (to zero) or constant, after the warm-up."""
    warmup_frac: float = 0.1
    """Share of the steps in which the rate rises linearly."""
    max_norm: float = 1.0
    """Clip of the gradient's global norm."""

    def __post_init__(self):
        self.name = self.name.lower()
        positive(optim__lr=self.lr, optim__eps=self.eps, optim__max_norm=self.max_norm)
        one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        for key in ("beta1", "beta2", "momentum", "warmup_frac"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optim.{key}={value} must be at least 0 and less than 1.")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay} must be 0 or more.")


@dataclass(kw_only=True)
class TrainConfig:
    batch_size: int = 256
    """Pairs in the global contrastive batch, over all devices: the only batch size that changes the result."""
    micro_batch: int | None = None
    """Pairs a device encodes at a time (memory only, the result is the same); null: as many as fit, tried at start."""
    compile: bool = False
    """Compile the blocks of both towers (torch.compile): faster steps after a minute or more of waiting for them."""
    epochs: int = 10
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many steps instead of after train.epochs."""
    patience: int | None = None
    """End the run when eval.select has not improved in so many validations in a row; null: never before its end."""
    ema: float | None = None
    """Decay of a moving average of the weights (0.999), which is what is validated, kept as best and exported."""
    seed: int = 0
    """Order, captions, augmentation and random weights follow from it."""
    batch_norm: str = "frozen"
    """BatchNorm statistics: frozen, or train (one device, one micro-batch: they depend on how a batch is cut)."""
    cache_features: bool = False
    """Make a locked tower's features once, on disk for all runs (equal to rounding); images need data.augment=none."""
    max_skipped: int = 10
    """Stop after this many steps in a row whose gradients were not finite; each of them is skipped."""
    max_time: str | None = None
    """Save and stop so long after the start ("23h", "50min"), as on SIGTERM; per trial under -m; null: no limit."""

    def __post_init__(self):
        if self.batch_size < 2:
            raise ValueError(f"train.batch_size={self.batch_size}: a contrastive batch needs at least 2 pairs.")
        positive(
            train__micro_batch=self.micro_batch,
            train__epochs=self.epochs,
            train__max_steps=self.max_steps,
            train__patience=self.patience,
            train__max_skipped=self.max_skipped,
        )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train.ema={self.ema} must be greater than 0 and less than 1.")
        one_of("train.batch_norm", self.batch_norm, ("frozen", "train"))
        limit = parse_every("train.max_time", self.max_time)
        if limit and limit.seconds is None:
            raise ValueError(f"train.max_time={self.max_time!r} must be a duration such as 50min or 23h.")
        if self.seed < 0:
            raise ValueError(f"train.seed={self.seed} must be 0 or more.")


@dataclass(kw_only=True)
class EvalConfig:
    every: Any = None
    """Steps (100) or a duration ("10min") between validations; null: once per epoch."""
    base: bool = True
    """Measure the model before the first step."""
    also: list[str] = field(default_factory=list)
    """More data sets to measure before and after: packed folders or names in data/."""
    relevance: str = "caption"
    """A caption counts for an image when it is its own or an equal text (caption), or only its own (pair)."""
    select: str = "mean_recall@1"
    """Validation metric that best.ckpt maximises: mean_recall@1 (of both directions), or one of the table's shares."""
    batch_size: int = 256
    """Images or texts encoded at a time."""

    def __post_init__(self):
        parse_every("eval.every", self.every)
        one_of("eval.relevance", self.relevance, ("caption", "pair"))
        one_of("eval.select", self.select, RECALLS + ZERO_SHOTS)
        positive(eval__batch_size=self.batch_size)


@dataclass(kw_only=True)
class CheckpointConfig:
    every: Any = "10min"
    """Steps (100) or a duration ("10min") between saved states."""
    keep: int = 2
    """Newest saved states that are kept, beside best."""

    def __post_init__(self):
        if parse_every("checkpoint.every", self.every) is None:
            raise ValueError("checkpoint.every=null: give a step count such as 100 or a duration such as 10min.")
        positive(checkpoint__keep=self.keep)


@dataclass(kw_only=True)
class TrainerConfig:
    accelerator: str = "auto"
    """auto (a GPU where there is one), cpu, gpu or mps."""
    devices: int = 1
    """Devices on this machine; each gets a process of its own (DDP)."""
    precision: str | None = None
    """Lightning's name, such as 32-true or bf16-mixed; null: bf16 on GPUs that have it, fp16 on others, fp32 on CPU."""
    dist_timeout_s: int = 600
    """Seconds after which a rank, or a bit sooner a loader process, that does not get any further ends the job."""

    def __post_init__(self):
        positive(trainer__devices=self.devices, trainer__dist_timeout_s=self.dist_timeout_s)
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "mps"))
        names = ("32-true", "bf16-mixed", "16-mixed", "64-true")  # weights in bf16 would lose most updates
        if self.precision is not None:
            one_of("trainer.precision", self.precision, names)


@dataclass(kw_only=True)
class Config:
    """What `clipft train` reads."""

    name: str | None = None
    """All of the run lies in runs/<name>/ (of a sweep: its trials); made from model and data when not given."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    resume: str = "auto"
    """auto: go on where an equal run stopped; force: also under a changed config; restart: move the old run away."""
    logger: str = "none"
    """none, wandb or tensorboard, beside metrics.csv and results.json."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self):
        one_of("resume", self.resume, ("auto", "force", "restart"))
        one_of("logger", self.logger, ("none", "wandb", "tensorboard"))
        if self.train.cache_features and all(rule["lr_mult"] for rule in self.tune.rules):
            raise ValueError(
                "train.cache_features=true would be ignored: no rule of tune.rules freezes anything (lr_mult: 0). Use "
                "tune=lit, or leave it out."
            )
        if self.train.cache_features and self.trainer.precision == "64-true":
            raise ValueError(
                "train.cache_features=true keeps features in 32 bits, and trainer.precision=64-true wants more. Leave "
                "one of them out."
            )


@dataclass(kw_only=True)
class GridConfig:
    """hydra.sweeper.* of a grid (`clipft train -m`): every combination of the values is a trial."""

    n_jobs: int | None = None
    """Trials side by side; null: as many as the GPUs are enough for, on a CPU one."""
    params: dict[str, str] = field(default_factory=dict)
    """What is swept, for a YAML file: {optim.lr: "1e-5,1e-4"} is optim.lr=1e-5,1e-4 on the command line."""

    def __post_init__(self):
        positive(hydra__sweeper__n_jobs=self.n_jobs)


@dataclass(kw_only=True)
class SearchConfig:
    """hydra.sweeper.* of a search (`clipft train -m hydra/sweeper=optuna`)."""

    n_trials: int = 20
    """Trials in all, with those of earlier starts of the same sweep."""
    n_jobs: int | None = None
    """Trials side by side; null: as many as the GPUs are enough for, on a CPU one."""
    sampler: str = "tpe"
    """tpe: learns from the trials so far (Bergstra et al. 2011); random."""
    pruner: str = "median"
    """median: a trial below the median of the finished ones at the same share of its steps is stopped; none."""
    n_startup_trials: int = 5
    """Trials that are drawn at random before tpe learns, and that are finished before any is pruned."""
    seed: int = 0
    """What is drawn follows from it and the trials before."""
    params: dict[str, str] = field(default_factory=dict)
    """What is swept, for a YAML file: {optim.lr: "tag(log, interval(1e-6, 1e-4))"}."""

    def __post_init__(self):
        one_of("hydra.sweeper.sampler", self.sampler, ("tpe", "random"))
        one_of("hydra.sweeper.pruner", self.pruner, ("median", "none"))
        positive(
            hydra__sweeper__n_trials=self.n_trials,
            hydra__sweeper__n_jobs=self.n_jobs,
            hydra__sweeper__n_startup_trials=self.n_startup_trials,
        )
        if self.seed < 0:
            raise ValueError(f"hydra.sweeper.seed={self.seed} must be 0 or more.")


def not_empty(**paths: str | None) -> None:
    """Raise for the first path that is given and blank, which would be the working directory."""
    for key, path in paths.items():
        if path is not None and not path.strip():
            raise ValueError(f"{key}={path!r} is empty. Give a path.")


def check_source(source: str | None, format: str | None) -> None:
    """Raise where no source can be read, whatever there is: for an empty name or a format that does not exist."""
    not_empty(source=source)
    if format is not None:
        one_of("format", format, SOURCE_FORMATS)


def refuse_training_options(model: ModelConfig) -> None:
    """Raise for an option of the model that only training sees."""
    for key in ("patch_dropout", "grad_checkpointing"):
        if value := getattr(model, key):
            raise ValueError(f"model.{key}={value} would be ignored: it belongs to training. Leave it out.")


@dataclass(kw_only=True)
class EvaluateConfig:
    """What `clipft evaluate` reads."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    split: str | None = None
    """train, val or test; null: test where there is one, else val."""
    relevance: str = "caption"
    """As eval.relevance."""
    batch_size: int = 256
    """Images or texts encoded at a time."""
    out: str | None = None
    """Also write the metrics to this JSON file."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self):
        refuse_training_options(self.model)
        one_of("relevance", self.relevance, ("caption", "pair"))
        positive(batch_size=self.batch_size)
        if self.split is not None:
            one_of("split", self.split, ("train", "val", "test"))


@dataclass(kw_only=True)
class ExportConfig:
    """What `clipft export` reads."""

    run: str
    """The run directory to export."""
    checkpoint: str = "best"
    """best, last, or a step number."""
    out: str | None = None
    """Folder to write; null: <run>/export."""

    def __post_init__(self):
        if self.checkpoint not in ("best", "last") and not self.checkpoint.isdigit():
            raise ValueError(f"checkpoint={self.checkpoint!r} must be best, last, or a step number.")


@dataclass(kw_only=True)
class ColumnsConfig:
    image: str | None = None
    """Column of the image's path, or of its bytes; null: found by its name, or by looking at the values."""
    caption: Any = None
    """Column of the captions, or a list of columns; null: found by its name; none: there are no captions."""
    label: str | None = None
    """Column of the class; null: found by its name; none: there are no labels."""
    split: str | None = None
    """Column of the split; null: found by its name; none: there are no splits."""

    def __post_init__(self):
        names = [self.caption] if isinstance(self.caption, str) else list(self.caption or [])
        if not all(isinstance(name, str) and name for name in names) or ("none" in names and names[1:]):
            raise ValueError(f"columns.caption={self.caption!r} must be a column, a list of columns, or none.")
        self.caption = names or None


@dataclass(kw_only=True)
class CsvConfig:
    delimiter: str | None = None
    """The sign between columns, tab for a tab; null: comma, tab, semicolon or bar, by looking."""
    quotes: bool | None = None
    """Whether a cell may stand in double quotes; false: they are letters like others; null: by looking."""
    encoding: str | None = None
    """Encoding such as latin-1 or cp1252; null: UTF-8, or UTF-16 where the file begins with its mark."""

    def __post_init__(self):
        self.delimiter = "\t" if self.delimiter in ("tab", "\\t") else self.delimiter
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(f"csv.delimiter={self.delimiter!r} must be one sign, or tab.")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError as error:
            raise ValueError(f"csv.encoding={self.encoding!r} is unknown. Use one such as utf-8 or cp1252.") from error


@dataclass(kw_only=True)
class DrawConfig:
    val: float | None = None
    """Share of the images drawn as val, out of train; null: none."""
    test: float | None = None
    """Share of the images drawn as test, out of train; null: none."""
    by: str = "image"
    """What stays on one side: image (identical or nearly), caption (also equal texts), a column (also its values)."""
    near: bool = True
    """Whether images that look the same count like identical ones; false: only identical files."""

    def __post_init__(self):
        for key, share in (("split.val", self.val), ("split.test", self.test)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{key}={share} must lie between 0 and 1, both excluded.")
        if (self.val or 0) + (self.test or 0) >= 1:
            raise ValueError(f"split.val={self.val} and split.test={self.test} leave nothing to train on.")
        if self.by != "image" and self.val is None and self.test is None:
            raise ValueError(f"split.by={self.by!r} would be ignored: it belongs to split.val and split.test.")


@dataclass(kw_only=True)
class ImageConfig:
    max_size: int | None = None
    """Images whose shorter side has more pixels are scaled down to it and stored as JPEG; null: bytes as they are."""
    quality: int | None = None
    """JPEG quality of the images that image.max_size scales down; null: 95."""

    def __post_init__(self):
        positive(image__max_size=self.max_size)
        if self.quality is not None and self.max_size is None:
            raise ValueError(f"image.quality={self.quality} would be ignored: it belongs to image.max_size.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"image.quality={self.quality} must lie between 1 and 100.")


@dataclass(kw_only=True)
class PackConfig:
    """What `clipft data pack` reads."""

    source: str
    """A folder, a table (CSV, TSV, JSONL, JSON, Parquet), a Hugging Face folder, or tars; known by looking."""
    out: str
    """Folder to write: <split>-<number>.tar, their indexes, shards.json, classnames.txt."""
    format: str | None = None
    """How to read the source: csv, jsonl, json, parquet, huggingface, tars, pairs or classes; null: by looking."""
    root: str | None = None
    """Folder that relative paths start from and no path may leave; null: the table's folder, links inside it only."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    csv: CsvConfig = field(default_factory=CsvConfig)
    split: DrawConfig = field(default_factory=DrawConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    captions_from_labels: bool = False
    """Give every labelled image without a caption one caption per template."""
    templates: Any = field(default_factory=lambda: ["a photo of a {c}."])
    """Prompts of a labelled set, {c} being the class; openai and simple: CLIP's 80 and 7 for ImageNet."""
    shard_samples: int = 1000
    """Most samples in one shard."""
    workers: int | None = None
    """Processes that read and write; the result is the same; null: one per core."""

    def __post_init__(self):
        positive(shard_samples=self.shard_samples)
        check_source(self.source, self.format)
        not_empty(out=self.out)
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 (this process alone) or more.")
        if isinstance(self.templates, str):
            one_of("templates", self.templates, ("openai", "simple"))
            return
        self.templates = [str(template).replace("{}", "{c}") for template in self.templates or []]
        if not self.templates or not all("{c}" in template for template in self.templates):
            raise ValueError(f"templates={self.templates!r}: every template must contain {{c}}, the class name.")


@dataclass(kw_only=True)
class IndexConfig:
    """What `clipft data index` reads."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True)
class VerifyConfig:
    """What `clipft data verify` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    decode: bool = True
    """Also decode every image and read its captions; false: only checksums, tar headers and stored indexes."""
    out: str | None = None
    """Also write every finding to this file: a line of JSON each, with key, reason, shard and byte."""


@dataclass(kw_only=True)
class CheckConfig:
    """What `clipft data check` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    source: str | None = None
    """In place of data: what `clipft data pack source=` takes, before it is packed."""
    format: str | None = None
    """As of `clipft data pack`."""
    root: str | None = None
    """As of `clipft data pack`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    csv: CsvConfig = field(default_factory=CsvConfig)
    model: ModelConfig
    batch_sizes: list[int] = field(default_factory=lambda: [64, 256, 1024, 4096])
    """Sizes of a batch for which the pairs are counted that belong together; larger ones than the set are left out."""
    out: str | None = None
    """Folder for report.html and findings.parquet; null: checks/NAME."""

    def __post_init__(self):
        refuse_training_options(self.model)
        check_source(self.source, self.format)
        not_empty(out=self.out)
        data = {name: getattr(self.data, name) for name in ("path", "train", "val", "test", "val_frac")}
        given = [name for name, value in data.items() if value]
        if self.source is not None and given:
            raise ValueError(f"source={self.source!r} and data.{given[0]} are two sets of data. Give one of them.")
        if self.source is not None and self.data.text_errors != "strict":
            raise ValueError("data.text_errors=replace would be ignored: packing reads captions strictly.")
        options = {
            "format": self.format,
            "root": self.root,
            **{f"columns.{name}": value for name, value in vars(self.columns).items()},
            **{f"csv.{name}": value for name, value in vars(self.csv).items()},
        }
        ignored = [name for name, value in options.items() if value is not None]
        if self.source is None and ignored:
            raise ValueError(f"{ignored[0]}={options[ignored[0]]!r} would be ignored: it belongs to source=.")
        if not self.batch_sizes or min(self.batch_sizes) < 2:
            raise ValueError(f"batch_sizes={list(self.batch_sizes)} must be whole numbers from 2 on.")
