"""A device without float64, simulated in a process of its own: ``python chip.py`` runs the programs below on it.

Its tensors hold their values on the CPU. They refuse float64, and the company of tensors of the CPU, as Apple's GPU
does. Random draws are those of the CPU, so that results can be compared bit for bit.
"""

import sys
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("privateuseone", 0)
# Operators that take tensors of two devices.
_BETWEEN = ("aten::_to_copy", "aten::copy_")


class OnChip(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError("the device doesn't support float64")
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **shape)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class Chip(TorchDispatchMode):
    """Inside, tensors can be made on the device or moved to it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _run(operator, args, kwargs):
    name, leaves = operator._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    wrappers = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnChip)}
    on_chip = bool(wrappers)
    if on_chip and name not in _BETWEEN and any(leaf.dim() for leaf in leaves if not isinstance(leaf, OnChip)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        on_chip = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        on_chip = isinstance(args[0], OnChip)

    def wrapped(value):
        if id(value) in wrappers:  # what the operator has written
            return wrappers[id(value)]
        return OnChip(value) if on_chip and isinstance(value, torch.Tensor) else value

    return tree_map(wrapped, operator(*_held(args), **_held(kwargs)))


def _held(values):
    return tree_map(lambda value: value.held if isinstance(value, OnChip) else value, values)


def moved(values):
    return tree_map(lambda value: OnChip(value.clone()) if isinstance(value, torch.Tensor) else value, values)


def same(function, *arguments, **options):
    """``function`` gives the same bits on the device as on the CPU, and leaves its tensors on the device."""
    torch.manual_seed(0)
    expected = function(*arguments, **options)
    torch.manual_seed(0)
    with Chip():
        found = function(*moved(arguments), **moved(options))
    for leaf, wanted in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert not isinstance(wanted, torch.Tensor) or isinstance(leaf, OnChip), "a result is on the CPU"
        assert leaf is wanted or torch.equal(*map(torch.as_tensor, (_held(leaf), wanted))), "results differ"


def searches():
    import fastvq

    for n, n_codes, dim in ((1, 5, 3), (30, 64, 8), (20, 2100, 6), (9, 70, 260)):
        for dtype in (torch.float32, torch.float16):
            codes = torch.randn(n_codes, dim, dtype=dtype)
            codes[-1] = codes[0]  # equal, and a token half way between two
            x = torch.randn(n, dim, dtype=dtype)
            x[0] = (codes[0] + codes[1]) / 2
            for metric in ("euclidean", "cosine", "dot"):
                same(fastvq.nearest_code, x, codes, metric=metric, return_distance=True)
    long = torch.randn(256, 16) * torch.tensor([1.0, 1e5])[(torch.arange(256) > 64).long(), None]
    same(fastvq.nearest_code, torch.randn(100, 16), long)
    same(fastvq.nearest_code, torch.randn(2, 50, 8), torch.randn(2, 70, 8), mask=torch.rand(2, 50) < 0.5)
    for backend in ("torch", "reference"):
        same(fastvq.nearest_code, torch.randn(50, 8), torch.randn(70, 8), backend=backend)


def prepared_codebooks():
    import fastvq

    def search(x, codes):
        prepared = fastvq.prepare(codes)
        return [fastvq.nearest_code(x, prepared, metric=metric) for metric in ("euclidean", "dot") * 2]

    same(search, torch.randn(60, 8), torch.randn(300, 8))
    same(search, torch.randn(3, 60, 8), torch.randn(3, 300, 8))


def quantized_tokens():
    import fastvq

    for mask in (None, torch.rand(3, 40) < 0.7):
        same(lambda *a, **o: tuple(fastvq.quantize(*a, **o)), torch.randn(3, 40, 8), torch.randn(90, 8), mask=mask)


def statistics():
    import fastvq

    x, indices = torch.randn(2, 500, 6) + 1e4, torch.randint(-1, 20, (2, 500))
    for options in ({}, {"heads": True}, {"deterministic": True}, {"mask": torch.rand(2, 500) < 0.5}):
        same(fastvq.code_statistics, x, indices, 20, **options)


def training():
    import fastvq

    def train(batches, mask, **options):
        module = fastvq.EMACodebook(32, 6, device=batches[0].device, **options)
        for z in batches:
            with module.accumulate():
                module(z, mask)
            result = module(z)
        evaluated = [module.eval()(batches[0], mask) for _ in range(2)]
        shown = module.usage, module.perplexity, module.dead_codes
        return [*result, *map(tuple, evaluated), module.embeddings, module.N, module.z_avg, shown]

    restarts = {"no_random_restart": False, "restart_threshold_relative": 0.5, "restart_resets_statistics": True}
    batches, mask = [torch.randn(80, 6) for _ in range(3)], torch.rand(80) < 0.8
    for options in ({}, restarts, {"metric": "cosine"}, {"init": "kmeans"}, {"ema_decay": 0.5}):
        same(train, batches, mask, **options)


def initialisation():
    import fastvq

    def learned(batches, **options):
        module = fastvq.EMACodebook(16, 6, device=batches[0].device, **options)
        module.initialize(batches)
        return module.embeddings, module.N

    for init in ("first_batch", "kmeans"):
        same(learned, [torch.randn(50, 6), torch.randn(30, 6)], init=init)


def clusters():
    import fastvq

    for x in (torch.randn(90, 5), [torch.randn(50, 5), torch.randn(30, 5)]):
        for options in ({}, {"metric": "cosine"}, {"init": "random"}):
            same(lambda x, **o: tuple(fastvq.kmeans(x, 8, max_iterations=5, **o)), x, **options)


def draws_over_ranks():
    from fastvq.common import distributed
    from fastvq.learning import restart

    distributed.is_distributed = lambda *ranks: True
    distributed.rank, distributed.world_size = (lambda *ranks: 0), (lambda *ranks: 2)
    distributed.all_reduce_min = distributed.all_reduce_sum = lambda tensor, *ranks: tensor

    def drawn(tokens):
        draw = restart.draw_tokens(tokens, torch.ones_like(tokens[:, 0], dtype=torch.bool), 8)
        rows, found = restart.over_ranks(draw, True)
        return rows, found.to(tokens.device)

    same(drawn, torch.randn(30, 4))


PROGRAMS = (
    searches,
    prepared_codebooks,
    quantized_tokens,
    statistics,
    training,
    initialisation,
    clusters,
    draws_over_ranks,
)


def pretend():
    """Let the library take the device for one without float64, and its tensors for plain ones."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from fastvq import functional
    from fastvq.backends import choose, operators
    from fastvq.common import devices

    _setup_privateuseone_for_python_backend()
    devices.has_float64 = choose.has_float64 = lambda device: device.type != DEVICE.type
    is_traced = operators.is_traced
    operators.is_traced = functional.is_traced = lambda x: not isinstance(x, OnChip) and is_traced(x)


if __name__ == "__main__":
    pretend()
    for program in PROGRAMS:
        torch.manual_seed(1)
        try:
            program()
        except Exception:
            print(f"{program.__name__}: {traceback.format_exc()}", file=sys.stderr)
        else:
            print(program.__name__)
