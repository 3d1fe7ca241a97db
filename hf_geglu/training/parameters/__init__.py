"""What is trained: all weights or some, adapters, and what is done to a model before it starts."""
