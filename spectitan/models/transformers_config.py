"""What transformers' config says of a decoder that it loads (base.arch = "hf")."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.decoder import DecoderConfig

OTHERS = 'allowed with base.arch = "hf"'
# What config.json says beside the function of the model.
_BESIDE = {"architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class HFConfig(DecoderConfig):
    """What a folder's config.json says, as transformers reads it."""

    folder: Path
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_embeddings: bool
    initializer_range: float
    model_type: str
    sliding_window: int  # of the layers that slide; -1: none does
    mixed_layers: bool  # some layers slide and others do not
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    content: dict = field(hash=False)  # all of config.json that decides the function
    # What a drafter's decoder takes after.
    num_kv_heads: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    hidden_act: str

    def identity(self) -> dict:
        return self.content


def import_transformers() -> ModuleType:
    """Raises UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError('base.arch = "hf" needs transformers: pip install "spectitan[hf]"') from None
    return transformers


def read_hf_config(folder: Path) -> HFConfig:
    """Raises UserError for what cannot be run: no weights are read for it, and no code of the folder."""
    keys = ConfigFile(folder, "a base model's folder has config.json, safetensors and a tokenizer")
    keys.must(keys.get("quantization_config") is None, "quantization_config", "quantised weights cannot be read; use the float weights")
    import_transformers()
    theirs = read_theirs(folder)
    problem = f"{keys.file}: model_type = {json.dumps(keys.get('model_type'))}"
    text = theirs.get_text_config(decoder=True)
    sizes = {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        sizes[name] = getattr(text, name, None)
        if type(sizes[name]) is not int:
            raise UserError(f"{problem}: transformers' config has no {name}; {OTHERS}: decoders that state it")
    layer_types = set(getattr(text, "layer_types", None) or ())
    if layer_types - _LAYER_TYPES or getattr(text, "is_encoder_decoder", False):
        found = ", ".join(sorted(layer_types - _LAYER_TYPES)) or "an encoder"
        raise UserError(f"{problem} has {found}; {OTHERS}: decoders of full or sliding attention")
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    slides = window is not None and (not layer_types or "sliding_attention" in layer_types)
    eos = text.eos_token_id
    return HFConfig(
        folder=folder,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        head_dim=getattr(text, "head_dim", None) or sizes["hidden_size"] // sizes["num_attention_heads"],
        max_position_embeddings=sizes["max_position_embeddings"],
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        initializer_range=getattr(text, "initializer_range", 0.02),
        model_type=theirs.model_type,
        sliding_window=window if slides else -1,
        mixed_layers="sliding_attention" in layer_types,
        bos_token_id=text.bos_token_id,
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        content={name: value for name, value in keys.content.items() if name not in _BESIDE},
        num_kv_heads=getattr(text, "num_key_value_heads", None) or sizes["num_attention_heads"],
        intermediate_size=getattr(text, "intermediate_size", None) or 3 * sizes["hidden_size"],
        norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(text),
        hidden_act=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu",
    )


def _rope_theta(text) -> float:
    """Of all layers, or of those that see everything; scaling is left out."""
    rotary = getattr(text, "rope_parameters", None) or {}
    rotary = rotary.get("full_attention", rotary)
    return float(rotary.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


def read_theirs(folder: Path):
    with told_in_one_line(folder):
        return import_transformers().AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def told_in_one_line(folder: Path) -> Iterator[None]:
    """What transformers refuses, as a mistake of the user's."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[0] if lines else type(error).__name__
        raise UserError(f'{folder}: transformers cannot load it with base.arch = "hf", which runs no code of a folder: {said}') from None


def must_be(condition: object, config: HFConfig, what: str) -> None:
    if not condition:
        raise UserError(f"{config.folder}: model_type = {config.model_type!r}: {what} was not found; {OTHERS}: decoders that have it")


def loading_options(theirs) -> dict:
    """Only transformers' eager attention caps its scores (Gemma 2)."""
    capped = getattr(theirs.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return {"trust_remote_code": False} | ({"attn_implementation": "eager"} if capped else {})
