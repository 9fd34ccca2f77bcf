"""What one rank of ``test_distributed.py`` runs: ``python rank_programs.py PROGRAM... RANK WORLD_SIZE FOLDER``."""

import copy
import os
import pickle
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastvq

CODES, DIM, STEPS = 16, 4, 100


def batch(step, rank):
    """Tokens and mask of a rank: of all sizes; now and then empty, fully masked, or with a NaN."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    n = 0 if (step + rank) % 7 == 0 else 5 + (3 * step + rank) % 11
    tokens, mask = torch.randn(n, DIM, generator=generator), torch.rand(n, generator=generator) < 0.8
    if (step + rank) % 5 == 0:
        mask[:] = False
    if n and step % 3 == 0:
        tokens[0, 1] = torch.nan
    return tokens, mask


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def trained_codebook(**options):
    """The same on every rank: a codebook that has learned something."""
    torch.manual_seed(0)
    module = fastvq.EMACodebook(CODES, DIM, **options)
    codes = torch.randn(CODES, DIM)
    module.load_state_dict({"embeddings": codes, "N": torch.ones(CODES), "z_avg": codes})
    return module


def steps(module, rank, n=STEPS):
    """The state after each step."""
    states = []
    for step in range(n):
        module(*batch(step, rank))
        states.append(copy_of(module.state_dict()))
    return states


def with_restart(rank):
    """From the first batch on, in which rank 0 has no token; some ranks were seeded alike, some were not."""
    torch.manual_seed(rank)
    module = fastvq.EMACodebook(CODES, DIM, no_random_restart=False)
    torch.manual_seed(10 + rank // 2)
    return steps(module, rank)


def without_restart(rank):
    return steps(trained_codebook(), rank)


def compiled(rank):
    torch.manual_seed(rank)
    module = fastvq.EMACodebook(CODES, DIM, no_random_restart=False, process_group=dist.new_group())
    return steps(torch.compile(module, fullgraph=True, backend="aot_eager"), rank, 8)


def accumulated(rank):
    """The ranks need not have as many batches: nobody waits inside."""
    module = trained_codebook()
    with module.accumulate():
        for step in range(1 + 2 * rank):
            module(*batch(step, rank))
    module(*batch(3, rank))
    return [copy_of(module.state_dict())]


def far_tokens(rank):
    return torch.randn(5000 + rank, DIM, generator=torch.Generator().manual_seed(rank)) + 1e6


def far_from_zero(rank):
    """A step without memory of earlier ones."""
    module = fastvq.EMACodebook(1, DIM, ema_decay=0.0)
    module.load_state_dict({"embeddings": torch.zeros(1, DIM), "N": torch.ones(1), "z_avg": torch.zeros(1, DIM)})
    module(far_tokens(rank))
    return [copy_of(module.state_dict())]


def local(rank):
    return [copy_of(steps(trained_codebook(sync=False), rank, 5)[-1])]


def clustered(rank):
    torch.manual_seed(rank)
    x = torch.randn(200, DIM) + 3 * rank
    found = fastvq.kmeans([x[:0], x[:150], x[150:]] if rank else [x], CODES)
    module = fastvq.EMACodebook(CODES, DIM, init="kmeans")
    module(x[:0] if rank == 0 else x)
    return [found._asdict(), copy_of(module.state_dict())]


def weighted_tokens(rank):
    """Tokens far from zero, more on the second rank, with weights; the first of no weight, at another place."""
    generator = torch.Generator().manual_seed(rank)
    x = 1e6 + 20 * torch.randint(3, (100 + 50 * rank, 1), generator=generator) + torch.randn(100 + 50 * rank, DIM)
    weights = torch.rand(len(x), generator=generator)
    x[0], weights[0] = 0, 0
    return x, weights


def clustered_with_weights(rank):
    torch.manual_seed(rank)
    x, weights = weighted_tokens(rank)
    found = fastvq.kmeans(x, 3, sample_weight=weights, n_init=2)
    parts = [torch.empty(150, DIM + 2) for _ in range(2)]
    own = torch.cat([x, weights[:, None], found.labels[:, None]], 1)
    torch.distributed.all_gather(parts, torch.nn.functional.pad(own, (0, 0, 0, 150 - len(x)), value=-1))
    return [{**found._asdict(), "tokens": torch.cat(parts)}]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, DIM), trained_codebook())


def fit(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        quantized, _, loss = model(x)
        (quantized.square().mean() + loss).backward()
        optimizer.step()


def batches_of_model(rank):
    return [torch.randn(30, 3, generator=torch.Generator().manual_seed(10 * step + rank)) for step in range(10)]


def data_parallel(rank, broadcast_buffers=True):
    model = nn.parallel.DistributedDataParallel(encoder(), broadcast_buffers=broadcast_buffers)
    fit(model, batches_of_model(rank))
    return [copy_of(model.module[1].state_dict())]


def data_parallel_without_broadcast(rank):
    return data_parallel(rank, broadcast_buffers=False)


def compiled_data_parallel(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, DIM), fastvq.EMACodebook(CODES, DIM, no_random_restart=False))
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager"))
    fit(wrapped, batches_of_model(rank)[:4])
    return [copy_of(model[1].state_dict())]


def fully_sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = encoder()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fit(model, batches_of_model(rank))
    return [copy_of(model[1].state_dict())]


def cast_by_fsdp(rank):
    """FSDP's first version casts the buffers, and casts them again after each state dict."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    kept = []
    for precision in (None, MixedPrecision(buffer_dtype=torch.bfloat16)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, DIM), fastvq.EMACodebook(CODES, DIM))
        model[1].set_codes(torch.randn(CODES, DIM), 100 * torch.rand(CODES))
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), mixed_precision=precision)
        fit(model, batches_of_model(rank)[:5])
        model.state_dict()
        fit(model, batches_of_model(rank)[5:])
        kept.append(copy_of(model.module[1].state_dict()))
    return kept


def subgroup(rank):
    """The last two ranks share a codebook; the first takes no part, and has none."""
    ranks = list(range(1, dist.get_world_size()))
    group = dist.new_group(ranks)
    if rank == 0:
        for build in (fastvq.EMACodebook, fastvq.kmeans):
            with pytest.raises(TypeError, match="a rank outside the group passes sync=False"):
                build(torch.randn(9, DIM) if build is fastvq.kmeans else CODES, DIM, process_group=group)
        return []
    torch.manual_seed(rank)
    x = torch.randn(200, DIM) + 3 * rank
    found = fastvq.kmeans([x[:0], x[:150], x[150:]] if rank == 1 else [x], CODES, process_group=group)
    options = {"no_random_restart": False, "process_group": group}
    clustered = fastvq.EMACodebook(CODES, DIM, init="kmeans", **options)
    clustered(x[:0] if rank == 1 else x)
    module = fastvq.EMACodebook(CODES, DIM, **options)
    module = copy.deepcopy(module)
    states = steps(module, rank, 20)
    learned = trained_codebook(process_group=group)
    states += steps(learned, rank, 5)
    restored = pickle.loads(pickle.dumps(learned))
    assert torch.equal(restored.eval()(x).indices, learned.eval()(x).indices)
    with pytest.raises(RuntimeError, match=r"assign module\.process_group"):
        restored.train()(x)
    restored.load_state_dict(learned.state_dict())
    restored.process_group = group
    return [found._asdict(), copy_of(clustered.state_dict()), *states, *steps(restored, rank, 2)]


def loaded_by_rank_0(rank):
    """DistributedDataParallel copies the buffers; the other ranks must not initialise them again."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, DIM), fastvq.EMACodebook(CODES, DIM))
    if rank == 0:
        model.load_state_dict(encoder().state_dict())
    model = nn.parallel.DistributedDataParallel(model)
    before = copy_of(model.module[1].state_dict())
    fit(model, batches_of_model(rank)[:1])
    return [before, copy_of(model.module[1].state_dict())]


def one_is_killed(rank):
    module = trained_codebook()
    for step in range(50):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        module(torch.randn(10, DIM))


def main(*arguments):
    *programs, rank, world_size, folder = arguments
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=int(world_size)
    )
    results = {name: globals()[name](int(rank)) for name in programs}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
    # Without the interpreter's end: a process aborts there if gloo's threads still hold tensors of the last exchange.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
