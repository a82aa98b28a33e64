"""What a step holds and sends, counted on the meta device: tensors have shapes there and no memory."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectitan.models import packed_attention


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta tensors that operations make for as long as they live, by kind; and of tensor parallelism's collectives.

    Attributes:
        kind: of what is made from here on.
        live: bytes by kind.
        peak: `live` when their sum was largest.
        sent: bytes that a rank sends in a ring, by what it is for.
    """

    def __init__(self):
        super().__init__()
        self.kind = "activations"
        self.live, self.peak, self.sent = Counter(), Counter(), Counter()
        self._total = self._largest = self._highest = 0
        self._kinds: dict[int, str | None] = {}  # of each storage; None: it is counted elsewhere

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors will come here
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("_c10d_functional", "c10d"):
            self._count_collective(function.overloadpacket.__name__.strip("_"), args, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor)
        return result

    def restart(self) -> None:
        """Takes what lives now for the peak."""
        self._largest, self.peak = self._total, self.live.copy()
        self.sent.clear()

    def measure(self, work: Callable) -> tuple[object, int, Counter]:
        """What `work` returns, the most bytes that it held beyond those before it, and what it sent."""
        before, highest, sent = self._total, self._highest, self.sent.copy()
        self._highest = before
        result = work()
        needed, self._highest = self._highest - before, max(highest, self._highest)
        return result, needed, self.sent - sent

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """What is there already, and counted elsewhere."""
        for tensor in tensors:
            self._kinds[_local(tensor).untyped_storage()._cdata] = None

    def rename(self, tensor: Tensor, kind: str) -> None:
        key = _local(tensor).untyped_storage()._cdata
        if self._kinds[key] is not None:
            size = _local(tensor).untyped_storage().nbytes()
            self.live[self._kinds[key]] -= size
            self.live[kind] += size
            self._kinds[key] = kind

    @contextlib.contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def hold(self, elements: int, dtype: torch.dtype, kind: str) -> Tensor:
        """Memory that counts until it is dropped. While this is on."""
        with self.of_kind(kind):
            return torch.empty(elements, dtype=dtype, device="meta")

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return
        self._kinds[key] = self.kind
        weakref.finalize(storage, self._drop, key, size).atexit = False
        self.live[self.kind] += size
        self._total += size
        self._highest = max(self._highest, self._total)
        if self._total > self._largest:
            self._largest, self.peak = self._total, self.live.copy()

    def _drop(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size
        self._total -= size

    def _count_collective(self, name: str, args: tuple, result) -> None:
        """Collectives that operations make by themselves are tensor parallelism's; the group's size is their second argument or last but one."""
        if name == "all_gather_into_tensor":
            self.sent["tp"] += _ring(_bytes(result), args[1])
        elif name == "reduce_scatter_tensor":
            self.sent["tp"] += _ring(_bytes(args[0]), args[2])
        elif name == "allreduce" and args[0][0].is_meta:
            self.sent["tp"] += 2 * _ring(_bytes(args[0][0]), torch.distributed.ProcessGroup.unbox(args[1]).size())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ring(whole: int, ranks: int) -> int:
    """Bytes that each rank sends to gather or to reduce and scatter so many."""
    return whole * (ranks - 1) // ranks


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention with the memory of the fused kernels, which keep no scores. PyTorch itself writes them out on the meta device."""
    originals = F.scaled_dot_product_attention, packed_attention.attend
    F.scaled_dot_product_attention = lambda queries, keys, values, *args, **kwargs: _Fused.apply(queries, keys, values)
    packed_attention.attend = lambda queries, keys, values, mask: (_Fused.apply(queries, keys, values), None)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, packed_attention.attend = originals


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values):
        attended = queries.new_empty(*queries.shape[:-1], values.shape[-1])
        log_sum_exp = queries.new_empty(queries.shape[:-1], dtype=torch.promote_types(queries.dtype, torch.float32))
        ctx.save_for_backward(queries, keys, values, attended, log_sum_exp)
        return attended

    @staticmethod
    def backward(ctx, d_attended):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
