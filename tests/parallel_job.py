"""What `test_parallel.py` runs in two processes: ``python -m torch.distributed.run ... parallel_job.py WHAT ...``."""

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


def tensor_parallel(folder: str, saved: str, plan: dict[str, str] | None = None) -> dict[str, Any]:
    """Logits and gradients of one process's share, and the model gathered again."""
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
    first = model.get_submodule("model.embed_tokens" if hasattr(model, "model") else "gpt_neox.embed_in")
    gradient = first.weight.grad
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    local = {name: list(getattr(p, "to_local", lambda p=p: p)().shape) for name, p in model.named_parameters()}
    model.save_pretrained(saved)
    return {"logits": logits.tolist(), "loss": loss.item(), "gradient": gradient.tolist(), "local": local}


def fsdp2(folder: str, _: str) -> dict[str, Any]:
    """Losses of three steps, each process with its half of the batch."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:  # accelerate shards on accelerators only; told so, it takes the same way on a CPU
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    share = IDS[accelerator.process_index :: accelerator.num_processes]
    losses = []
    for _step in range(3):
        loss = model(share, labels=share).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "to_local")]
    return {"losses": losses, "sharded": sharded}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    what, folder, output, *rest = sys.argv[1:]
    found = globals()[what](folder, f"{output}.saved", *map(json.loads, rest))
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
