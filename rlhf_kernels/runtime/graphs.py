"""What a compiled graph holds where the native kernel is what runs: the C++ operator, and no Python.

Our operators are written in Python, which a compiled graph pays for at each call: 50 to 90 us on a CPU where
the kernel of a small call takes 10. So `Operator.call` traces them with the backend's name, and where that is
"native" they give way to the C++ operators in AOTAutograd, below autograd and before the compiler sees the
graph, as those of `torch.library.triton_op` do. The name is part of the graph that a cache of graphs goes
by. Exported programs keep our operators: they may be run where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from rlhf_kernels.runtime import native

_held: set[str] = set()
_shaped: set[str] = set()


def hold(overload: Any, name: str, fake: Callable[..., Any], library: torch.library.Library) -> None:
    """Lets, once, an operator that was traced for "native" give way to the C++ operator `name`.

    Args:
        overload: ours; its positional arguments are the first of the C++ operator's.
        name: in the namespace of the compiled library, which has been loaded.
        fake: shapes of the outputs, from these arguments.
        library: where `overload` is defined.
    """
    own = overload._schema.name
    if own in _held:
        return
    _held.add(own)
    inner = native.overload(name)
    if name not in _shaped:
        _shaped.add(name)
        count = sum(not argument.kwarg_only for argument in overload._schema.arguments)
        defaults = [argument.default_value for argument in inner._schema.arguments]

        def shapes(*args: Any) -> Any:
            # The dispatcher leaves out what is at its default.
            return fake(*args[:count], *defaults[len(args) : count])

        torch.library.register_fake(f"{native.NAMESPACE}::{name}", shapes)

    def give_way(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("backend") != "native":
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return inner(*args)

    torch.library.register_torch_dispatch(own, FunctionalTensorMode, give_way, lib=library)
