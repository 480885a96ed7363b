"""A thin PaLM + RLHF stack that trains on rlhf_kernels."""

__version__ = "0.1.0.dev0"
__all__: list[str] = []
