"""The architectures of bases: base.arch -> config and model."""

import torch

from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.gpt_bigcode import EmbedGPTBigCode, GPTBigCodeConfig
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.mixtral import EmbedMixtral, MixtralConfig
from spectitan.models.transformers_config import HFConfig
from spectitan.models.transformers_decoder import HFDecoder

ARCHITECTURES: dict[str, type[Decoder]] = {
    "embedllama": EmbedLLaMA,
    "embedmixtral": EmbedMixtral,
    "embedgptbigcode": EmbedGPTBigCode,
    "hf": HFDecoder,
}
_ARCH_OF = {LlamaConfig: "embedllama", MixtralConfig: "embedmixtral", GPTBigCodeConfig: "embedgptbigcode", HFConfig: "hf"}


def arch_of(config: DecoderConfig) -> str:
    """The base.arch of a config."""
    return _ARCH_OF[type(config)]


def build_on_meta(config: DecoderConfig) -> Decoder:
    """A model of shapes without weights."""
    if isinstance(config, HFConfig):  # its buffers are made where it is built, not read
        return HFDecoder(config)
    with torch.device("meta"):
        return ARCHITECTURES[arch_of(config)](config)
