"""Whether what was timed still does the work: asked after the clock has stopped, of the very calls it timed.

The check before the clock holds results against the definition. An implementation may be right then and cheat
later: answer from what it remembers of an address, hand out one result again and again, skip the work once
nobody looks, or leave it to another thread that the clock does not wait for. So afterwards

- new values are written into the memory of the inputs, new memory is full of NaN, and the timed call is asked
  once more: its answer must follow, and an earlier answer must stay what it was;
- processor time is taken: on one thread no other may compute, and nothing may go on after a call returns.

The comparison with plain PyTorch is coarse: what is a little wrong fails the check before the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, process_time, thread_time
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.check import Judge, bytes_of, one_line, same_bits
from rlhf_kernels.engine.clock import Contender
from rlhf_kernels.engine.poison import poisoned

# Of the largest value, and of the elements: what may be off, and how many.
_COARSE = {2: 0.05, 4: 0.01, 8: 0.01}
_STRAYS = 0.02
# Of the processor time: what other threads may take, and the least that is noticed, seconds.
_SHARE, _LEAST = 0.1, 0.0005
_WATCHED = 0.005

Call = Callable[[], Any]


def stale(
    judge: Judge,
    eager: Call,
    contenders: Mapping[str, Contender],
    outputs: Mapping[str, tuple[int, ...] | None],
) -> dict[str, str]:
    """What is wrong with the answers of timed calls to inputs that they have not seen, by name.

    Args:
        judge: whose inputs the calls read; they are as before when this returns.
        eager: plain PyTorch on the same inputs.
        contenders: the timed calls.
        outputs: indices of the op's outputs where a contender gives only some.
    """
    found: dict[str, str] = {}
    earlier = {}
    for name, one in contenders.items():
        try:
            earlier[name] = _answer(judge, one.call, one)
        except Exception as error:  # whatever an implementation raises is its result
            found[name] = one_line(error)
    copies = {name: [_copied(t) for t in answer] for name, answer in earlier.items()}
    with _other_values(judge):
        want = _answer(judge, eager)
        for name in earlier:
            try:
                with poisoned(judge.device, [t for t in want if t is not None]):
                    got = _answer(judge, contenders[name].call, contenders[name])
            except Exception as error:
                found[name] = one_line(error)
                continue
            some = outputs.get(name)
            due = want if some is None else [want[i] for i in some]
            if any(_off(judge, g, w) for g, w in zip(got, due)) or len(got) != len(due):
                found[name] = "after it was timed it gave a wrong answer to new inputs in the same memory"
            elif _moved(judge, earlier[name], copies[name]):
                found[name] = (
                    "an earlier result of its changed: it hands its memory out again, or writes late"
                )
    return found


def elsewhere(contender: Contender, threads: int) -> str:
    """What a timed call left to others on the CPU: threads beyond those of the case, or later work."""
    _settle()
    with contender.context():
        began, own, whole = perf_counter(), thread_time(), process_time()
        while process_time() - whole < _WATCHED and perf_counter() - began < 10 * _WATCHED:
            contender.call()
        taken, own, whole = perf_counter() - began, thread_time() - own, process_time() - whole
        later = process_time()
        time.sleep(max(_WATCHED, min(taken, 0.05)))
        later = process_time() - later
    # Against processor time: on a busy machine the clock on the wall says nothing of who computes.
    noticed = _SHARE * whole + _LEAST
    if threads == 1 and whole - own > noticed:
        return f"other threads computed for {whole - own:.2g} s of {whole:.2g} s: a case on one thread"
    if later > noticed:
        return f"it computed for {later:.2g} s after its calls had returned"
    return ""


def _settle(seconds: float = 5.0) -> None:
    """Waits until nothing computes in this process: what others left running is not this call's."""
    until = perf_counter() + seconds
    while perf_counter() < until:
        before = process_time()
        time.sleep(0.003)
        if process_time() - before < _LEAST:
            return


def other_streams(contender: Contender, device: torch.device) -> str:
    """What a timed call left to another stream of a GPU, beyond the event that ends its time."""
    later = seen = 0.0
    for _ in range(3):  # the host may have been busy with something else once
        with contender.context(), torch.cuda.device(device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            before.record()
            contender.call()
            after.record()
            after.synchronize()
            start = perf_counter()
            torch.cuda.synchronize(device)
            later = perf_counter() - start
        seen = before.elapsed_time(after) / 1e3
        if later <= seen / 2 + 1e-4:
            break
    else:
        return f"another stream worked for {later:.2g} s after the {seen:.2g} s that events saw"
    return ""


def _answer(judge: Judge, call: Call, contender: Contender | None = None) -> list[Tensor | None]:
    """What a call gives with its random generators at one state."""
    for value in judge.inputs.args.values():
        if isinstance(value, torch.Generator):
            value.manual_seed(0)
    if contender is None:
        answer = call()
    else:
        with contender.context():
            answer = call()
    if judge.device.type == "cuda":
        torch.cuda.synchronize(judge.device)
    return [answer] if isinstance(answer, Tensor) else list(answer)


@contextmanager
def _other_values(judge: Judge) -> Iterator[None]:
    """Inside, the inputs hold other values of their kind in the same memory; afterwards what they held."""
    memory = list(bytes_of(judge.inputs))
    before = [held.clone() for held in memory]
    draw = torch.Generator().manual_seed(1)
    new = judge.spec.make(judge.case, judge.dtype, draw, judge.device).tensors()
    old = judge.inputs.tensors()
    fits = [t.shape for t in new] == [t.shape for t in old]
    try:
        with torch.no_grad():
            for t, other in zip(old, new if fits else old):
                if torch._debug_has_internal_overlap(t) == 0 and (fits or t.is_floating_point()):
                    t.copy_(other if fits else t.flip(-1))
        yield
    finally:
        for held, value in zip(memory, before):
            held.copy_(value)


def _off(judge: Judge, got: Tensor | None, want: Tensor | None) -> bool:
    """Whether an answer is another one, and not the same in other bits."""
    if got is None or want is None:
        return got is not want
    if got.shape != want.shape:
        return True
    got, want = judge.real(got.detach()), judge.real(want.detach())
    if not want.numel():
        return False
    if not want.is_floating_point():
        return (got != want).double().mean().item() > _STRAYS
    finite = want.isfinite()
    if not got[finite].isfinite().all():
        return True
    coarse = _COARSE[got.element_size()]
    got, want = got[finite].double(), want[finite].double()
    if not want.numel():
        return False
    wrong = (got - want).abs() > coarse * want.abs().max()
    return wrong.double().mean().item() > _STRAYS


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _moved(judge: Judge, answers: list[Tensor | None], copies: list[Tensor | None]) -> bool:
    """Whether earlier answers changed; one that lies in the memory of an input may."""
    inputs = {t.untyped_storage().data_ptr() for t in judge.inputs.tensors()}
    return any(
        not same_bits(t.detach(), copy)
        for t, copy in zip(answers, copies)
        if t is not None and t.untyped_storage().data_ptr() not in inputs
    )
