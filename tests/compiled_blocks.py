"""Run by torchrun in test_processes.py: two blocks with LoRA, each compiled on its own as Unsloth does, checkpointed, under DDP.

    torchrun --nproc_per_node=2 tests/compiled_blocks.py whole

The number of threads changes before the backward pass, so the blocks are compiled anew in it: torch's compiler takes graphs again
only where that number is the same.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed
from torch.nn.functional import silu
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sonovqa import devices

WIDTH, RANK = 512, 128  # more trained weights than DDP's first bucket of 1 MB holds


class Adapted(torch.nn.Module):
    """A frozen layer with LoRA matrices."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = torch.nn.Linear(WIDTH, RANK, bias=False), torch.nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Block(torch.nn.Module):
    """A feed-forward block of three such layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = Adapted(), Adapted(), Adapted()

    def forward(self, x):
        return x + self.down(silu(self.gate(x)) * self.up(x))


class Blocks(torch.nn.Module):
    """Two of them; the graphs stop before code generation, which changes nothing here."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.run = torch.compile(Block.forward, backend="aot_eager_decomp_partition")

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(self.run, block, x, use_reentrant=False)
        return x.pow(2).mean()


def main() -> None:
    """One step."""
    if sys.argv[1] == "whole":
        devices.keep_blocks_whole()
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(Blocks())
    loss = model(torch.randn(2, 8, WIDTH))
    torch.set_num_threads(2)
    loss.backward()
    assert all(parameter.grad.norm() > 0 for name, parameter in model.named_parameters() if ".b." in name)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
