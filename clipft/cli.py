"""The command line ends here: commands, Hydra's composition, exit codes. Neither torch nor open_clip is imported."""

import difflib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.arguments import (
    SWEEPER,
    SWEEPERS,
    check_sweeper,
    explain,
    group_names,
    is_multirun,
    options_of,
    split_flags,
    to_overrides,
)
from clipft.conf_files import conf_dirs, yaml_names
from clipft.config import (
    CheckConfig,
    Config,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    ModelConfig,
    PackConfig,
    VerifyConfig,
)
from clipft.data.remote.addresses import ALLOW_PIPE
from clipft.learn.stop import STOPPED
from clipft.model.listing import list_models
from clipft.model.names import architecture_names
from clipft.report import RunFailed
from clipft.rundir import load_config, save_config, settle

EXAMPLES = """\
python train.py                                        drawn toy pairs, tiny model, about two minutes on a CPU
python train.py model=ViT-B-32 data=mydata             fine-tune OpenAI's ViT-B-32 on data/mydata
python train.py model=ViT-B-32 data=mydata --cfg job   show the composed config and stop
python train.py model=ViT-L-14 model.pretrained=laion2b_s32b_b82k data=mydata train.batch_size=512 train.micro_batch=64
python train.py model=ViT-B-32 data=mydata trainer.devices=8 name=eight
python train.py model=runs/flickr8k data=emoji         fine-tune the best weights of an earlier run
python train.py model=ViT-B-32 'data.train="shards/{000..059}.tar"' data.val=shards/val logger=wandb
clipft data pack source=FOLDER out=data/mydata         images with captions or labels, in any usual form -> shards
clipft evaluate model=runs/emoji data=flickr8k         retrieval and zero-shot numbers
clipft export run=runs/emoji                           a folder that open_clip loads"""

SWEEPS = """\
Sweeps: -m trains with each of several values, in runs/<name>/0, 1, ...; the same command goes on where it stopped
python train.py -m optim.lr=1e-5,3e-5 train.batch_size=64,128        a grid: every combination
python train.py -m hydra/sweeper=optuna 'optim.lr=tag(log, interval(1e-6, 1e-4))' hydra.sweeper.n_trials=30
        a search, in interval(a, b), int(interval(a, b)), range(a, b, step), tag(log, interval(a, b)) or values"""

FOLDERS = {"data": ["FOLDER"]}  # what else may be named in the place of a group's file
MODELS = "models"
MODELS_DOC = "list the architectures with the tags of their weights; `clipft models WORD ...` those with the words"

PACKING = """\
What source= may be is found out by looking and said in the first line (data/README.md has more of it)
source=FOLDER                       images and metadata.jsonl or metadata.csv, or one table, or what save_to_disk wrote
source=FOLDER                       images with texts of the same name: 1.jpg, 1.txt (a caption per line) or 1.json
source=FOLDER                       a folder per class, below train/ val/ test/ where there are splits: train/cat/1.jpg
source=FOLDER                       WebDataset tars, also those of img2dataset
source=captions.csv root=IMAGES     CSV, TSV, JSONL, JSON (also COCO captions), Flickr's captions.txt or token.txt
source='data/*.parquet'             Parquet, with paths of images or the images themselves

clipft data pack source=photos out=data/mydata split.val=0.05            hold out images, look-alikes on one side
clipft data pack source=table.csv out=data/mydata columns.caption=title  say which of two columns it is
clipft data pack source=photos out=data/mydata image.max_size=512        scale large photos down
clipft data pack source=classes out=data/mydata captions_from_labels=true templates=openai"""

CHECKING = """\
Tables here, pictures in checks/NAME/report.html, a row per sample in checks/NAME/findings.parquet
clipft data check data=mydata                            a packed set, or any shards: data.train=... data.val=...
clipft data check source=FOLDER                          what data pack reads, before it is packed
clipft data check data=mydata model=ViT-L-14 model.context_length=32 'batch_sizes=[512,2048]'"""


@dataclass(frozen=True)
class Command:
    schema: type
    conf: str
    """Primary config in conf/; its schema is stored as <conf>_schema."""
    job: Callable[[Any], int]
    doc: str
    more: str = EXAMPLES
    """What its help shows before the options."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 failed, 2 unusable config or data, 130 and 143 stopped by a signal with state saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == [MODELS] and not {"-h", "--help"} & set(arguments):
            print(list_models(arguments[1:]))
            return 0
        name, rest = split_command(arguments)
        if name is None or {"-h", "--help"} & set(rest):
            print(help_text(name))
            return 0
        return compose(COMMANDS[name], heed_pipes(rest, COMMANDS[name].schema))
    except (ValueError, OSError, RunFailed) as error:
        if os.environ.get("CLIPFT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunFailed) else 2


def heed_pipes(arguments: list[str], schema: type) -> list[str]:
    """Lets this process and those that it starts run the commands of pipe: sources where the command line says so.

    Returns the arguments, without that word for a command whose data are those of a run (export).
    """
    os.environ.pop(ALLOW_PIPE, None)
    word = "data.allow_pipe=true"
    if word in (argument.lower() for argument in arguments):
        os.environ[ALLOW_PIPE] = "1"
    if schema is ExportConfig:
        return [argument for argument in arguments if argument.lower() != word]
    return arguments


def refuse_pipes_from_files(config: Any) -> None:
    """Raises where a file, and not the command line, allows commands: a config that comes with data could do so."""
    data = getattr(config, "data", None)
    if data is not None and data.allow_pipe and ALLOW_PIPE not in os.environ:
        raise ValueError(
            "data.allow_pipe=true stands in a YAML file, where it is not heard. If the commands are yours, write "
            "data.allow_pipe=true on the command line."
        )


def split_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command's name (None: only help is wanted) and its arguments."""
    if (
        not arguments
        or arguments[0] in ("-h", "--help", MODELS)
        or (arguments[1:2] == ["--help"] and arguments[0] == "data")
    ):
        return None, []
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, arguments[words:]
    near = difflib.get_close_matches(" ".join(arguments[:2]), COMMANDS, n=1, cutoff=0.3)
    hint = f" Did you mean clipft {near[0]}?" if near else ""
    raise ValueError(f"{arguments[0]!r} is no command. There are: {', '.join([*COMMANDS, MODELS])}.{hint}")


def help_text(name: str | None) -> str:
    docs = {each: command.doc for each, command in COMMANDS.items()} | {MODELS: MODELS_DOC}
    commands = "\n".join(f"  clipft {each:<11} {doc}" for each, doc in docs.items())
    command = COMMANDS[name or "train"]
    examples = f"Examples\n{EXAMPLES}" if command.more == EXAMPLES else command.more
    text = f"clipft fine-tunes CLIP on your own image-text pairs.\n\n{commands}\n\n{examples}\n\n"
    groups = [group for group in group_names(option.key for option in options_of(command.schema)) if group != "model"]
    shown = [f"{group}={'|'.join([*yaml_names(group), *FOLDERS.get(group, [])])}" for group in groups]
    text += f"Groups: {'  '.join(shown)}\n" if shown else ""
    text += f"Options of clipft {name or 'train'}, written key=value (type, default)\n{options_text(command.schema)}"
    if command.schema is not Config:
        return text
    sweepers = [f"Options of hydra/sweeper={each}\n{options_text(SWEEPERS[each], SWEEPER)}" for each in SWEEPERS]
    return "\n\n".join([text, SWEEPS, *sweepers])


def options_text(schema: type, prefix: str = "") -> str:
    options = list(options_of(schema, prefix))
    width = max(len(option.key) for option in options)
    return "\n".join(f"  {option.key:<{width}}  {option.doc} ({option.type}, {option.default})" for option in options)


def compose(command: Command, arguments: list[str]) -> int:
    """Composes the config with Hydra and runs the command's job on it, once or, under -m, for each of several."""
    overrides = to_overrides(arguments, command.schema)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if command.schema is Config and is_multirun(arguments):
        return sweep(arguments, overrides)
    codes: list[int] = []
    errors: list[Exception] = []

    def job(node: Any) -> None:
        try:
            config = OmegaConf.to_object(node)
            refuse_pipes_from_files(config)
            codes.append(command.job(config))
        except (ValueError, OSError, RunFailed, OmegaConfBaseException) as error:  # Hydra would print its own text too
            errors.append(error)
        if codes and codes[-1] in STOPPED:
            raise KeyboardInterrupt  # what would come after it does not start either

    with tempfile.TemporaryDirectory(prefix="clipft-") as folder:
        # Where Hydra writes a file under -m.
        overrides += [f"hydra.sweep.dir={folder}"] if is_multirun(arguments) else []
        try:
            run_hydra(command, overrides, job)
        except KeyboardInterrupt:
            return codes[-1] if codes else 130
    for error in errors:
        if isinstance(error, OSError | RunFailed):
            raise error
        raise ValueError(explain(error)) from error
    return max(codes, default=0)


def sweep(arguments: list[str], overrides: list[str]) -> int:
    """Runs the trials of `clipft train -m`."""
    from clipft.launch import is_rank

    if is_rank():
        raise ValueError("-m starts the processes of its trials itself. Start it without torchrun.")
    check_sweeper(arguments)
    from clipft.sweep.launched import SweepTask

    task = SweepTask(sys.argv[0], arguments)
    try:
        run_hydra(COMMANDS["train"], overrides, task)
    except KeyboardInterrupt:
        return 130
    return task.code


def run_hydra(command: Command, overrides: list[str], job: Callable[[Any], Any]) -> None:
    """Lets Hydra read the overrides and call the job; its errors get our form."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register(command)
    flags, rest = split_flags(overrides)  # in this order, because argparse loses overrides that come before flags
    before, sys.argv = sys.argv, ["clipft", *flags, *rest]
    try:
        hydra.main(config_path=str(conf_dirs()[-1]), config_name=command.conf, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    finally:
        sys.argv = before


def register(command: Command) -> None:
    """Tells Hydra the schema, the architectures that have no YAML of their own, and the user's conf folder."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from clipft.sweep.sweeper import register_sweepers

    store = ConfigStore.instance()
    store.store(name=f"{command.conf}_schema", node=command.schema)
    curated = set(yaml_names("model"))
    for name in architecture_names():
        if name not in curated:
            store.store(group="model", name=name, node={"name": name})

    class UserConf(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in conf_dirs()[:-1]:
                search_path.prepend(provider="working-directory", path=f"file://{folder}")

    Plugins.instance().register(UserConf)
    if command.schema is Config:
        register_sweepers()


def train(config: Config) -> int:
    from clipft.launch import is_rank, launch

    if is_rank():
        from clipft.rank import train_under_torchrun

        return train_under_torchrun(config, prepare)
    folder = prepare(config)
    return launch("train", folder / "config.yaml", config.trainer.devices) if folder else 0


def prepare(config: Config) -> Path | None:
    """The run's folder with the config that its ranks read, None if it is finished; raises for what cannot work."""
    from clipft.plan import resolve

    folder = settle(resolve(config))
    if folder.state == "finished":
        print(f"{folder.path} is finished. Use resume=restart to run it again, or another name=.")
        return None
    return folder.path


def evaluate(config: EvaluateConfig) -> int:
    from clipft.data.split import find_shards
    from clipft.launch import is_rank
    from clipft.model.check import check_model, check_reachable
    from clipft.plan import make_toy_data
    from clipft.rank import evaluate_under_torchrun

    make_toy_data(config.data)
    check_model(config.model)
    find_shards(config.data)
    check_reachable(config.model)
    if is_rank():
        return evaluate_under_torchrun(config)
    return launch_from_file("evaluate", config, config.trainer.devices)


def export(config: ExportConfig) -> int:
    from clipft.data.split import find_shards
    from clipft.model.check import check_model
    from clipft.model.sources import kind_of_path

    if kind_of_path(config.run) != "run":
        raise ValueError(f"run={config.run!r} is no run directory (with config.yaml and checkpoints/).")
    check_model(ModelConfig(name=f"local-dir:{config.run}", pretrained=None, checkpoint=config.checkpoint))
    find_shards(load_config(Path(config.run) / "config.yaml", Config).data)
    return launch_from_file("export", config, devices=1)


def launch_from_file(command: str, config: Any, devices: int) -> int:
    from clipft.launch import launch

    with tempfile.TemporaryDirectory(prefix="clipft-") as folder:
        save_config(Path(folder) / "config.yaml", config)
        return launch(command, Path(folder) / "config.yaml", devices)


def pack(config: PackConfig) -> int:
    from clipft.data import pack as module

    print(module.describe(module.pack(config)))
    return 0


def index(config: IndexConfig) -> int:
    from clipft.data import indexing
    from clipft.plan import make_toy_data

    make_toy_data(config.data)
    print(indexing.describe(indexing.index(config.data)))
    return 0


def verify(config: VerifyConfig) -> int:
    from clipft.data import verify as module
    from clipft.plan import make_toy_data

    make_toy_data(config.data)
    report = module.verify(config)
    print(module.describe(report), flush=True)
    module.refuse(report, config.data.max_bad_frac)
    return 0


def check(config: CheckConfig) -> int:
    from clipft.data.check import run as module
    from clipft.model.tokens import reader_of
    from clipft.plan import make_toy_data

    reader = reader_of(config.model)
    make_toy_data(config.data)
    report = module.check(config, reader)
    print(report.text, flush=True)
    module.refuse(report)
    return 0


COMMANDS = {
    "train": Command(Config, "train", train, "fine-tune a model; what train.py runs"),
    "evaluate": Command(EvaluateConfig, "evaluate", evaluate, "measure a model on a data set"),
    "export": Command(ExportConfig, "export", export, "write a run's weights as files that open_clip loads"),
    "data pack": Command(PackConfig, "pack", pack, "write WebDataset shards from what you have", PACKING),
    "data index": Command(IndexConfig, "index", index, "find out what shards hold, before a run needs to know"),
    "data check": Command(
        CheckConfig, "check", check, "look at a data set: repeats, leaks, cut captions, odd images", CHECKING
    ),
    "data verify": Command(VerifyConfig, "verify", verify, "read a data set whole: is it as it was written"),
}
