"""`patch(model)`: the replacements for transformers, in one model alone.

A module gets a `forward` of its own, bound to itself, the model a loss function of its own, and attention by
name through `set_attn_implementation`. Classes, functions and other models stay as they are.

A deep copy of a patched model is patched too, and what is pickled is the plain model. Neither belongs to the
first patch: `patch(copy)` takes it over.
"""

from __future__ import annotations

import copy
import importlib
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from rlhf_kernels.stacks import patching, slots
from rlhf_kernels.stacks.patching import Patched, PatchError, Replaced
from rlhf_kernels.stacks.rebind import Rebinding
from rlhf_kernels.stacks.slots import Slot
from rlhf_kernels.stacks.transformers_attention import our_attention, our_mask

_MARK = "_rlhf_kernels_patch"
_NAME = (
    "rlhf_kernels"  # of our attention in transformers' registries; it stays there, as register() has no undo
)
# Models and modules that a patch holds.
_held: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Attribute(Slot):
    """An attribute of a module's own."""

    def put(self, value: Any) -> None:
        super().put(value)
        _held.add(self.holder)

    def restore(self) -> str | None:
        complaint = super().restore()
        _held.discard(self.holder)
        return complaint


class _Loss:
    """Our loss, which is the original in a file."""

    def __init__(self, ours: Any, original: Any) -> None:
        self._ours, self._original = ours, original
        setattr(self, _MARK, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ours(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Loss:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self._original,)  # which gives a function itself: no name of ours is in the file


class _Implementation(NamedTuple):
    """The attention of a model by name, and which it was."""

    label: str
    model: Any
    before: str
    ours: str

    def put(self, name: str) -> None:
        """Registers ours, and makes the model use it."""
        from transformers import AttentionInterface, AttentionMaskInterface

        functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
        if name not in functions:
            AttentionInterface.register(name, our_attention(functions["sdpa"]))
            AttentionMaskInterface.register(name, our_mask(masks["sdpa"]))
        self.model.set_attn_implementation(name)
        _held.add(self.model)

    def restore(self) -> str | None:
        """Puts back what was there; says so where it is no longer ours to take away."""
        _held.discard(self.model)
        if self.model.config._attn_implementation != self.ours:
            return "the model's attention was chosen anew by other code meanwhile and stays as it is"
        self.model.set_attn_implementation(self.before)
        return None


def patch_model(
    model: nn.Module, only: Any, backend: str | None, allow_untested: bool, names: Sequence[Rebinding]
) -> Patched:
    """See `patch`; `names` are the rebindings that were asked for."""
    target = patching.find("transformers")
    version = patching.version_of(target, allow_untested)
    patched = Patched(target, version, backend)
    patched.target, patched.left = type(model).__name__, {}
    with patching.LOCK:
        patching.refuse_double(patched.target, names)
        if any(one in _held for one in model.modules()):
            raise PatchError(
                f"patch({patched.target}): this model is patched already: call undo() on the first patch"
            )
        _clear(model)
        try:
            for rebinding in (one for one in names if one.fits(version, target)):
                _replace(patched, model, rebinding, asked=only is not None)
        except BaseException:
            patched.undo()
            raise
    if not patched.replaced and not patched.left:
        raise PatchError(
            f"patch({patched.target}): this model has nothing that is replaced. Known are causal models of "
            "transformers: Llama, Mistral, Qwen2, Qwen3, Gemma, GPT-NeoX and Phi."
        )
    return patched


def _clear(model: Any) -> None:
    """Takes out what a copy of a patched model has from it."""
    for module in model.modules():
        forward, loss = (vars(module).get(name) for name in ("forward", "_loss_function"))
        # Read from a file, where a bound method is a name, it is the class's.
        plain = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
        if plain or hasattr(forward, _MARK):
            del module.forward
        if hasattr(loss, _MARK):
            del module._loss_function
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == _NAME:
        model.set_attn_implementation("sdpa")


def _replace(patched: Patched, model: nn.Module, rebinding: Rebinding, asked: bool) -> None:
    name = rebinding.place.partition(":")[0]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        patched.left[rebinding.name] = f"{name} cannot be imported here: {error}"
        return
    found = slots.look_up(rebinding.place, module)
    if found is None:
        return
    owner, key = found
    original = owner[key] if isinstance(owner, dict) else getattr(owner, key)
    ours = rebinding.make(original)
    if complaint := slots.other_signature(original, ours):
        patched.left.setdefault(rebinding.name, complaint)
        return
    if patched.backend:
        ours = slots.on(patched.backend, ours)
    why = None if asked else patching.left_alone(rebinding, patched.backend)
    is_attention = rebinding.op == "attention"
    taken = _attention(model, rebinding.name) if is_attention else _slots(model, rebinding, original, ours)
    taken = list(taken)
    if taken and why is not None:
        patched.left[rebinding.name] = why
    elif taken:
        for slot in taken:
            slot.put(slot.ours)
        patched.slots += taken
        patched.left.pop(rebinding.name, None)  # of an earlier declaration for another version
        places = tuple(slot.label for slot in taken)
        patched.replaced.append(Replaced(rebinding.name, rebinding.op, rebinding.place, places))


def _slots(model: nn.Module, rebinding: Rebinding, original: Any, ours: Any) -> Iterator[Slot]:
    for name, module in model.named_modules():
        forward = type(module).forward
        bound = None
        if rebinding.name == "loss":
            if getattr(module, "loss_function", None) is original:
                label = f"{name or 'model'}.loss_function"
                before = vars(module).get("_loss_function", slots.ABSENT)
                yield _Attribute(label, module, "_loss_function", before, _Loss(ours, original))
        elif forward is original:
            bound = ours
        else:
            bound = _reading(forward, original, ours)
        if bound is not None and "forward" not in vars(module):
            method = types.MethodType(_copy(bound), module)
            yield _Attribute(f"{name}.forward", module, "forward", slots.ABSENT, method)


def _reading(forward: Any, function: Any, ours: Any) -> Any:
    """The method over other globals, where it calls this very function by a global name; else None.

    Through decorators too, which are made anew around it.
    """
    if not isinstance(forward, types.FunctionType):
        return None
    name = getattr(function, "__name__", "")
    if name in forward.__code__.co_names and forward.__globals__.get(name) is function:
        return slots.over(forward, {name: ours}, forward.__closure__)
    inner = getattr(forward, "__wrapped__", None)
    made = _reading(inner, function, ours)
    if made is None:
        return None
    cells = [types.CellType(made) if _content(cell) is inner else cell for cell in forward.__closure__ or ()]
    return _made(forward, tuple(cells))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _made(function: Any, closure: Any) -> Any:
    given = (function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made = types.FunctionType(*given)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _copy(function: Any) -> Any:
    """The function under a mark that says whose it is."""
    made = _made(function, function.__closure__)
    made.__dict__.update(function.__dict__)
    setattr(made, _MARK, True)
    return made


def _attention(model: Any, name: str) -> Iterator[_Implementation]:
    """The model's attention, if it is chosen by name; its mask goes with it."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if name == "attention" and hasattr(model, "set_attn_implementation") and chosen in ("sdpa", "eager"):
        yield _Implementation("attention", model, chosen, _NAME)
