"""config.json of EAGLE-3 in the format of vLLM's speculators, written and read."""

from collections.abc import Sequence

from spectitan.models.config_file import ConfigFile
from spectitan.speculators.draft_decoder import DecoderShape, adopt_decoder, decoder_to_json
from spectitan.speculators.eagle3_config import Eagle3Config, layer_windows
from spectitan.speculators.speculators_folders import read_speculative_tokens, speculators_config


def write_eagle3(config: Eagle3Config, shape: DecoderShape, taps: Sequence[int], draft_vocab_size: int) -> dict:
    """
    Args:
        shape: of the decoder layers.
        taps: layer ids of the base that are read.
    """
    own = {
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": shape.hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(taps),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": config.embed_requires_grad,
        "train_head": config.train_head,
    }
    decoder = decoder_to_json(shape, layer_windows(config))
    return speculators_config("eagle3", "Eagle3DraftModel", config.ttt_steps, decoder, own)


def read_eagle3(file: ConfigFile) -> tuple[Eagle3Config, int, int]:
    """The keys, the base's hidden size and its vocabulary size."""
    decoder = file.inside("transformer_layer_config")
    hidden_size, vocab_size = decoder.count("hidden_size"), decoder.count("vocab_size")
    draft_vocab_size = file.count("draft_vocab_size", vocab_size, at_most=vocab_size)
    taps = file.get("eagle_aux_hidden_state_layer_ids")
    known = isinstance(taps, list) and taps and all(type(tap) is int and tap >= 0 for tap in taps) and taps == sorted(set(taps))
    file.must(bool(known), "eagle_aux_hidden_state_layer_ids", "a list of different, ascending layer ids is expected")
    target_hidden_size = file.count("target_hidden_size", hidden_size)
    file.must(target_hidden_size == hidden_size, "target_hidden_size", f"allowed: transformer_layer_config.hidden_size = {hidden_size}")
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
    config = Eagle3Config(
        **{name: file.flag(name) for name in flags},
        # A folder that does not say whether its head is the base's is read with the head that it holds.
        train_head=file.get("train_head") is None or file.flag("train_head"),
        target_layer_ids=taps,
        draft_vocab_size=-1 if draft_vocab_size == vocab_size else draft_vocab_size,
        ttt_steps=read_speculative_tokens(file, default=Eagle3Config().ttt_steps),
    )
    adopt_decoder(config, decoder)
    return config, hidden_size, vocab_size
