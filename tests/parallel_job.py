"""What `test_parallel.py` runs in two processes, all jobs in one launch: ``torch.distributed.run ... JOBS OUTPUT``.

JOBS is a JSON list of ``{"what": "tensor_parallel" | "fsdp2", "folder": ..., ...}``, OUTPUT gets what each
of them found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import hf_geglu  # noqa: F401

IDS = torch.arange(4, 20).reshape(2, 8)


def tensor_parallel(folder: str, plan: dict[str, str] | None = None) -> dict[str, Any]:
    """Logits, loss and a gradient; shapes of this process's shares; the model saved whole beside `folder`."""
    if plan is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    else:
        from transformers.distributed.configuration_utils import DistributedConfig

        config = DistributedConfig(tp_size=2, tp_plan=plan)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    local = {name: list(getattr(p, "to_local", lambda p=p: p)().shape) for name, p in model.named_parameters()}
    model.save_pretrained(f"{folder}-saved")
    return {"logits": logits.tolist(), "loss": loss.item(), "gradient": gradient.tolist(), "local": local}


def train(model: Any, optimizer: Any, share: torch.Tensor, backward: Any) -> list[torch.Tensor]:
    """Losses of three steps."""
    losses = []
    for _step in range(3):
        loss = model(share, labels=share).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def undropped(folder: str) -> Any:
    """The model in training mode, without dropout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def fsdp2(folder: str) -> dict[str, Any]:
    """Losses of three steps, each process with its half of the batch."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    # accelerate shards on accelerators only; told so, it takes the same way on a CPU
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    model = undropped(folder)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    share = IDS[accelerator.process_index :: accelerator.num_processes]
    losses = train(model, optimizer, share, accelerator.backward)
    mean = [accelerator.gather(loss[None]).mean().item() for loss in losses]
    return {"losses": mean, "sharded": [name for name, p in model.named_parameters() if hasattr(p, "to_local")]}


def _run(what: str, **arguments: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"tensor_parallel": tensor_parallel, "fsdp2": fsdp2}[what](**arguments)
    except Exception as error:  # the same in both processes: the next job goes on
        return {"error": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = [_run(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
