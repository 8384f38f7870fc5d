"""What an object is, as a digest on which two processes agree: its values and its code."""

from __future__ import annotations

import contextlib
import copyreg
import dis
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import pickle
import random
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
    how far it has come; the global generators of torch, NumPy and Python are left out of both.
    """

    digest: str
    moving: list[object]


class UnidentifiableError(TypeError):
    """Raised for what holds something that cannot be told from another, a lock or a file, say."""


def identify(learned: Iterable[Tensor] = (), /, **things: object) -> Identity:
    """Find out what determines how things behave.

    What an object holds counts (in attributes, slots, closures, default arguments, the keywords of
    a ``functools.partial``), and so does its code: that of its class and of the functions that it
    reaches, with the global names that they use. Of installed libraries and of the standard library
    names and versions count. Neither file names, line numbers and comments nor addresses and the
    order of sets do.

    Parameters
    ----------
    learned : iterable of Tensor
        Those whose numbers do not count, but shape, type and hooks alone.
    **things
        The names are for messages only.

    Raises
    ------
    UnidentifiableError
        If that cannot be established; the message says for what.
    """
    walk = _Walk({}, [], {id(tensor) for tensor in learned})
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
_GLOBAL_GENERATORS = (torch.default_generator, np.random.mtrand._rand, random._inst)
_GLOBAL_GENERATORS += (np.random.mtrand._rand._bit_generator,)
_PLAIN = (int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset)
# Of a class: what Python or torch writes there, and which says nothing of what it does (some of it
# only once an instance has been pickled, say).
_NOT_CODE = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__conditional_annotations__", "__parameters__", "__orig_bases__"),
    *("_abc_impl", "_backward_cls", "__slotnames__"),
}


class _Walk:
    """Goes through things from one to the next, and adds what it finds to one hash."""

    def __init__(self, seen: dict[int, int], path: list[str], learned: Set[int]) -> None:
        self.hash = hashlib.sha256()
        self.learned = learned  # addresses of tensors
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
        try:
            self._visit(thing, type(thing))
        except (UnidentifiableError, RecursionError):
            raise
        except Exception:  # the reader's objects may raise anything when they are looked at
            self.refuse(thing)
        self.path.pop()

    def _visit(self, thing: object, kind: type) -> None:
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
            if not _is_of_library(kind):
                self.visit(kind, "class")
            rules = (rule for of, rule in _RULES if isinstance(thing, of))
            (_MUTABLE.get(kind) or next(rules, _Walk._object))(self, thing)

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
        walks = [_Walk(dict(self.seen), self.path, self.learned) for _ in things]
        for thing, walk in zip(things, walks, strict=True):
            walk.visit(thing, "element")
        self.put(str(len(walks)))
        for walk in sorted(walks, key=lambda walk: walk.hash.digest()):
            self.put(walk.hash.digest())
            self.moving += walk.moving

    def _dict(self, things: Mapping) -> None:
        self.put(str(len(things)))
        for key, thing in things.items():
            self.visit(key, "key")
            self.visit(thing, str(key))

    def _tensor(self, tensor: Tensor) -> None:
        is_trained = tensor.is_leaf and tensor.requires_grad
        self.put(repr((tuple(tensor.shape), tensor.dtype, is_trained)))
        hooks = [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
        self._sequence([list((of or {}).values()) for of in hooks])
        self._attributes(vars(tensor))
        if id(tensor) not in self.learned:
            self.put(as_bytes(tensor))

    def _array(self, array: np.ndarray) -> None:
        self.put(repr(array.dtype), repr(array.shape))
        if array.dtype.hasobject:
            self.visit(array.tolist(), "array")
        else:
            self.put(np.ascontiguousarray(array).tobytes())
        if type(array) is not np.ndarray:
            self._attributes(getattr(array, "__dict__", {}))
            self._reduced(array)

    def _generator(self, generator: object) -> None:
        if any(generator is known for known in _GLOBAL_GENERATORS):
            self.put("global")
            return
        self.moving.append(generator)
        if isinstance(generator, torch.Generator):
            self.put(str(generator.device), str(generator.initial_seed()))
        else:
            self.visit(state_of(generator), "state")

    def _network(self, network: nn.Module) -> None:
        self.visit(type(network), "class")
        self.moving.append(network)
        attributes = dict(vars(network))
        tensors = attributes["_parameters"].keys() | attributes["_buffers"].keys()
        for name, value in vars(network).items():
            if name.endswith("_hooks"):  # its keys count all hooks that this process ever had
                attributes[name] = list(value.values())
            elif "_hooks_" in name:  # the same keys, of hooks with options
                hooks = list(vars(network)[name.partition("_hooks_")[0] + "_hooks"])
                attributes[name] = [hooks.index(key) for key in value]
            elif {f"{name}_orig", f"{name}_g"} & tensors and isinstance(value, Tensor):
                del attributes[name]  # made of weights at each step, by pruning, say
        self._attributes(attributes)

    def _builtin(self, function: types.BuiltinFunctionType) -> None:
        owner = function.__self__
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            self.put(getattr(owner, "__name__", ""), function.__qualname__)
        else:
            self._parts(of=owner, method=function.__name__)

    def _module(self, module: types.ModuleType) -> None:
        """Tell a library by its version, a module of the reader's by all there is in it."""
        self.put(module.__name__)
        if _is_library(module.__name__):
            self.put(_version(module.__name__))
        else:
            self._attributes({k: v for k, v in vars(module).items() if not k.startswith("__")})

    def _global(self, name: str, value: object, names: _Names) -> None:
        """Tell what a function finds under a name; of a module, what is used of it, if known."""
        self.put(name)
        is_module = isinstance(value, types.ModuleType)
        if not is_module or name in names.values or _is_library(value.__name__):
            self.visit(value, name)
            return
        self.put(value.__name__)
        rest = names._replace(all=names.all - {name})
        for inner in sorted(rest.all & vars(value).keys()):
            self._global(inner, vars(value)[inner], rest)

    def _function(self, function: types.FunctionType) -> None:
        if _is_of_library(function):
            self._named(function)
            return
        if _is_dispatcher(function):  # what it holds besides is a cache
            self._parts(registry=function.registry)
            return
        code = function.__code__
        self._code(code)
        self._parts(defaults=function.__defaults__, keywords=function.__kwdefaults__)
        self._attributes(vars(function))
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self._attributes({name: _content(cell) for name, cell in cells})
        space, names = function.__globals__, _names(code)
        for name in sorted(names.globals & space.keys()):
            self._global(name, space[name], names)
        for level, name in sorted(names.imports):
            self._import("." * level + name, space.get("__package__"), names)

    def _import(self, name: str, package: str | None, names: _Names) -> None:
        """Tell what a function imports when it runs, as a global; what is missing is that too."""
        name = importlib.util.resolve_name(name, package)
        root = name.partition(".")[0]
        if _is_library(root) or not _places(root):
            self.put(name, _version(root))
            return
        found = {module: importlib.import_module(module) for module in (root, name)}
        for module, value in found.items():
            self._global(module, value, names)

    def _named(self, thing: type | types.FunctionType) -> None:
        self.put(_module_of(thing), thing.__qualname__, _version(_module_of(thing)))

    def _code(self, code: types.CodeType) -> None:
        self.put(code.co_code, getattr(code, "co_exceptiontable", b""))
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self.put(repr((counts, code.co_names, code.co_varnames, code.co_freevars)))
        self._sequence(code.co_consts)

    def _class(self, kind: type) -> None:
        if _is_of_library(kind):
            self._named(kind)
            return
        self.put(kind.__qualname__)
        self._parts(kind=type(kind), bases=kind.__bases__)
        attributes = {k: v for k, v in vars(kind).items() if k not in _NOT_CODE}
        if issubclass(kind, torch.optim.Optimizer):
            attributes["step"] = _own_step(kind)
        self._attributes(attributes)

    def _object(self, thing: object) -> None:
        """Tell any other object by its attributes, or as pickle would, where C holds them."""
        if not _is_of_library(type(thing)):
            self.moving.append(thing)
            self._attributes(getattr(thing, "__dict__", {}) | _slots(thing))
            self.visit(_value(thing), "value")
        if _is_of_library(type(thing)) or _has_parts_in_c(type(thing)):
            self._reduced(thing)

    def _partial(self, thing: functools.partial) -> None:
        """Tell a function with some arguments; attributes it has from when they are asked for."""
        self.moving.append(thing)
        self._parts(of=thing.func, given=thing.args, keywords=thing.keywords, has=vars(thing))

    def _reduced(self, thing: object) -> None:
        parts = copyreg.dispatch_table.get(type(thing), lambda t: t.__reduce_ex__(4))(thing)
        if not isinstance(parts, str):
            self.moving.append(thing)
            self._sequence([list(part) if isinstance(part, Iterator) else part for part in parts])
        elif hasattr(thing, "__wrapped__"):
            self.visit(thing.__wrapped__, "wrapped")
        else:  # a name, of which there has to be a module that has this very thing
            module = sys.modules[pickle.whichmodule(thing, parts)]
            if functools.reduce(getattr, parts.split("."), module) is not thing:
                self.refuse(thing)
            self.put(parts)


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
    (functools.partial, _Walk._partial),
    (property, lambda walk, t: walk._parts(get=t.fget, set=t.fset, delete=t.fdel)),
    (functools.cached_property, lambda walk, t: walk._parts(get=t.func)),
    (weakref.ref, lambda walk, t: walk._parts(to=t())),
    (RemovableHandle, lambda walk, t: None),
    (enum.Enum, lambda walk, t: walk._parts(kind=type(t), member=t.name, has=vars(t))),
    (_GENERATORS, _Walk._generator),
    (np.random.Generator, lambda walk, t: walk._parts(bits=t.bit_generator)),
    (logging.Logger, lambda walk, t: walk.put(t.name)),  # tells, and changes nothing
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
    return next((of(thing) for of in _PLAIN if isinstance(thing, of)), None)


def _has_parts_in_c(kind: type) -> bool:
    """Whether a class derives from one in C other than the plain ones, say a deque or a date."""
    made_in_c = (types.BuiltinFunctionType, types.BuiltinMethodType)
    known = {object, *_PLAIN}
    return any(
        isinstance(vars(of).get("__new__"), made_in_c) for of in kind.__mro__ if of not in known
    )


def _own_step(kind: type[torch.optim.Optimizer]) -> object:
    """Give the step that an optimiser defines, if any.

    At its first use torch writes a wrapper there, around its own step or around an inherited one.
    """
    steps = [vars(of).get("step") for of in kind.__mro__]
    own, *inherited = [s.__wrapped__ if getattr(s, "hooked", False) else s for s in steps]
    return None if own in inherited else own


def _is_dispatcher(function: types.FunctionType) -> bool:
    """Whether a function is one of several by its first argument's type (functools)."""
    registry = getattr(function, "registry", None)
    return isinstance(registry, types.MappingProxyType) and hasattr(function, "dispatch")


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # of a function that is not defined yet
        return None


class _Names(NamedTuple):
    """What a function and those within it use by name."""

    globals: set[str]
    all: set[str]  # attributes too
    values: set[str]  # those that are not only looked into: ``f(name)``, not ``name.x``
    imports: set[tuple[int, str]]  # dots and name


_NAMING = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "IMPORT_NAME", "IMPORT_FROM"}


def _names(code: types.CodeType) -> _Names:
    names = _Names(set(), set(code.co_names), set(), set())
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for place, (step, after) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.globals.add(step.argval)
        if step.opname == "IMPORT_NAME":
            names.imports.add((steps[place - 2].argval, step.argval))
        looked_into = after and after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"))
        if step.opname in _NAMING and not looked_into:
            names.values.add(step.argval.partition(".")[0])
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for mine, inner in zip(names, _names(constant), strict=True):
                mine.update(inner)
    return names


def _module_of(thing: type | types.FunctionType) -> str:
    """Return the name of the module that defines a thing, of C where nothing tells."""
    module = thing.__module__
    return module if isinstance(module, str) else "builtins"


def _is_of_library(thing: type | types.FunctionType) -> bool:
    """Whether a class or function is what an installed library has under its name, or in C."""
    if not _is_library(_module_of(thing)):
        return False
    found = sys.modules.get(_module_of(thing))
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is thing:
        return True
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    return not any(isinstance(part, types.FunctionType) for part in parts)


def _is_library(module: str) -> bool:
    """Whether a module is Python's own or installed, and not this package, which may be edited."""
    root = module.partition(".")[0]
    if root == "tripletlib" or root == "__main__":
        return False
    if root in sys.builtin_module_names or root.startswith("_cython_"):  # Cython's own types
        return True
    return any(_is_installed(place) for place in _places(root))


def _places(root: str) -> list[str]:
    """Return the files or folders of a module that there is, imported or not."""
    module = sys.modules.get(root)
    if module is not None:
        return list(
            getattr(module, "__path__", None) or [getattr(module, "__file__", None) or root]
        )
    spec = importlib.util.find_spec(root)
    return [] if spec is None else list(spec.submodule_search_locations or [spec.origin or root])


@functools.cache
def _is_installed(place: str) -> bool:
    path = Path(place)
    if place in sys.stdlib_module_names:  # a module that is in no file
        return True
    stdlib = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    stdlib.append(Path(sys.base_prefix) / "DLLs")  # on Windows
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or any(folder in path.parents for folder in stdlib)


def _version(module: str) -> str:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return sys.version
    version = getattr(sys.modules.get(root), "__version__", None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = version or importlib.metadata.version(root)
    return str(version)


_SIMPLE = {bool, int, float, str, type(None)}


def state_of(thing: object, learned: Set[int] = frozenset()) -> object:
    """Give how far a generator has come, or the simple attributes of an object, to be kept.

    Of a module that is also its own parameters and buffers, but for those at the addresses
    `learned`.
    """
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.BitGenerator):
        return _with_lists(thing.state)
    if isinstance(thing, np.random.RandomState):
        return _with_lists(thing.get_state(legacy=False))
    if isinstance(thing, random.Random):
        return thing.getstate()
    mine = getattr(thing, "__dict__", {})
    state = {k: v for k, v in mine.items() if type(v) in _SIMPLE and k != "training"}
    if isinstance(thing, nn.Module):
        tensors = mine | mine["_parameters"] | mine["_buffers"]
        state |= {
            name: value.detach().clone()
            for name, value in tensors.items()
            if isinstance(value, Tensor) and id(value) not in learned
        }
    return state


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
        for name, value in state.items():
            mine = getattr(thing, name, None)
            if isinstance(value, Tensor) and isinstance(mine, Tensor):
                value = value.to(mine.device)
            if isinstance(mine, nn.Parameter):
                mine.data = value  # optimisers know it by address
            elif isinstance(value, Tensor):
                setattr(thing, name, value)  # a buffer, or an attribute
            else:
                thing.__dict__[name] = value


def _with_lists(state: dict) -> dict:
    """Replace arrays by lists, which a checkpoint that holds no code can keep."""
    kinds = {dict: _with_lists, np.ndarray: np.ndarray.tolist}
    return {key: kinds.get(type(value), lambda v: v)(value) for key, value in state.items()}
