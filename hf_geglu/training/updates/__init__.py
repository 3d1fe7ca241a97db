"""From gradients to weights: clipping, optimizer and schedule, DeepSpeed's engine, the moving average."""
