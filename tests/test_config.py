"""Every YAML composes, and every option does something."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_config, make_data, make_world, outcome, train_here

from clipft import fit, ranks
from clipft.arguments import options_of
from clipft.cli import main
from clipft.config import (
    CheckConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GridConfig,
    IndexConfig,
    PackConfig,
    SearchConfig,
    TrainerConfig,
    VerifyConfig,
    num_bytes,
    parse_every,
)
from clipft.data.split import load_splits
from clipft.report import RunFailed

ROOT = Path(__file__).parent.parent
GROUPS = ("model", "data", "tune", "experiment")


@pytest.mark.parametrize(
    "path", sorted(p for g in GROUPS for p in (ROOT / "conf" / g).glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_yaml_composes(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [f"{path.parent.name}={path.stem}"]
    if path.parent.name in ("model", "data"):
        arguments += [a for a in ("model=tiny", "data=toy") if not a.startswith(path.parent.name)]
    assert main(["train", *arguments, "--cfg", "job"]) == 0
    assert "batch_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, steps, seconds",
    [("100", 100, None), (7, 7, None), ("10min", None, 600), ("1.5h", None, 5400), ("90s", None, 90)],
)
def test_intervals_are_steps_or_durations(text, steps, seconds):
    every = parse_every("eval.every", text)
    assert every is not None and (every.steps, every.seconds) == (steps, seconds)


# Every option of `train` stands in one of these tables.
# 1. Changed alone, it changes what a run of six steps leaves.
CHANGES = [
    "model.image_size=24",
    "model.context_length=10",
    "model.patch_dropout=0.5",
    "data.name=other",
    "data.train={data}/train-00000.tar",
    "data.val={data}/test-00000.tar",
    "data.test={data}/val-00000.tar",
    "data.captions=all",
    "data.lanes=2",
    "data.augment=none",
    "data.crop_min=0.3",
    "data.affine_degrees=30",
    "data.flip_prob=1.0",
    "tune.rules=[{{match: image, lr_mult: 0}}, {{match: '*'}}]",
    "tune.layer_decay.image=0.5",
    "tune.layer_decay.text=0.5",
    "loss.name=siglip",
    "loss.positives=pair",
    "loss.duplicates=mask",
    "loss.label_smoothing=0.1",
    "loss.temperature=0.05",
    "loss.gather_dtype=bfloat16",
    "optim.name=lion",
    "optim.lr=0.02",
    "optim.weight_decay=0.5",
    "optim.beta1=0.5",
    "optim.beta2=0.5",
    "optim.eps=0.01",
    "optim.schedule=constant",
    "optim.warmup_frac=0.5",
    "optim.max_norm=0.01",
    "train.batch_size=6",
    "train.max_steps=4",
    "train.ema=0.5",
    "train.seed=1",
    "eval.every=3",
    "eval.base=false",
    "eval.also=[{data}]",
    "eval.relevance=pair",
    "eval.select=text_to_image_recall@10",
    "checkpoint.every=1",
    "checkpoint.keep=1",
    "trainer.precision=bf16-mixed",
    "logger=tensorboard",
]
# 2. A value that cannot work is refused with the key in the message.
REFUSED = [
    "resume=never",
    "logger=mlflow",
    "model.name=tiney",
    "model.pretrained=openai",
    "model.checkpoint=first",
    "model.image_size=0",
    "model.context_length=0",
    "model.patch_dropout=1",
    "data.path=nowhere",
    "data.train=nowhere",
    "data.val_frac=1.5",
    "data.captions=some",
    "data.lanes=0",
    "data.window_shards=4",
    "data.text_errors=ignore",
    "data.augment=wild",
    "data.crop_min=2",
    "data.affine_degrees=-1",
    "data.flip_prob=2",
    "data.workers=-1",
    "data.max_pixels=0",
    "data.max_bad_frac=2",
    "data.cache_size=many",
    "tune.rules=[]",
    "tune.blocks=2",
    "tune.layer_decay.image=2",
    "tune.layer_decay.text=0",
    "loss.name=clap",
    "loss.positives=all",
    "loss.group=colour",
    "loss.duplicates=drop",
    "loss.label_smoothing=1",
    "loss.temperature=0",
    "loss.temperature=warm",
    "loss.gather_dtype=float16",
    "optim.name=lyon",
    "optim.momentum=0.9",
    "optim.lr=0",
    "optim.beta1=1",
    "optim.max_norm=0",
    "optim.warmup_frac=1",
    "train.batch_size=41",
    "train.micro_batch=0",
    "train.epochs=0",
    "train.max_steps=0",
    "train.patience=0",
    "train.ema=1",
    "train.seed=-1",
    "train.batch_norm=melted",
    "train.cache_features=true",
    "train.max_skipped=0",
    "train.max_time=100",
    "eval.every=often",
    "eval.select=text_to_image_median_rank",
    "eval.batch_size=0",
    "checkpoint.every=0",
    "checkpoint.keep=0",
    "trainer.accelerator=warp",
    "trainer.devices=0",
    "trainer.precision=half",
    "trainer.dist_timeout_s=0",
]
# 3. Tests of their own, by name, anywhere in tests/.
ELSEWHERE = {
    "name": "test_a_run_without_name_is_called_after_model_and_data_and_numbered",
    "runs_dir": "test_a_run_without_name_is_called_after_model_and_data_and_numbered",
    "resume": "test_restart_moves_the_old_run_away_first",
    "model.name": "test_a_base_run_is_measured_again_on_its_own_data",
    "model.pretrained": "test_every_curated_model_has_an_existing_name_and_tag",
    "model.checkpoint": "test_a_run_directory_gives_back_weights_activation_and_preprocessing",
    "model.grad_checkpointing": "test_memory_settings_leave_the_result",
    "data.path": "test_a_run_leaves_what_it_promises",
    "data.val_frac": "test_the_share_that_is_held_out_is_the_one_asked_for",
    "data.workers": "test_loader_processes_are_as_many_as_asked_for",
    "data.max_pixels": "test_limits_on_samples_reach_the_run",
    "data.max_bad_frac": "test_limits_on_samples_reach_the_run",
    "data.cache_dir": "test_two_ranks_with_a_cache_smaller_than_the_set_get_the_batches_of_local_files",
    "data.cache_size": "test_a_cache_smaller_than_what_is_needed_at_once_is_refused_with_the_sizes",
    "data.allow_pipe": "test_commands_are_refused_unless_the_command_line_allows_them",
    "data.text_errors": "test_captions_that_are_not_utf8_are_dropped_or_repaired_as_the_config_says",
    "data.window_shards": "test_lanes_read_by_shard_and_say_what_that_costs",
    "tune.blocks": "test_the_presets_train_what_they_say",
    "loss.group": "test_a_group_that_no_sample_names_is_refused",
    "optim.momentum": "test_adamw_has_clips_settings_and_the_others_their_own",
    "train.micro_batch": "test_two_ranks_with_micro_batches_train_the_model_of_one",
    "train.compile": "test_a_run_with_compiled_blocks_is_like_one_without_also_where_it_goes_on",
    "train.batch_norm": "test_batch_norm_moves_only_where_it_is_asked_to",
    "train.cache_features": "test_nothing_is_decoded_or_encoded_twice",
    "train.max_skipped": "test_a_step_that_is_left_out_names_its_samples_and_too_many_in_a_row_end_the_run",
    "train.patience": "test_a_run_ends_when_validations_do_not_improve_also_after_kills_and_on_two_ranks",
    "train.max_time": "test_a_run_out_of_time_saves_and_goes_on_later",
    "train.epochs": "test_epochs_count_the_steps",
    "eval.batch_size": "test_memory_settings_leave_the_result",
    "trainer.accelerator": "test_an_accelerator_that_is_not_there_is_refused",
    "trainer.devices": "test_a_run_on_two_devices_outlives_neither_its_supervisor_nor_its_result",
    "trainer.dist_timeout_s": "test_ranks_wait_for_each_other_as_long_as_the_config_says",
}


def key_of(override: str) -> str:
    return override.split("=")[0]


def test_every_option_is_in_one_of_the_tables():
    keys = {option.key for option in options_of(Config)}
    assert keys == {key_of(each) for each in CHANGES} | set(ELSEWHERE)
    assert {key_of(each) for each in REFUSED} <= keys
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert all(f"def {name}" in tests for name in ELSEWHERE.values())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, Any]:
    return outcome(train_here(make_config(root, "name=plain"))[1])


@pytest.mark.process
@pytest.mark.parametrize("override", CHANGES)
def test_an_option_changes_the_result(root, plain, override):
    name = f"name={key_of(override)}"
    code, path = train_here(make_config(root, override.format(data=root / "data" / "packed"), name))
    assert code == 0 and outcome(path) != plain


@pytest.mark.process
def test_limits_on_samples_reach_the_run(root):
    """Pictures are 24 x 20 pixels; a limit below that drops every one."""
    with pytest.raises(ValueError, match="none of its 12 images could be decoded"):
        train_here(make_config(root, "name=pixels", "data.max_pixels=400"))
    data = make_data(root / "spoiled", damaged=4)
    few = make_config(
        root, f"data.path={data}", "name=spoiled", "train.max_steps=30", "eval.every=30", "eval.base=false"
    )
    with pytest.raises(RunFailed, match=r"more than data\.max_bad_frac=0\.05"):
        train_here(few)
    many = replace(few, name="allowed", data=replace(few.data, max_bad_frac=0.2))
    assert train_here(many)[0] == 0


@pytest.mark.process
def test_loader_processes_are_as_many_as_asked_for(root, monkeypatch):
    asked = []
    build = fit.train_loader

    def watched(samples, **options):
        asked.append(options["workers"])
        return build(samples, **options)

    monkeypatch.setattr(fit, "train_loader", watched)
    for number in (0, 1):
        train_here(make_config(root, f"data.workers={number}", "train.max_steps=1", f"name=workers-{number}"))
    assert asked == [0, 1]


def test_ranks_wait_for_each_other_as_long_as_the_config_says(monkeypatch):
    seen = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, timeout: seen.update(timeout=timeout))
    with ranks.joined(TrainerConfig(accelerator="cpu", dist_timeout_s=17)):
        assert seen["timeout"].total_seconds() == 17


def test_the_share_that_is_held_out_is_the_one_asked_for(packed):
    for frac, held_out in ((None, 2), (0.25, 10)):
        splits = load_splits(DataConfig(train=str(packed / "train-*.tar"), val_frac=frac))
        assert splits.val is not None and splits.train is not None
        assert (len(splits.val), len(splits.train)) == (held_out, 40 - held_out)
    with pytest.raises(ValueError, match=r"data\.val_frac=0\.1 would be ignored"):
        load_splits(DataConfig(path=str(packed), val_frac=0.1))


@pytest.mark.process
def test_epochs_count_the_steps(root):
    one, two = (
        outcome(train_here(make_config(root, "train.max_steps=null", f"train.epochs={n}", f"name=epochs-{n}"))[1])
        for n in (1, 2)
    )
    assert (len(one["rows"]), len(two["rows"])) == (5, 10)


@pytest.mark.process
@pytest.mark.parametrize(
    "free", ["train.micro_batch=3", "data.workers=1", "eval.batch_size=5", "model.grad_checkpointing=true"]
)
def test_memory_settings_leave_the_result(root, plain, free):
    found = outcome(train_here(make_config(root, free, f"name={key_of(free)}"))[1])
    for ours, theirs in zip(found["rows"], plain["rows"], strict=True):
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("override", REFUSED)
def test_a_value_that_cannot_work_is_refused_by_name(tmp_path, packed, override, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rest = [f"data.path={packed}", "model.name=tiny", "model.pretrained=null"]
    rest = [each for each in rest if key_of(each) != key_of(override)]
    assert main(["train", override, *rest]) == 2
    assert key_of(override) in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_an_accelerator_that_is_not_there_is_refused():
    from clipft.ranks import choose_device

    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in [name for name, available in there.items() if not available]:
        with pytest.raises(ValueError, match=r"trainer\.accelerator"):
            choose_device(name, 0)


PACKING = {
    "source": "test_captions_and_splits_are_those_of_the_set_whatever_its_form",
    "out": "test_packing_twice_gives_the_same_bytes_and_changes_nothing",
    "format": "test_few_texts_among_images_in_folders_are_not_decided_by_clipft",
    "root": "test_a_root_that_the_user_names_may_be_wider",
    "columns.image": "test_the_user_decides",
    "columns.caption": "test_the_user_decides",
    "columns.label": "test_the_user_decides",
    "columns.split": "test_the_user_decides",
    "csv.delimiter": "test_the_user_overrides_what_was_found",
    "csv.quotes": "test_the_user_overrides_what_was_found",
    "csv.encoding": "test_marks_tell_the_encoding_and_the_user_tells_others",
    "split.val": "test_the_shares_are_those_asked_for",
    "split.test": "test_the_shares_are_those_asked_for",
    "split.by": "test_by_caption_equal_texts_stay_together_too",
    "split.near": "test_images_that_look_the_same_stay_together_unless_the_user_says_no",
    "image.max_size": "test_larger_images_are_scaled_to_the_shorter_side_and_others_keep_their_bytes",
    "image.quality": "test_a_scaled_image_is_upright_and_lower_quality_is_smaller",
    "captions_from_labels": "test_labels_become_captions_by_templates_where_there_are_none",
    "templates": "test_labels_become_captions_by_templates_where_there_are_none",
    "shard_samples": "test_shards_are_balanced_and_keep_the_order_of_the_rows",
    "workers": "test_the_number_of_processes_changes_no_byte",
}


def test_the_other_commands_have_no_option_without_a_test():
    """Their options are read in tests/test_commands.py, data/test_verify.py and data/test_data_check.py; this list has
    to grow with them."""
    assert {option.key for option in options_of(ExportConfig)} == {"run", "checkpoint", "out"}
    assert {option.key for option in options_of(PackConfig)} == set(PACKING)
    tests = "".join(path.read_text() for path in (Path(__file__).parent / "data").rglob("test_*.py"))
    assert all(f"def {name}" in tests for name in PACKING.values())
    assert {option.key for option in options_of(VerifyConfig) if "." not in option.key} == {"decode", "out"}
    reading = {key for key in PACKING if key in ("source", "format", "root") or key.startswith(("columns.", "csv."))}
    own = {option.key for option in options_of(CheckConfig) if not option.key.startswith(("data.", "model."))}
    assert own == reading | {"batch_sizes", "out"}
    sweep = {"n_trials", "n_jobs", "sampler", "pruner", "n_startup_trials", "seed", "params"}  # tests/sweep
    assert {option.key for option in options_of(SearchConfig)} == sweep
    assert {option.key for option in options_of(GridConfig)} == {"n_jobs", "params"}
    own = {option.key for option in options_of(EvaluateConfig) if "." not in option.key}
    assert own == {"split", "relevance", "batch_size", "out"}


@pytest.mark.parametrize(
    ("text", "number"), [("500MB", 5e8), ("1.5 GB", 1.5e9), ("2TB", 2e12), ("20kB", 2e4), (1234, 1234), ("7G", 7e9)]
)
def test_sizes_are_numbers_of_bytes_with_their_units(text, number):
    assert num_bytes("data.cache_size", text) == number


def test_the_index_command_reads_the_options_of_the_data_alone():
    assert {option.key.split(".")[0] for option in options_of(IndexConfig)} == {"data"}
