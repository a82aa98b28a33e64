"""A base split over ranks, against the whole one: states, both ends, losses on ragged rows, gradients; and what each rank holds and computes."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectitan.distributed.fsdp import apply_fsdp
from spectitan.distributed.mesh import init_distributed
from spectitan.distributed.tensor_parallel import apply_tp, check_tensor_parallel
from spectitan.errors import UserError
from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.families import arch_of, build_on_meta
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.llama import LlamaConfig
from spectitan.models.mixtral import MixtralConfig
from spectitan.models.registry import fill_model
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss
from spectitan.objectives.vocab_parallel import rows_of
from tests.integration import processes

RANKS, ROWS, LENGTH = 4, 2, 5  # of each rank
SUPERVISED = (3, 0, 7, 5)  # rows with a target, of each rank
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "head_dim": 6}
CONFIGS = {
    "plain": LlamaConfig(37, **SHAPE),
    "two kv heads": LlamaConfig(7, **SHAPE, num_kv_heads=2, tie_embeddings=True),
    "biases and norms": LlamaConfig(37, **SHAPE, num_kv_heads=2, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    "mixtral": MixtralConfig(37, **SHAPE, num_kv_heads=4, num_experts=3),
    "gpt_bigcode": GPTBigCodeConfig(37, 16, num_layers=2, num_heads=4, intermediate_size=24, max_position_embeddings=13),
    "one kv head": LlamaConfig(41, **SHAPE, num_kv_heads=1, qkv_bias=True),
}
LAYOUTS = {"tp 2": {"sharding_strategy": "fsdp", "tp_size": 2}, "tp 4": {"sharding_strategy": "tp", "tp_size": 4}}
CASES = [(layout, config) for layout in LAYOUTS for config in CONFIGS]


class Work(TorchDispatchMode):
    """Multiply-adds of this rank's own products: of the whole tensors that a DTensor stands for, nothing is counted."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.counts["linear"] += left.shape[0] * left.shape[1] * right.shape[1]
        elif name.startswith("_scaled_dot_product"):
            queries, keys = args[:2]
            self.counts["attention"] += 2 * queries.numel() * keys.shape[2]
        return function(*args, **(kwargs or {}))


def loss_of(base, own_head, tokens, documents, supervised: list[int], per_row: int) -> tuple[torch.Tensor, tuple]:
    """A scalar that uses all that drafters, objectives and decoding use of a base; and what they see of it."""
    states = base(tokens, documents, taps=(1,))
    embedded, logits = base.readout.embed(tokens), base.readout.logits(states.final[:, -1])
    final = states.final.flatten(0, 1)
    rows = torch.cat([block * per_row + torch.arange(count) for block, count in enumerate(supervised)])
    targets, row_weights = tokens.flatten()[rows], torch.full((len(rows),), 1 / sum(SUPERVISED), dtype=torch.float64)

    def losses(readout, hidden):
        """Of the base's head against the text, itself divided against a divided teacher, and a drafter's own head against that; and
        one that gathers both heads."""
        head = readout.head.weight
        teacher = Teacher(2 * final.detach(), head.detach(), rows // 2 * 2)  # most rows twice
        own = fused_linear_loss(hidden.sin(), own_head, row_weights, loss="kl_div", targets=targets, teacher=teacher, chunk_rows=3)
        ce = fused_linear_loss(hidden, head, row_weights, loss="ce", targets=targets, chunk_rows=2)
        mixture = '{"ce": 0.3, "jsd": 0.7}'
        mixed = fused_linear_loss(hidden.cos(), head, row_weights, loss=mixture, targets=targets, teacher=teacher, chunk_rows=2)
        return ce, fused_linear_loss(hidden, head, row_weights, loss="kl_div", targets=targets, teacher=teacher), own, mixed

    (ce, ce_stats), (kl, kl_stats), (own, own_stats), (mixed, mixed_stats) = base.readout.call(losses, final[rows])
    total = 0.7 * ce + 0.3 * kl + 0.2 * own + 0.4 * mixed + (states.taps[0].pow(3).sum() + embedded.pow(2).sum() + logits.sin().sum()) / 10
    return total, (states.final, states.taps[0], embedded, logits, ce_stats, kl_stats, own_stats, mixed_stats)


def head_of_a_drafter(config: DecoderConfig) -> torch.Tensor:
    """[vocab, hidden], which every rank has."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(config.vocab_size, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()


def worker(rank: int, folder: str) -> None:
    results = {}
    for layout, keys in LAYOUTS.items():
        world = init_distributed(**keys, device="cpu")
        for name, config in CONFIGS.items():
            results[layout, name] = of_rank(world, rank, config)
    torch.save(results, f"{folder}/{rank}.pt")


def of_rank(world, rank: int, config: DecoderConfig) -> dict:
    base = build_on_meta(config).double()
    apply_tp(base, arch_of(config), world.tp_mesh)
    elements = sum(parameter.to_local().numel() for parameter in base.parameters())
    apply_fsdp(base, nn.Module(), world.mesh, torch.float64, freeze_base=False)
    base.to_empty(device="cpu")
    fill_model(base, init="random", seed=3)
    tokens, documents = (rows.split(ROWS)[rank] for rows in text(config))
    own_head = head_of_a_drafter(config)
    total, seen = loss_of(base, own_head, tokens, documents, [SUPERVISED[rank]], ROWS * LENGTH)
    total.backward()
    gradients = {parameter: value.grad.full_tensor() for parameter, value in base.named_parameters()}
    dist.all_reduce(own_head.grad)  # as FSDP does over all ranks
    gradients["own_head"] = own_head.grad
    ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(4))[: config.vocab_size // 2]
    gathered = base.readout.call(lambda readout, ids: rows_of(readout.head.weight, ids), ids)
    assert torch.equal(gathered, base.readout.head.weight.detach().full_tensor()[ids])
    with torch.no_grad(), Work() as forward:
        base(tokens, documents)
    seen = [tensor.detach().clone() for tensor in seen]  # what a collective has returned is no plain tensor before it is used
    return {"seen": seen, "total": total.detach(), "gradients": gradients, "elements": elements, "work": dict(forward.counts)}


def text(config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (RANKS * ROWS, LENGTH), generator=generator)
    return tokens, (torch.arange(LENGTH) >= torch.randint(1, LENGTH, (RANKS * ROWS, 1), generator=generator)).long()


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("tp")
    processes.run_group(RANKS, folder / "output", worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def whole_base(config: DecoderConfig) -> Decoder:
    base = build_on_meta(config).double().to_empty(device="cpu")
    fill_model(base, init="random", seed=3)
    return base


@pytest.mark.parametrize("layout, name", CASES)
def test_a_split_base_equals_the_whole_one(split, layout, name):
    base, own_head = whole_base(CONFIGS[name]), head_of_a_drafter(CONFIGS[name])
    total, seen = loss_of(base, own_head, *text(CONFIGS[name]), list(SUPERVISED), ROWS * LENGTH)
    total.backward()
    of_ranks = [results[layout, name] for results in split]
    torch.testing.assert_close(sum(result["total"] for result in of_ranks), total, rtol=1e-12, atol=0)
    for ours, theirs in zip(zip(*(result["seen"] for result in of_ranks)), seen):
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-9, atol=1e-12)
    for parameter, value in (*base.named_parameters(), ("own_head", own_head)):
        for result in of_ranks:
            torch.testing.assert_close(result["gradients"][parameter], value.grad, rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("layout, name", CASES)
def test_a_rank_holds_and_computes_its_share(split, layout, name):
    config, tp_size = CONFIGS[name], LAYOUTS[layout]["tp_size"]
    base = whole_base(config)
    kv_heads = getattr(config, "num_kv_heads", 1)
    repeated = kv_heads < tp_size
    divided = replicated = kv = 0
    for parameter, value in base.named_parameters():
        if "norm" in parameter or parameter.endswith(("o_proj.bias", "down_proj.bias", "mlp.gate.weight")):  # the router is whole
            replicated += value.numel()
        elif repeated and ("k_proj" in parameter or "v_proj" in parameter):
            kv += value.numel()
        else:  # padded: each rank's share of the rows or columns is rounded up
            divided += (
                -(-value.shape[0] // tp_size) * value[0].numel()
                if parameter.startswith(("readout", "positions"))
                else value.numel() // tp_size
            )
    with torch.no_grad(), Work() as whole:
        base(*text(config))
    extra = 0  # multiply-adds of a row in a layer
    if repeated:  # one head's keys and values, not a share of them
        extra += (1 - kv_heads / tp_size) * 2 * config.head_dim * config.hidden_size
    if name == "mixtral":  # the router
        extra += (1 - 1 / tp_size) * config.num_experts * config.hidden_size
    extra *= config.num_layers * tp_size * ROWS * LENGTH
    for results in split:
        result = results[layout, name]
        assert result["elements"] <= divided + replicated + kv
        assert result["work"]["attention"] == whole.counts["attention"] / RANKS
        assert result["work"]["linear"] == pytest.approx(whole.counts["linear"] / RANKS + extra, rel=1e-12)
    assert max(results[layout, name]["elements"] for results in split) == divided + replicated + kv


@pytest.mark.parametrize(
    "changes, tp_size, message",
    [
        ({}, 3, "tp_size = 3: the base's num_heads = 4 does not divide by it"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, "tp_size = 2: the base's num_kv_heads = 3; allowed: a divisor or a multiple of that"),
        ({"vocab_size": 6}, 4, "tp_size = 4: the base's vocab_size = 6 leaves the last of them nothing"),
        ({"intermediate_size": 25}, 4, "tp_size = 4: the base's intermediate_size = 25 does not divide by it"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(changes, tp_size, message):
    with pytest.raises(UserError, match=f"^parallelism.{message}"):
        check_tensor_parallel("embedllama", LlamaConfig(**{"vocab_size": 37} | SHAPE | changes), tp_size)
    with pytest.raises(UserError, match="tp_size = 2: base.arch = hf cannot be split; allowed: embedllama"):
        check_tensor_parallel("hf", LlamaConfig(37, **SHAPE), 2)
    check_tensor_parallel("hf", LlamaConfig(37, **SHAPE), 1)
