"""Hidden states from a cache, on a GPU: nothing waits for the device, and they are the base's own."""

import pytest
import torch

from spectitan.config.sections import Data
from spectitan.data.loader import build_loader
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.states.cache import open_cache
from spectitan.states.cached import CachedStates
from spectitan.states.online import OnlineStates
from tests.unit.data_fixtures import ByteTokenizer, text, write_texts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_filling_and_reading_do_not_wait(tmp_path, dtype):
    device, taps = torch.device("cuda"), (1, 2)
    base = EmbedLLaMA(LlamaConfig(vocab_size=258, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2))
    base.init_weights(torch.Generator().manual_seed(0))
    base.requires_grad_(False).to(device, torch.bfloat16)
    write_texts(tmp_path / "text", {f"{number}.txt": text(number) for number in range(7)})
    data = Data(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), seq_length=61)
    loader = build_loader(data, ByteTokenizer(), seed=3, global_batch_size=2, micro_batch_size=2)
    batches = [next(loader) for _ in range(5)]
    online = OnlineStates(base, taps, frozen=True)

    def source(make: bool) -> CachedStates:
        store = open_cache(tmp_path / "states", base="base", layers=taps, hidden_size=64, dtype=dtype, make=make)
        keys = {"online": online, "keep": True} if make else {}
        return CachedStates(store, loader.samples, taps, base.readout, torch.bfloat16, device, **keys)

    def passed(states: CachedStates) -> list:
        found = []
        for batch in batches:
            begun = states.begin(batch).to(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                given = states.states(begun)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append([tensor.float().cpu() for tensor in (*given.taps, given.final)])
        states.close()
        return found

    passed(source(make=True))
    for batch, found in zip(batches, passed(source(make=False))):
        expected = online.states(batch.to(device))
        for ours, theirs in zip(found, (*expected.taps, expected.final)):
            theirs = theirs.float().cpu()
            here = batch.document_ids >= 0
            step = theirs.abs().amax(-1, keepdim=True) / 127 if dtype == "int8" else torch.zeros_like(theirs[..., :1])
            assert ((ours - theirs).abs() <= step * 0.51 + (theirs.abs() * 0.004 if dtype == "int8" else 0))[here].all()
