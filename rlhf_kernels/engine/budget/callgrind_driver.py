"""Runs recorded calls of `_host` under valgrind, without torch: callgrind_driver.py <library> <calls>."""

import importlib.util
import pickle
import sys
from importlib.machinery import ExtensionFileLoader


def main() -> None:
    """Each kernel runs once to warm up, then once inside `_host.counted`, which callgrind collects."""
    library, recording = sys.argv[1:]
    spec = importlib.util.spec_from_file_location(
        "_host", library, loader=ExtensionFileLoader("_host", library)
    )
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    with open(recording, "rb") as file:
        kernels = pickle.load(file)  # written by callgrind.py a moment ago
    for calls in kernels:
        prepared = [(getattr(host, name), args, kwargs) for name, args, kwargs in calls]

        def run(prepared=prepared) -> None:  # noqa: ANN001
            for function, args, kwargs in prepared:
                function(*args, **kwargs)

        run()
        host.counted(run)


if __name__ == "__main__":
    main()
