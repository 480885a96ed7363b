"""What of a model learns: adapters on which projections, the last layers, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# "attention", "mlp", "all", or names of projections.
Targets = str | Sequence[str]
KINDS = ("attention", "mlp")
LAYERS = "the model has {depth} layers: from 1 to {depth} of the last ones can learn, got {count}"


def chosen(projections: Mapping[str, str], targets: Targets, what: str = "the model") -> list[str]:
    """Names of the projections that `targets` mean, in their order.

    Args:
        projections: names to kinds, "attention" or "mlp".
        targets: "all", a kind, an end of names at a dot such as "q_proj", or several of these.
        what: the model in errors.

    Raises:
        ValueError: one of the targets means no projection.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for target in wanted:
        matched = {
            name
            for name, kind in projections.items()
            if target in ("all", kind, name) or name.endswith(f".{target}")
        }
        if not matched:
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in projections}))
            raise ValueError(
                f"{what} has no projection {target!r} for adapters. Choose from all, "
                f"{', '.join(KINDS)}, {there}."
            )
        found |= matched
    if not found:
        raise ValueError(f"{what}: adapters need a projection at least, got none")
    return [name for name in projections if name in found]
