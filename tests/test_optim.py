"""An optimizer's settings behind a checkpoint."""

import logging

import torch
from torch.optim import SGD, AdamW

from opd_lightning.optim import settings_of, settle


def behind(kind, then, now):
    """Return an optimizer made with the settings ``now`` behind the checkpoint of one made with ``then``."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    earlier, later = kind([weight], **then), kind([weight], **now)
    earlier.step()
    wanted = settings_of(later)
    later.load_state_dict(earlier.state_dict())
    settle(later, wanted, None)
    return later


def test_settings_apart_from_the_state_are_those_of_now(caplog):
    now = {"lr": 0.2, "momentum": 0.8, "nesterov": True, "maximize": True, "weight_decay": 0.1}
    later = behind(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, now)
    assert {name: later.param_groups[0][name] for name in now} == now
    assert later.param_groups[0]["dampening"] == 0
    assert not caplog.messages


def test_settings_that_the_state_depends_on_are_the_checkpoint_s_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        later = behind(AdamW, {"lr": 0.1}, {"lr": 0.2, "amsgrad": True})
    assert (later.param_groups[0]["lr"], later.param_groups[0]["amsgrad"]) == (0.2, False)
    assert caplog.messages == ["the optimizer keeps its checkpoint's settings of amsgrad"]
    later.step()
