"""Makes a run's plan without a cluster: a rank's step is rehearsed on the meta device, in a process group that sends nothing."""

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from spectitan.config.sections import Plan as Cluster
from spectitan.decoding.sampling import Sampling
from spectitan.distributed.fsdp import cast_parameters, hold_trained, master_dtype, resolve_compute_dtype
from spectitan.distributed.mesh import Distributed, init_distributed
from spectitan.distributed.tensor_parallel import apply_tp, check_tensor_parallel
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of, build_on_meta
from spectitan.models.layers import DecoderLayer
from spectitan.planning.alike import AlikeLayers
from spectitan.planning.live_bytes import LiveBytes, fused_attention
from spectitan.planning.plan import RunPlan, StagePlan
from spectitan.planning.sharding import Layout, ShardedRoot, share
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import build_objective
from spectitan.states.continued import ContinuedStates, prompts_per_sample
from spectitan.states.noisy import NoisyStates
from spectitan.states.online import OnlineStates
from spectitan.training.activation_checkpointing import apply_activation_checkpointing
from spectitan.training.batch_layout import batch_layout
from spectitan.training.optimizer import build_optimizer, optimizer_tensors
from spectitan.types import BaseStates, TokenBatch

_META = torch.device("meta")


def processes(cluster: Cluster) -> int:
    return cluster.world_size if cluster.world_size > 0 else int(os.environ.get("WORLD_SIZE", 1))


def plan_run(config, base_config: DecoderConfig, speculator: Speculator) -> RunPlan:
    """
    Args:
        config: a dataclass of tables.
        base_config: of the base.
        speculator: on the meta device.

    Raises:
        UserError: a layout that is impossible.
    """
    with _silent_group(processes(config.plan)) as world_size:
        parallelism, nodes = config.parallelism, max(1, world_size // config.plan.gpus_per_node)
        replicate = nodes if parallelism.sharding_strategy == "hsdp" and parallelism.dp_replicate == -1 else parallelism.dp_replicate
        world = init_distributed(
            parallelism.sharding_strategy, "cpu", tp_size=parallelism.tp_size, dp_replicate=replicate,
            shard_speculator=parallelism.shard_speculator,
        )  # fmt: skip
        return _Rehearsal(config, base_config, speculator, world).plan()


@contextlib.contextmanager
def _silent_group(world_size: int) -> Iterator[int]:
    """A process group of which this is rank 0, and the others are not there."""
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)  # that gloo has no all-to-all is no news here
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield world_size
    finally:
        dist.destroy_process_group()


class _Rehearsal:
    """A rank's step with modules of the meta device: built as run/model.py builds them, but that the memory of FSDP is only counted."""

    def __init__(self, config, base_config: DecoderConfig, speculator: Speculator, world: Distributed):
        self.config, self.base_config, self.world = config, base_config, world
        self.global_batch_size, self.accumulation = batch_layout(config.training, world.world_size)
        name = config.training.compute_dtype
        self.dtype = torch.bfloat16 if name == "auto" else resolve_compute_dtype(name, _META)
        self.master_dtype = master_dtype(self.dtype)
        self.ledger = LiveBytes()
        self.frozen, self.speculator = config.base.freeze, speculator
        self.prompts = 0
        if config.stage2.start_step >= 0:
            self.prompts = prompts_per_sample(
                config.stage2, self.global_batch_size, config.data.seq_length, base_config.max_position_embeddings, speculator.steps
            )
        self.parameters = {"speculator": _count(speculator)}
        self.base = self._build_base()
        self.held = self._sizes()
        self.roots = self._shard()
        self.objective = build_objective(speculator, base_config, config.objective, config.training, self.frozen)
        self.reads_states = config.states.source == "offline"
        self.source = (
            _FromFiles(self.base, speculator.taps, self.dtype)
            if self.reads_states
            else OnlineStates(self.base, speculator.taps, self.frozen)
        )
        if config.states.noise_std:
            self.source = NoisyStates(self.source, config.states.noise_std, seed=0)

    def _build_base(self) -> nn.Module:
        config, arch = self.config, arch_of(self.base_config)
        check_tensor_parallel(arch, self.base_config, config.parallelism.tp_size)
        base = build_on_meta(self.base_config).to(_META)
        self.parameters["base"] = _count(base)
        if self.frozen and not self.prompts and not self.speculator.needs_base_head:
            base.readout.drop_head()
        if config.states.source == "offline":
            base.drop_layers()
        cast_parameters(base, self.dtype)
        if self.world.tp_mesh is not None:
            apply_tp(base, arch, self.world.tp_mesh)
        if config.base.activation_checkpointing:
            apply_activation_checkpointing(base.layers)
        if self.frozen and all(isinstance(layer, DecoderLayer) for layer in base.layers):
            AlikeLayers(base.layers, self.ledger)
        return base.requires_grad_(not self.frozen)

    def _layout(self, name: str) -> Layout:
        mesh = {"base": self.world.mesh, "speculator": self.world.speculator_mesh}[name]
        return Layout(name, mesh.size(-1), mesh.size(0) if mesh.ndim == 2 else 1, self.dtype, self.master_dtype)

    # ---- what is held ----

    def _sizes(self) -> dict[str, dict[str, int]]:
        held = {kind: {"base": 0, "speculator": 0} for kind in ("parameters", "gradients", "optimizer")}
        for name, module in (("base", self.base), ("speculator", self.speculator)):
            is_trained = name == "speculator" or not self.frozen
            shards = self._layout(name).shards
            parameters = {f"{name}.{key}": share(parameter, shards) for key, parameter in module.named_parameters()}
            shapes = list(parameters.values())
            dtype = self.master_dtype if is_trained else self.dtype
            held["parameters"][name] = sum(map(math.prod, shapes)) * dtype.itemsize + sum(_size(buffer) for buffer in module.buffers())
            if is_trained and shapes:
                held["gradients"][name] = sum(map(math.prod, shapes)) * dtype.itemsize
                held["optimizer"][name] = self._optimizer_bytes(parameters, dtype)
        return held

    def _optimizer_bytes(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
        shards = [(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=_META))) for name, shape in shapes.items()]
        inner = {f"speculator.{name}" for name in self.speculator.inner_matrices()}
        optimizer = build_optimizer(SimpleNamespace(named_parameters=lambda: shards), self.config.optimizer, inner)
        return sum(map(_size, optimizer_tensors(optimizer).values()))

    # ---- what a step takes ----

    def _shard(self) -> list[ShardedRoot]:
        """As distributed.fsdp.apply_fsdp."""
        base, speculator, roots = self.base, self.speculator, []
        layout = self._layout("base")
        self.ledger.ignore([*base.parameters(), *base.buffers()])
        is_alone = self.world.mesh.size() == 1 and self.dtype == self.master_dtype and self.world.tp_mesh is None
        if layout.shards > 1 if self.frozen else not is_alone:
            roots.append(ShardedRoot(base, base.layers, base.readout, layout, self.ledger, reshard=layout.shards > 1))
        elif not self.frozen:
            self._name_gradients(base)
        if self.world.speculator_mesh.size() > 1:
            cast_parameters(speculator, self.dtype)
            self.ledger.ignore([*speculator.parameters(), *speculator.buffers()])
            roots.append(ShardedRoot(speculator, (), None, self._layout("speculator"), self.ledger, reshard=False))
        else:
            hold_trained(speculator, _META, self.dtype, speculator.head_modules)
            self.ledger.ignore([*speculator.parameters(), *speculator.buffers()])
            self._name_gradients(speculator)
        return roots

    def _name_gradients(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: self.ledger.rename(parameter.grad, "gradients"))

    def _step(self, batch: TokenBatch, sampled: bool) -> tuple[int, Counter]:
        """Bytes of the hidden states, and what is sent; the peak is in the ledger. Names live as long as in train.py: so does memory."""
        targets = self.objective.align(batch)
        denominators = targets.counts.to(_META)
        sent = self._sample(len(batch.tokens)) if sampled else Counter()
        repeats = [1] if self.accumulation == 1 else [self.accumulation - 1, 1]  # all micro-batches but the last are alike
        for index, times in enumerate(repeats):
            is_last = index == len(repeats) - 1
            for root in self.roots:
                root.syncs = is_last or root.layout.name == "base"
                root.all_reduces = is_last
            moved = batch.to(_META)
            states = self.source.states(moved._replace(document_ids=None) if sampled else moved)
            tensors = (states.final, *states.taps)
            for tensor in tensors:
                self.ledger.rename(tensor, "states")
            if sampled and is_last:
                self._base_root("free_all")
            loss = self.objective(moved, states, targets.to(_META), denominators, self.base.readout)
            loss.total.backward()
            for root in self.roots:
                root.end_backward()
            sent += self._take_sent(times)
        return sum(map(_size, tensors)), sent

    def _take_sent(self, times: int) -> Counter:
        sent = Counter({name: times * size for name, size in self.ledger.sent.items()})
        self.ledger.sent.clear()
        return sent

    @torch.no_grad()
    def _sample(self, rows: int) -> Counter:
        """The base reads its prompts and samples a token, with a cache for all; what is sent is counted for all tokens."""
        stage2 = self.config.stage2
        self._base_root("gather_all")
        sent = self._take_sent(1)
        cache, fed = self.base.new_cache(rows, stage2.prompt_length + stage2.seq_length), stage2.prompt_length
        for times in (1, stage2.seq_length - 1):
            states = self.base(torch.empty(rows, fed, dtype=torch.int64, device=_META), cache=cache)
            cache.commit(fed)
            quantiles = torch.empty(rows, dtype=torch.float64, device=_META)
            Sampling(stage2.temperature, stage2.top_k).choose(self.base.readout.logits(states.final[:, -1]), quantiles)
            sent += self._take_sent(times * self.accumulation)
            fed = 1
        return sent

    def _base_root(self, method: str) -> None:
        for root in self.roots:
            if root.layout.name == "base":
                getattr(root, method)()

    # ---- the plan ----

    def plan(self) -> RunPlan:
        config = self.config
        stages = [] if config.stage2.start_step == 0 else [self._stage_1()]
        if self.prompts:
            stages.append(self._stage_2())
        base, speculator = self.world, self.world.speculator_mesh
        layout = self._layout("base")
        world = {"world_size": base.world_size, "replicate": layout.copies, "shard": layout.shards}
        world |= {"tp": config.parallelism.tp_size, "micro_batch_size": config.training.micro_batch_size}
        world |= {"accumulation": self.accumulation, "global_batch_size": self.global_batch_size, "seq_length": config.data.seq_length}
        dims = (speculator.size(0) if speculator.ndim == 2 else 1, speculator.size(-1))
        return RunPlan(world, self.parameters, self.held, stages, 4 * sum(self.parameters.values()) * self._is_measured(), dims)

    def _is_measured(self) -> bool:
        """Whether rank 0 will draft and verify, or measure, with everything in float32."""
        config = self.config
        drafts = config.eval.prompts != "none" and config.speculator.type != "none"
        return (
            config.eval.at_end
            and bool(drafts or config.data.holdout or config.data.val_path)
            or bool((config.eval.interval or config.eval.interval_epochs > 0) and drafts)
        )

    def _stage_1(self) -> StagePlan:
        rows, length = self.config.training.micro_batch_size, self.config.data.seq_length
        batch = _batch(rows, length)
        tokens = self.global_batch_size * length
        flops = 0 if self.reads_states else self.base.flops(tokens, length)
        return self._stage("stage 1" if self.prompts else "step", batch, tokens, flops, sampled=False)

    def _stage_2(self) -> StagePlan:
        stage2, rows = self.config.stage2, self.config.training.micro_batch_size * self.prompts
        online = OnlineStates(self.base, self.speculator.taps, frozen=True)
        source = ContinuedStates(online, stage2, first_sample=0, prompts=self.prompts, steps=self.speculator.steps, seed=0)
        tokens, flops = source.work(self.global_batch_size)
        batch = _batch(rows, stage2.prompt_length + stage2.seq_length)
        batch = batch._replace(loss_mask=source.is_new.repeat(rows, 1), state_mask=source.is_start.repeat(rows, 1))
        return self._stage("stage 2", batch, tokens, flops, sampled=True)

    def _stage(self, name: str, batch: TokenBatch, tokens: int, base_flops: int, sampled: bool) -> StagePlan:
        for part in (self.base, self.speculator):
            part.zero_grad()
        for root in self.roots:
            root.forget_gradients()
        self.ledger.restart()
        with self.ledger, fused_attention():
            states, sent = self._step(batch, sampled)
        times = tokens // batch.tokens.numel()
        counts = [times * count for count in self.objective.align(batch).counts.tolist()]
        trained, repeated = (0, 0) if self.frozen else (2 * base_flops, base_flops * self.config.base.activation_checkpointing)
        return StagePlan(
            name, tokens, base_flops + trained, self.objective.flops(counts, tokens), repeated, dict(self.ledger.peak), states, dict(sent)
        )


class _FromFiles(OnlineStates):
    """What comes from files, and lies on the device when it is used."""

    def __init__(self, base: nn.Module, taps: tuple[int, ...], dtype: torch.dtype):
        super().__init__(base, taps, frozen=True)
        self.dtype = dtype

    def states(self, batch: TokenBatch) -> BaseStates:
        shape = (*batch.tokens.shape, self.base.config.hidden_size)
        final, *taps = (torch.empty(shape, dtype=self.dtype, device=_META) for _ in range(1 + len(self.taps)))
        return BaseStates(final, tuple(taps))


def _batch(rows: int, length: int) -> TokenBatch:
    """Rows of one document each, supervised throughout: nothing has more targets."""
    tokens, index = torch.zeros(rows, length, dtype=torch.int64), torch.arange(rows)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index[:, None].repeat(1, length), index, index)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
