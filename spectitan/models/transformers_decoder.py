"""Any decoder that transformers loads, as a frozen base (base.arch = "hf").

The model is transformers' own, taken apart at two places: its embedding, final norm and head become our Readout, and its
attention keeps keys and values in our cache through transformers' own interface. Masks are made here: transformers takes a
prepared mask as it is. Whether a family really computes so is not left to its name: when weights are read, logits, taps, packed
documents and cached rows are compared with the untouched model's (transformers_weights.py).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spectitan.models.decoder import Decoder
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import attention_bias, positions_in_documents
from spectitan.models.transformers_config import HFConfig, import_transformers, loading_options, read_theirs, told_in_one_line
from spectitan.models.transformers_readout import HFReadout, backbone_of, layers_of
from spectitan.types import BaseStates


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
        backbone = backbone_of(causal_lm, config)
        self.readout = HFReadout(causal_lm, backbone, config)
        self.backbone = backbone.eval()
        theirs = causal_lm.config.get_text_config(decoder=True)
        self._weights_per_token = sum(_weights_per_token(layer, theirs) for layer in self.layers)

    @property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.backbone, self.config)

    def to_empty(self, *, device: torch.device | str, recurse: bool = True) -> "HFDecoder":
        """Parameters only: buffers (rotary frequencies) are computed when the model is built."""
        buffers = dict(self.named_buffers())
        super().to_empty(device=device, recurse=recurse)
        for name, buffer in buffers.items():
            owner, _, own_name = name.rpartition(".")
            self.get_submodule(owner)._buffers[own_name] = buffer.to(device)
        return self

    def weights_per_token(self) -> int:
        return self._weights_per_token

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


def _weights_per_token(layer: nn.Module, theirs) -> int:
    """Numbers in a layer's matrices that a token meets; of stacked experts, those that are chosen."""
    experts = next((n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(theirs, name, None))), 1)
    chosen = getattr(theirs, "num_experts_per_tok", None) or 1
    return sum(
        parameter.numel() if parameter.dim() == 2 else parameter.numel() * chosen // experts
        for parameter in layer.parameters()
        if parameter.dim() >= 2
    )


def _without_weights(config: HFConfig) -> nn.Module:
    """Parameters on the meta device; buffers are there, as building computes them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    theirs = read_theirs(config.folder)
    nn.Module.register_parameter = register_on_meta
    try:
        with told_in_one_line(config.folder):
            return import_transformers().AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, **loading_options(theirs))
    finally:
        nn.Module.register_parameter = register
