"""Any decoder that transformers loads, as a frozen base (base.arch = "hf").

The model is transformers' own, taken apart at two places: its embedding, final norm and head become our Readout, and its
attention keeps keys and values in our cache through transformers' own interface. Masks are made here: transformers takes a
prepared mask as it is. Whether a family really computes so is not left to its name: when weights are read, logits, taps, packed
documents and cached rows are compared with the untouched model's (`check_like`).
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import assign, attention_bias, positions_in_documents
from spectitan.models.readout import Readout
from spectitan.types import BaseStates

_OTHERS = 'allowed with base.arch = "hf"'
# What config.json says beside the function of the model.
_BESIDE = {"architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id"}
_TAKES = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
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
    theirs = _read_theirs(folder)
    problem = f"{keys.file}: model_type = {json.dumps(keys.get('model_type'))}"
    text = theirs.get_text_config(decoder=True)
    sizes = {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        sizes[name] = getattr(text, name, None)
        if type(sizes[name]) is not int:
            raise UserError(f"{problem}: transformers' config has no {name}; {_OTHERS}: decoders that state it")
    layer_types = set(getattr(text, "layer_types", None) or ())
    if layer_types - _LAYER_TYPES or getattr(text, "is_encoder_decoder", False):
        found = ", ".join(sorted(layer_types - _LAYER_TYPES)) or "an encoder"
        raise UserError(f"{problem} has {found}; {_OTHERS}: decoders of full or sliding attention")
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


def _read_theirs(folder: Path):
    with _told_in_one_line(folder):
        return import_transformers().AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def _told_in_one_line(folder: Path) -> Iterator[None]:
    """What transformers refuses, as a mistake of the user's."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[0] if lines else type(error).__name__
        raise UserError(f'{folder}: transformers cannot load it with base.arch = "hf", which runs no code of a folder: {said}') from None


class HFDecoder(Decoder):
    """transformers' model, frozen.

    Args:
        config: of its folder.
        causal_lm: transformers' model, which is taken apart; None: one without weights.

    Attributes:
        backbone: everything but embedding, final norm and head.
    """

    def __init__(self, config: HFConfig, causal_lm: nn.Module | None = None):
        nn.Module.__init__(self)
        causal_lm = _without_weights(config) if causal_lm is None else causal_lm
        self.config, self.sliding_window = config, config.sliding_window
        backbone = _backbone_of(causal_lm, config)
        self.readout = HFReadout(causal_lm, backbone, config)
        self.backbone = backbone.eval()
        self._multiplied = sum(_multiplied(layer, causal_lm.config.get_text_config(decoder=True)) for layer in self.layers)

    @property
    def layers(self) -> nn.ModuleList:
        return _layers_of(self.backbone, self.config)

    def to_empty(self, *, device: torch.device | str, recurse: bool = True) -> "HFDecoder":
        """Parameters only: buffers (rotary frequencies) are computed when the model is built."""
        buffers = dict(self.named_buffers())
        super().to_empty(device=device, recurse=recurse)
        for name, buffer in buffers.items():
            owner, _, own_name = name.rpartition(".")
            self.get_submodule(owner)._buffers[own_name] = buffer.to(device)
        return self

    def flops(self, tokens: int, seq_length: int) -> int:
        attention = self.config.num_heads * self.config.head_dim
        return tokens * (2 * self._multiplied + 2 * self.config.num_layers * attention * (seq_length + 1))

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        taps: tuple[int, ...] = (),
    ) -> BaseStates:
        """See Decoder.forward."""
        assert all(0 <= tap <= self.config.num_layers for tap in taps), f"taps {taps} of {self.config.num_layers} layers"
        x = self.readout.embed(tokens)
        index, past = torch.arange(tokens.shape[1], device=tokens.device), None
        if cache is None:
            if positions is None:
                positions = index[None] if document_ids is None else positions_in_documents(document_ids)
            visible = (index <= index[:, None])[None]
            if document_ids is not None:
                visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])
            near = (index > index[:, None] - self.sliding_window)[None]
        else:
            slots = cache.next_slots(tokens.shape[1])
            past = _slot_cache(cache, slots)
            positions = slots.index if positions is None else positions
            all_slots = torch.arange(slots.stop, device=tokens.device)
            visible = all_slots <= slots.index[..., None] if mask is None else mask[..., : slots.stop]
            held = all_slots.expand(len(positions), -1).scatter(1, slots.index, positions)  # the position that each slot holds
            near = held[:, None] > positions[..., None] - self.sliding_window
        with self._kept_inputs(taps) as kept:
            x = self.backbone(
                inputs_embeds=x,
                attention_mask=self._prepared(visible, near, len(tokens), x.dtype),
                position_ids=positions.expand(len(tokens), -1),
                past_key_values=past,
                use_cache=past is not None,
            ).last_hidden_state
        kept[self.config.num_layers] = x
        return BaseStates(self.readout.final(x), tuple(kept[tap] for tap in taps))

    def _prepared(self, visible: Tensor, near: Tensor, batch: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The masks that transformers adds to scores: one, or one for each kind of layer."""
        full, sliding = (attention_bias(seen.expand(batch, -1, -1), dtype) for seen in (visible, visible & near))
        if self.config.mixed_layers:
            return {"full_attention": full, "sliding_attention": sliding}
        return full if self.sliding_window == -1 else sliding

    @contextlib.contextmanager
    def _kept_inputs(self, taps: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}

        def keep(index: int):
            return lambda module, args, keys: kept.__setitem__(index, args[0] if args else keys["hidden_states"])

        layers = self.layers
        handles = [layers[tap].register_forward_pre_hook(keep(tap), with_kwargs=True) for tap in taps if tap < len(layers)]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


class HFReadout(Readout):
    """The ends of transformers' model. Logits are made by its own code: scaled, capped or biased as the family has it.

    Attributes:
        plain_head: logits are the product with head.weight and nothing else.
    """

    def __init__(self, causal_lm: nn.Module, backbone: nn.Module, config: HFConfig):
        nn.Module.__init__(self)
        embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
        _must_be(type(head) is nn.Linear and head.in_features == config.hidden_size, config, "a linear head")
        _must_be(isinstance(embedding, nn.Embedding) and embedding.embedding_dim == config.hidden_size, config, "a token embedding")
        self.tied = head.weight is embedding.weight
        layers = _layers_of(backbone, config)
        own = [name for name, module in backbone.named_children() if "norm" in type(module).__name__.lower() and module is not layers]
        _must_be(own, config, "a final norm")
        self.embedding, self.norm, self.head = embedding, backbone.get_submodule(own[-1]), head
        setattr(backbone, own[-1], nn.Identity())
        for name, module in list(backbone.named_modules()):
            if module is embedding:
                backbone.set_submodule(name, nn.Identity())
        for name, module in list(causal_lm.named_modules()):
            if module is backbone:
                causal_lm.set_submodule(name, _PassThrough())
        self._ends = (causal_lm.eval(),)  # in a tuple: its modules are registered already
        self.plain_head = self._find_plain_head()

    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        logits = self.call(lambda readout, rows: readout._ends[0](inputs_embeds=rows, use_cache=False).logits, rows)
        return logits.view(*hidden.shape[:-1], -1)

    def _find_plain_head(self) -> bool:
        """Tried with a head of a few rows, so that no weights are needed."""
        head, width = self.head, self.head.in_features
        few = nn.Linear(width, 7, bias=head.bias is not None, device="cpu")
        nn.init.normal_(few.weight, std=5 / width**0.5)
        hidden = torch.randn(1, 3, width)
        self._ends[0].set_output_embeddings(few)
        try:
            with torch.no_grad():
                found = self._ends[0](inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._ends[0].set_output_embeddings(head)
        return torch.allclose(found, hidden @ few.weight.T, rtol=1e-4, atol=1e-4)


class _PassThrough(nn.Module):
    """Stands where the backbone was: what comes in are its states."""

    def forward(self, *args, inputs_embeds: Tensor, **keys) -> "_States":
        return _States(inputs_embeds)


class _States:
    """What a family asks of its backbone's output: the states, and None for everything else."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _slot_cache(cache: KVCache, slots: Slots):
    """transformers' interface to one forward's part of our cache."""

    class SlotCache(import_transformers().Cache):
        def __init__(self):
            super().__init__(layers=[])

        def update(self, keys: Tensor, values: Tensor, layer: int, *args, **options) -> tuple[Tensor, Tensor]:
            return cache.write(layer, keys, values, slots)

        def get_seq_length(self, layer: int = 0) -> int:
            return slots.stop - slots.index.shape[1]

    return SlotCache()


def _backbone_of(causal_lm: nn.Module, config: HFConfig) -> nn.Module:
    backbone = causal_lm.get_decoder()
    _must_be(
        backbone is not causal_lm and set(_TAKES) <= signature(backbone.forward).parameters.keys(),
        config,
        f"a decoder that takes {', '.join(_TAKES)}",
    )
    _must_be(_layers_of(backbone, config) is not None, config, "a list of its layers")
    return backbone


def _layers_of(backbone: nn.Module, config: HFConfig) -> nn.ModuleList | None:
    lists = (child for child in backbone.children() if isinstance(child, nn.ModuleList) and len(child) == config.num_layers)
    return next(lists, None)


def _must_be(condition: object, config: HFConfig, what: str) -> None:
    if not condition:
        raise UserError(f"{config.folder}: model_type = {config.model_type!r}: {what} was not found; {_OTHERS}: decoders that have it")


def _multiplied(layer: nn.Module, theirs) -> int:
    """Numbers in a layer's matrices that a token meets; of stacked experts, those that are chosen."""
    experts = next((n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(theirs, name, None))), 1)
    chosen = getattr(theirs, "num_experts_per_tok", None) or 1
    return sum(
        parameter.numel() if parameter.dim() == 2 else parameter.numel() * chosen // experts
        for parameter in layer.parameters()
        if parameter.dim() >= 2
    )


def _options(theirs) -> dict:
    """Only transformers' eager attention caps its scores (Gemma 2)."""
    capped = getattr(theirs.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return {"trust_remote_code": False} | ({"attn_implementation": "eager"} if capped else {})


def _without_weights(config: HFConfig) -> nn.Module:
    """Parameters on the meta device; buffers are there, as building computes them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    theirs = _read_theirs(config.folder)
    nn.Module.register_parameter = register_on_meta
    try:
        with _told_in_one_line(config.folder):
            return import_transformers().AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, **_options(theirs))
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def fill_hf(model: HFDecoder, path: Path) -> None:
    """Reads the weights through transformers, safetensors only, whole on every rank; the model keeps its part and is checked.

    Raises:
        UserError: no safetensors, missing tensors, or a family that does not compute as this adapter takes for granted.
    """
    theirs, dtype = _read_theirs(path), next(model.parameters()).dtype
    with _told_in_one_line(path):
        whole, report = import_transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **_options(theirs)
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors that config.json asks for are missing: {', '.join(missing[:3])}")
    tokens = _probe(model.config)
    before_norm, expected = [], None
    backbone = _backbone_of(whole.eval(), model.config)
    handle = _layers_of(backbone, model.config)[-1].register_forward_hook(
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
