"""Reads the weights of a decoder that transformers loads, and holds the taken-apart model to the untouched one."""

from pathlib import Path

import torch
from torch import Tensor

from spectitan.errors import UserError
from spectitan.models.layers import assign
from spectitan.models.transformers_config import HFConfig, import_transformers, loading_options, read_theirs, told_in_one_line
from spectitan.models.transformers_decoder import HFDecoder
from spectitan.models.transformers_readout import backbone_of, layers_of


@torch.no_grad()
def fill_hf(model: HFDecoder, path: Path) -> None:
    """Reads the weights through transformers, safetensors only, whole on every rank; the model keeps its part and is checked.

    Raises:
        UserError: no safetensors, missing tensors, or a family that does not compute as this adapter takes for granted.
    """
    theirs, dtype = read_theirs(path), next(model.parameters()).dtype
    with told_in_one_line(path):
        whole, report = import_transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **loading_options(theirs)
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors that config.json asks for are missing: {', '.join(missing[:3])}")
    tokens = _probe(model.config)
    before_norm, expected = [], None
    backbone = backbone_of(whole.eval(), model.config)
    handle = layers_of(backbone, model.config)[-1].register_forward_hook(
        lambda module, args, output: before_norm.append(output[0] if isinstance(output, tuple) else output)
    )
    output = whole(tokens, output_hidden_states=True, use_cache=False)
    handle.remove()
    expected = (*output.hidden_states[: model.config.num_layers], before_norm[0], output.logits)
    source = HFDecoder(model.config, whole)
    parameters, buffers = dict(source.named_parameters()), dict(source.named_buffers())
    for name, parameter in model.named_parameters():
        assign(parameter, parameters[name].detach())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    check_like(model, tokens, expected)


def _probe(config: HFConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_like(model: HFDecoder, tokens: Tensor, expected: tuple[Tensor, ...]) -> None:
    """Raises UserError if the model does not compute as transformers', or mixes documents or cached rows. All ranks call it.

    Args:
        tokens: int64 [1, m].
        expected: states entering each layer, the state before the final norm, and if there is a head, logits, each [1, m, ...].
    """
    device = model.readout.norm.weight.device
    tokens, taps = tokens.to(device), tuple(range(model.config.num_layers + 1))
    states = model(tokens, taps=taps)
    logits = () if model.readout.head is None else (model.readout.logits(states.final),)
    _must_agree(model, "logits or hidden states", zip((*states.taps, *logits), expected))

    m, packed = tokens.shape[1], torch.cat([tokens.flip(1), tokens], 1)
    documents = torch.arange(2, device=device).repeat_interleave(m)[None]
    _must_agree(model, "packed documents", [(model(packed, documents).final[:, m:], states.final)])

    rows, cache = torch.cat([tokens, tokens.roll(1, 1)]), model.new_cache(2, 3 * m)
    model(rows, cache=cache)
    cache.commit(torch.tensor([1, m - 1], device=device))
    again = rows.new_zeros(2, m - 1)
    again[0], again[1, :1] = rows[0, 1:], rows[1, m - 1 :]
    found = model(again, cache=cache).final
    wanted = model(rows).final
    _must_agree(model, "cached rows", [(found[0], wanted[0, 1:]), (found[1, :1], wanted[1, m - 1 :])])


def _must_agree(model: HFDecoder, what: str, pairs) -> None:
    for found, expected in pairs:
        tolerance = {torch.bfloat16: 0.1, torch.float16: 0.03}.get(found.dtype, 1e-3)
        if (found.float().cpu() - expected.float().cpu()).abs().max() > tolerance * expected.float().abs().max():
            raise UserError(
                f'{model.config.folder}: base.arch = "hf" cannot run model_type = {model.config.model_type!r}: its {what} differ'
            )
