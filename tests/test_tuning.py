"""Tests of what a reader may choose beyond the defaults of `fit`: optimiser, validation, an end."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from problems import IMAGES, LABELS, SmallNet, Stop, same_weights, stop_at
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from tripletlib import ContrastiveLoss, TripletLoss, embed, fit, load_or_fit, recall_at_k

OPTIONS = {"seed": 1, "progress": False, "augment": False, "batch_size": 20, "epochs": 2}


def made(seed=0):
    torch.manual_seed(seed)
    return SmallNet()


class Flat(nn.Module):
    """A network without chance, so that a loop by hand gives the same weights."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())


def by_hand(network, optimizer, schedule=None, epochs=2):
    loss, batches = TripletLoss(), torch.arange(100).split(20)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(network(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return network


IN_ORDER = [list(range(i, i + 20)) for i in range(0, 100, 20)]


def flat():
    torch.manual_seed(3)
    return Flat()


@pytest.mark.parametrize("as_instance", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_of_ones_own_moves_the_weights_as_a_bare_loop_would(as_instance, scheduled):
    right = flat()
    its = torch.optim.SGD(right.parameters(), 0.1, momentum=0.9)
    by_hand(right, its, StepLR(its, 3, 0.5) if scheduled else None)
    network = flat()
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = optimizer(network.parameters()) if as_instance else optimizer
    schedule = (lambda optimizer, steps: StepLR(optimizer, 3, 0.5)) if scheduled else None
    options = OPTIONS | {"batch_sampler": IN_ORDER, "optimizer": optimizer, "schedule": schedule}
    history = fit(network, IMAGES, LABELS, **options)
    assert same_weights(network, right)
    rates = [0.1 * 0.5 ** (step // 3) if scheduled else 0.1 for step in range(10)]
    assert history["learning_rate"] == pytest.approx(rates)


def test_groups_keep_their_rates_and_frozen_parts_stay():
    network = flat()
    before = copy.deepcopy(network)
    network.body.bias.requires_grad = False
    groups = [
        {"params": [network.body.weight], "lr": 0.0},
        {"params": network.head.parameters(), "lr": 0.1},
    ]
    fit(network, IMAGES, LABELS, optimizer=torch.optim.SGD(groups), **OPTIONS)
    assert same_weights(network.body, before.body)
    assert not same_weights(network.head, before.head)


def test_the_number_of_steps_reaches_the_schedule():
    seen = []

    def schedule(optimizer, steps):
        seen.append(steps)
        return LambdaLR(optimizer, lambda step: 1 - step / steps)

    optimizer = partial(torch.optim.SGD, lr=0.1)
    history = fit(made(), IMAGES, LABELS, optimizer=optimizer, schedule=schedule, **OPTIONS)
    assert seen == [10]
    assert history["learning_rate"] == pytest.approx([0.1 * (1 - step / 10) for step in range(10)])


def test_parameters_of_the_loss_reach_a_callable_optimizer():
    class Proxy(nn.Module):
        def __init__(self):
            super().__init__()
            self.proxies = nn.Parameter(torch.zeros(4, 3))

        def forward(self, embeddings, labels):
            return (embeddings - self.proxies[labels]).square().mean()

    loss = Proxy()
    fit(made(), IMAGES, LABELS, loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1), **OPTIONS)
    assert loss.proxies.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be an Optimizer or callable, got 'sgd'"),
        ({"optimizer": lambda weights: 3}, TypeError, "must give a torch.optim.Optimizer, got int"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(5, 2))])},
            ValueError,
            r"must hold parameters of network or loss, got another of shape \(5, 2\)",
        ),
        ({"schedule": StepLR}, ValueError, "schedule must come with an optimizer, got none"),
        (
            {"optimizer": torch.optim.SGD, "schedule": lambda optimizer, steps: 3},
            TypeError,
            "schedule must give one of torch's schedules, got int",
        ),
        ({"validate": 0.5}, TypeError, "validate must be callable, got 0.5"),
        ({"patience": 2}, ValueError, "patience must come with validate, got none"),
        ({"validate": len, "patience": 0}, ValueError, "patience must be a whole number of at"),
        ({"validate": lambda net: "good"}, ValueError, "what validate returns must be a finite"),
        ({"validate": lambda net: float("nan")}, ValueError, "what validate returns must be a fi"),
    ],
)
def test_bad_choices_get_a_clear_error(options, error, message):
    with pytest.raises(error, match=message):
        fit(made(), IMAGES, LABELS, **OPTIONS | options)


def test_the_weights_of_the_best_epoch_are_kept_and_the_numbers_are_in_the_history():
    numbers, states = iter([0.1, 0.7, 0.3, 0.7]), []

    def validate(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
        states.append(copy.deepcopy(network))
        return torch.tensor(next(numbers))

    network = made()
    history = fit(network, IMAGES, LABELS, **OPTIONS | {"epochs": 4, "validate": validate})
    column = history["validation"]
    assert column[4::5] == pytest.approx([0.1, 0.7, 0.3, 0.7])
    assert np.isnan(column.reshape(4, 5)[:, :4]).all()
    assert same_weights(network, states[1])
    plain = made()
    assert "validation" not in fit(plain, IMAGES, LABELS, **OPTIONS).frame()


def test_watching_does_not_change_the_training():
    def validate(network):
        torch.rand(5)
        return float(recall_at_k(embed(network, IMAGES), LABELS)) + torch.rand(()).item() * 1e-9

    rows = [
        fit(made(), IMAGES, LABELS, **OPTIONS | {"epochs": 3, "validate": of})["loss"]
        for of in (None, validate)
    ]
    assert np.array_equal(*rows)


@pytest.mark.parametrize("patience", [1, 2])
def test_training_ends_when_patience_is_out(patience):
    numbers = iter([0.1, 0.5, 0.4, 0.5, 0.9, 0.1])
    options = {"epochs": 6, "validate": lambda net: next(numbers), "patience": patience}
    history = fit(made(), IMAGES, LABELS, **OPTIONS | options)
    assert len(history) == 5 * {1: 3, 2: 4}[patience]


def test_a_callback_that_returns_true_ends_the_run_and_other_values_do_not():
    network = made()
    history = fit(network, IMAGES, LABELS, **OPTIONS, callback=lambda so_far: len(so_far) == 7)
    assert len(history) == 7
    assert not network.training
    by_numpy = fit(
        made(), IMAGES, LABELS, **OPTIONS, callback=lambda so_far: so_far["step"][-1] == 6
    )
    assert len(by_numpy) == 7
    for value in (1, "yes", None):
        assert len(fit(made(), IMAGES, LABELS, **OPTIONS, callback=lambda _, v=value: v)) == 10


def test_a_stopped_run_goes_on_from_its_last_whole_epoch(tmp_path):
    options = OPTIONS | {"epochs": 3, "checkpoint": tmp_path / "run.pt"}
    fit(made(), IMAGES, LABELS, **options, callback=lambda so_far: len(so_far) == 8)
    network = made()
    history = fit(network, IMAGES, LABELS, **options)
    assert len(history) == 15
    right = made()
    fit(right, IMAGES, LABELS, **OPTIONS | {"epochs": 3})
    assert same_weights(network, right)


SCORES = {1: 0.2, 2: 0.8, 3: 0.5, 4: 0.6}


class Scored:
    """Gives numbers by how often it was asked, as a thing whose state moves on."""

    def __init__(self):
        self.asked = 0

    def __call__(self, network):
        self.asked += 1
        return SCORES[self.asked]


@pytest.mark.parametrize("as_instance", [False, True])
def test_optimizer_schedule_and_best_weights_survive_a_break(as_instance, tmp_path):
    def run(network, **more):
        optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = optimizer(network.parameters()) if as_instance else optimizer
        options = {"epochs": 4, "validate": Scored(), "optimizer": optimizer, "schedule": halving}
        return fit(network, IMAGES, LABELS, **OPTIONS | options | more)

    def halving(optimizer, steps):
        return StepLR(optimizer, 5, 0.5)

    right = made()
    its_history = run(right)
    network, file = made(), tmp_path / "run.pt"
    with pytest.raises(Stop):
        run(network, checkpoint=file, callback=stop_at(12))
    network = made()
    history = run(network, checkpoint=file)
    assert same_weights(network, right)
    np.testing.assert_array_equal(history["loss"], its_history["loss"])
    np.testing.assert_array_equal(history["validation"], its_history["validation"])
    again = made()
    run(again, checkpoint=file)  # just loaded
    assert same_weights(again, right)
    with pytest.raises(ValueError, match="made with other settings"):
        run(made(), checkpoint=file, patience=9)


def test_another_rate_of_a_group_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path))

    def count(**options):
        load_or_fit(SmallNet, IMAGES, LABELS, **{**OPTIONS, "seed": 0}, **options)
        return len(list((tmp_path / "networks").iterdir()))

    sgd = torch.optim.SGD
    assert count(optimizer=partial(sgd, lr=0.1)) == 1
    assert count(optimizer=partial(sgd, lr=0.1)) == 1
    assert count(optimizer=partial(sgd, lr=0.2)) == 2
    assert count(loss=ContrastiveLoss(), optimizer=partial(sgd, lr=0.2)) == 3
    assert count(validate=lambda net: 0.5) == 4
    assert count(validate=lambda net: 0.6) == 5
