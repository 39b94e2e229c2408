"""The format of plans: what each token in brackets is.

Owns the numbers. `comfy_models_plan` and `comfy_models_kinds` write them, `comfy_models_build` reads them.
"""

from __future__ import annotations

import enum

__all__ = ["Tag"]


class Tag(enum.IntEnum):
    """What a token in brackets is."""

    REF = 0  # an object that came before: its number
    LIST = 1
    TUPLE = 2
    DICT = 3  # pairs
    SET = 4
    FROZENSET = 5
    INT = 6  # beyond 64 bits
    COMPLEX = 7
    RANGE = 8
    SLICE = 9
    NAMED = 10  # a class or function: module, name
    CODE = (
        11  # a function: module, digest, name, qualified name, defaults, keyword defaults, cells, attributes
    )
    CELL = 12
    CLASS = 13  # a class made inside of a function: module, names, bases, its namespace
    METHOD = 14  # function, self
    PARTIAL = 15
    MODULE = 16
    TENSOR = 17  # its number among the tensors
    DTYPE = 18
    SIZE = 19
    NDARRAY = 20
    ENUM = 21  # class, name
    OBJECT = 22  # class, attributes
    TORCH_MODULE = 23  # class, training, attributes, parameters, buffers, names of buffers not saved, modules
    CONTAINER = 24  # class, items, attributes: a subclass of dict or list
    STATIC = 25
    CLASSMETHOD = 26
    PROPERTY = 27
    PACKAGE = 28  # its key
    SPECIAL = 29  # name, state
    ORDERED_DICT = 30
    ELLIPSIS = 31
    BYTEARRAY = 32
    LAYOUT = 33  # a torch.layout or memory_format, by name
    DEFAULT_DICT = 34
    DEQUE = 35
