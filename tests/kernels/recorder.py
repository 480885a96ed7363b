"""Which of this library's operators are called, with what."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Keeps the calls to this library's operators that go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
