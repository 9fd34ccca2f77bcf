"""Comparison of the states of modules."""

import torch


def assert_equal_states(first, second):
    """Two modules, or two state dicts, hold the same bits."""
    first, second = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (first, second))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
