"""Memory of the emulated chip: pointers, descriptors of global tensors, shared memory, barriers.

What is asynchronous happens as late as the rules allow. A copy into shared memory (TMA) fills its target with
NaN when it is issued and writes it when somebody waits for its barrier; a product (wgmma) reads shared memory
when it is waited for. So a missing or mistaken wait gives NaN.
"""

import math

import torch

from tests.emulation.gluon.scheduler import Fault


class Pointer:
    """Elements of a global tensor's memory; an index outside of it is a fault."""

    def __init__(self, tensor, offset=None):
        self.tensor = tensor
        self.offset = tensor.storage_offset() if offset is None else offset

    def __add__(self, more):
        return Pointer(self.tensor, self.offset + more)

    def cells(self, mask):
        """The flat memory, the wanted places in it as a tensor, and the mask in their shape."""
        storage = self.tensor.untyped_storage()
        flat = torch.empty(0, dtype=self.tensor.dtype).set_(storage)
        at = torch.as_tensor(self.offset).long()
        keep = (
            torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        )
        wanted = at[keep]
        if wanted.numel() and (wanted.min() < 0 or wanted.max() >= flat.numel()):
            raise Fault(f"elements {wanted.min()} to {wanted.max()} of a tensor with {flat.numel()}")
        return flat, at, keep


def load(pointer, mask=None, other=None):
    """gl.load."""
    flat, at, keep = pointer.cells(mask)
    found = torch.full(
        at.shape, math.nan if other is None and flat.is_floating_point() else other or 0, dtype=flat.dtype
    )
    found[keep] = flat[at[keep]]
    return found


def store(pointer, value, mask=None):
    """gl.store."""
    flat, at, keep = pointer.cells(mask)
    flat[at[keep]] = torch.as_tensor(value, dtype=flat.dtype).expand(at.shape)[keep]


class Descriptor:
    """What TMA knows of a global tensor: blocks of one shape, zeros outside."""

    def __init__(self, host):
        base = host.base.detach()
        self.view = base.as_strided(tuple(host.shape), tuple(host.strides), base.storage_offset())
        self.block_shape, self.dtype, self.layout = list(host.block_shape), host.base.dtype, host.layout
        self.block_type = self

    @property
    def nbytes(self):
        """Bytes of a block."""
        return math.prod(self.block_shape) * self.dtype.itemsize

    def _inside(self, corner):
        """Where block and tensor meet: slices of the tensor, slices of the block."""
        here, there = [], []
        for at, length, size in zip(map(int, corner), self.block_shape, self.view.shape):
            low, high = max(at, 0), max(min(at + length, size), max(at, 0))
            here.append(slice(low, high))
            there.append(slice(low - at, high - at))
        return tuple(here), tuple(there)

    def read(self, corner):
        """The block at a corner."""
        here, there = self._inside(corner)
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        block[there] = self.view[here]
        return block

    def write(self, corner, block):
        """Writes what of the block lies inside."""
        here, there = self._inside(corner)
        self.view[here] = block[there]


class Shared:
    """Shared memory, NaN at first. `stale` marks what a partition wrote and has not fenced since."""

    def __init__(self, block, data, stale):
        self.block, self.data, self.stale = block, data, stale
        self.dtype, self.shape = data.dtype, list(data.shape)

    def _view(self, change):
        return Shared(self.block, change(self.data), change(self.stale))

    def index(self, i):
        """The i-th of the outermost dimension."""
        if not 0 <= int(i) < self.shape[0]:
            raise Fault(f"slot {int(i)} of {self.shape[0]}")
        return self._view(lambda t: t[int(i)])

    def reshape(self, shape):
        """The same elements."""
        return self._view(lambda t: t.view(shape))

    def permute(self, order):
        """The same elements."""
        return self._view(lambda t: t.permute(order))

    def slice(self, start, length, dim=0):
        """A part along one dimension."""
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise Fault(f"[{start}, {start + length}) of {self.shape[dim]}")
        return self._view(lambda t: t.narrow(dim, start, length))

    def load(self, layout):
        """Into registers."""
        return self.data.clone()

    def store(self, value):
        """From registers: TMA and wgmma see it after a fence."""
        if list(value.shape) != self.shape or value.dtype != self.dtype:
            raise Fault(f"{value.dtype} {list(value.shape)} stored as {self.dtype} {self.shape}")
        self.data.copy_(value)
        self.stale.fill_(self.block.scheduler.current.number + 1)

    def seen_by(self, reader):
        """The content as TMA or wgmma reads it."""
        if self.stale.any():
            raise Fault(f"{reader} reads what was stored without fence_async_shared() since")
        return self.data


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all expected bytes are there."""

    def __init__(self, name):
        self.name, self.count, self.phase = name, 0, 0
        self.fenced = False
        self.missing, self.bytes, self.copies = 0, 0, []

    def init(self, count):
        """Before that it cannot be used."""
        self.count = self.missing = int(count)

    def arrive(self, count=1):
        """Once more than expected is a fault: it would count for the next phase."""
        if not self.fenced:
            raise Fault(f"{self.name} is used before it is initialised and fenced")
        if count > self.missing:
            raise Fault(f"{self.name}: more arrivals than {self.count} in phase {self.phase}")
        self.missing -= count
        self._end()

    def expect(self, nbytes):
        """An arrival that also announces bytes."""
        self.bytes += int(nbytes)
        self.arrive()

    def over(self, parity):
        """Whether the phase of this parity is; copies that are under way land only when that is asked."""
        if not self.fenced:
            raise Fault(f"{self.name} is waited for before it is initialised and fenced")
        if self.phase & 1 == parity and self.missing == 0:
            for land, nbytes in self.copies:
                land()
                self.bytes -= nbytes
            self.copies = []
            self._end()
        return self.phase & 1 != parity

    def _end(self):
        if self.missing == 0 and self.bytes == 0 and not self.copies:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    """An array of barriers in shared memory."""

    def __init__(self, name, barriers):
        self.name, self.barriers = name, barriers

    def index(self, i):
        """The i-th."""
        if not 0 <= int(i) < len(self.barriers):
            raise Fault(f"barrier {int(i)} of {len(self.barriers)}")
        return Barriers(self.name, [self.barriers[int(i)]])

    @property
    def one(self):
        """The barrier, where there is one."""
        if len(self.barriers) != 1:
            raise Fault("an array of barriers was used as one: index() it")
        return self.barriers[0]
