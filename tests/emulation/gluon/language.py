"""Gluon's language on PyTorch tensors: `launch` runs the source of a kernel, block after block.

The function under a kernel's decorator is run as it stands; only what its globals name is exchanged:
`gl` and `tl`, `tma`, `mbarrier`, the wgmma functions, other kernels' functions, constexprs. Scalars are
tensors without dimensions, 32 bits wide as on the chip. Layouts are built and not looked at: that they fit
together is what the ahead-of-time compiler shows.
"""

import types

import torch
import triton.language as tl
from triton.experimental.gluon import language as real
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.emulation.gluon.memory import Barrier, Barriers, Descriptor, Pointer, Shared, load, store
from tests.emulation.gluon.scheduler import Fault, Scheduler


class Token:
    """A product under way; whoever computes with it instead of waiting gets a TypeError."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value = None

    def finish(self):
        """Reads the operands now, and not before."""
        left = self.a.seen_by("wgmma") if isinstance(self.a, Shared) else self.a
        product = left.float() @ self.b.seen_by("wgmma").float()
        acc = self.acc.value if isinstance(self.acc, Token) else self.acc
        self.value = product + acc if self.use_acc else product


class Block:
    """One program: its shared memory and barriers, and the language as its partitions see it."""

    def __init__(self, program, seed):
        self.program = program
        self.scheduler = Scheduler(seed)
        self.memory, self.barriers, self.functions = [], [], {}
        self.gl = self._language()
        self.mbarrier = types.SimpleNamespace(
            MBarrierLayout=hopper.mbarrier.MBarrierLayout, init=lambda b, count: b.one.init(count),
            expect=self._expect, arrive=self._arrive, wait=self._wait,
        )  # fmt: skip
        self.tma = types.SimpleNamespace(
            async_copy_global_to_shared=self._copy_in, async_copy_shared_to_global=self._copy_out,
            store_wait=self._store_wait,
        )  # fmt: skip
        self.hopper = {
            "fence_async_shared": self._fence,
            "warpgroup_mma": self._mma,
            "warpgroup_mma_wait": self._mma_wait,
        }

    def finish(self):
        """Nothing may be left under way."""
        self.scheduler.kernel.finish()
        for barrier in self.barriers:
            if barrier.copies:
                raise Fault(f"{barrier.name} ends with copies that nobody waited for")

    # Barriers and copies.

    def _expect(self, barrier, nbytes, pred=True):
        self.scheduler.pause()
        barrier.one.expect(nbytes)

    def _arrive(self, barrier, *, count=1, pred=True):
        self.scheduler.pause()
        barrier.one.arrive(count)

    def _wait(self, barrier, phase, pred=True, deps=()):
        one, parity = barrier.one, int(phase)
        self.scheduler.pause()
        if not one.over(parity):
            self.scheduler.pause(
                lambda: one.over(parity), f"{one.name}, parity {parity}, in phase {one.phase}"
            )

    def _copy_in(self, descriptor, corner, barrier, target, pred=True):
        if target.shape != descriptor.block_shape:
            raise Fault(f"a block of {descriptor.block_shape} copied to {target.shape}")
        if not barrier.one.fenced:
            raise Fault(f"{barrier.one.name} is used before it is initialised and fenced")
        self.scheduler.pause()
        target.data.fill_(float("nan"))
        corner = [int(x) for x in corner]

        def land():
            target.data.copy_(descriptor.read(corner))

        barrier.one.copies.append((land, descriptor.nbytes))

    def _copy_out(self, descriptor, corner, source):
        corner = [int(x) for x in corner]
        self.scheduler.current.stores.append(
            lambda: descriptor.write(corner, source.seen_by("TMA").view(descriptor.block_shape))
        )

    def _store_wait(self, pendings):
        stores = self.scheduler.current.stores
        while len(stores) > pendings:
            stores.pop(0)()

    def _fence(self, cluster=False):
        own = self.scheduler.current.number + 1
        for shared in self.memory:
            shared.stale[shared.stale == own] = 0
        for barrier in self.barriers:
            barrier.fenced = barrier.fenced or barrier.count > 0

    # Products.

    def _mma(self, a, b, acc, *, use_acc=True, precision=None, is_async=False):
        if not isinstance(b, Shared):
            raise Fault("the right operand of wgmma lies in shared memory")
        shape = [a.shape[0], b.shape[1]]
        if a.shape[1] != b.shape[0] or shape[0] % 64 or list(_shape(acc)) != shape:
            raise Fault(f"wgmma of {list(a.shape)}, {b.shape} and {list(_shape(acc))}")
        token = Token(a, b, acc, use_acc)
        if not is_async:
            token.finish()
            return token.value
        self.scheduler.current.inflight.append(token)
        self.scheduler.pause()
        return token

    def _mma_wait(self, num_outstanding=0, deps=None):
        self.scheduler.pause()
        inflight = self.scheduler.current.inflight
        while len(inflight) > num_outstanding:
            token = inflight.pop(0)
            token.finish()
            if not isinstance(token.a, Shared) and not any(token.a is dep for dep in deps):
                raise Fault(
                    "a left operand in registers must be among the deps of the wait that ends its product"
                )
        if any(isinstance(dep, Token) and dep.value is None for dep in deps):
            raise Fault(f"a wait for all but {num_outstanding} products leaves one of its deps under way")
        found = tuple(dep.value if isinstance(dep, Token) else dep for dep in deps)
        return found[0] if len(found) == 1 else found

    # The rest of the language.

    def _specialize(self, functions_and_args, worker_num_warps, worker_num_regs):
        if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
            raise Fault("every worker wants its number of warps and of registers")
        self.scheduler.run(functions_and_args)

    def _allocate(self, dtype, shape, layout):
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            name = f"barrier {len(self.barriers)}"
            barriers = Barriers(name, [Barrier(f"{name}[{i}]") for i in range(shape[0])])
            self.barriers += barriers.barriers
            return barriers
        data = torch.full(shape, float("nan"), dtype=dtype)
        self.memory.append(Shared(self, data, torch.zeros(shape, dtype=torch.int8)))
        return self.memory[-1]

    def _language(self):
        layouts = (
            "BlockedLayout",
            "SliceLayout",
            "NVMMADistributedLayout",
            "NVMMASharedLayout",
            "DotOperandLayout",
        )
        dtypes = ("float32", "float16", "bfloat16", "int32", "int64")
        return types.SimpleNamespace(
            **{name: getattr(real, name) for name in layouts},
            **{name: getattr(torch, name) for name in dtypes},
            program_id=lambda axis: torch.tensor(self.program, dtype=torch.int32),
            allocate_shared_memory=self._allocate,
            warp_specialize=self._specialize,
            load=load,
            store=store,
            static_range=range,
            where=lambda see, a, b: torch.where(torch.as_tensor(see), a, b),
            maximum=_elementwise(torch.maximum),
            minimum=_elementwise(torch.minimum),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
            exp2=torch.exp2,
            abs=torch.abs,
            reshape=torch.reshape,
            permute=torch.permute,
            split=lambda x: x.unbind(-1),
            log2=torch.log2,
            arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            zeros_like=torch.zeros_like,
            convert_layout=lambda x, layout, assert_trivial=False: x,
            inline_asm_elementwise=_asm,
        )

    def function(self, jitted):
        """The Python function of a kernel with its globals exchanged."""
        function = jitted.fn
        if found := self.functions.get(function):
            return found
        names = {name: self._exchange(value) for name, value in function.__globals__.items()
                 if name in _names(function.__code__)}  # fmt: skip
        names |= {"__builtins__": __builtins__}
        made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        self.functions[function] = made
        return made

    def _exchange(self, value):
        if value in (tl, real):
            return self.gl
        if value is hopper.mbarrier:
            return self.mbarrier
        if value is hopper.tma:
            return self.tma
        if isinstance(value, tl.constexpr):
            return value.value
        if getattr(value, "__module__", "") == hopper.__name__:
            return self.hopper[value.__name__]
        return self._later(value) if hasattr(value, "fn") else value

    def _later(self, jitted):
        """Exchanged when it is called: it may name itself, or what stands further down."""

        def call(*args, **kwargs):
            return self.function(jitted)(*args, **kwargs)

        call.__name__ = jitted.fn.__name__
        return call


def _names(code):
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _shape(x):
    return _shape(x.acc) if isinstance(x, Token) else x.shape


def _elementwise(function):
    return lambda a, b: function(*torch.broadcast_tensors(*_alike(a, b)))


def _alike(a, b):
    """Both as tensors; a Python number takes the other's type."""
    kind = next((x.dtype for x in (a, b) if isinstance(x, torch.Tensor)), torch.int32)
    return tuple(x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=kind) for x in (a, b))


def _asm(text, constraints, args, dtype, is_pure, pack):
    """Only the instruction that pins an order is known; it hands its argument on."""
    if "bar.warp.sync" not in text or "mov.b32 $0, $1" not in text:
        raise Fault(f"what does this do? {text}")
    return args[0]


def _argument(value):
    if isinstance(value, torch.Tensor):
        return Pointer(value.detach())
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.int32 if abs(value) < 2**31 else torch.int64)
    return value


def launch(kernel, grid, on, /, *args, seed=0, **meta):
    """Runs every program of a grid with these arguments, as runtime.launch.launch does."""
    constants = {name: value for name, value in meta.items() if name in kernel.arg_names}
    for program in range(grid[0]):
        block = Block(program, seed + program)
        block.function(kernel)(*map(_argument, args), **constants)
        block.finish()
