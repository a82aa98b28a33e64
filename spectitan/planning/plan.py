"""What a run asks of a cluster."""

from typing import NamedTuple


class StagePlan(NamedTuple):
    """One stage's optimizer step."""

    name: str
    tokens: int  # over all ranks
    base_flops: int  # useful, over all ranks; sampling included
    speculator_flops: int
    repeated_flops: int  # of activation checkpointing
    live: dict[str, int]  # bytes of a rank at the peak, parameters and optimizer aside: gradients, states, gathered, activations
    states: int  # bytes of the hidden states of a micro-batch
    sent: dict[str, int]  # bytes that a rank sends in a step, by dimension

    @property
    def peak(self) -> int:
        return sum(self.live.values())


class RunPlan(NamedTuple):
    """Sizes are bytes of the rank that holds most."""

    world: dict[str, int]  # world_size, replicate, shard, tp; micro_batch_size, accumulation, global_batch_size
    parameters: dict[str, int]  # how many, of base and speculator in whole
    held: dict[str, dict[str, int]]  # parameters, gradients, optimizer -> base, speculator
    stages: list[StagePlan]
    evaluation: int  # the base and its speculator in float32 on rank 0; 0: nothing is measured there
    speculator_dims: tuple[int, int]  # copies and shards

    @property
    def always(self) -> int:
        return sum(sum(self.held[kind].values()) for kind in ("parameters", "optimizer"))

    def peak(self, stage: StagePlan) -> int:
        return self.always + stage.peak
