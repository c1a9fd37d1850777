"""Descriptors of tensors, by which the copy engine reads boxes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Boxes:
    """Describe tensors that differ in their address only.

    Triton checks every descriptor as it is made, which takes the host several times as long as the rest of it. Here the
    first is checked, and those of later tensors, of the same shape, strides, dtype and alignment, are copies of it.

    Args:
        make: Make a tensor's descriptor.
    """

    __slots__ = ("_fields", "_kind", "_make")

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self._make = make
        self._kind: Any = None
        self._fields: dict[str, Any] = {}  # all but the tensor, which is not kept

    def of(self, x: Tensor) -> Any:
        """Return a tensor's descriptor."""
        if self._kind is None:
            made = self._make(x)
            self._fields = {name: value for name, value in vars(made).items() if value is not x}
            self._kind = type(made)  # last: other threads go by it
            return made
        copy = object.__new__(self._kind)
        vars(copy).update(self._fields, base=x)
        return copy
