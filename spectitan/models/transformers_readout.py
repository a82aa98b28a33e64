"""The two ends of transformers' model, and where its layers are between them."""

from inspect import signature

import torch
from torch import Tensor, nn

from spectitan.models.readout import Readout
from spectitan.models.transformers_config import HFConfig, must_be

_TAKES = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")


def backbone_of(causal_lm: nn.Module, config: HFConfig) -> nn.Module:
    backbone = causal_lm.get_decoder()
    must_be(
        backbone is not causal_lm and set(_TAKES) <= signature(backbone.forward).parameters.keys(),
        config,
        f"a decoder that takes {', '.join(_TAKES)}",
    )
    must_be(layers_of(backbone, config) is not None, config, "a list of its layers")
    return backbone


def layers_of(backbone: nn.Module, config: HFConfig) -> nn.ModuleList | None:
    lists = (child for child in backbone.children() if isinstance(child, nn.ModuleList) and len(child) == config.num_layers)
    return next(lists, None)


class HFReadout(Readout):
    """The ends of transformers' model. Logits are made by its own code: scaled, capped or biased as the family has it.

    Attributes:
        plain_head: logits are the product with head.weight and nothing else.
    """

    def __init__(self, causal_lm: nn.Module, backbone: nn.Module, config: HFConfig):
        nn.Module.__init__(self)
        embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
        must_be(type(head) is nn.Linear and head.in_features == config.hidden_size, config, "a linear head")
        must_be(isinstance(embedding, nn.Embedding) and embedding.embedding_dim == config.hidden_size, config, "a token embedding")
        self.tied = head.weight is embedding.weight
        layers = layers_of(backbone, config)
        own = [name for name, module in backbone.named_children() if "norm" in type(module).__name__.lower() and module is not layers]
        must_be(own, config, "a final norm")
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
