"""Two gloo processes against one: losses, gradient norms and weights, and checkpoints that move between the two."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from spectitan.config.sections import Optimizer
from spectitan.distributed import utils
from spectitan.distributed.fsdp import apply_fsdp, master_dtype, set_gradient_sync
from spectitan.distributed.mesh import init_distributed
from spectitan.errors import UserError
from spectitan.training.checkpoint import Checkpointer, module_tensors
from spectitan.training.checkpoint_reading import find_checkpoint
from spectitan.training.optimizer import build_optimizer, optimizer_tensors, step_if_finite
from tests.integration import processes

VOCAB, HIDDEN, STEPS, MICRO_BATCHES, ROWS = 13, 7, 4, 2, 6  # nothing divides by two ranks
BAD_STEP = 2  # its loss is infinite on one rank
CASES = [(dtype, freeze) for dtype in (torch.float64, torch.float32) for freeze in (True, False)]


class Readout(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def call(self, function, *args):
        return function(self, *args)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, 5), nn.GELU(), nn.Linear(5, HIDDEN)) for _ in range(2))
        self.readout = Readout()

    def forward(self, tokens):
        hidden = self.readout.call(lambda readout, tokens: readout.embedding(tokens), tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.readout.call(lambda readout, hidden: readout.norm(hidden), hidden)


class Drafter(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.emb, self.head = nn.Linear(HIDDEN, 5), nn.Embedding(VOCAB, 5), nn.Linear(5, VOCAB)

    def forward(self, states, tokens, targets, weights):
        logits = self.head(torch.tanh(self.proj(states) + self.emb(tokens)))
        return (nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


def build(dtype):
    torch.manual_seed(5)
    return Base().to(master_dtype(dtype)), Drafter().to(master_dtype(dtype))


def rows_of(step, micro_batch, rank, world_size, dtype):
    """tokens, next tokens, targets and weights of this rank's rows; over ranks and micro-batches the weights add up to 1."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    tokens, following, targets = torch.randint(0, VOCAB, (3, ROWS), generator=generator)
    supervised = torch.arange(ROWS) < (ROWS if micro_batch == 0 else 2)  # the second micro-batch has targets on rank 0 only
    weights = supervised.to(dtype) / (ROWS + 2)
    if step == BAD_STEP:
        weights[ROWS - 1] = math.inf if micro_batch == 0 else 0.0
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return tokens[mine], following[mine], targets[mine], weights[mine]


def tensors_of(model, optimizer):
    return module_tensors(model) | {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}


def train(base, drafter, freeze, dtype, steps):
    """Losses and gradient norms of some steps, and all that a checkpoint would hold."""
    model = nn.ModuleDict({"drafter": drafter} if freeze else {"drafter": drafter, "base": base})
    optimizer = build_optimizer(model, Optimizer())
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=master_dtype(dtype))
        for micro_batch in range(MICRO_BATCHES):
            set_gradient_sync([drafter], enabled=micro_batch == MICRO_BATCHES - 1)
            tokens, following, targets, weights = rows_of(step, micro_batch, utils.rank(), utils.world_size(), master_dtype(dtype))
            with torch.set_grad_enabled(not freeze):
                states = base(tokens)
            total = drafter(states, following, targets, weights)
            if not freeze:  # the base's own loss: its head is used after its forward has ended
                logits = base.readout.call(lambda readout, states: readout.head(states), states)
                total = total + (nn.functional.cross_entropy(logits, following, reduction="none") * weights).sum()
            utils.backward(total)
            loss += total.detach()
        step_norms = [utils.clip_grad_norm(module.parameters(), 0.5) for module in model.values()]
        step_if_finite(optimizer, 10, *step_norms)
        losses.append(utils.sum_over_ranks(loss).item())
        norms.append([norm.item() for norm in step_norms])
    return losses, norms, tensors_of(model, optimizer)


def full(tensors):
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone() for name, tensor in tensors.items()}


def worker(rank, folder):
    results = {}
    try:
        init_distributed("none", device="cpu")
    except UserError as error:
        results["refused"] = str(error)
    world = init_distributed("fsdp", device="cpu")
    assert (world.rank, world.world_size, world.mesh.mesh_dim_names) == (rank, 2, ("shard",))
    for dtype, freeze in CASES:
        base, drafter = build(dtype)
        apply_fsdp(base, drafter, world.mesh, dtype, freeze_base=freeze)
        losses, norms, tensors = train(base, drafter, freeze, dtype, range(STEPS))
        results[dtype, freeze] = losses, norms, full(tensors)

    # The other case's tensors, as one process saved them, and back again from two.
    checkpointer = Checkpointer(Path(folder) / "from_one")
    path = checkpointer.newest_valid()
    base, drafter = build(torch.float32)
    apply_fsdp(base, drafter, world.mesh, torch.float32, freeze_base=False)
    model = nn.ModuleDict({"drafter": drafter, "base": base})
    tensors = tensors_of(model, build_optimizer(model, Optimizer()))
    results["state"] = checkpointer.load(path, tensors)
    back = Checkpointer(Path(folder) / "from_two", keep_latest_k=1)
    back.save(1, tensors, {})
    back.save(2, tensors, {"from": 2})

    # A failure on one rank is a failure on all: nobody waits for ever.
    try:
        utils.together(lambda: (Path(folder) / "no" / "such").touch() if rank == 1 else None)
    except OSError as error:
        results["failure"] = str(error)
    try:
        utils.on_main(lambda: find_checkpoint(Path(folder) / "no"))
    except UserError as error:
        results["mistake"] = str(error)
    results["agreed"] = utils.any_rank(rank == 1), utils.any_rank(False), utils.broadcast(rank + 5), utils.gather(rank)
    torch.save(results, Path(folder) / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """Results of one unsharded process, results of both ranks of two, and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("seam")
    one = {(dtype, freeze): train(*build(dtype), freeze, dtype, range(STEPS)) for dtype, freeze in CASES}
    Checkpointer(folder / "from_one").save(STEPS, one[torch.float32, False][2], {"position": 3})
    processes.run_group(2, folder / "output", worker, str(folder))
    return one, [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.mark.parametrize("dtype, freeze", CASES)
def test_two_processes_train_as_one_does(one_and_two, dtype, freeze):
    one, two, _ = one_and_two
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    losses, norms, tensors = one[dtype, freeze]
    good = [step for step in range(STEPS) if step != BAD_STEP]
    for rank in range(2):
        losses_of_two, norms_of_two, tensors_of_two = two[rank][dtype, freeze]
        for step in good:
            assert losses_of_two[step] == pytest.approx(losses[step], rel=tolerance)
            assert norms_of_two[step] == pytest.approx(norms[step], rel=tolerance)
        assert math.isinf(losses_of_two[BAD_STEP]) and not any(map(math.isfinite, norms_of_two[BAD_STEP]))
        assert tensors_of_two.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensors_of_two[name], tensor.detach(), rtol=0, atol=tolerance)
    assert tensors["optimizer.drafter.head.weight.step"] == STEPS - 1  # the step whose loss was infinite on one rank was skipped


def test_a_checkpoint_moves_from_one_process_to_two_and_back(one_and_two):
    one, two, folder = one_and_two
    saved = one[torch.float32, False][2]
    assert two[0]["state"] == two[1]["state"] == {"step": STEPS, "position": 3}
    checkpointer = Checkpointer(folder / "from_two")
    assert [path.name for path in sorted(checkpointer.folder.iterdir())] == ["step-00000002"]
    assert len(list(checkpointer.newest_valid().glob("*.distcp"))) == 2
    restored = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    assert checkpointer.load(checkpointer.newest_valid(), restored) == {"step": 2, "from": 2}
    assert all(torch.equal(restored[name], saved[name]) for name in saved)


def test_ranks_agree(one_and_two):
    for results in one_and_two[1]:
        assert "parallelism.sharding_strategy = none takes one process, 2 were started" in results["refused"]
        assert "No such file" in results["failure"]
        assert "no checkpoint here" in results["mistake"]  # rank 0's alone
        assert results["agreed"] == (True, False, 5, [0, 1])
