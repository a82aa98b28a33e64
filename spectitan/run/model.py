"""Base, speculator and optimizer of a run, each in its place on the mesh."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectitan import compiled
from spectitan.config.tables import Config
from spectitan.distributed.fsdp import apply_fsdp, master_dtype
from spectitan.distributed.mesh import Distributed
from spectitan.distributed.tensor_parallel import apply_tp
from spectitan.errors import UserError
from spectitan.models.families import arch_of
from spectitan.models.registry import fill_model, get_model
from spectitan.run.inputs import Inputs
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import build_objective
from spectitan.training.activation_checkpointing import apply_activation_checkpointing
from spectitan.training.checkpoint import module_tensors
from spectitan.training.compile import apply_compile
from spectitan.training.optimizer import build_optimizer, optimizer_tensors


class Model(NamedTuple):
    base: nn.Module
    speculator: Speculator
    trained: nn.ModuleDict  # "speculator", "base" or both
    objective: Speculator  # whose forward is the loss
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds."""
        optimizer = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        return module_tensors(self.trained) | optimizer


def build_model(config: Config, inputs: Inputs, world: Distributed, compute_dtype: torch.dtype) -> Model:
    """
    Raises:
        UserError: a base that the speculator cannot be trained on, or weights that cannot be read.
    """
    base, speculator = _base_on_meta(config, inputs, compute_dtype), inputs.speculator
    if config.speculator.type != "none" and not inputs.fine_tunes:
        speculator.init_weights(torch.Generator().manual_seed(config.job.seed))
    speculator.to(world.device)
    parallelize(config, base, speculator, world, compute_dtype, freeze_base=config.base.freeze)
    fill_model(base, inputs.base_path, config.base.init, config.job.seed)
    if not inputs.fine_tunes:
        speculator.init_from_base(base.readout)
    trained = nn.ModuleDict({"speculator": speculator} if config.speculator.type != "none" else {})
    if not config.base.freeze:
        trained["base"] = base
    objective = build_objective(speculator, base.config, config.objective, config.training, config.base.freeze)
    optimizer = build_optimizer(trained, config.optimizer, {f"speculator.{name}" for name in speculator.inner_matrices()})
    return Model(base, speculator, trained, objective, optimizer)


def parallelize(
    config: Config, base: nn.Module, speculator: Speculator | None, world: Distributed, compute_dtype: torch.dtype, *, freeze_base: bool
) -> None:
    """Splits by tensor parallelism, compiles and shards, in this order and in place.

    Args:
        base: on the meta device; then each rank holds its share of it, without values.
        speculator: full parameters, on the run's device.
    """
    if world.tp_mesh is not None:
        apply_tp(base, arch_of(base.config), world.tp_mesh)
    if config.base.activation_checkpointing and not freeze_base:
        apply_activation_checkpointing(base.layers)
    blocks = [] if config.base.arch == "hf" else base.layers  # transformers' own code runs as it is
    methods = speculator.backbone() if speculator is not None else []
    compiled.compile_loops(apply_compile(config.compile.enabled, world.device, blocks, methods))
    apply_fsdp(
        base,
        nn.Module() if speculator is None else speculator,
        world.mesh,
        compute_dtype,
        freeze_base=freeze_base,
        speculator_mesh=world.speculator_mesh,
    )
    base.to_empty(device=world.device)


def _base_on_meta(config: Config, inputs: Inputs, compute_dtype: torch.dtype) -> nn.Module:
    """The base without memory, and without the parts that this run does not need."""
    dtype = compute_dtype if config.base.freeze else master_dtype(compute_dtype)
    base = get_model(config.base.arch, config.base.variant, inputs.base_path, init=config.base.init, dtype=dtype, device="meta")
    needs_head = inputs.speculator.needs_base_head
    if needs_head and not base.readout.plain_head:
        raise UserError(
            f"{inputs.base_path}: this base scales, caps or biases its logits, and the speculator or its loss asks for the head alone; "
            'allowed: speculator.type = mlp or lstm with objective.loss = "ce"'
        )
    if config.base.freeze and config.stage2.start_step < 0 and not needs_head:
        base.readout.drop_head()
    if config.states.source == "offline":
        base.drop_layers()
    return base
