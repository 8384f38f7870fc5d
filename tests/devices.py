"""Stand-ins for devices that the machine does not have, and a list of those that it has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]

# Of torch's own device types, this alone can be imitated in autograd without a driver.
FAKE = torch.device("meta")

_FROM_ANY_DEVICE = ("_to_copy", "copy_", "index", "index_put_", "index_put")


def _refuse_double(result):
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
            raise TypeError("this device does not support float64")
    return result


class NoDouble(TorchDispatchMode):
    """Let no operation give float64, on whichever device, as on Apple's MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _refuse_double(func(*args, **(kwargs or {})))


class _Elsewhere(Tensor):
    """A tensor that says that it is on `FAKE`; its numbers are in an ordinary one."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=FAKE
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"{self.held!r} elsewhere"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    """Run on the ordinary tensors and give the result as on `FAKE`."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    mine = {id(t.held): t for t in inputs if isinstance(t, _Elsewhere)}
    name = func._schema.name.removeprefix("aten::")
    if mine and name not in _FROM_ANY_DEVICE:
        for t in inputs:
            if not isinstance(t, _Elsewhere) and (t.dim() or name in ("cat", "stack")):
                raise RuntimeError(f"{name}: tensors are on two devices, {FAKE} and {t.device}")

    def ordinary(value):
        if isinstance(value, _Elsewhere):
            return value.held
        return torch.device("cpu") if value == FAKE else value

    def elsewhere(value):
        if not isinstance(value, Tensor):
            return value
        known = mine.get(id(value))
        return _Elsewhere(value) if known is None else known

    result = func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
    target = kwargs.get("device", FAKE if mine else None)
    target = FAKE if target is None else target
    if name == "copy_" and not isinstance(args[0], _Elsewhere):
        return args[0]
    return tree_map(elsewhere, _refuse_double(result)) if target == FAKE else result


class _Made(TorchDispatchMode):
    """Make tensors that are asked for on `FAKE`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (kwargs or {}).get("device") == FAKE:
            return _compute(func, args, kwargs)
        return func(*args, **(kwargs or {}))


class FakeDevice(TorchFunctionMode):
    """While it is entered, `FAKE` is a device of its own without float64.

    Tensors come to it and leave it by `to`; they mix with the CPU's no more than those of a real
    device do, and have no `numpy`.
    """

    def __enter__(self):
        self._made = _Made()
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # These make a tensor on the CPU and move it where no dispatch mode can see it.
        if func is Tensor.new_tensor and isinstance(args[0], _Elsewhere):
            like, *args = args
            func, kwargs = torch.tensor, {"dtype": like.dtype, "device": FAKE, **kwargs}
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu") == FAKE
        ):
            return func(*args, **{**kwargs, "device": "cpu"}).to(FAKE)
        return func(*args, **kwargs)
