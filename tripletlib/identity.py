"""What an object is, as a digest on which two processes agree: its values and its code."""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import random
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Identity(NamedTuple):
    """A digest of things, and what there is in them that moves on as they are used.

    `moving` lists their random generators and their objects with attributes, in an order that is
    the same for things of the same digest. Of a `torch.Generator` the digest holds the seed, not
    how far it has come; of a module's parameters and persistent buffers their shapes and types.
    """

    digest: str
    moving: list[object]


class UnidentifiableError(TypeError):
    """Raised for what holds something that cannot be told from another, a lock or a file, say."""


def identify(**things: object) -> Identity:
    """Find out what determines how things behave.

    What an object holds counts (in attributes, slots, closures, default arguments, the keywords of
    a ``functools.partial``), and so does its code: that of its class and of the functions that it
    reaches, with the global names that they use. Of installed libraries and of the standard library
    names and versions count. Neither file names, line numbers and comments nor addresses and the
    order of sets do.

    Raises
    ------
    UnidentifiableError
        If that cannot be established; the message says for what.
    """
    walk = _Walk({}, [])
    try:
        for name, thing in things.items():
            walk.visit(thing, name)
    except RecursionError:
        raise UnidentifiableError(f"{' and '.join(things)}, which is nested too deeply") from None
    return Identity(walk.hash.hexdigest(), walk.moving)


_ATOMS = {
    *(bool, int, float, complex, str, type(None), type(Ellipsis), type(NotImplemented), range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
}
_DESCRIPTORS = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_GENERATORS = (torch.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
# Of a class: what Python or torch writes there, and which says nothing of what it does.
_NOT_CODE = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__conditional_annotations__", "__parameters__", "__orig_bases__"),
    *("_abc_impl", "_backward_cls"),
}


class _Walk:
    """Goes through things from one to the next, and adds what it finds to one hash."""

    def __init__(self, seen: dict[int, int], path: list[str]) -> None:
        self.hash = hashlib.sha256()
        self.seen = seen  # what was met, by address, numbered in the order of meeting
        self.path = path  # the names that lead to the present place, for the message
        self.kept: list[object] = []  # alive while we walk, so that no address comes twice
        self.moving: list[object] = []

    def put(self, *words: str | bytes | memoryview) -> None:
        """Add words to the hash, each with its length, so that no two lists look alike."""
        for word in words:
            data = word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word
            self.hash.update(f"{len(data)}:".encode())
            self.hash.update(data)

    def visit(self, thing: object, name: str) -> None:
        self.path.append(name)
        kind = type(thing)
        if kind in _ATOMS:
            self.put(kind.__name__, repr(thing))
        elif kind in (bytes, bytearray):
            self.put(kind.__name__, thing)
        elif isinstance(thing, np.generic) and not thing.dtype.hasobject:
            self.put(thing.dtype.str, thing.tobytes())
        elif kind in _IMMUTABLE:  # whether two equal ones are one object is up to chance
            _IMMUTABLE[kind](self, thing)
        elif id(thing) in self.seen:
            self.put("again", str(self.seen[id(thing)]))
        else:
            self.seen[id(thing)] = len(self.seen)
            self.kept.append(thing)
            self.put(kind.__qualname__)
            rules = (rule for of, rule in _RULES if isinstance(thing, of))
            (_MUTABLE.get(kind) or next(rules, _Walk._object))(self, thing)
        self.path.pop()

    def refuse(self, thing: object) -> None:
        where = ".".join(name for name in self.path if name)
        raise UnidentifiableError(
            f"{where}, of type {type(thing).__module__}.{type(thing).__qualname__}"
        )

    def _parts(self, **parts: object) -> None:
        self._attributes(parts)

    def _attributes(self, attributes: dict[str, object]) -> None:
        self.put(str(len(attributes)))
        for name in sorted(attributes):
            self.put(name)
            self.visit(attributes[name], name)

    def _sequence(self, things: Sequence[object]) -> None:
        self.put("sequence", str(len(things)))
        for place, thing in enumerate(things):
            self.visit(thing, str(place))

    def _set(self, things: set | frozenset) -> None:
        digests = []
        for thing in things:
            walk = _Walk(dict(self.seen), self.path)
            walk.visit(thing, "element")
            digests.append(walk.hash.hexdigest())
        self.put(str(len(digests)), *sorted(digests))

    def _dict(self, things: Mapping) -> None:
        self.put(str(len(things)))
        for key, thing in things.items():
            self.visit(key, "key")
            self.visit(thing, str(key))

    def _tensor(self, tensor: Tensor) -> None:
        self._like(tensor)
        try:
            self.put(as_bytes(tensor))
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # sparse, or no data
            self.refuse(tensor)

    def _like(self, tensor: Tensor) -> None:
        self.put(repr((tuple(tensor.shape), tensor.dtype, tensor.requires_grad)))

    def _array(self, array: np.ndarray) -> None:
        self.put(array.dtype.str, repr(array.shape))
        if array.dtype.hasobject:
            self.visit(array.tolist(), "array")
        else:
            self.put(np.ascontiguousarray(array).tobytes())

    def _generator(self, generator: object) -> None:
        self.moving.append(generator)
        if isinstance(generator, torch.Generator):
            self.put(str(generator.device), str(generator.initial_seed()))
        else:
            self.visit(state_of(generator), "state")

    def _network(self, network: nn.Module) -> None:
        """Tell a module by its class and attributes, but for the weights that a run changes."""
        self.visit(type(network), "class")
        self.moving.append(network)
        attributes = dict(vars(network))
        weights = {**attributes.pop("_parameters"), **attributes["_buffers"]}
        fleeting = network._non_persistent_buffers_set
        attributes["_buffers"] = {name: weights.pop(name) for name in fleeting & weights.keys()}
        for name, tensor in weights.items():
            self.put(name)
            if tensor is None or id(tensor) in self.seen:  # seen where two layers share it
                self.visit(tensor, name)
            else:
                self.seen[id(tensor)] = len(self.seen)
                self._like(tensor)
        for name, value in list(attributes.items()):
            if name.endswith("_hooks"):  # its keys count all hooks that this process ever had
                attributes[name] = list(value.values())
            if isinstance(value, Tensor) and any(of.startswith(f"{name}_") for of in weights):
                del attributes[name]  # made of weights at each step, by pruning, say
        self._attributes(attributes)

    def _builtin(self, function: types.BuiltinFunctionType) -> None:
        owner = function.__self__
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            self.put(getattr(owner, "__name__", ""), function.__qualname__)
        else:
            self._parts(of=owner, method=function.__name__)

    def _module(self, module: types.ModuleType) -> None:
        self._names_of(module, vars(module).keys())

    def _names_of(self, module: types.ModuleType, names: Set[str]) -> None:
        """Tell a library by its version, a module of the reader's by what is used of it."""
        self.put(module.__name__)
        if _is_library(module.__name__):
            self.put(_version(module.__name__))
            return
        for name in sorted(names & vars(module).keys()):
            self._global(name, vars(module)[name], names)

    def _global(self, name: str, value: object, names: Set[str]) -> None:
        self.put(name)
        if isinstance(value, types.ModuleType):
            self._names_of(value, names - {name})
        else:
            self.visit(value, name)

    def _function(self, function: types.FunctionType) -> None:
        if _is_of_library(function):
            self.put(function.__module__, _version(function.__module__))
            return
        code = function.__code__
        self._code(code)
        self._parts(defaults=function.__defaults__, keywords=function.__kwdefaults__)
        self._attributes(vars(function))
        self._attributes(
            {
                name: _content(c)
                for name, c in zip(code.co_freevars, function.__closure__ or (), strict=True)
            }
        )
        used, names = _names(code)
        for name in sorted(used):
            if name in function.__globals__:
                self._global(name, function.__globals__[name], names)
            elif name in sys.modules:  # imported by the function itself
                self._global(name, sys.modules[name], names)

    def _code(self, code: types.CodeType) -> None:
        self.put(code.co_code, getattr(code, "co_exceptiontable", b""))
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self.put(repr((counts, code.co_names, code.co_varnames, code.co_freevars)))
        self._sequence(code.co_consts)

    def _class(self, kind: type) -> None:
        self.put(kind.__qualname__)
        if _is_of_library(kind):
            self.put(kind.__module__, _version(kind.__module__))
            return
        self._parts(kind=type(kind), bases=kind.__bases__)
        self._attributes({k: v for k, v in vars(kind).items() if k not in _NOT_CODE})

    def _object(self, thing: object) -> None:
        """Tell any other object by its attributes, or as pickle would, where C holds them."""
        self.moving.append(thing)
        if not _is_of_library(type(thing)):
            self.visit(type(thing), "class")
            self._attributes(getattr(thing, "__dict__", {}) | _slots(thing))
            self.visit(_value(thing), "value")
            return
        reduce = copyreg.dispatch_table.get(type(thing), lambda t: t.__reduce_ex__(4))
        try:
            parts = reduce(thing)
        except Exception:  # each type refuses in a way of its own
            self.refuse(thing)
        if isinstance(parts, str):  # a name
            parts = (parts, getattr(thing, "__wrapped__", None))
        self._sequence([list(part) if isinstance(part, Iterator) else part for part in parts])


_IMMUTABLE = {tuple: _Walk._sequence, frozenset: _Walk._set, types.CodeType: _Walk._code}
_MUTABLE = {
    list: _Walk._sequence,
    set: _Walk._set,
    dict: _Walk._dict,
    types.MappingProxyType: _Walk._dict,
}
_RULES = (
    (Tensor, _Walk._tensor),
    (np.ndarray, _Walk._array),
    (types.ModuleType, _Walk._module),
    (type, _Walk._class),
    (types.FunctionType, _Walk._function),
    (types.MethodType, lambda walk, t: walk._parts(of=t.__self__, function=t.__func__)),
    (types.BuiltinFunctionType, _Walk._builtin),
    (_DESCRIPTORS, lambda walk, t: walk.put(t.__objclass__.__qualname__, t.__name__)),
    ((staticmethod, classmethod), lambda walk, t: walk._parts(function=t.__func__)),
    (property, lambda walk, t: walk._parts(get=t.fget, set=t.fset, delete=t.fdel)),
    (functools.cached_property, lambda walk, t: walk._parts(get=t.func)),
    (weakref.ref, lambda walk, t: walk._parts(to=t())),
    (RemovableHandle, lambda walk, t: None),
    (enum.Enum, lambda walk, t: walk._parts(kind=type(t), member=t.name)),
    (_GENERATORS, _Walk._generator),
    (np.random.Generator, lambda walk, t: walk._parts(bits=t.bit_generator)),
    (nn.Module, _Walk._network),
)


def as_bytes(tensor: Tensor) -> memoryview:
    """Give the numbers of a tensor of any type as they are in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _slots(thing: object) -> dict[str, object]:
    members = [(k, m) for kind in type(thing).__mro__ for k, m in vars(kind).items()]
    slots = [k for k, m in members if isinstance(m, types.MemberDescriptorType)]
    return {name: getattr(thing, name) for name in slots if hasattr(thing, name)}


def _value(thing: object) -> object:
    """Give what an object of a type derived from a builtin one holds as such."""
    plain = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
    return next((of(thing) for of in plain if isinstance(thing, of)), None)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # of a function that is not defined yet
        return None


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Names that a function and those within it look up as globals, and all names they use."""
    used, names = set(), set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
            used.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_used, inner_names = _names(constant)
            used |= inner_used
            names |= inner_names
    return used, names


def _is_of_library(thing: type | types.FunctionType) -> bool:
    """Whether a class or function is what an installed library has under its name, or in C."""
    if thing.__module__ is None or not _is_library(thing.__module__):
        return False
    found = sys.modules.get(thing.__module__)
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is thing:
        return True
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    return not any(isinstance(part, types.FunctionType) for part in parts)


@functools.cache
def _is_library(module: str) -> bool:
    """Whether a module is Python's own or installed, and not this package, which may be edited."""
    root = module.partition(".")[0]
    if root == "tripletlib" or root == "__main__":
        return False
    if root in sys.stdlib_module_names:
        return True
    places = getattr(sys.modules.get(root), "__path__", None)
    places = list(places or [getattr(sys.modules.get(root), "__file__", None) or ""])
    folders = {"site-packages", "dist-packages"}
    return any(folders & set(Path(place).parts) for place in places)


def _version(module: str) -> str:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return sys.version
    return str(getattr(sys.modules.get(root), "__version__", ""))


_SIMPLE = {bool, int, float, str, type(None)}


def state_of(thing: object) -> object:
    """Give how far a generator has come, or the simple attributes of an object, to be kept."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.BitGenerator):
        return _with_lists(thing.state)
    if isinstance(thing, np.random.RandomState):
        return _with_lists(thing.get_state(legacy=False))
    if isinstance(thing, random.Random):
        return thing.getstate()
    kinds = {*_SIMPLE, Tensor} if isinstance(thing, nn.Module) else _SIMPLE
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in getattr(thing, "__dict__", {}).items()
        if type(value) in kinds and name != "training"
    }


def set_state(thing: object, state: object) -> None:
    """Bring a thing to a state that `state_of` gave."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, np.random.BitGenerator):
        thing.state = state
    elif isinstance(thing, np.random.RandomState):
        thing.set_state(state)
    elif isinstance(thing, random.Random):
        thing.setstate(state)
    else:
        mine = getattr(thing, "__dict__", {})
        for name, value in state.items():
            is_tensor = isinstance(value, Tensor) and isinstance(mine.get(name), Tensor)
            mine[name] = value.to(mine[name].device) if is_tensor else value


def _with_lists(state: dict) -> dict:
    """Replace arrays by lists, which a checkpoint that holds no code can keep."""
    kinds = {dict: _with_lists, np.ndarray: np.ndarray.tolist}
    return {key: kinds.get(type(value), lambda v: v)(value) for key, value in state.items()}
