"""Fully sharded data parallelism for a task: every rank keeps a part of each weight, gradient and optimiser state.

Checkpoints hold whole tensors under the names of an unsharded run, so that any number of ranks, with sharding or
without, continues what another number began. Works on GPUs, and with gloo on CPUs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.errors import ZooError
from zoo.train import checkpoint_io


class Sharded(ModelParallelStrategy):
    """The strategy `fsdp`: FSDP2 over all ranks of all nodes. The task shards its model in `configure_model`."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state dict that the optimiser of an unsharded run would give.

        Lightning's own numbers the parameters by module, not by group, and so belongs to no unsharded optimiser.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        found = inner.state_dict()
        state = {number: {key: _whole(item) for key, item in row.items()} for number, row in found["state"].items()}
        return {**found, "state": state}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the file and takes its parts."""
        checkpoint = checkpoint_io.load(Path(self.broadcast(checkpoint_path)))
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint.pop("state_dict"))
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            like = dict(zip(numbers, weights, strict=True))
            state = {
                number: {key: part(item, like[number]) if item.ndim else item for key, item in row.items()}
                for number, row in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
        return checkpoint


def _whole(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value


def strategy(name: str) -> Any:
    """What Lightning's Trainer takes for the recipe's `trainer.strategy`.

    Raises:
        ZooError: DeepSpeed is asked for and not installed, or there is no GPU for it.
    """
    if name.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ZooError(
                f"trainer.strategy={name} needs DeepSpeed, which is not installed: pip install 'seqzoo[deepspeed]' "
                "(trainer.strategy=fsdp shards without it)"
            )
        if not torch.cuda.is_available():
            raise ZooError(f"trainer.strategy={name} needs a GPU, and PyTorch sees none: take ddp or fsdp")
    return Sharded() if name == "fsdp" else name


def reshard(module: nn.Module) -> None:
    """Let every rank keep only its parts: after a forward pass without a backward one some weights are whole."""
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def whole(value: Tensor) -> Tensor:
    """The tensor of which every rank holds a part; all ranks must call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of *value*, laid out as *like* is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors on every rank; all ranks must call this together."""
    reshard(module)
    return {name: whole(value) for name, value in module.state_dict().items()}


def load_whole(module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Load whole tensors into a module that may be sharded; strict."""
    reshard(module)
    if any(isinstance(weight, DTensor) for weight in module.parameters()):
        set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, strict=True))
    else:
        module.load_state_dict(state)
