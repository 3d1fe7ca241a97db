"""Memory of a calibration layer by layer: what one layer needs, however many there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 24

_RUN = """
import gc, json, sys, warnings
from pathlib import Path
import torch
import hf_geglu
from hf_geglu.calibration import CalibrationData
from hf_geglu.calibration.progress import batches_bar
torch.set_num_threads(1)
source, warm, target = map(Path, sys.argv[1:])

def data(tokens):
    ids = torch.randint(3, 250, (8, tokens), generator=torch.Generator().manual_seed(0))
    return CalibrationData(batches=tuple({"input_ids": part} for part in ids.split(2)))

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def measured(folder, tokens):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    done = hf_geglu.convert_checkpoint(folder, target / folder.name, calibration=data(tokens))
    return status("VmHWM") - before, done.report.held_out

measured(warm, 8)  # everything imported
print(json.dumps(measured(source, 32)))
"""


def llama(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=6,
            max_position_embeddings=64,
        )
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_is_a_few_layers_not_the_model(tmp_path):
    model = llama(LAYERS)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "source")
    llama(1).save_pretrained(tmp_path / "warm")
    del model
    folders = [str(tmp_path / name) for name in ("source", "warm", "out")]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", _RUN, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    peak, held_out = json.loads(result.stdout.splitlines()[-1])
    print(f"{peak / 2**20:.0f} MiB above, a layer has {layer / 2**20:.0f}, the model {whole / 2**20:.0f}; {held_out}")
    assert "KL" in held_out
    assert whole > 3 * peak
    assert peak < 8 * layer
