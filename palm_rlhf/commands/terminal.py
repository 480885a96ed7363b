"""Text for a person to read."""

from __future__ import annotations

# C0 but for newline and tab, DEL, and C1, in which a terminal reads commands as well.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    r"""The text with its control characters spelled out, \x1b for an escape; newlines and tabs stay.

    What a model writes is nobody's command to the terminal. A pipe gets the same: what it is saved to is read
    in a terminal later. --json, which escapes by itself, gives texts as they are.
    """
    return text.translate(_CONTROLS)
