"""config.json of recurrent drafters: IBM's layout (fms-extras) and Arctic's (ArcticTraining, VERL), written and read."""

from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.speculators.recurrent import MAX_HEADS, WIDTH_KEYS, WIDTHS, RecurrentSpeculator


def ibm_config(speculator: RecurrentSpeculator, architecture: str, format: str) -> dict:
    """Raises UserError if the speculator has more than one width."""
    return _shared_config(speculator, architecture) | {"emb_dim": speculator.hidden_size, "inner_dim": single_width(speculator, format)}


def arctic_config(speculator: RecurrentSpeculator, method: str) -> dict:
    """Widths by level are written as "1024.2048", a single one as a number."""
    widths = {name: getattr(speculator, name) for name in WIDTH_KEYS}
    return _shared_config(speculator, "ArcticLSTMSpeculatorPreTrainedModel") | {
        "input_hidden_dim": speculator.hidden_size,
        **{name: levels[0] if len(levels) == 1 else ".".join(map(str, levels)) for name, levels in widths.items()},
        "method": method,
    }


def _shared_config(speculator: RecurrentSpeculator, architecture: str) -> dict:
    return {
        "architectures": [architecture],
        "model_type": "mlp_speculator",
        "vocab_size": speculator.vocab_size,
        "n_predict": speculator.steps,
        # The tree of readers that draft one: their default of 5, 4, 3, continued.
        "top_k_tokens_per_head": [max(5 - step, 1) for step in range(speculator.steps)],
        "n_candidates": 5,
        "tie_weights": speculator.tied,
        "scale_input": speculator.scale_input,
    }


def single_width(speculator: RecurrentSpeculator, format: str) -> int:
    """The one width of all parts, which is what servers know.

    Raises:
        UserError: widths by level, or different ones.
    """
    for name in WIDTH_KEYS:
        if getattr(speculator, name) != [speculator.width]:
            found = ".".join(map(str, getattr(speculator, name)))
            raise UserError(
                f'export.format = "{format}": speculator.{name} = {found}; servers take a single width, '
                "the same for emb_dim, proj_dim and inner_dim; allowed: verl, none"
            )
    return speculator.width


def read_ibm(file: ConfigFile) -> tuple[dict, int, int]:
    """Keys of a RecurrentConfig, the base's hidden size and vocabulary size."""
    hidden_size = file.count("emb_dim")
    width = file.count("inner_dim", default=0, at_least=0) or hidden_size
    return _shared_keys(file) | dict.fromkeys(("speculator_width", *WIDTH_KEYS), width), hidden_size, file.count("vocab_size")


def read_arctic(file: ConfigFile) -> tuple[dict, int, int]:
    """As `read_ibm`."""
    widths = {name: _read_widths(file, name) for name in WIDTH_KEYS}
    last = int(str(widths["emb_dim"]).split(".")[-1])
    return _shared_keys(file) | {"speculator_width": last} | widths, file.count("input_hidden_dim"), file.count("vocab_size")


def _shared_keys(file: ConfigFile) -> dict:
    return {
        "n_speculator_heads": file.count("n_predict", at_most=MAX_HEADS),
        "tie_weights": file.flag("tie_weights"),
        "scale_input": file.flag("scale_input"),
    }


def _read_widths(file: ConfigFile, name: str) -> int | str:
    """1024, "1024", [1024] or "[1024]" (as some VERL versions write) -> 1024; two levels -> "1024.2048"."""
    value = file.get(name)
    levels = value if isinstance(value, list) else str(value).strip("[]").split(", ")
    text = ".".join(map(str, levels))
    fits = type(value) in (int, str, list) and WIDTHS.fullmatch(text) is not None
    file.must(fits, name, 'a width is expected, or several as "1024.2048"')
    return text if "." in text else int(text)
