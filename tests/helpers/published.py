"""The published codebook with its faults, so that tests can show them beside ours.

ESM3's forward, with the update, the restart and the perplexity of VideoGPT and TATS, formula by formula.
:class:`fastvq.reference.EMACodebook` is the same without the faults that would keep it from being compared with.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class PublishedCodebook(nn.Module):
    def __init__(self, n_codes, embedding_dim, no_random_restart=True, restart_thres=1.0, ema_decay=0.99):
        super().__init__()
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.n_codes, self.embedding_dim = n_codes, embedding_dim
        self.no_random_restart, self.restart_thres, self.ema_decay = no_random_restart, restart_thres, ema_decay
        self._need_init = True

    def draw(self, flat):
        if len(flat) < self.n_codes:
            flat = flat.repeat(-(-self.n_codes // len(flat)), 1)
            flat = flat + torch.randn_like(flat) * 0.01 / self.embedding_dim**0.5
        rows = flat[torch.randperm(len(flat))][: self.n_codes].detach()
        if dist.is_initialized():
            dist.broadcast(rows, 0)
        return rows

    def forward(self, z):
        batch, time, channels = z.shape
        flat = z.view(batch * time, channels)
        if self._need_init and self.training:
            self._need_init = False
            rows = self.draw(flat)
            self.embeddings.data.copy_(rows)
            self.z_avg.data.copy_(rows)
            self.N.data.fill_(1)
        codes = self.embeddings.t()
        indices = ((flat**2).sum(1, keepdim=True) - 2 * flat @ codes + (codes**2).sum(0, keepdim=True)).argmin(1)
        one_hot = F.one_hot(indices, self.n_codes).type_as(flat)
        quantized = F.embedding(indices, self.embeddings).view(z.shape)
        loss = 0.25 * F.mse_loss(z, quantized.detach())
        if self.training:
            self.update(flat, one_hot)
        shares = one_hot.mean(0)
        self.perplexity = (-(shares * (shares + 1e-10).log()).sum()).exp()
        return (quantized - z).detach() + z, indices.view(batch, time), loss

    def update(self, flat, one_hot):
        counts, sums = one_hot.sum(0), one_hot.t() @ flat
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.N.data.mul_(self.ema_decay).add_(counts, alpha=1 - self.ema_decay)
        self.z_avg.data.mul_(self.ema_decay).add_(sums.data, alpha=1 - self.ema_decay)
        n = self.N.sum()
        weights = (self.N + 1e-7) / (n + self.n_codes * 1e-7) * n
        self.embeddings.data.copy_(self.z_avg / weights[:, None])
        rows = self.draw(flat)
        if not self.no_random_restart:
            used = (self.N >= self.restart_thres)[:, None]
            self.embeddings.data.copy_(torch.where(used, self.embeddings, rows))
