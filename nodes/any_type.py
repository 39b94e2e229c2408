"""The input and output type that fits every other, in every ComfyUI that we support.

Owns that one value.
"""

from __future__ import annotations

__all__ = ["ANY", "AnyType"]


class AnyType(str):
    """``*``, and different from nothing.

    ComfyUI 0.3 has no wildcard of its own: it asks ``given != wanted``, and Python asks the subclass of str
    first, whichever side it stands on. Equality stays a string's, so that code which looks for "INT" or
    "STRING" does not find it here.
    """

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")
