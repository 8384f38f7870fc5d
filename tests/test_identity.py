"""What is another thing has another digest; the same thing has the same one in any process."""

import datetime
import functools
import importlib
import io
import logging
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from torch import nn
from torch.nn.utils import parametrizations, prune

from tripletlib import BalancedBatchSampler, EmbeddingNet, TripletLoss
from tripletlib.identity import UnidentifiableError, identify, set_state, state_of


def digest(thing):
    learned = thing.state_dict(keep_vars=True).values() if isinstance(thing, nn.Module) else ()
    return identify(learned, thing=thing).digest


class Silent:
    """Has attributes of which its text tells nothing."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return "Silent()"

    def __call__(self, images):
        return images * self.value

    def method(self, images):
        return images + self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Pickled(Silent):
    pass


class Shade(Enum):
    DARK = 1
    LIGHT = 2


@dataclass
class Settings:
    value: object
    rest: list = field(default_factory=list)


class Text(str):
    pass


class Bag(list):
    pass


def nested(value):
    def outer(images):
        def inner(image):
            return image * value

        return inner(images)

    return outer


def with_default(value):
    def function(images, by=value):
        return images * by

    return function


def with_keyword(value):
    def function(images, *, by=value):
        return images * by

    return function


def with_list(value):
    def function(images):
        return [image * value for image in images]

    return function


def decorated(value):
    @functools.wraps(Silent.method)
    def wrapper(images):
        return nested(value)(images)

    return wrapper


def on_class(value):
    return type("Local", (), {"factor": value, "f": nested(value), "g": staticmethod(len)})


def bound(value):
    return types.MethodType(lambda self, images: images * self.value, Silent(value))


def patched(value):
    network = nn.Linear(2, 2)
    network.forward = nested(value)
    return network


def hooked(value):
    network = nn.Linear(2, 2)
    network.register_forward_hook(lambda *_: value)
    return network


def advanced(value):
    generator = np.random.default_rng(0)
    generator.random(value)
    return generator


class Queue(deque):
    pass


class Day(datetime.date):
    pass


def with_hook(hook):
    network = nn.Linear(2, 2)
    network.weight.register_hook(hook)
    return network


class Tagged(nn.Parameter):
    def __new__(cls, tag):
        return super().__new__(cls, torch.zeros(2))

    def __init__(self, tag):
        self.tag = tag


def teacher(value):
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, value)
    nn.init.constant_(network.bias, value)
    return network


SILENT = {1: Silent(1), 2: Silent(2)}
MAKERS = [
    lambda v: v,
    float,
    str,
    lambda v: [1, {"key": (v,)}],
    lambda v: {v, "other"},
    lambda v: frozenset([v]),
    lambda v: {v: 1},
    lambda v: deque([v]),
    lambda v: OrderedDict(key=v),
    lambda v: defaultdict(int, key=v),
    lambda v: slice(v),
    lambda v: range(v),
    lambda v: Text(v),
    lambda v: Bag([v]),
    lambda v: np.float32(v),
    lambda v: np.full(3, v),
    lambda v: np.array([v, None], dtype=object),
    lambda v: torch.full((3,), v),
    lambda v: torch.full((3,), v, dtype=torch.bfloat16),
    lambda v: nn.Parameter(torch.full((3,), 1.0 * v)),
    lambda v: torch.zeros(v),
    lambda v: torch.Generator().manual_seed(v),
    lambda v: np.random.default_rng(v),
    lambda v: np.random.RandomState(v),
    random.Random,
    advanced,
    lambda v: list(Shade)[v - 1],
    Settings,
    Silent,
    Slotted,
    lambda v: Silent(v).method,
    bound,
    lambda v: torch.full((2,), v).add,
    lambda v: functools.partial(torch.add, alpha=v),
    lambda v: functools.partial(nested, v),
    lambda v: functools.lru_cache(nested(v)),
    lambda v: torch.no_grad()(nested(v)),
    lambda v: weakref.ref(SILENT[v]),
    lambda v: [torch.neg, torch.abs][v - 1],
    lambda v: [np.add, np.multiply][v - 1],
    lambda v: [str.upper, str.lower][v - 1],
    lambda v: [nn.functional.relu, nn.functional.gelu][v - 1],
    lambda v: [nn.functional.relu, nn.functional.silu][v - 1],
    lambda v: functools.partial([nn.functional.relu, nn.functional.silu][v - 1], inplace=False),
    lambda v: [nn.Linear.forward, nn.Bilinear.forward][v - 1],
    lambda v: getattr(torch.distributions.Normal(0.0, 1.0), ["sample", "rsample"][v - 1]),
    lambda v: [np.random.rand, np.random.randn][v - 1],
    lambda v: Queue([v]),
    lambda v: Queue([1] * v),
    lambda v: Day(2026, 1, v),
    lambda v: np.ma.array([1, 2], mask=[v == 1, False]),
    lambda v: np.zeros(2, dtype=[("ab"[v - 1], float)]),
    lambda v: pd.DataFrame({"a": [v]}),
    lambda v: with_hook(lambda gradient: gradient * v),
    lambda v: Tagged(v),
    lambda v: [teacher(v)],
    lambda v: lambda images: teacher(v)(images),
    lambda v: [nn.ReLU, nn.GELU][v - 1],
    nested,
    with_default,
    with_keyword,
    with_list,
    decorated,
    on_class,
    lambda v: on_class(v)(),
    patched,
    hooked,
    lambda v: nn.Linear(2, v),
    lambda v: nn.Dropout(v / 10),
    lambda v: EmbeddingNet(4, normalize=v == 1),
    lambda v: nn.Linear(2, 2).requires_grad_(v == 1),
    lambda v: nn.Sequential(nn.ReLU(), nn.Linear(2, 2)).train(v == 1),
    lambda v: TripletLoss(v / 10),
    lambda v: pml_losses.TripletMarginLoss(margin=v),
    lambda v: BalancedBatchSampler(torch.arange(8) % 4, 2, v + 1),
    lambda v: BalancedBatchSampler(
        torch.arange(8) % 4, 2, 2, generator=torch.Generator().manual_seed(v)
    ),
    lambda v: torch.utils.data.RandomSampler(range(9), num_samples=v),
]


@pytest.mark.parametrize("make", MAKERS)
def test_what_differs_has_another_digest_and_what_is_made_again_the_same(make):
    assert digest(make(1)) != digest(make(2))
    assert digest(make(1)) == digest(make(1))


def defined(source, **names):
    """Define the function or class f by source, as a cell of a notebook does."""
    space = {"__name__": "__main__", "torch": torch, "nn": nn, **names}
    exec(textwrap.dedent(source), space)
    return space["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("f = lambda x: x + 1", "f = lambda x: x - 1"),
        ("f = lambda x: x.sum()", "f = lambda x: x.mean()"),
        ("f = lambda x: x if x in {1, 2} else 0", "f = lambda x: x if x in {1, 3} else 0"),
        (
            "class f(nn.Module):\n    def forward(self, x): return x",
            "class f(nn.Module):\n    def forward(self, x): return -x",
        ),
        ("class f:\n    margin = 1", "class f:\n    margin = 2"),
        ("class f:\n    g = property(lambda s: 1)", "class f:\n    g = property(lambda s: 2)"),
        (
            "class f:\n    @classmethod\n    def g(cls): return 1",
            "class f:\n    @classmethod\n    def g(cls): return 2",
        ),
        (
            "class f(nn.Linear):\n    def forward(self, x): return super().forward(x)",
            "class f(nn.Linear):\n    def forward(self, x): return super().forward(x) * 2",
        ),
        (
            "class b:\n    def g(self): return 1\nclass f(b): pass",
            "class b:\n    def g(self): return 2\nclass f(b): pass",
        ),
        (
            "def f(x):\n    try: return g(x)\n    except ValueError: return 1",
            "def f(x):\n    try: return g(x)\n    except KeyError: return 1",
        ),
    ],
)
def test_code_edited_in_a_notebook_has_another_digest(one, other):
    assert digest(defined(one)) != digest(defined(other))
    assert digest(defined(one)) == digest(defined("\n\n" + one))


def test_comments_do_not_count():
    plain = defined("def f(x):\n    return x + 1")
    commented = defined("def f(x):\n    # Add one.\n\n    return x + 1")
    assert digest(plain) == digest(commented)


def test_globals_that_a_function_uses_count_and_others_do_not():
    source = "def f(x):\n    def g(): return [scale * y for y in x]\n    return g()"
    first = digest(defined(source, scale=1, other=1))
    assert first == digest(defined(source, scale=1, other=2))
    assert first != digest(defined(source, scale=2, other=1))
    # A name that is an attribute here is no global.
    attribute = "def f(x):\n    return x.scale"
    assert digest(defined(attribute, scale=1)) == digest(defined(attribute, scale=2))


@pytest.mark.parametrize(
    "source",
    [
        "import helpers\ndef f(x):\n    return helpers.twice(x)",
        "from helpers import twice as f",
        "from helpers import twice\ndef f(x):\n    return twice(x)",
        "def f(x):\n    from helpers import twice\n    return twice(x)",
        "import helpers\nclass f(helpers.Base): pass",
    ],
)
def test_the_readers_own_modules_count_by_what_is_used_of_them(source, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def with_helpers(content):
        (tmp_path / "helpers.py").write_text(textwrap.dedent(content))
        module = types.ModuleType("helpers")
        exec(textwrap.dedent(content), vars(module))
        monkeypatch.setitem(sys.modules, "helpers", module)
        return digest(defined(source))

    content = """
        import threading
        factor, unused, lock = 2, 1, threading.Lock()
        def twice(x): return x * factor
        class Base:
            def f(self, x): return twice(x)
    """
    first = with_helpers(content)
    assert first == with_helpers(content.replace("unused, lock = 2, 1", "unused, lock = 2, 7"))
    assert first != with_helpers(
        content.replace("factor, unused, lock = 2", "factor, unused, lock = 3")
    )


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    import helpers\n    return helpers.twice(x)",
        "def f(x):\n    import helpers as h\n    return g(h, x)\ndef g(m, x): return x * m.factor",
        "import helpers\ndef f(x): return g(helpers, x)\ndef g(m, x): return x * m.factor",
        "import helpers\ndef f(x): return x * getattr(helpers, 'factor')",
        "import helpers\nclass C: pass\nf = C()\nf.settings = helpers",
    ],
)
def test_the_readers_own_modules_count_whole_where_it_is_not_seen_what_is_used(source, monkeypatch):
    def with_factor(factor):
        module = types.ModuleType("helpers")
        exec(f"factor = {factor}\ndef twice(x): return x * factor", vars(module))
        monkeypatch.setitem(sys.modules, "helpers", module)
        return digest(defined(source))

    assert with_factor(1) == with_factor(1) != with_factor(2)


def test_modules_that_a_function_imports_count_before_they_are_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "cellar"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def f(x):\n    from .inner import factor\n    return x * factor"
    )

    def with_factor(factor):
        (package / "inner.py").write_text(f"factor = {factor}")
        for name in [name for name in sys.modules if name.partition(".")[0] == "cellar"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        return importlib.import_module("cellar").f

    first = digest(with_factor(1))
    assert first == digest(with_factor(1))
    other = with_factor(2)
    before = digest(other)
    other(1)  # imports
    assert first != before == digest(other)


def test_a_module_of_the_readers_that_is_named_like_one_of_pythons_counts(tmp_path, monkeypatch):
    def with_factor(factor):
        module = types.ModuleType("code")
        module.__file__ = str(tmp_path / "code.py")
        exec(f"def scale(x): return x * {factor}", vars(module))
        monkeypatch.setitem(sys.modules, "code", module)
        return digest(module.scale)

    assert with_factor(1) == with_factor(1) != with_factor(2)


def test_global_generators_are_one_and_the_same_wherever_they_have_got_to():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    bound = [random.uniform, np.random.normal, torch.default_generator]
    first = identify(draw=draw, bound=bound)
    draw()
    again = identify(draw=draw, bound=bound)
    assert first.digest == again.digest
    assert first.moving == []


def test_weights_count_by_shape_and_whether_they_are_shared_or_frozen():
    def pair(shared):
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if shared:
            network[1].weight = network[0].weight
        return network

    assert digest(pair(False)) == digest(pair(False))
    assert digest(pair(True)) == digest(pair(True))
    assert digest(pair(False)) != digest(pair(True))


class Buffered(nn.Module):
    def __init__(self, value, persistent):
        super().__init__()
        self.register_buffer("constant", torch.tensor(value), persistent=persistent)


def test_buffers_count_by_value_only_where_no_checkpoint_holds_them():
    assert digest(Buffered(1.0, False)) != digest(Buffered(2.0, False))
    assert digest(Buffered(1.0, True)) == digest(Buffered(2.0, True))


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_layers_that_make_their_weights_are_the_same_before_and_after_use(wrap):
    layer = wrap(nn.Linear(4, 4))
    before = digest(layer)
    layer(torch.randn(2, 4)).sum().backward()
    assert digest(layer) == before != digest(nn.Linear(4, 4))
    assert digest(wrap(nn.Linear(4, 4))) == before


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: open(os.devnull),  # noqa: SIM115
        lambda: (x for x in ()),
        lambda: iter(open(os.devnull)),  # noqa: SIM115
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: sys._getframe(),
        lambda: functools.reduce(lambda inner, _: [inner], range(10_000), []),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_told_from_others_is_refused_by_name(make):
    with pytest.raises(UnidentifiableError, match="loss"):
        identify(loss={"part": Silent(make())})


@pytest.mark.parametrize("option", ["with_kwargs", "always_call"])
def test_hooks_with_options_count_by_what_they_do_not_by_when_they_were_made(option):
    def network(option):
        layer = nn.Linear(2, 2)
        layer.register_forward_hook(lambda *_, **__: None)
        layer.register_forward_hook(lambda *_, **__: None, **{option: True})
        return layer

    first = digest(network(option))
    assert digest(network(option)) == first
    assert digest(network("prepend")) != first


def test_what_is_under_its_name_in_a_module_is_told_by_it_and_else_refused():
    assert digest(np.add) != digest(np.subtract)
    with pytest.raises(UnidentifiableError, match="ufunc"):
        digest(np.frompyfunc(lambda x: x + 1, 1, 1))


def test_a_logger_may_change():
    logger = logging.getLogger("of the reader")
    first = identify(logger=[logger])
    logger.setLevel(10)
    assert identify(logger=[logger]) == first == (first.digest, [])


class Stepping(torch.optim.Optimizer):
    def __init__(self):
        super().__init__([torch.ones(1)], {})

    def step(self):
        return 1


def test_an_optimizer_is_the_same_before_and_after_its_first_use():
    def optimizers():
        class Own(Stepping):
            def step(self):
                return 2

        class Inherited(Stepping):
            pass

        class OfTorch(torch.optim.Adamax):
            def __init__(self):
                super().__init__([torch.ones(1)])

        return [Own, Inherited, OfTorch]

    first = digest(optimizers())
    for used in optimizers():  # the parent's step is wrapped after the child's, if at all
        used()
        assert digest(used) == digest(next(o for o in optimizers() if o.__name__ == used.__name__))
    Stepping(), torch.optim.Adamax([torch.ones(1)])
    assert digest(optimizers()) == first
    used = optimizers()
    for optimizer in used:
        optimizer()
    assert digest(used) == first
    used[1].step = lambda self: 3
    assert digest(used) != first


def test_a_class_is_the_same_before_and_after_one_of_it_is_pickled():
    before = digest(Pickled)
    pickle.dumps(Pickled(1))
    assert digest(Pickled) == before


def test_a_function_by_type_is_the_same_before_and_after_use():
    def by_type(value):
        of = functools.singledispatch(lambda thing: 0)
        of.register(int, lambda thing: value)
        return of

    used = by_type(1)
    used(3), used("a")
    assert digest(used) == digest(by_type(1)) != digest(by_type(2))
    registered = by_type(1)
    registered.register(str, lambda thing: 1)
    assert digest(registered) != digest(used)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_asked_for_its_state_stays_the_same(make):
    thing = make(1)
    before = digest(thing)
    for moving in identify(thing=thing).moving:
        state_of(moving)
    assert digest(thing) == before


def test_cycles_end():
    def knot(value):
        loop = [Silent(value)]
        loop[0].value = [loop, value]
        return loop

    assert digest(knot(1)) == digest(knot(1)) != digest(knot(2))


def test_generators_and_objects_that_move_on_are_found_and_brought_back():
    def things():
        return {
            "torch": torch.Generator().manual_seed(3),
            "numpy": np.random.default_rng(3),
            "bits": [b(3) for b in (np.random.MT19937, np.random.Philox, np.random.SFC64)],
            "old": np.random.RandomState(3),
            "python": random.Random(3),
            "object": Silent(1),
            "loss": nn.Linear(2, 2),
        }

    def use(things):
        things["object"].value += 1
        things["loss"].queue = torch.ones(1) * things["object"].value
        return [
            torch.rand(1, generator=things["torch"]).item(),
            things["numpy"].random(),
            *(np.random.Generator(bits).random() for bits in things["bits"]),
            things["old"].normal(),
            things["python"].random(),
            things["object"].value,
        ]

    first, second = things(), things()
    found, also_found = identify(**first).moving, identify(**second).moving
    use(first)
    states = [state_of(thing) for thing in found]
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    for thing, state in zip(also_found, torch.load(buffer, weights_only=True), strict=True):
        set_state(thing, state)
    assert use(second) == use(first)
    assert torch.equal(first["loss"].queue, second["loss"].queue)


def test_another_process_agrees_on_everything():
    script = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch, test_identity as t
        from tripletlib import EmbeddingNet, fit
        if len(sys.argv) > 1:  # the other one has trained before
            images, labels = torch.rand(8, 1, 28, 28), torch.arange(8) % 2
            fit(EmbeddingNet(4), images, labels, batch_size=4, progress=False)
        torch.manual_seed(0)
        print(t.digest(fit), t.digest([m(1) for m in t.MAKERS]))
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
        )
        for seed, arguments in enumerate([[], ["trained"]], 1)
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert len(outputs[0].stdout.split()) == 2, outputs[0].stderr
