"""Configuration: precedence, types and bounds, messages, the resolved file, and help."""

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectitan.config import checks, sections
from spectitan.config.keys import keys_of, toml_value
from spectitan.config.manager import load
from spectitan.config.sections import key
from spectitan.config.tables import Config
from spectitan.errors import UserError
from spectitan.speculators.registry import SPECULATOR_CONFIGS


@dataclass
class Alpha:
    heads: int = key(3, "number of heads", minimum=1)
    scale: float = key(0.5, "scale of the input", above=0)
    tied: bool = key(True, "one weight for all")
    dims: list[int] = key([16, 8], "widths", minimum=1)
    levels: int | str = key(-1, "width, or widths of levels", minimum=-1)


@dataclass
class Beta:
    layers: list[str] = key(["first"], "names of layers")


FAMILIES = {"alpha": Alpha, "beta": Beta}
TRAINED = ["--data.path", "texts", "--base.path", "base"]
NEEDED = [*TRAINED, "--training.num_steps", "10", "--speculator.type", "alpha"]


def loaded(*flags: str, program: str = "train") -> Config:
    return load([*NEEDED, *flags], program, FAMILIES)


def message(*flags: str, program: str = "train", needed: list[str] = NEEDED) -> str:
    with pytest.raises(UserError) as error:
        load([*needed, *flags], program, FAMILIES)
    assert "\n" not in str(error.value)
    return str(error.value)


def all_keys(family: type = Alpha) -> list:
    tables = typing.get_type_hints(Config)
    own = list(keys_of("speculator", family).values())
    return [key for table, section in tables.items() for key in keys_of(table, section).values()] + own


@pytest.fixture
def toml_file(tmp_path):
    def write(text: str | bytes, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_flag_wins_over_file_and_file_over_default(toml_file):
    path = toml_file('[training]\nnum_steps = 7\nmicro_batch_size = 3\n[speculator]\ntype = "beta"\nlayers = ["a", "b"]')
    config = load(["--base.path=b", "--training.num_steps", "9", "--job.config_file", path, "--data.path", "d"], "train", FAMILIES)
    assert (config.training.num_steps, config.training.micro_batch_size, config.data.seq_length) == (9, 3, 2048)
    assert (config.speculator.type, config.speculator.layers, config.speculator.path) == ("beta", ["a", "b"], "")
    assert isinstance(config.speculator, Beta) and isinstance(config.speculator, sections.SpeculatorSelection)
    assert config.job.config_file == path


def test_family_comes_from_flag_then_file_then_default(toml_file):
    path = toml_file('[speculator]\ntype = "beta"')
    common = ["--base.path", "b", "--data.path", "d", "--training.num_steps", "1", "--job.config_file", path]
    assert isinstance(load([*common, "--speculator.type", "alpha"], "train", FAMILIES).speculator, Alpha)
    assert isinstance(load(common, "train", FAMILIES).speculator, Beta)
    assert isinstance(load(["--base.path", "b"], "evaluate", {"mlp": Alpha}).speculator, Alpha)  # the default is "mlp"
    alone = load([*common, "--speculator.type=none", "--base.freeze=false"], "train", FAMILIES)
    assert [field.name for field in dataclasses.fields(alone.speculator)] == ["type", "path"]


@pytest.mark.parametrize(
    "flags, table, name, value",
    [
        (["--training.num_steps", "-1", "--training.epochs", "2"], "training", "num_steps", -1),
        (["--training.epochs=-1"], "training", "epochs", -1.0),
        (["--optimizer.lr=3"], "optimizer", "lr", 3.0),
        (["--optimizer.lr", "1e-3"], "optimizer", "lr", 0.001),
        (["--data.datasets", "a,b", "--data.weights", "0.5, 1"], "data", "weights", [0.5, 1.0]),
        (["--data.datasets="], "data", "datasets", []),
        (["--metrics.loggers", ""], "metrics", "loggers", []),
        (["--speculator.dims", "4"], "speculator", "dims", [4]),
        (["--speculator.levels", "-1"], "speculator", "levels", -1),
        (["--speculator.levels", "4.40"], "speculator", "levels", "4.40"),
        (["--job.deterministic"], "job", "deterministic", True),
        (["--job.deterministic", "--job.seed", "1"], "job", "deterministic", True),
        (["--job.deterministic", "False"], "job", "deterministic", False),
        (["--speculator.tied=false"], "speculator", "tied", False),
        (["--compile.enabled", "true"], "compile", "enabled", "true"),
        (["--generate.prompt", "a = b, c == d"], "generate", "prompt", "a = b, c == d"),
        (["--generate.prompt=--x=1"], "generate", "prompt", "--x=1"),
        (["--generate.prompt", "-x"], "generate", "prompt", "-x"),
        (["--generate.prompt="], "generate", "prompt", ""),
        (["--job.seed", "1", "--job.seed", "2"], "job", "seed", 2),
        (["--job.seed", str(2**63 - 1)], "job", "seed", 2**63 - 1),
        (["--job.dump_folder=~/runs/a"], "job", "dump_folder", str(Path.home() / "runs" / "a")),
        (["--checkpoint.folder=s3://~/b"], "checkpoint", "folder", "s3://~/b"),
    ],
)
def test_flags(flags, table, name, value):
    found = getattr(getattr(loaded(*flags), table), name)
    assert found == value and type(found) is type(value)
    assert [type(item) for item in found] == [type(item) for item in value] if isinstance(value, list) else True


@pytest.mark.parametrize(
    "text, table, name, value",
    [
        ("[optimizer]\nlr = 3", "optimizer", "lr", 3.0),
        ("[compile]\nenabled = false", "compile", "enabled", "false"),
        ("[optimizer]\nbetas = [0, 0.5]", "optimizer", "betas", [0.0, 0.5]),
        ("optimizer.eps = 1e-300", "optimizer", "eps", 1e-300),
        ("[speculator]\nlevels = 1024", "speculator", "levels", 1024),
        ('[speculator]\nlevels = "1024"', "speculator", "levels", 1024),
        ('[speculator]\nlevels = "1024.2048"', "speculator", "levels", "1024.2048"),
        ("[generate]\nprompt = '''two\nlines'''", "generate", "prompt", "two\nlines"),
        ('[export]\npath = "~/e"', "export", "path", str(Path.home() / "e")),
    ],
)
def test_file_values(toml_file, text, table, name, value):
    found = getattr(getattr(loaded("--job.config_file", toml_file(text)), table), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--training.micro_batch_size", "0"], ["training.micro_batch_size = 0", "an integer, at least 1"]),
        (["--training.micro_batch_size", "2.5"], ['= "2.5"', "an integer"]),
        (["--training.num_steps", "-2"], ["training.num_steps = -2", "at least -1"]),
        (["--training.num_steps", "many"], ['training.num_steps = "many"']),
        (["--training.num_steps"], ["--training.num_steps needs a value", "an integer"]),
        (["--training.num_steps", "--job.seed", "1"], ["--training.num_steps needs a value"]),
        (["--optimizer.lr", "nan"], ["optimizer.lr = nan", "a number, above 0"]),
        (["--optimizer.lr", "0"], ["optimizer.lr = 0.0", "above 0"]),
        (["--training.max_grad_norm", "inf"], ["training.max_grad_norm = inf"]),
        (["--training.max_grad_norm", "1e400"], ["training.max_grad_norm = inf"]),
        (["--data.holdout", "0.6"], ["data.holdout = 0.6", "at least 0, at most 0.5"]),
        (["--data.datasets", "a", "--data.weights", "-1"], ["data.weights = [-1.0]", "each at least 0"]),
        (["--data.datasets", "a", "--data.weights", "x"], ['data.weights = ["x"]', "list of numbers"]),
        (["--metrics.loggers", "pigeon"], ['metrics.loggers = ["pigeon"]', "list of any of tensorboard"]),
        (["--objective.loss", "mse"], ['objective.loss = "mse"', "one of ce, kl_div"]),
        (["--objective.loss", '{"ce": 0.1, "mse": 0.9}'], ["'mse' is no loss", "one of ce, kl_div"]),
        (["--objective.loss", '{"ce": 0, "tv": 0.9}'], ["the weight of ce is 0.0", "above 0"]),
        (["--objective.loss", '{"ce": 1e999}'], ["the weight of ce is Infinity"]),
        (["--objective.loss", '{"ce": true}'], ["the weight of ce is true"]),
        (["--objective.loss", '{"ce": 1, "ce": 2}'], ["a loss is named twice"]),
        (["--objective.loss", "{}"], ['objective.loss = "{}"', "allowed"]),
        (["--objective.loss", '["ce"]'], ["objective.loss", "allowed"]),
        (["--objective.loss", '{"ce": 0.1'], ["objective.loss", "allowed"]),
        (["--job.deterministic", "yes"], ['job.deterministic = "yes"', "true or false"]),
        (["--job.seed", str(2**63)], ["job.seed = 9223372036854775808"]),
        (["--eval.prompts="], ['eval.prompts = ""; allowed: a file, spectitan:NAME, or none']),
        (["--job.seed", "9" * 5000], ["job.seed", "..."]),
        (["--speculator.levels", "-2"], ["speculator.levels = -2", "an integer or a string, at least -1"]),
        (["--speculator.type", "gamma"], ['speculator.type = "gamma"', "one of alpha, beta, none"]),
        (["--speculator.type"], ["--speculator.type needs a value"]),
        (["--speculator.layers", "x"], ["speculator.layers is a key of speculator.type = beta, but speculator.type is alpha"]),
        (["--data.path", "a\udcffb"], ["data.path", "a string"]),
        (["--training.num_step", "5"], ["'training.num_step'", "nearest is training.num_steps"]),
        (["--training.num-steps", "5"], ["nearest is training.num_steps"]),
        (["--trainig.num_steps", "5"], ["nearest is training.num_steps"]),
        (["--num_steps", "5"], ["nearest is training.num_steps"]),
        (["--training.val_path", "v"], ["nearest is data.val_path"]),
        (["--speculator.head", "5"], ["nearest is speculator.heads"]),
        (["--training", "5"], ["unknown key 'training'"]),
        (["--"], ["unknown key ''"]),
        (["train.toml"], ["unexpected argument 'train.toml'", "--section.key value"]),
        (["-v"], ["unexpected argument '-v'"]),
        (["--job.config_file", "no_such.toml"], ["job.config_file = no_such.toml", "No such file"]),
        (["--job.config_file", "."], ["job.config_file = .", "directory"]),
    ],
)
def test_mistakes_in_flags(flags, parts):
    text = message(*flags)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "text, parts",
    [
        ("[training]\nnum_steps = ", ["line 2"]),
        ("[training]\nnum_steps = 1\nnum_steps = 2", ["not valid TOML"]),
        (b"[training]\n\n# \xff", ["not valid UTF-8", "line 3"]),
        ("x = " + "[" * 5000, ["not valid TOML"]),
        ("[trainng]\nnum_steps = 1", ["unknown table [trainng]", "nearest is [training]"]),
        ("num_steps = 1", ["num_steps stands in no table", "training.num_steps"]),
        ("training = 1", ["training is a table"]),
        ("speculator = 1", ["speculator is a table"]),
        ("[training]\nnum_stps = 1", ["unknown key 'training.num_stps'", "nearest is training.num_steps"]),
        ("[training.num_steps]\nx = 1", ["training.num_steps = ", "an integer"]),
        ("[[training]]\nnum_steps = 1", ["training is a table"]),
        ("[training]\nnum_steps = 1.0", ["training.num_steps = 1.0", "an integer"]),
        ("[training]\nnum_steps = true", ["training.num_steps = true", "an integer"]),
        ("[training]\nepochs = true", ["training.epochs = true", "a number"]),
        ("[optimizer]\nlr = nan", ["optimizer.lr = nan"]),
        ("[optimizer]\nlr = 1" + "0" * 400, ["optimizer.lr"]),
        ("[optimizer]\nbetas = [0.5, -inf]", ["optimizer.betas"]),
        ('[optimizer]\nbetas = ["a", 0.5]', ['optimizer.betas = ["a", 0.5]', "list of numbers"]),
        ("[optimizer]\nbetas = 0.5", ["optimizer.betas = 0.5", "list of numbers"]),
        ("[base]\nfreeze = 1", ["base.freeze = 1", "true or false"]),
        ('[base]\nfreeze = "true"', ["base.freeze", "true or false"]),
        ("[base]\nvariant = 7", ["base.variant = 7", "a string"]),
        ("[base]\nvariant = 2020-01-01", ["base.variant", "a string"]),
        ("[data]\ncache_dir = 'x\\y'\npath = \"a\\u0000b\"", ["data.path", "a string"]),
        ("[speculator]\nlayers = []", ["speculator.layers is a key of", "beta"]),
        ("[speculator]\nheads = 0", ["speculator.heads = 0"]),
        ("[speculator]\nlevels = 1024.2048", ["speculator.levels = 1024.2048", "an integer or a string"]),
        ("[speculator]\nlevels = [1024, 2048]", ["speculator.levels = [1024, 2048]", "an integer or a string"]),
        ("[speculator]\nlevels = true", ["speculator.levels = true", "an integer or a string"]),
        ('[job]\nconfig_file = "other.toml"', ["job.config_file belongs on the command line"]),
    ],
)
def test_mistakes_in_files_name_the_file(toml_file, text, parts):
    path = toml_file(text)
    found = message("--job.config_file", path)
    for part in [path, *parts]:
        assert part in found


def test_family_in_file_must_be_known(toml_file):
    path = toml_file('[speculator]\ntype = "gamma"')
    assert "one of alpha, beta, none" in message("--job.config_file", path, needed=NEEDED[:-2])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--training.epochs", "1"], ["training.num_steps", "training.epochs"]),
        (["--training.num_steps", "-1"], ["training.num_steps", "training.epochs"]),
        (["--training.num_steps", "0"], ["training.num_steps"]),
        (["--training.num_steps=-1", "--training.epochs=-0.5"], ["training.epochs"]),
        (["--training.global_batch_size", "12"], ["training.global_batch_size", "training.micro_batch_size"]),
        (["--job.threads", "0"], ["job.threads"]),
        (["--job.dump_folder", ""], ["job.dump_folder"]),
        (["--data.path", ""], ["data.path"]),
        (["--base.path", ""], ["base.path"]),
        (["--data.weights", "1"], ["data.weights", "data.datasets"]),
        (["--data.weights", "1,2", "--data.datasets", "a,b,c"], ["data.weights", "data.datasets"]),
        (["--data.weights", "0,0", "--data.datasets", "a,b"], ["data.weights"]),
        (["--data.datasets", "a,b,a"], ["data.datasets"]),
        (["--data.overlong", "truncate"], ["data.overlong = truncate", "data.packing = concat", "best_fit or document"]),
        (["--data.datasets", "a,,b"], ["data.datasets"]),
        (["--data.prompt_key=q", "--data.response_key="], ["data.prompt_key = 'q' and data.response_key = ''", "both"]),
        (["--data.prompt_key=", "--data.response_key=a"], ["data.prompt_key = '' and data.response_key = 'a'", "neither"]),
        (["--data.loss_mask_column="], ["data.input_ids_column = 'input_ids' and data.loss_mask_column = ''"]),
        (["--optimizer.base_lr", "1e-5"], ["optimizer.base_lr = 1e-05", "base.freeze = false"]),
        (["--optimizer.base_lr", "0", "--base.freeze=false"], ["optimizer.base_lr = 0", "-1, or above 0"]),
        (["--base.activation_checkpointing"], ["base.activation_checkpointing", "base.freeze = false"]),
        (["--training.speculator_loss_coeff", "0.5"], ["training.speculator_loss_coeff = 0.5", "base.freeze = false"]),
        (["--training.detach_states=false"], ["training.detach_states", "base.freeze = false"]),
        (["--training.detach_states=false", "--base.freeze=false", "--speculator.type=none"], ["training.detach_states", "a speculator"]),
        (["--base.init", "random"], ["base.init", "base.freeze"]),
        (["--speculator.type", "none"], ["speculator.type", "base.freeze"]),
        (["--speculator.type", "none", "--base.freeze=false", "--objective.loss", "kl_div"], ["objective.loss", "speculator.type"]),
        (["--speculator.type=none", "--base.freeze=false", "--export.format=mlp_speculator"], ["export.format", "speculator.type"]),
        (["--export.format", "hf"], ["export.format", "base.freeze"]),
        (["--optimizer.betas", "0.9"], ["optimizer.betas"]),
        (["--optimizer.betas", "0.9,1"], ["optimizer.betas"]),
        (["--optimizer.muon_lr", "0.1"], ["optimizer.muon_lr = 0.1", 'optimizer.name = "adamw"', "allowed: 0.02"]),
        (["--optimizer.muon_ns_steps", "6"], ["optimizer.muon_ns_steps = 6", 'optimizer.name = "adamw"']),
        (["--optimizer.name=muon", "--optimizer.muon_momentum=1"], ["optimizer.muon_momentum = 1.0", "below 1"]),
        (["--optimizer.name=muon", "--speculator.type=none", "--base.freeze=false"], ["optimizer.name", "speculator.type"]),
        (["--lr_scheduler.total_steps=0"], ["lr_scheduler.total_steps = 0", "-1, or above 0"]),
        (
            ["--lr_scheduler.type=linear", "--lr_scheduler.num_cosine_cycles=2"],
            ["lr_scheduler.num_cosine_cycles = 2.0", "linear", "allowed: 0.5"],
        ),
        (
            ["--lr_scheduler.type=constant", "--lr_scheduler.min_lr_ratio=0.1"],
            ["lr_scheduler.min_lr_ratio = 0.1", "constant", "allowed: 0.0"],
        ),
        (["--lr_scheduler.type=constant", "--lr_scheduler.total_steps=9"], ["lr_scheduler.total_steps = 9", "constant", "allowed: -1"]),
        (["--lr_scheduler.type=two_stage", "--lr_scheduler.warmup_steps=3"], ["lr_scheduler.warmup_steps = 3", "two_stage"]),
        (["--lr_scheduler.type=two_stage", "--lr_scheduler.decay_ratio=0.5"], ["lr_scheduler.decay_ratio = 0.5", "two_stage"]),
        (["--stage2.start_step=10"], ["stage2.start_step", "training.num_steps"]),
        (["--stage2.start_step=1", "--speculator.type=none", "--base.freeze=false"], ["stage2.start_step", "base.freeze"]),
        (["--stage2.batch_size=0"], ["stage2.batch_size"]),
        (["--data.prefetch_factor=4"], ["data.prefetch_factor = 4", "data.loader_workers = 0", "allowed: 2"]),
        (["--job.run_name={model}"], ["job.run_name", "{model}", "{speculator}"]),
        (["--states.on_generate=delete"], ['states.on_generate = "delete"', "states.source = online", 'allowed: "cache"']),
        (["--states.format=hs"], ['states.format = "hs"', "states.source = online"]),
        (["--states.final=pre_norm"], ['states.final = "pre_norm"', "states.source = online"]),
        (["--states.dtype=int8"], ['states.dtype = "int8"', "states.source = online"]),
        (["--checkpoint.interval_epochs=0"], ["checkpoint.interval_epochs = 0.0", "-1, or above 0"]),
        (["--checkpoint.interval_epochs=0.5", "--checkpoint.interval=7"], ["checkpoint.interval = 7", "checkpoint.interval_epochs = 0.5"]),
        (["--eval.interval_epochs=2", "--eval.interval=7"], ["eval.interval = 7", "eval.interval_epochs = 2"]),
        (["--checkpoint.save_best=loss", "--data.holdout=0.1"], ['checkpoint.save_best = "loss"', "eval.interval or eval.interval_epochs"]),
        (["--checkpoint.save_best=loss", "--eval.interval=1"], ['checkpoint.save_best = "loss"', "data.val_path or data.holdout"]),
        (["--checkpoint.save_best=acceptance", "--eval.interval=1", "--eval.prompts=none"], ["checkpoint.save_best", "eval.prompts"]),
    ],
)
def test_combinations_that_cannot_be_trained(flags, named):
    text = message(*flags)
    for name in named:
        assert name in text


FILLED = ["--base.path", "b", "--data.path", "d", "--prepare.states"]


@pytest.mark.parametrize(
    "program, flags, named",
    [
        ("prepare", ["--base.path", "b"], "data.path"),
        ("prepare", ["--data.path", "d"], "base.path"),
        ("evaluate", [], "speculator.path"),
        ("export", [], "base.path"),
        ("prepare", ["--base.path", "b", "--data.path", "d", "--prepare.token_freq=x.jsonl"], "prepare.token_freq = 'x.jsonl'"),
        ("prepare", [*FILLED, "--states.format=hs"], "states.format = hs"),
        ("prepare", [*FILLED, "--states.final=pre_norm"], "states.final = pre_norm"),
        ("prepare", [*FILLED, "--base.init=random"], "base.init = random"),
        ("prepare", [*FILLED, "--training.num_steps=5", "--training.epochs=2"], "training.epochs = 2"),
        ("prepare", [*FILLED, "--training.num_steps=5"], "training.global_batch_size = -1"),
        ("prepare", [*FILLED, "--training.epochs=0.5"], "training.global_batch_size = -1"),
        ("prepare", [*FILLED, "--training.epochs=2", "--data.datasets=x,y", "--data.weights=1,2"], "training.global_batch_size = -1"),
        ("generate", ["--base.path", "b"], "generate.prompt"),
        ("generate", ["--base.path", "b", "--generate.prompt=a", "--generate.prompt_file=f"], "generate.prompt_file"),
    ],
)
def test_what_other_programs_need(program, flags, named):
    assert named in message("--speculator.type", "alpha", *flags, program=program, needed=[])


@pytest.mark.parametrize(
    "program, flags",
    [
        ("evaluate", ["--base.path", "b", "--speculator.path", "s"]),
        ("export", ["--speculator.path", "s"]),
        ("generate", ["--base.path", "b", "--generate.prompt", "x"]),
        ("prepare", ["--base.path", "b", "--data.path", "d"]),
        ("train", [*TRAINED, "--training.epochs=0.1", "--speculator.type=none", "--base.freeze=false", "--base.init=random"]),
        ("train", [*TRAINED, "--training.num_steps=9", "--lr_scheduler.type=two_stage", "--stage2.start_step=8"]),
        ("train", [*TRAINED, "--training.epochs=1", "--stage2.start_step=0"]),
        ("train", [*TRAINED, "--training.epochs=1", "--optimizer.name=muon", "--optimizer.muon_lr=0.1", "--optimizer.muon_momentum=0"]),
        ("train", [*TRAINED, "--training.epochs=1", "--lr_scheduler.total_steps=9", "--lr_scheduler.num_cosine_cycles=2"]),
        (
            "train",
            [
                *TRAINED,
                "--training.epochs=1",
                "--checkpoint.interval_epochs=0.1",
                "--eval.interval_epochs=0.1",
                "--checkpoint.save_best=acceptance",
            ],
        ),
        ("train", [*TRAINED, "--training.epochs=1", "--lr_scheduler.type=constant", "--lr_scheduler.warmup_steps=9"]),
        ("prepare", ["--base.path", "b", "--data.path", "d", "--data.packing=document", "--data.overlong=truncate"]),
        ("prepare", [*FILLED, "--training.epochs=2"]),
        ("prepare", [*FILLED, "--training.num_steps=5", "--training.global_batch_size=4"]),
        ("prepare", ["--base.path", "b", "--data.path", "d", "--data.prompt_key=", "--data.input_ids_column=", "--data.loss_mask_column="]),
    ],
)
def test_what_is_enough(program, flags):
    load(flags, program, {"mlp": Alpha})


ODD = {
    str: ['"', "back\\slash", "tab\tline\nreturn\r", "\x7f\x1b\x01", "# no", "'''\"\"\"", "ünï \u2028 🦙", "true", "1", "", "a,b = [c]"],
    int: [0, 1, -1, 7, 2**63 - 1, -(2**63) + 1],
    float: [0.1, 1 / 3, -1.0, 5e-324, 1.7976931348623157e308, 1e16, 1e22, 123456789.123456789, 2.0, 0.5, -0.0],
    bool: [True, False],
    int | str: [-1, 7, "1024.2048", "1e3", "1.", "ünï"],
}


@pytest.mark.parametrize("key", all_keys() + list(keys_of("speculator", Beta).values())[-1:], ids=lambda key: key.label)
def test_resolved_file_gives_the_same_configuration(key, tmp_path):
    """Every key with odd values, as flag and as file."""
    if key.label in ("job.config_file", "speculator.type"):
        return
    items = list(key.choices) or ODD[key.item_type]
    if key.label == "objective.loss":
        items = ["kl_div", '{"ce": 0.1, "tv": 3}']
    tried = 0
    for value in [[], items[:1], items, items[::-1]] if key.is_list else items:
        try:
            key.checked(value, "")
        except UserError:
            continue
        family = "beta" if key.name == "layers" else "alpha"
        config = load(["--base.path", "b", "--speculator.path", "s", "--speculator.type", family], "evaluate", FAMILIES)
        config.data.loader_workers = 2  # without them there is nothing to prefetch
        setattr(getattr(config, key.section), key.name, value)
        try:
            checks.check_combinations(config, "evaluate")
        except UserError:
            continue
        path = tmp_path / "config.toml"
        path.write_text(config.to_toml(), encoding="utf-8", newline="\n")
        again = load(["--job.config_file", str(path)], "evaluate", FAMILIES)
        again.job.config_file = ""
        assert again == config
        assert again.to_toml() == config.to_toml()
        assert repr(getattr(getattr(again, key.section), key.name)) == repr(value)  # -0.0 == 0.0
        if not key.is_list:
            text = str(value).lower() if key.type is bool else str(value)
            assert repr(key.from_text(text)) == repr(value)
        tried += 1
    assert tried


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_load(path):
    load(["--job.config_file", str(path)], "train", SPECULATOR_CONFIGS)


def test_keys_have_help_and_defaults_that_are_allowed():
    for each in all_keys():
        assert each.help and "\n" not in each.help
        assert repr(each.checked(each.default, "default")) == repr(each.default)
        assert each.type in (bool, int, float, str, int | str) or each.is_list and each.item_type in (int, float, str)


def test_defaults_are_not_shared():
    first, second = loaded(), loaded()
    first.optimizer.betas.append(0.5)
    assert second.optimizer.betas == loaded().optimizer.betas == [0.9, 0.95]


@pytest.mark.parametrize("columns, width", [("40", 100), ("120", 120), ("300", 140)])
def test_help_prints_every_key_with_meaning_and_default(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        load(["--training.nonsense", "--help"], "evaluate", FAMILIES)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert text.startswith("usage: python -m spectitan.evaluate")
    words = re.sub(r"\s+", " ", text)
    for each in all_keys() + list(keys_of("speculator", Beta).values()):
        default = toml_value(each.default)
        description = f"--{each.label} {each.help} ("
        assert description in words
        assert re.match(rf"[^;]*; default {re.escape(default)}\)", words.split(description)[1])
    for table in typing.get_type_hints(Config):
        assert f"\n[{table}]\n" in text
    assert "one of alpha, beta, none" in words
