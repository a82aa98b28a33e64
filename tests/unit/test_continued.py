"""Stage 2: what is cut, sampled and supervised, against plain decoding and against fms-fsdp's stage 2 written down."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from spectitan.config.sections import Objective, Stage2
from spectitan.decoding.continuation import continue_prompts
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampling, Stream
from spectitan.distributed.fsdp import register_fsdp_forward_method, shard_frozen
from spectitan.errors import UserError
from spectitan.keyed_random import uniform
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.states import continued
from spectitan.states.continued import ContinuedStates, prompts_per_sample
from spectitan.states.online import OnlineStates
from spectitan.types import TokenBatch

VOCAB, PROMPT, NEW, SEED = 53, 7, 11, 3
CONFIG = Stage2(start_step=0, prompt_length=PROMPT, seq_length=NEW, top_k=5)


@pytest.fixture(scope="module")
def base() -> EmbedLLaMA:
    return build()


def build(**options) -> EmbedLLaMA:
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1}
    model = EmbedLLaMA(LlamaConfig(**shape | options, max_position_embeddings=40))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.readout.embedding.weight *= 10
        model.readout.head.weight *= 10  # far from uniform
    return model.to(torch.float64).requires_grad_(False)


def make_batch(rows: int, seq_length: int, first: int = 0, document: int = 10**9, padding: int = 0) -> TokenBatch:
    """Samples first .. of the global order, in documents of one length; the last row ends in padding."""
    tokens = torch.stack([(uniform(9, row, torch.arange(seq_length)) * VOCAB).long() for row in range(first, first + rows)])
    documents = torch.arange(rows)[:, None] * seq_length + torch.arange(seq_length) // document
    documents[-1, seq_length - padding :] = -1
    index = torch.arange(first, first + rows)
    return TokenBatch(tokens, documents >= 0, documents, index, index + (1 << 40))


def source_of(base: EmbedLLaMA, prompts: int = 2, steps: int = 3, config: Stage2 = CONFIG, first_sample: int = 0) -> ContinuedStates:
    online = OnlineStates(base, (), frozen=True)
    return ContinuedStates(online, config, first_sample=first_sample, prompts=prompts, steps=steps, seed=SEED)


# ---- what is supervised ----


@pytest.mark.parametrize(("n", "tied"), [(1, False), (3, True), (5, False), (10, True)])
def test_pairs_and_loss_are_those_of_fms_fsdp(base, n, tied):
    """Its stage2_loss: embeds[:, -S:-n] of a generation whose first state is the prompt's last, tokens y[:, :-1], targets y[:, i+1:]."""
    speculator = MlpSpeculator(MlpConfig(n_speculator_heads=n, speculator_width=13, tie_weights=tied), base.config, Objective())
    speculator.init_weights(torch.Generator().manual_seed(1))
    speculator.double()
    source = source_of(base, steps=n)
    batch = source.begin(make_batch(3, 31))
    targets = speculator.align(batch)

    starts = [(row, j) for row in range(6) for j in range(NEW - n)]
    length = PROMPT + NEW
    expected = {(row * length + PROMPT - 1 + j, step, row * length + PROMPT + j + step) for row, j in starts for step in range(n)}
    assert set(zip(targets.state.tolist(), targets.step.tolist(), targets.teacher.tolist())) == expected
    assert targets.counts.tolist() == [6 * (NEW - n)] * n == [len(targets.step) // n] * n

    found = speculator(batch, source.states(batch), targets, targets.counts, base.readout)
    y, states = batch.tokens[:, PROMPT:], base(batch.tokens).final
    embeds = states[:, PROMPT - 1 :][:, :NEW][:, : NEW - n].flatten(0, 1)
    consumed = torch.stack([y[:, i : i + NEW - n].flatten() for i in range(n)])
    heads = [speculator.head[min(i, len(speculator.head) - 1)] for i in range(n)]
    hidden = speculator.unroll(embeds, consumed)
    losses = [F.cross_entropy(heads[i](hidden[i]), y[:, i + 1 : i + 1 + NEW - n].flatten()) for i in range(n)]
    torch.testing.assert_close(found.total, sum(losses), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sums[:, 0] / targets.counts, torch.stack(losses), rtol=1e-12, atol=0)


def test_what_comes_before_stage_2_is_left_alone(base):
    source = source_of(base, first_sample=6)
    before, after = make_batch(2, 31, first=4), make_batch(2, 31, first=6)
    assert source.begin(before) is before
    torch.testing.assert_close(source.states(before).final, base(before.tokens, before.document_ids).final, rtol=0, atol=0)
    begun = source.begin(after)
    assert begun.tokens.shape == (4, PROMPT + NEW)
    torch.testing.assert_close(source.states(begun).final, base(begun.tokens).final, rtol=0, atol=0)
    assert begun.index.tolist() == [12, 13, 14, 15] and begun.sample_ids.tolist() == after.sample_ids.repeat_interleave(2).tolist()
    assert begun.document_ids.tolist() == [[row] * (PROMPT + NEW) for row in range(4)]
    assert begun.loss_mask.sum(1).tolist() == [NEW] * 4


# ---- what is cut from the text ----


def windows_of(batch: TokenBatch, row: int, part: range) -> list[tuple[list[int], list[int]]]:
    """Every window of a part: its tokens and its documents."""
    starts = range(part.start, part.stop - PROMPT + 1)
    return [(batch.tokens[row, s : s + PROMPT].tolist(), batch.document_ids[row, s : s + PROMPT].tolist()) for s in starts]


@pytest.mark.parametrize(("seq_length", "document", "padding"), [(31, 9, 0), (31, 7, 3), (29, 5, 0), (47, 13, 19), (14, 10**9, 5)])
def test_prompts_are_windows_of_one_document_where_there_are_any(base, seq_length, document, padding):
    source, seen = source_of(base), set()
    for first in range(0, 40, 4):
        batch = make_batch(4, seq_length, first, document, padding)
        begun = source.begin(batch)
        part = seq_length // 2
        for place in range(8):
            row, begin = place // 2, place % 2 * part
            windows = windows_of(batch, row, range(begin, begin + part))
            whole = [tokens for tokens, documents in windows if -1 not in documents]
            of_one = [tokens for tokens, documents in windows if documents[0] == documents[-1] >= 0]
            prompt = begun.tokens[place, :PROMPT].tolist()
            assert prompt in (of_one or whole or [windows[0][0]])
            assert bool(begun.loss_mask[place].any()) == bool(whole)  # a prompt with padding is not trained on
            if not padding:
                seen.add(([tokens for tokens, _ in windows].index(prompt), place % 2))
        source._awaited = 0
    if not padding:  # by key, not always the same place
        assert len(seen) > 2


def test_samples_as_long_as_their_prompts_are_cut_as_fms_fsdp_cuts_them(base):
    batch = make_batch(3, 3 * PROMPT)
    begun = source_of(base, prompts=3).begin(batch)
    assert torch.equal(begun.tokens[:, :PROMPT], batch.tokens.reshape(9, PROMPT))


# ---- what is sampled ----


@pytest.mark.parametrize("rule", [(1.0, 10), (0.7, 3), (1.3, 0), (1.0, 1000), (0.0, 0), (1.0, 1)])
def test_tokens_are_those_of_plain_decoding_with_the_same_numbers(base, rule):
    prompts, rule = make_batch(5, PROMPT).tokens, Sampling(*rule, seed=8)
    keys = torch.tensor([4, 0, 99, 7, 10**12])
    expected = generate_plain(base, prompts.tolist(), NEW, sampling=rule, row_keys=keys.tolist())
    quantiles = uniform(8, Stream.TEXT, keys[:, None], torch.arange(NEW), 0)
    text = continue_prompts(base, prompts, quantiles, rule)
    assert torch.equal(text[:, :PROMPT], prompts)
    assert text[:, PROMPT:].tolist() == expected.tokens


@pytest.mark.parametrize("top_k", [1, 4, 0, 17])
def test_every_quantile_draws_its_share(top_k):
    """Over evenly spaced quantiles each token comes as often as it is likely, those outside the top k never."""
    logits = torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    quantiles = (torch.arange(10_000) + 0.5) / 10_000
    tokens = Sampling(0.8, top_k).choose(logits.expand(10_000, 17), quantiles)
    kept = logits.argsort(descending=True)[: top_k or 17]
    expected = torch.zeros(17, dtype=torch.float64).scatter(0, kept, (logits[kept] / 0.8).softmax(0))
    counts = torch.bincount(tokens, minlength=17)
    assert (counts / 10_000 - expected).abs().max() < 2e-4 and (counts[expected == 0] == 0).all()


def test_of_tokens_that_tie_exactly_top_k_can_be_drawn():
    quantiles = (torch.arange(100) + 0.5) / 100
    tokens = Sampling(1.0, 3).choose(torch.zeros(100, 9), quantiles)
    assert torch.bincount(tokens).sort(descending=True).values[:3].tolist() == [34, 33, 33]


def test_text_hangs_on_seed_and_sample_alone(base):
    """Micro-batches of any size give the same tokens; the end-of-text token is one like any other."""
    ends = build(eos_token_id=tuple(range(VOCAB)))
    batch = make_batch(6, 31)
    together = source_of(base).begin(batch).tokens
    for size in (1, 2, 3):
        source = source_of(ends)
        parts = [source.begin(TokenBatch(*(tensor[i : i + size] for tensor in batch[:5]))).tokens for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), together)
    later = source_of(base).begin(batch._replace(index=batch.index + 6)).tokens
    assert (later[:, PROMPT:] != together[:, PROMPT:]).any(1).all()
    other = ContinuedStates(OnlineStates(base, (), True), CONFIG, first_sample=0, prompts=2, steps=3, seed=SEED + 1)
    assert (other.begin(batch).tokens != together).any(1).all()


def test_the_host_never_waits_while_tokens_are_sampled():
    """On the meta device nothing has a value: whoever asks for one fails."""
    base = build().to("meta")
    prompts, quantiles = torch.zeros(4, PROMPT, dtype=torch.int64, device="meta"), torch.zeros(4, 2, dtype=torch.float64, device="meta")
    assert continue_prompts(base, prompts, quantiles, Sampling(1.0, 5)).shape == (4, PROMPT + 2)


def test_no_tensor_over_the_vocabulary_but_one_row_of_logits_a_prompt(base):
    head = base.readout.head.weight

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and result.data_ptr() != head.data_ptr():
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        source_of(base).begin(make_batch(3, 31))
    assert largest.elements == 6 * VOCAB


# ---- a sharded base ----


def test_a_sharded_base_is_gathered_once_and_kept_until_the_last_states(base, one_rank_mesh):
    sharded = build()
    shard_frozen(sharded, [*sharded.layers, sharded.readout], one_rank_mesh, torch.float64)
    register_fsdp_forward_method(sharded.readout, "call")

    def kept() -> list[bool]:
        return [not isinstance(parameter, DTensor) for parameter in sharded.parameters()]

    source, plain = source_of(sharded), source_of(base)
    for step in range(2):
        samples = [make_batch(2, 31, first=6 * step + 2 * i) for i in range(3)]
        assert not any(kept())
        batches = []
        for sample in samples:
            batches.append(source.begin(sample))
            assert all(kept())
            assert torch.equal(batches[-1].tokens, plain.begin(sample).tokens)
        for left, batch in zip((2, 1, 0), batches):
            torch.testing.assert_close(source.states(batch).final, plain.states(batch).final, rtol=0, atol=0)
            assert all(kept()) if left else not any(kept())
    text = make_batch(2, 31)  # and then it is gathered unit by unit as before
    torch.testing.assert_close(sharded(text.tokens).final, base(text.tokens).final, rtol=0, atol=0)
    assert not any(kept())


@pytest.mark.parametrize("where", ["gather_frozen", "continue_prompts"])
def test_what_does_not_fit_is_said(base, monkeypatch, where):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(continued, where, full)
    with pytest.raises(UserError, match=r"^stage2: .*4 prompts.*training.micro_batch_size.*parallelism.sharding_strategy = tp$"):
        source_of(base).begin(make_batch(2, 31))


# ---- what it costs, and what is refused ----


def test_work_is_what_is_multiplied():
    base = build(hidden_size=64, intermediate_size=200, num_heads=2, num_kv_heads=2).float()
    source = source_of(base)
    with FlopCounterMode(display=False) as counter:
        source.states(source.begin(make_batch(7, 31)))
    by_name = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in by_name.items() if "attention" not in name)
    length = PROMPT + NEW  # attention: 1 + ... + length keys for the states; one less while sampling, the last token is not fed
    attention = 2 * 2 * 64 * 2 * 14 * (sum(range(length)) + sum(range(length + 1)))
    assert source.work(7) == (14 * length, products + attention)


@pytest.mark.parametrize(
    ("keys", "data_seq_length", "prompts"),
    [({}, 64, 1), ({"batch_size": 8}, 64, 1), ({"batch_size": 24, "prompt_length": 21}, 64, 3), ({"seq_length": 4}, 64, 1)],
)
def test_prompts_per_sample(keys, data_seq_length, prompts):
    assert prompts_per_sample(Stage2(**keys), 8, data_seq_length, 320, 3) == prompts


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 12}, r"stage2.batch_size = 12; allowed: -1, or a multiple of training.global_batch_size = 8"),
        ({"batch_size": 4}, r"stage2.batch_size = 4; allowed"),
        ({"batch_size": 24, "prompt_length": 22}, r"data.seq_length = 64: .* 3 prompts of stage2.prompt_length = 22 .* at least 66$"),
        ({"prompt_length": 65}, r"data.seq_length = 64: .* at least 65$"),
        ({"seq_length": 257}, r"stage2.prompt_length \+ stage2.seq_length = 321: the base allows at most 320$"),
        ({"seq_length": 3}, r"stage2.seq_length = 3: the speculator looks 3 tokens ahead; allowed: at least 4$"),
    ],
)
def test_what_does_not_fit_is_refused(keys, message):
    with pytest.raises(UserError, match=f"^{message}"):
        prompts_per_sample(Stage2(**keys), 8, 64, 320, 3)
