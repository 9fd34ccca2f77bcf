"""Where float64 work is done: on the device of the tensors, or on the CPU where that device has no float64."""

import torch


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64; Apple's GPUs and some of Intel's do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def float64_device(device: torch.device) -> torch.device:
    """``device`` itself, or the CPU where ``device`` has no float64."""
    return device if has_float64(device) else torch.device("cpu")
