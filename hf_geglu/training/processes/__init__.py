"""One process or several: accelerate, who holds which share of a model, and files of tensors gathered one by one."""
