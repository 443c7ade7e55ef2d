"""A short training, alone or under torchrun, that prints its curves: run as `-m tests.together`.

`nn.SyncBatchNorm` wants a GPU, and takes part where each process has one. So that a CPU can tell whether processes
train what one would, the norms here share their statistics over gloo, differentiably.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from dbb.data import load
from dbb.fold import RULES, rule
from dbb.recipes import recipe
from dbb.train import Hardware, Trainer


class SharedNorm(nn.BatchNorm2d):
    """A batch norm over the batches of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        number = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / number
        var = all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3))) / number
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * number / (number - 1), self.momentum)
        scale = self.weight / torch.sqrt(var + self.eps)
        return x * scale[:, None, None] + (self.bias - scale * mean)[:, None, None]


rule(SharedNorm)(RULES[nn.BatchNorm2d])


def share_norms(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.BatchNorm2d:
                shared = SharedNorm(norm.num_features, norm.eps, norm.momentum)
                shared.load_state_dict(norm.state_dict())
                setattr(parent, name, shared)
    return model


def main() -> None:
    torch.set_num_threads(1)
    together = "RANK" in os.environ
    gpus = torch.cuda.device_count() > 1
    if together:
        dist.init_process_group("nccl" if gpus else "gloo")
    hardware = Hardware(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu")
    share = share_norms if together and not gpus else None  # on GPUs the trainer takes SyncBatchNorm by itself
    small = {"block": "dbb", "epochs": 2, "batch_size": 100, "train_images": 300, "model_options": {"width": 4}}
    # 397 test images, an odd number: one process gets one more
    chosen = recipe("digits", lr=0.02, **small)
    trainer = Trainer(chosen, *load("digits"), hardware=hardware, synchronise=share)
    trainer.run()
    if trainer.rank == 0:
        curves = {name: [line[name] for line in trainer.state.history] for name in ("train_loss", "test_loss")}
        counted = [round(line["test_accuracy"] * len(trainer.test_images)) for line in trainer.state.history]
        print(json.dumps(curves | {"right": counted, "processes": trainer.world}))
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
