"""A plan in words, and whether it fits."""

from spectitan.config.sections import Plan as Cluster
from spectitan.errors import UserError
from spectitan.planning.plan import RunPlan, StagePlan

_KINDS = ("gradients", "states", "gathered", "activations")  # of what lives at a stage's peak


class Floor:
    """Seconds that a step takes at least.

    Matrix products run at the GPU's peak, and links at theirs. Tensor parallelism's collectives stand between products; the gathers and
    reductions of FSDP may pass while others compute.
    """

    def __init__(self, plan: RunPlan, stage: StagePlan, cluster: Cluster):
        flops = stage.base_flops + stage.speculator_flops + stage.repeated_flops
        self.compute = flops / plan.world["world_size"] / (cluster.gpu_flops * 1e12)
        self.links = {name: size / _bandwidth(plan, name, cluster) for name, size in stage.sent.items() if size}
        beside = sum(seconds for name, seconds in self.links.items() if name != "tp")
        self.seconds = max(self.compute + self.links.get("tp", 0.0), beside)


def _bandwidth(plan: RunPlan, name: str, cluster: Cluster) -> float:
    """Bytes/s that a rank sends in a ring over a dimension: those of its node in the ring share all their network links."""
    stride, size = _dimension(plan, name)
    of_node = min(size, max(1, cluster.gpus_per_node // stride))
    inside = cluster.node_bandwidth * 1e9
    return inside if of_node == size else min(inside, of_node * cluster.network_bandwidth * 1e9)


def _dimension(plan: RunPlan, name: str) -> tuple[int, int]:
    """Distance of the ranks that follow each other in it, and how many they are. tp is fastest, replicate slowest."""
    world = plan.world
    copies, shards = plan.speculator_dims
    return {
        "tp": (1, world["tp"]),
        "base shard": (world["tp"], world["shard"]),
        "base replicate": (world["tp"] * world["shard"], world["replicate"]),
        "speculator shard": (1, shards),
        "speculator replicate": (shards, copies),
    }[name]


def check_fits(plan: RunPlan, cluster: Cluster) -> None:
    """Raises UserError, with the sizes, for what a GPU cannot hold."""
    room, world = _room(cluster), plan.world
    given = f"plan.gpu_memory = {cluster.gpu_memory:g} less plan.headroom = {cluster.headroom:g} leaves {_gib(room)} GiB of a GPU"
    for stage in plan.stages:
        if plan.peak(stage) > room:
            parts = {"parameters": sum(plan.held["parameters"].values()), "optimizer": sum(plan.held["optimizer"].values())} | stage.live
            listed = ", ".join(f"{kind} {_gib(size)}" for kind, size in sorted(parts.items(), key=lambda part: -part[1]) if size)
            degrees = " x ".join(f"{name} {world[name]}" for name in ("replicate", "shard", "tp"))
            raise UserError(
                f"the layout {degrees} with training.micro_batch_size = {world['micro_batch_size']} does not fit: {stage.name} needs "
                f"{_gib(plan.peak(stage))} GiB ({listed}), {given}; allowed: more shards, tp_size, GPUs or memory, or smaller micro-batches"
            )
    if plan.evaluation and plan.evaluation + plan.always > room:
        raise UserError(
            f"the evaluation does not fit: rank 0 then holds base and speculator whole in float32, {_gib(plan.evaluation)} GiB beside the "
            f"{_gib(plan.always)} GiB of the run, and {given}; allowed: eval.at_end = false and eval.interval = 0, and spectitan.evaluate elsewhere"
        )


def describe(plan: RunPlan, cluster: Cluster) -> str:
    """The plan as text of several lines."""
    world, lines = plan.world, []
    lines.append(
        f"{world['world_size']} GPUs, {cluster.gpus_per_node} a node: replicate {world['replicate']} x shard {world['shard']} x tp {world['tp']}; "
        f"each {cluster.gpu_memory:g} GiB, {cluster.gpu_flops:g}e12 FLOP/s, {cluster.node_bandwidth:g}e9 bytes/s in its node and "
        f"{cluster.network_bandwidth:g}e9 out of it"
    )
    lines.append(
        f"parameters: base {_count(plan.parameters['base'])}, speculator {_count(plan.parameters['speculator'])}; a step: "
        f"{world['global_batch_size']} samples of {world['seq_length']} tokens, {world['accumulation']} micro-batches of "
        f"{world['micro_batch_size']} on each GPU"
    )
    lines.append(f"\n{'GiB of a GPU':<28}{'base':>10}{'speculator':>12}")
    for kind, sizes in plan.held.items():
        lines.append(f"{kind:<28}{_gib(sizes['base']):>10}{_gib(sizes['speculator']):>12}")
    for stage in plan.stages:
        lines += _describe_stage(plan, stage, cluster)
    if plan.evaluation:
        lines.append(f"\nevaluation, rank 0: {_gib(plan.evaluation)} GiB in float32 beside {_gib(plan.always)}, of {_gib(_room(cluster))}")
    return "\n".join(lines)


def _describe_stage(plan: RunPlan, stage: StagePlan, cluster: Cluster) -> list[str]:
    floor = Floor(plan, stage, cluster)
    lines = [f"\n{stage.name}, {stage.tokens} tokens", f"{'hidden states of the base':<28}{_gib(stage.states):>10}"]
    lines.append(
        f"{'at the peak':<28}{_gib(plan.peak(stage)):>10}  of {_gib(_room(cluster))}: parameters and optimizer {_gib(plan.always)}"
    )
    lines[-1] += "".join(f", {kind} {_gib(stage.live.get(kind, 0))}" for kind in _KINDS)
    useful = stage.base_flops + stage.speculator_flops
    of_parts = f"base {stage.base_flops / stage.tokens:.3g}, speculator {stage.speculator_flops / stage.tokens:.3g}"
    lines.append(
        f"{'FLOPs a token':<28}{useful / stage.tokens:>10.3g}  {of_parts}; computed again {stage.repeated_flops / stage.tokens:.3g}"
    )
    lines.append(f"{'GB sent by a GPU':<28}{sum(stage.sent.values()) / 1e9:>10.3g}")
    lines[-1] += "  " + ", ".join(f"{name} {size / 1e9:.3g} ({floor.links[name]:.3g} s)" for name, size in stage.sent.items() if size)
    lines.append(
        f"{'floor of the step, s':<28}{floor.seconds:>10.3g}  compute {floor.compute:.3g}; {stage.tokens / floor.seconds:.3g} tokens/s"
    )
    return lines


def _room(cluster: Cluster) -> float:
    return cluster.gpu_memory * (1 - cluster.headroom) * 2**30


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}e9"
