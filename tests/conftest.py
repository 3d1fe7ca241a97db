"""Settings that every test shares."""

import os

# MKL picks its kernels by the shape of a product, so that widening a projection moves a sum's last bit (1e-16) however
# the
# weights are arranged. This setting makes each output's arithmetic independent of the matrix's width; what is left of a
# difference in float64 is then the conversion's. It must be set before torch is imported.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models; xdist's workers share the cores
