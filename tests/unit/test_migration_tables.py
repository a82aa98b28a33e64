"""The tables of other systems' parameters: our side exists with the values it says, their side is complete."""

import re
import typing
from pathlib import Path

import pytest

from spectitan.config.keys import keys_of, toml_value
from spectitan.config.manager import load
from spectitan.config.tables import Config
from spectitan.speculators.registry import SPECULATOR_CONFIGS

ROOT = Path(__file__).parents[2]
PROGRAMS = {f"spectitan.{name}" for name in ("train", "evaluate", "export", "generate", "prepare")}

# Every parameter that the documents of these systems name.
FMS = """model_arch model_variant model_path ckpt_save_path ckpt_load_path sharding_strategy tp_size seq_length batch_size report_interval
    checkpoint_interval num_steps stage2_start_step stage2_batch_size n_speculator_heads speculator_width use_torch_compile learning_rate
    seed data_path datasets weights"""
VERL = """nproc_per_node save_path model.partial_pretrain model.speculator.n_predict model.speculator.inner_dim model.speculator.emb_dim
    model.speculator.proj_dim model.speculator.scale_input model.speculator.tie_weights model.speculator.tie_lstm_embs
    model.speculator.method model.speculator_loss_coeff model.freeze_base_model optim.lr trainer.total_epochs trainer.save_freq
    trainer.test_freq trainer.logger data.micro_batch_size_per_gpu data.train_files data.val_files speculator_loss
    language_model_with_speculator"""
ARCTIC = """DATA_GEN TRAIN vllm_tensor_parallel total_num_of_scripts --hf_dataset --max_tokens --gen_temp --tensor_parallel load_hf_dataset
    model.name_or_path n_speculator_heads speculator_width proj_dim emb_dim method data.sources.name_or_path checkpoint.output_dir
    --speculative-config"""
SPECULATORS = """--verifier-name-or-path --trust-remote-code --speculator-type --from-pretrained --draft-config --dry-run --num-layers
    --draft-arch --draft-hidden-act --sliding-window --sliding-window-indices --data-path --on-missing --on-generate --hidden-states-path
    --vllm-endpoint --request-timeout --max-retries --legacy-data --data-format-version --total-seq-len --draft-vocab-size --token-freq-path
    --d2t-path --t2d-path --mask-token-id --target-layer-ids --save-path --epochs --lr --no-resume-from-checkpoint --logger --log-dir
    --run-name --seed --hidden-states-dtype --deterministic-cuda --optimizer --weight-decay --muon-lr --muon-momentum --muon-weight-decay
    --muon-ns-steps --muon-adjust-lr-fn --use-off-policy-tokens --norm-before-residual --no-norm-before-residual --embed-requires-grad
    --no-embed-requires-grad --norm-before-fc --ttt-steps --ttt-step-loss-decay --draft-attn-impl --block-size --max-anchors
    --dflash-decay-gamma --num-workers --prefetch-factor --noise-std --checkpoint-freq --save-best --scheduler-type
    --scheduler-warmup-steps --scheduler-total-steps --scheduler-num-cosine-cycles --nproc_per_node --nnodes
    --standalone launch_vllm.py --port"""
SYSTEMS = {
    "llama3.1_8b_eagle3": SPECULATORS,
    "llama3.1_8b_fms": FMS,
    "qwen2.5_0.5b_verl": VERL,
    "llama3.1_8b_arctic": ARCTIC,
}  # by the recipe that heads the table


class Row(typing.NamedTuple):
    names: list[str]
    here: str
    default: str
    recipe: str


def tables() -> dict[str, list[Row]]:
    section = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    found = {}
    for part in section.split("\n**")[1:]:
        recipe = re.search(r"train_configs/([\w.]+)\.toml", part)[1]
        lines = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")][2:]
        cells = [[cell.strip() for cell in line] for line in lines]
        found[recipe] = [Row(re.findall("`(.+?)`", names), here, default, value) for names, _, here, default, value in cells]
    return found


TABLES = tables()
ROWS = [(recipe, row) for recipe, rows in TABLES.items() for row in rows]


def known_keys() -> dict[str, object]:
    """section.key -> default; of a speculator's keys, those of both families."""
    sections = [*typing.get_type_hints(Config).items(), *(("speculator", config) for config in SPECULATOR_CONFIGS.values())]
    return {key.label: key.default for name, section in sections for key in keys_of(name, section).values()}


KEYS = known_keys()


def shown(value: object) -> str:
    return "" if value in ("", []) else value if isinstance(value, str) else toml_value(value)


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_every_parameter_of_the_documents_has_a_row(recipe):
    names = [name for row in TABLES[recipe] for name in row.names]
    assert set(SYSTEMS[recipe].split()) <= set(names)
    assert len(set(names)) == len(names)


def test_there_is_a_table_for_each_system():
    assert TABLES.keys() == SYSTEMS.keys()


@pytest.mark.parametrize(("recipe", "row"), ROWS, ids=lambda value: "-".join(value.names) if isinstance(value, Row) else "")
def test_a_row_says_what_is_here(recipe, row):
    quoted = re.findall("`(.+?)`", row.here)
    keys = [name for name in quoted if re.fullmatch(r"\w+\.\w+", name) and name not in PROGRAMS and not name.endswith(".sh")]
    assert all(name in KEYS for name in keys), keys
    assert quoted or "refused, because" in row.here
    for path in (name for name in quoted if name.endswith(".sh")):
        assert (ROOT / path).is_file()
    if not row.here.startswith("`") or quoted[0] not in KEYS:  # no single key takes its place
        assert not row.default and not row.recipe
        return
    config = load(["--job.config_file", str(ROOT / "train_configs" / f"{recipe}.toml")], "train", SPECULATOR_CONFIGS)
    section, _, name = keys[0].partition(".")
    assert row.default == shown(KEYS[keys[0]])
    given = keys[0] in config.given
    assert row.recipe == (shown(getattr(getattr(config, section), name)) if given else "")


def test_scripts_are_named_and_their_variables_are_those_of_the_documents():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in (ROOT / "scripts").glob("*.sh"):
        text = script.read_text(encoding="utf-8")
        assert f"`{script.name}`" in readme and "\nset -euo pipefail\n" in text
        assert "TRAIN=${TRAIN:-1} " in text and "EXPORT=${EXPORT:-1} " in text
        assert ("DATA_GEN=${DATA_GEN:-1} " in text) == (script.stem != "fms_quickstart")
        for recipe in re.findall(r"train_configs/[\w.]+toml", text):
            assert (ROOT / recipe).is_file()
        flags = set(re.findall(r"--(\w+\.\w+)", text)) - {"section.key"}
        assert flags <= KEYS.keys(), flags - KEYS.keys()
