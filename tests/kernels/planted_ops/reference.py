"""The definition."""

DIFFERENTIABLE = True


def forward(x):
    """2 x."""
    return x + x
