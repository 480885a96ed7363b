"""Correctness of one implementation at one case: the gate before any time is shown.

The definition runs in float64 on the inputs as the low precision holds them. The yardstick is plain PyTorch
at the same dtype against the same definition. An implementation passes when, for every output and every
gradient,

    max |got - definition|  <=  2 * max |yardstick - definition|  +  floor * ulp * max |definition|

with the spec's floor and the unit in the last place of the tensor's own dtype. Integers equal the definition
or the yardstick. Besides: shape, dtype, device and kind are those of the yardstick; new memory is full of NaN
while it runs; no byte of an input changes; a second run gives the same bits.

    rows = check_case(spec, spec.case("small_64x512"), torch.float32, "native")
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.poison import poisoned
from rlhf_kernels.engine.row import Row, dtype_name
from rlhf_kernels.engine.spec import Case, Direction, Inputs, OpSpec, as_outputs
from rlhf_kernels.runtime.dispatch import BackendError, interpreted
from rlhf_kernels.runtime.dispatch import backend as use_backend
from rlhf_kernels.stacks import Unavailable

# The interpreter takes seconds for a million elements, and its bfloat16 arithmetic is wrong.
INTERPRETED_TIERS = ("smoke", "awkward")
INTERPRETED_BYTES = 2 << 20
INTERPRETED_DTYPES = (torch.float32, torch.float16)
# Factor on what a foreign function is granted.
FOREIGN_SLACK = 16.0
_WROTE = "it wrote to its inputs"
# Elements compared at a time: temporaries that stay in the cache.
_CHUNK = 1 << 17


@dataclass
class Result:
    """What one call gave: outputs, and the gradient of each differentiated argument."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def named(self, direction: Direction, names: Sequence[str] = ()) -> list[tuple[str, Tensor]]:
        """The tensors that a direction is judged by; `names` are those of the outputs."""
        if direction == "backward":
            return [(f"the gradient of {name}", t) for name, t in self.gradients.items()]
        if len(self.outputs) == 1:
            return [("the output", self.outputs[0])]
        return [(names[i] if i < len(names) else f"output {i}", t) for i, t in enumerate(self.outputs)]


def run(function: Callable[..., Any], inputs: Inputs, upstream: Sequence[Tensor] = ()) -> Result:
    """Calls `function` on `inputs`; with `upstream`, a gradient for each output, also differentiates.

    Leaves share the memory of the inputs and so keep their strides; a random generator is cloned, so that
    every call draws the same numbers.
    """
    args = {name: _clone_generator(value) for name, value in inputs.args.items()}
    leaves = {name: args[name].detach().requires_grad_() for name in inputs.wrt} if upstream else {}
    outputs = as_outputs(function(**args | leaves))
    if not leaves:
        return Result(outputs)
    pairs = [(out, grad) for out, grad in zip(outputs, upstream) if out.requires_grad]
    if not pairs:
        raise RuntimeError("no output requires a gradient, although inputs do")
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return Result(tuple(out.detach() for out in outputs), dict(zip(leaves, found)))


class Judge:
    """Inputs, definition and yardstick of one case, computed once, against which implementations are held.

    Args:
        spec, case, dtype, device: what is called, on which inputs.
    """

    def __init__(
        self, spec: OpSpec, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        self.spec, self.case, self.dtype, self.device = spec, case, dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.name}".encode()))
        self.inputs = spec.make(case, dtype, self.generator, self.device)
        self.differentiable = bool(self.inputs.wrt)
        both: tuple[Direction, ...] = ("forward", "backward")
        self.directions = both if self.differentiable else both[:1]

    @cached_property
    def checked(self) -> tuple[Inputs, Callable[[Tensor], Tensor]]:
        """The part of the inputs that the definition sees, and how an output is cut down to it."""
        if self.case.checked is None:
            return self.inputs, lambda output: output
        return self.spec.narrow(self.inputs, self.case.checked)

    @cached_property
    def upstream(self) -> tuple[Tensor, ...]:
        """A fixed random gradient for each output of the whole case; empty without a differentiated input."""
        if not self.differentiable:
            return ()
        noise = tuple(self._noise(out) for out in as_outputs(self.spec.torch_form(**self.inputs.args)))
        return tuple(self._limited(grad) for grad in noise) if self._shares_arguments else noise

    @property
    def _shares_arguments(self) -> bool:
        """Whether a differentiated argument, such as a weight, belongs to the checked part and the rest."""
        whole, part = self.inputs.args, self.checked[0].args
        return any(part[name] is whole[name] for name in self.inputs.wrt) and part is not whole

    def _limited(self, grad: Tensor) -> Tensor:
        """Zero outside the checked part: else the rest would add to the gradient of what they share."""
        at = self.checked[1](torch.arange(grad.numel(), device=grad.device).view(grad.shape)).flatten()
        limited = torch.zeros_like(grad)
        limited.view(-1)[at] = grad.view(-1)[at]
        return limited

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator)
        return noise.to(device=like.device, dtype=like.dtype if like.is_floating_point() else torch.float32)

    @cached_property
    def narrow_upstream(self) -> tuple[Tensor, ...]:
        """The same gradients for the checked part."""
        return tuple(self.checked[1](grad) for grad in self.upstream)

    @cached_property
    def reference(self) -> Result:
        """The definition in float64."""
        inputs = self.checked[0].map(_to_float64)
        return run(self.spec.reference, inputs, tuple(_to_float64(g) for g in self.narrow_upstream))

    @cached_property
    def yardstick(self) -> Result:
        """Plain PyTorch at the case's dtype."""
        return run(self.spec.torch_form, self.checked[0], self.narrow_upstream)

    def rows(
        self,
        impl: str,
        function: Callable[..., Any],
        directions: Sequence[Direction] | None = None,
        *,
        repeat: bool = True,
        foreign: bool = False,
        outputs: Sequence[int] | None = None,
    ) -> list[Row]:
        """Calls `function` as the op and judges it, one row a direction.

        Args:
            impl: its name in the rows.
            function: takes the arguments of the public function.
            directions: those that are judged; None means all that the case has.
            repeat: also asks for the same bits twice.
            foreign: the function is asked whether it does the same thing, not whether it is as exact: more is
                granted, and where there is a `mask`, only what is real counts, since stacks leave what they
                like in padding.
            outputs: indices of the op's outputs where `function` gives only some; for the forward alone.
        """
        wanted = [d for d in self.directions if directions is None or d in directions]
        try:
            upstream = self.upstream if "backward" in wanted else ()
            result, complaint = self._observe(function, upstream, repeat)
        except (BackendError, Unavailable) as refusal:
            return [self.row(impl, d).failed("unavailable", str(refusal)) for d in wanted]
        except Exception as error:  # whatever an implementation raises is its result
            return [self.row(impl, d).failed("error", one_line(error)) for d in wanted]
        return [self._judge(self.row(impl, d), result, complaint, foreign, outputs) for d in wanted]

    def row(self, impl: str, direction: str) -> Row:
        """An empty row of this case."""
        return Row(self.spec.name, impl, self.case.name, dtype_name(self.dtype), direction, self.device.type)

    def _observe(
        self, function: Callable[..., Any], upstream: Sequence[Tensor], repeat: bool
    ) -> tuple[Result, str]:
        """The result of a call in poisoned memory, and what was wrong with its manners."""
        likes = [t for r in (self.reference, self.yardstick) for t in (*r.outputs, *r.gradients.values())]
        memory = list(bytes_of(self.inputs))
        before = [held.clone() for held in memory]
        with poisoned(self.device, likes):
            result = run(function, self.inputs, upstream)
        if not all(map(torch.equal, memory, before)):
            # What it gave may lie in the inputs, which are put back.
            outputs = tuple(out.detach().clone() for out in result.outputs)
            result = Result(outputs, {name: grad.clone() for name, grad in result.gradients.items()})
            for held, value in zip(memory, before):
                held.copy_(value)
            return result, _WROTE
        if repeat:
            again = run(function, self.inputs, upstream)
            for direction in self.directions:
                for (name, first), (_, second) in zip(result.named(direction), again.named(direction)):
                    if not same_bits(first, second):
                        return result, f"a second run gave other bits in {name}"
        return result, ""

    def _judge(
        self, row: Row, result: Result, complaint: str, foreign: bool, outputs: Sequence[int] | None
    ) -> Row:
        direction = row.direction
        results = (result, self.reference, self.yardstick)
        got, want, yard = (r.named(direction, self.spec.outputs) for r in results)
        if outputs is not None:
            want, yard = ([named[i] for i in outputs] for named in (want, yard))
        if len(got) != len(want):
            return row.failed("incorrect", f"{len(got)} outputs, expected {len(want)}")
        worst = -1.0
        for (_, g), (name, w), (_, y) in zip(got, want, yard):
            g = self._part(name, g, direction)
            if odd := _unlike(name, g, y):
                return row.failed("incorrect", odd)
            if foreign:
                g, w, y = (self.real(t) for t in (g, w, y))
            error, allowed = deviation(g, w, y, self.spec.floor)
            allowed *= FOREIGN_SLACK if foreign else 1.0
            excess = error / allowed if allowed else (math.inf if error else 0.0)
            if excess > worst:
                worst, row.error, row.allowed = excess, error, allowed
                row.reason = f"{name} is off by {error:.3g}, allowed is {allowed:.3g}"
                if error == math.inf:
                    row.reason = f"{name} is not finite where the definition is, or the other way round"
        # What was written may be why the rest is off; other bits may be because something is.
        off = [row.reason] if worst > 1 else []
        reasons = [complaint, *off] if complaint == _WROTE else off or [complaint]
        row.reason = ""
        return row.failed("incorrect", "; ".join(reasons)) if any(reasons) else row

    def real(self, tensor: Tensor) -> Tensor:
        """What is not padding, where the tensor has the mask's shape."""
        mask = self.checked[0].args.get("mask")
        masked = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == tensor.shape
        return tensor[mask] if masked else tensor

    def _part(self, name: str, tensor: Tensor, direction: Direction) -> Tensor:
        """The checked part; a gradient is cut as the argument that it belongs to."""
        if self.case.checked is None:
            return tensor
        if direction == "forward":
            return self.checked[1](tensor)
        name = name.removeprefix("the gradient of ")
        return self.spec.narrow(Inputs({**self.inputs.args, name: tensor}), self.case.checked)[0].args[name]


def deviation(got: Tensor, want: Tensor, yard: Tensor, floor: float) -> tuple[float, float]:
    """Largest error of `got` against `want`, and what is granted; the formula stands at the top of this file.

    Where the yardstick itself overflowed, `got` may do as it did; infinities and NaN elsewhere must be those
    of `want`.
    """
    if not got.is_floating_point():
        return float(((got != want.to(got.dtype)) & (got != yard)).sum()), 0.0
    error = yard_error = largest = 0.0
    for g, w, y in zip(*(t.reshape(-1).split(_CHUNK) for t in (got, want, yard))):
        if g.numel() == 0:
            continue
        found = [(g.double() - w).abs_().max(), (y.double() - w).abs_().max(), w.abs().max()]
        if not torch.stack(found).isfinite().all():
            found = _with_exceptions(g, w, y)
        error, yard_error, largest = map(max, (error, yard_error, largest), (t.item() for t in found))
    return error, 2 * yard_error + floor * torch.finfo(got.dtype).eps * largest


def _with_exceptions(got: Tensor, want: Tensor, yard: Tensor) -> list[Tensor]:
    """Largest error of `got`, of `yard` and largest value, where some are infinite or NaN."""
    overflowed = ~torch.isfinite(yard)
    excused = overflowed & ((got == yard) | (got.isnan() & yard.isnan()))
    return [
        _distance(got.double(), want).masked_fill(excused, 0.0).max(),
        _distance(yard.double(), want).masked_fill(overflowed, 0.0).max(),
        want.abs().masked_fill(~torch.isfinite(want), 0.0).max(),
    ]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|: 0 where both are the same infinity or NaN, infinite where only one is not finite."""
    difference = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


def _unlike(name: str, got: Tensor, like: Tensor) -> str:
    """How `got` differs from `like` in kind, dtype, shape or device; empty where it does not."""
    if type(got) is not Tensor:
        return f"{name} is a {type(got).__name__}, expected a plain tensor"
    if (got.dtype, got.shape, got.device) == (like.dtype, like.shape, like.device):
        return ""
    kinds = [f"{dtype_name(t.dtype)} {tuple(t.shape)} on {t.device}" for t in (got, like)]
    return f"{name} is {kinds[0]}, expected {kinds[1]}"


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def unmade(spec: OpSpec, case: Case, dtype: torch.dtype, impl: str, device: str, error: Exception) -> Row:
    """The row of a case whose inputs could not be made."""
    row = Row(spec.name, impl, case.name, dtype_name(dtype), "forward", device)
    return row.failed("error", why_unmade(error))


def why_unmade(error: Exception) -> str:
    """What is said of a case whose inputs could not be made."""
    return f"its inputs cannot be made: {one_line(error)}"


def _to_float64(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t


def _clone_generator(value: Any) -> Any:
    if not isinstance(value, torch.Generator):
        return value
    return torch.Generator(value.device).set_state(value.get_state())


def bytes_of(inputs: Inputs) -> Iterator[Tensor]:
    """The whole memory under each input, the gaps of a strided one included."""
    for t in inputs.tensors():
        storage = t.untyped_storage()
        yield torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, NaN included."""

    def raw(t: Tensor) -> Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(raw(a), raw(b))  # an empty tensor may have any strides


def refusal(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str) -> str | None:
    """Why a backend is not checked at this case, although it may run: the interpreter's limits."""
    if device != "cpu" or backend != "triton" or not interpreted():
        return None
    if dtype not in INTERPRETED_DTYPES:
        return f"the interpreter is right in float32 and float16 only, not in {dtype_name(dtype)}"
    size = spec.cost(case, dtype, "forward").bytes
    if case.tier not in INTERPRETED_TIERS or size > INTERPRETED_BYTES:
        return f"the interpreter is too slow for the {case.tier} case {case.name}"
    return None


def check_case(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str | torch.device = "cpu",
    directions: Sequence[Direction] | None = None,
    judge: Judge | None = None,
) -> list[Row]:
    """Holds one backend of an op against its definition at one case and dtype.

    Args:
        spec, case, dtype: what is checked; a dtype that the case does not list works as well.
        backend: one of the op's declared backends, run strictly: a fall-back counts as `unavailable`.
        device: where.
        directions: a part of ("forward", "backward"); None is all that the case has.
        judge: what an earlier call computed for the same case, dtype and device.

    Returns:
        One row a direction: ok, incorrect, unavailable or error, with the reason.
    """
    judge = judge or Judge(spec, case, dtype, device)
    kind = judge.device.type
    reason = spec.op.unsupported(backend, kind, dtype) or refusal(spec, case, dtype, backend, kind)
    if reason:
        wanted = [d for d in judge.directions if directions is None or d in directions]
        return [judge.row(backend, d).failed("unavailable", reason) for d in wanted]
    interpreting = backend == "triton" and kind == "cpu"
    with use_backend(f"{spec.op.name}={backend}", strict=True), warnings.catch_warnings():
        if interpreting:  # NumPy complains about lanes that are masked out
            warnings.simplefilter("ignore", RuntimeWarning)
        # The interpreter has no order of execution that could differ; PyTorch's backwards have, on a GPU.
        repeat = not interpreting and backend != "torch"
        return judge.rows(backend, spec.function, directions, repeat=repeat)
