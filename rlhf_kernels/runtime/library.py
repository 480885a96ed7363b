"""One declaration of an op's forward and backward, registered with torch.library and used by eager calls.

A call takes the shortest way that is right:
  compiled, or under a tensor subclass or a dispatch mode          torch.ops.rlhf_kernels.<name>
  under a torch.func transform, or forward-mode derivatives        plain PyTorch, which these see through
  no input needs a gradient                                        the kernel itself
  the kernel is plain PyTorch, or has a form that is               that, autograd goes through it
  otherwise                                                        an autograd.Function over the kernels

The way through torch.library costs some microseconds more and is what `torch.compile`, export and fake
tensors need; the formulas are the same objects. `runtime/graphs.py` has what a compiled graph holds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from rlhf_kernels.runtime import dispatch, graphs
from rlhf_kernels.runtime.dispatch import Op

_OPERATORS: dict[str, Operator] = {}
_LIBRARY = torch.library.Library("rlhf_kernels", "FRAGMENT")
# Dynamo's flag alone: whatever else traces does so by a mode or a tensor subclass, which a call sees.
_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


class Operator:
    """A differentiable op over the backends of one room; a room calls its `call`.

    The kernels' `forward(*args)` and `backward(*backward_args)` and the torch.library schemas take the same
    positional arguments. The first argument is a tensor and decides device and dtype. A kernel may give None
    for an output that only its backward would read: torch.library, which wants a tensor, gets zeros. A kernel
    without a backward of its own may have a `differentiable` form for calls that need a gradient; one that is
    plain PyTorch an `opaque` form for calls whose gradient is its `backward`'s.

    Args:
        op: the room's backends.
        schema: torch.library schema without the name: "(Tensor x, float eps) -> Tensor".
        fake: shapes of the outputs, from the same arguments.
        backward_schema: likewise for `<name>_backward`; None where the op has no gradient, or where it is its
            own backward with other arguments: then `run` of `gradients` is the op itself, to any order.
        backward_fake: likewise.
        setup_context: torch.library's: saves what the backward needs.
        gradients: (ctx, run, *grads) -> a gradient or None for each argument; `run` is the backward kernel.
        replay: backward's arguments -> (forward's arguments, gradients of its outputs), for kernels that are
            plain PyTorch and define no backward of their own.
        wrt: indices of the arguments that backward returns gradients of; an absent one gives an empty tensor.
        wanted: backward's arguments -> which of `wrt` are asked for, where it can leave some out (as empty).
        shape_class: arguments -> what besides device and dtype decides the backend (a head size).
        native: the C++ operator with the arguments of `schema`. Compiled graphs hold it.
        native_backward: whether there is `<native>_backward`, with those of `backward_schema`.
    """

    def __init__(
        self,
        op: Op,
        schema: str,
        fake: Callable[..., Any],
        *,
        backward_schema: str | None = None,
        backward_fake: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        gradients: Callable[..., Sequence[Tensor | None]] | None = None,
        replay: Callable[..., tuple[Sequence[Any], Sequence[Tensor | None]]] | None = None,
        wrt: tuple[int, ...] = (0,),
        wanted: Callable[..., Sequence[bool]] | None = None,
        shape_class: Callable[..., Hashable] | None = None,
        native: str | None = None,
        native_backward: bool = True,
    ) -> None:
        self.op = op
        self.replay = replay
        self.wrt = wrt
        self.wanted = wanted
        self.shape_class = shape_class
        self.fake, self.backward_fake = fake, backward_fake
        self.overload = _register(op.name, schema, self._run, fake)
        kinds = [str(argument.type) for argument in self.overload._schema.arguments]
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]"))
        self.function: type[torch.autograd.Function] | None = None
        self.plain: Callable[..., Any] | None = None
        self.differentiable: Callable[..., Any] | None = None
        self.natives = [(self.overload, native, fake)] if native else []
        _OPERATORS[op.name] = self
        if gradients is None:
            return
        backward, run_backward, once = self.overload, self.call, backward_schema is not None
        if backward_schema:
            run_backward = self._run_backward
            backward = _register(f"{op.name}_backward", backward_schema, run_backward, backward_fake)
            _refuse_second_derivative(op.name)
            if native and native_backward:
                self.natives.append((backward, f"{native}_backward", backward_fake))
        _define_autograd(op.name, setup_context, gradients, backward)
        self.function = _eager_function(op.name, self._run, run_backward, setup_context, gradients, once)

    def _run(self, *args: Any) -> Any:
        shape_class = self.shape_class(*args) if self.shape_class else None
        kernel = self.op.choose(args[0], shape_class)
        found = getattr(kernel, "opaque", kernel.forward)(*args)
        some = type(found) is tuple and any(output is None for output in found)
        plain = getattr(kernel, "DIFFERENTIABLE", False)
        return _laid_out(found, self.fake, args) if some or plain else found

    def _run_backward(self, *args: Any) -> Any:
        forward_args, grads = self.replay(*args)
        shape_class = self.shape_class(*forward_args) if self.shape_class else None
        kernel = self.op.choose(forward_args[0], shape_class)
        if hasattr(kernel, "backward"):
            found = kernel.backward(*args)
            plain = getattr(kernel, "DIFFERENTIABLE", False)
            return _laid_out(found, self.backward_fake, args) if plain else found
        found = recomputed(kernel.forward, forward_args, grads)
        wanted = self.wanted(*args) if self.wanted else (True,) * len(self.wrt)
        asked = [found[i] if w else None for i, w in zip(self.wrt, wanted)]
        results = tuple(forward_args[0].new_empty(0) if grad is None else grad for grad in asked)
        return _laid_out(results if len(results) > 1 else results[0], self.backward_fake, args)

    def _traced_for(self, args: tuple[Any, ...]) -> str:
        """What a graph is traced for; "" is our operator, which chooses at each call. Dynamo traces it."""
        if dispatch.overridden or torch.compiler.is_exporting():
            return ""
        shape_class = _numbers(self.shape_class(*args)) if self.shape_class else None
        return _held(self.op.name, args[0].device.type, args[0].dtype, shape_class)

    def call(self, *args: Any) -> Any:
        """The op, by the shortest way that is right. A method: calling an object costs 0.2 us more."""
        if _compiling():
            backend = self._traced_for(args)
            if backend == "torch":
                return self.plain(*args)
            if backend and self.differentiable and _grad_enabled() and self._needs_grad(args):
                return self.differentiable(*args)
            return self.overload(*args, backend=backend)
        needs_grad = False
        for i in self.tensors:
            arg = args[i]
            if arg is None:
                continue
            kind = type(arg)
            if kind is not Tensor and kind is not Parameter:
                return self.overload(*args)
            if arg.requires_grad:
                needs_grad = True
        if _transforms() is not None or forward_ad._current_level >= 0:
            return self._seen_through().forward(*args)
        if _modes():
            return self.overload(*args)
        shape_class = self.shape_class(*args) if self.shape_class else None
        kernel = self.op.choose(args[0], shape_class)
        if needs_grad and self.function and _grad_enabled() and not getattr(kernel, "DIFFERENTIABLE", False):
            return getattr(kernel, "differentiable", self.function.apply)(*args)
        return kernel.forward(*args)

    def _seen_through(self) -> ModuleType:
        """The kernel that is plain PyTorch all through: torch.library has no derivatives of these kinds."""
        kernels = [self.op.module(name) for name in ("torch", "reference")]
        return next((kernel for kernel in kernels if getattr(kernel, "DIFFERENTIABLE", False)), kernels[0])

    def _needs_grad(self, args: tuple[Any, ...]) -> bool:
        return any(args[i] is not None and args[i].requires_grad for i in self.tensors)


def _laid_out(found: Any, fake: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Outputs with the strides that graphs are told of, which plain PyTorch does not keep; zeros for None."""
    outputs = found if isinstance(found, tuple) else (found,)
    # Of contiguous inputs all outputs are, which is soon seen; `fake` allocates them.
    if all(o is not None and o.is_contiguous() for o in outputs) and all(
        a.is_contiguous() for a in args if isinstance(a, Tensor)
    ):
        return found
    promised = fake(*args)
    if not isinstance(found, tuple):
        return _as(found, promised)
    return tuple(map(_as, found, promised))


def _as(found: Tensor | None, promised: Tensor) -> Tensor:
    if found is None:
        return promised.zero_()
    strides = zip(found.shape, found.stride(), promised.stride())
    return found if all(n < 2 or a == b for n, a, b in strides) else promised.copy_(found)


def _numbers(shape_class: Any) -> Hashable:
    """The same, a symbolic head size made a number: Dynamo makes one of what is hashed, and a graph each."""
    if isinstance(shape_class, tuple):
        return tuple(map(_numbers, shape_class))
    return hash(shape_class) if isinstance(shape_class, int) else shape_class


def _held(name: str, device: str, dtype: torch.dtype, shape_class: Hashable) -> str:
    """The backend whose code takes our operator's place in graphs from now on, or "".

    C++ operators, and plain PyTorch that is made to be traced. A tuned kernel stays behind our operator: it
    looks at the shapes of each call.
    """
    operator = _OPERATORS[name]
    choice = operator.op.decide(device, dtype, shape_class)
    if getattr(choice.kernel, "TRACEABLE", False):
        operator.plain = choice.kernel.forward
        return choice.backend
    if choice.backend != "native" or not operator.natives or not isinstance(choice.kernel, ModuleType):
        return ""
    operator.differentiable = getattr(choice.kernel, "differentiable", None)
    for overload, native, fake in operator.natives:
        graphs.hold(overload, native, fake, _LIBRARY)
    return choice.backend


# torch.compiler.assume_constant_result, without importing Dynamo: this is called while a graph is traced.
_held._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Our operator; that it was traced for a backend is for `graphs` alone."""
    schema = schema.replace(") ->", ', *, str backend="") ->', 1)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, lambda *args, **traced: run(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_kernels::{name}", lambda *args, **traced: fake(*args), lib=_LIBRARY)
    return getattr(torch.ops.rlhf_kernels, name).default


def _define_autograd(name: str, setup_context: Any, gradients: Any, backward: Any) -> None:
    def setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.backward = partial(backward, **keyword_only_inputs)
        setup_context(ctx, inputs, output)

    def through_library(ctx: Any, *grads: Tensor) -> Any:
        return gradients(ctx, ctx.backward, *grads)

    torch.library.register_autograd(
        f"rlhf_kernels::{name}", through_library, setup_context=setup, lib=_LIBRARY
    )


def _refuse_second_derivative(name: str) -> None:
    """Without a kernel for autograd, a second differentiation would silently give zero."""

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{name} has no second derivative on this backend: use `with rlhf_kernels.backend('reference'):`"
        )

    torch.library.register_autograd(f"rlhf_kernels::{name}_backward", refuse, lib=_LIBRARY)


def _eager_function(
    name: str, run: Any, run_backward: Any, setup: Any, gradients: Any, once: bool
) -> type[torch.autograd.Function]:
    """The eager twin. A `forward` that takes ctx costs 20 us less a call than one with setup_context."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gradients(ctx, run_backward, *grads)

    differentiated = once_differentiable(backward) if once else backward
    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiated)}
    return type(f"{name}_function", (torch.autograd.Function,), members)


def _autograd_keys() -> Any:
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_tls_local_exclude_set() - before


_AUTOGRAD_KEYS = _autograd_keys()


def _autograd_active() -> Any:
    """A guard that lets autograd record inside an operator too, where the dispatcher has left it out."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS)


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which sees through plain PyTorch alone."""
    return torch._C._are_functorch_transforms_active()


def recomputed(forward: Callable[..., Any], args: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Any]:
    """Gradients of a plain-PyTorch `forward`, one for each argument, by running it once more.

    The backward of the `torch` and `reference` backends where they run as opaque operators and have no other.
    Arguments that are no floating-point tensors get None.
    """
    differentiable = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
    with torch.enable_grad(), _autograd_active():
        inputs = [a.detach().requires_grad_() if d else a for a, d in zip(args, differentiable)]
        outputs = forward(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
        leaves = [a for a, d in zip(inputs, differentiable) if d]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                leaves,
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            if pairs
            else [torch.zeros_like(leaf) for leaf in leaves]
        )
    return [next(found) if d else None for d in differentiable]
