"""The YAML files: where they lie, what they are called."""

from pathlib import Path

from omegaconf import OmegaConf

from clipft.config import DataConfig


def conf_dirs() -> list[Path]:
    """Folders with YAML files: the working directory's conf first, then the one of this installation."""
    here = Path(__file__).parent
    shipped = here / "conf" if (here / "conf").is_dir() else here.parent / "conf"  # a wheel, a checkout
    own = Path.cwd() / "conf"
    return [own, shipped] if own.is_dir() and own.resolve() != shipped.resolve() else [shipped]


def yaml_names(group: str) -> list[str]:
    """Names of the group's YAML files."""
    return sorted({path.stem for folder in conf_dirs() for path in (folder / group).glob("*.yaml")})


def named_data(name: str) -> DataConfig:
    """The data of conf/data/NAME.yaml, of the packed folder data/NAME, or of the folder at that path or address."""
    for folder in conf_dirs():
        if (folder / "data" / f"{name}.yaml").is_file():
            config = OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(folder / "data" / f"{name}.yaml"))
            )
            assert isinstance(config, DataConfig)
            return config
    if "://" in name:
        return DataConfig(path=name)
    path = data_folder(name)
    return DataConfig(name=path.resolve().name, path=str(path))


def data_folder(name: str) -> Path:
    """Where data=NAME lies when it is no YAML file: the path itself, else the folder data/NAME."""
    return Path(name) if Path(name).is_dir() else Path("data") / name


def default_tag(architecture: str) -> str | None:
    """The weights that conf/model/ARCHITECTURE.yaml names; ValueError where there is no such file."""
    for folder in conf_dirs():
        file = folder / "model" / f"{architecture}.yaml"
        if file.is_file():
            return OmegaConf.load(file).pretrained
    raise ValueError(
        f"{architecture} has no default weights. Give pretrained=TAG, or pretrained=None for random weights."
    )
