"""The keys of EAGLE-3, and what they come to for a base."""

from dataclasses import dataclass
from typing import ClassVar

from spectitan.config.sections import key
from spectitan.errors import UserError
from spectitan.speculators.ttt_attention import BACKENDS


@dataclass
class Eagle3Config:
    """Keys of EAGLE-3; names as in vLLM's speculators."""

    num_layers: int = key(1, "decoder layers of the drafter", minimum=1, maximum=64)
    draft_arch: str = key("llama", "decoder layers: llama, or qwen3, which norms queries and keys", choices=("llama", "qwen3"))
    draft_hidden_act: str = key("silu", "activation of the drafter's MLP: silu, gelu, gelu_pytorch_tanh, relu; inherit: the base's")
    target_layer_ids: list[int] = key(
        [], "states of the base that are read: id k enters layer k, the number of layers is before the final norm; empty: three", minimum=0
    )
    norm_before_residual: bool = key(True, "first layer: the residual is the normed state; false: the state itself")
    norm_before_fc: bool = key(False, "an RMS norm over the joined states of the base, before they are projected")
    fc_norm: bool = key(False, "an RMS norm of each of these states instead")
    norm_output: bool = key(False, "the next step takes in the normed output of the one before; false: the output itself")
    embed_requires_grad: bool = key(False, "train an embedding of its own, which starts as the base's")
    train_head: bool = key(False, "train a head of its own, which starts as the base's")
    sliding_window: int = key(-1, "tokens that a layer sees at most; -1: all", minimum=-1)
    sliding_window_indices: list[int] = key([], "the layers that see no more than sliding_window; empty: all", minimum=0)
    ttt_steps: int = key(3, "steps of test-time training: tokens it is trained to look ahead", minimum=1, maximum=64)
    ttt_step_loss_decay: float = key(1.0, "each step's loss counts so many times that of the one before", above=0)
    ttt_tokens: str = key(
        "ground_truth", "tokens that later steps take in: those of the text, or its own likeliest", choices=("ground_truth", "own")
    )
    attention: str = key(
        "auto", "in training. flex: FlexAttention (GPU); sdpa: by document (CPU); eager: by document, written out", choices=BACKENDS
    )
    draft_vocab_size: int = key(-1, "tokens that it can draft, the most frequent ones; -1: all", minimum=-1)
    token_freq_path: str = key("", "file of token counts that say which are the most frequent: token_freq.pt")
    d2t_path: str = key("", "instead of counts, the draft vocabulary itself: d2t.npy, with speculator.t2d_path")
    t2d_path: str = key("", "t2d.npy, with speculator.d2t_path")
    draft_config: str = key(
        "",
        "shape of the decoder, instead of the base's: JSON file of a LlamaConfig or Qwen3Config, or of a whole speculator; a folder with "
        "config.json, or organisation/name of Hugging Face's hub; hidden_size must be the base's",
    )

    of_training: ClassVar[tuple[str, ...]] = (
        "ttt_steps",
        "ttt_step_loss_decay",
        "ttt_tokens",
        "attention",
        "token_freq_path",
        "d2t_path",
        "t2d_path",
    )


def tap_layers(ids: list[int], num_layers: int) -> tuple[int, ...]:
    """speculator.target_layer_ids, ascending; by default three that are spread over the base."""
    if ids:
        if len(set(ids)) < len(ids) or max(ids) > num_layers:
            raise UserError(f"speculator.target_layer_ids = {ids}; allowed: different ids from 0 to the base's {num_layers} layers")
        return tuple(sorted(ids))
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    if num_layers >= 3:
        highest = max(3, num_layers - 1)
        return 1, (1 + highest) // 2, highest
    return tuple(range(num_layers + 1))


def layer_windows(config: Eagle3Config) -> list[int]:
    """Of each layer; -1: it sees all."""
    indices, window = config.sliding_window_indices, config.sliding_window
    if window == 0:
        raise UserError("speculator.sliding_window = 0; allowed: -1, or 1 and more")
    if indices and window == -1:
        raise UserError(f"speculator.sliding_window_indices = {indices} with speculator.sliding_window = -1; allowed: with a window")
    if len(set(indices)) < len(indices) or max(indices, default=0) >= config.num_layers:
        raise UserError(
            f"speculator.sliding_window_indices = {indices}; allowed: different layers from 0 to {config.num_layers - 1}, "
            "as speculator.num_layers says"
        )
    return [window if not indices or index in indices else -1 for index in range(config.num_layers)]


def vocabulary_size(config: Eagle3Config, vocab_size: int) -> int:
    """Tokens that can be drafted."""
    size = vocab_size if config.draft_vocab_size == -1 else config.draft_vocab_size
    if not 1 <= size <= vocab_size:
        raise UserError(f"speculator.draft_vocab_size = {size}; allowed: -1, or 1 to the base's {vocab_size} tokens")
    return size
