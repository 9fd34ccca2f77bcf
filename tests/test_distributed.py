"""Several processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

RANK = """
import sys
import torch, torch.distributed as dist
import fastvq
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)  # ranks draw differently unless one of them decides
module = fastvq.EMACodebook(16, 4, no_random_restart=False)
batches = torch.load(f"{folder}/batches.pt")
states = []
for batch in batches:
    module(batch.chunk(2)[rank])
    states.append({name: value.clone() for name, value in module.state_dict().items()})
torch.save(states, f"{folder}/states{rank}.pt")
dist.destroy_process_group()
"""


def test_ranks_agree_bitwise_and_count_all_tokens(tmp_path):
    batches = [torch.randn(60, 4) for _ in range(20)]
    torch.save(batches, tmp_path / "batches.pt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (torch.load(tmp_path / f"states{rank}.pt") for rank in range(2))
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name
    # N ← 0.99 N + 0.01 n from ΣN = 16, with 60 tokens a step over both ranks; float32 sums of 16 numbers.
    total = 60 - (60 - 16) * 0.99**20
    assert abs(first[-1]["N"].sum().item() - total) <= 40 * 2.0**-24 * total
