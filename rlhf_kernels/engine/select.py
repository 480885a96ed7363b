"""Names given on a command line as ops, cases and dtypes; an unknown one is answered with those there are."""

from __future__ import annotations

import difflib
import fnmatch
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_kernels.engine.row import dtype_name
from rlhf_kernels.engine.spec import Case, OpSpec, load_specs
from rlhf_kernels.runtime.dispatch import BACKENDS

TIERS = ("smoke", "typical", "large", "awkward")


class UsageError(ValueError):
    """A name or value that does not exist; the text says what is expected."""


class Measurement(NamedTuple):
    """What is checked, timed or tuned in one go."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, str, str]:
        """Op, case and dtype."""
        return self.spec.name, self.case.name, dtype_name(self.dtype)


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """One sentence about a name that does not exist."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {what} {name!r}: {hint}expected one of {', '.join(known)}")


def known(what: str, given: Sequence[str], names: Iterable[str]) -> list[str]:
    """The given names, all of which exist.

    Raises:
        UsageError: one does not.
    """
    names = list(names)
    for name in given:
        if name not in names:
            raise unknown(what, name, names)
    return list(given)


def specs_named(ops: Sequence[str], otherwise: str) -> tuple[str, list[str]]:
    """The package of specs that is named among ops, as `my_package.specs` or a .py file, and the ops left.

    Args:
        ops: names given on a command line.
        otherwise: the package where none is named.

    Raises:
        UsageError: there are two, or one that cannot be imported or declares no op.
    """
    packages = [name for name in ops if "." in name or "/" in name]
    if len(packages) > 1:
        raise UsageError(f"expected one package of specs, got {' and '.join(packages)}")
    if not packages:
        return otherwise, list(ops)
    package = str(Path(packages[0]).resolve()) if packages[0].endswith(".py") else packages[0]
    if os.getcwd() not in sys.path:  # as the measuring processes have it, and `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        load_specs(package)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except Exception as error:  # whatever a foreign file raises is what is wrong with it
        raise UsageError(f"{packages[0]} cannot be imported: {type(error).__name__}: {error}") from None
    return package, [name for name in ops if name not in packages]


def select_ops(specs: Mapping[str, OpSpec], ops: Sequence[str]) -> list[OpSpec]:
    """The specs of these ops; all where none is named."""
    return [specs[name] for name in known("op", ops, specs) or specs]


def select_backends(specs: Sequence[OpSpec], given: Sequence[str], also: Iterable[str] = ()) -> list[str]:
    """Backends, and other implementations, that at least one of the ops has."""
    return known("backend", given, dict.fromkeys((*BACKENDS, *also)))


def measurements(
    specs: Sequence[OpSpec],
    cases: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    tiers: Sequence[str] = (),
    default_dtypes: Callable[[Case], Sequence[torch.dtype]] = lambda case: case.dtypes,
) -> list[Measurement]:
    """What the names stand for.

    Args:
        specs: the ops.
        cases: names or patterns such as "palm*"; none means all of the tiers.
        dtypes: such as "float32"; "all" means all that a case has; none means `default_dtypes`.
        tiers: of the cases; none means all. A case that is named counts in any tier.

    Raises:
        UsageError: a name that none of the ops has.
    """
    known("tier", tiers, TIERS)
    everything = dict.fromkeys(case.name for spec in specs for case in spec.cases)
    for pattern in cases:
        if not fnmatch.filter(everything, pattern):
            raise unknown("case", pattern, everything)
    found = []
    available = dict.fromkeys(dtype_name(d) for spec in specs for case in spec.cases for d in case.dtypes)
    known("dtype", dtypes, (*available, "all"))
    for spec in specs:
        for case in spec.cases:
            named = any(fnmatch.fnmatch(case.name, pattern) for pattern in cases)
            if not named and (cases or (tiers and case.tier not in tiers)):
                continue
            allowed = case.dtypes if "all" in dtypes else None
            wanted = allowed or [d for d in case.dtypes if dtype_name(d) in dtypes]
            wanted = wanted if dtypes else default_dtypes(case)
            found += [Measurement(spec, case, dtype) for dtype in wanted]
    if not found:
        raise UsageError(
            "nothing to do: no case of these ops has that tier and dtype (rlhf-kernels list <op>)"
        )
    return found
