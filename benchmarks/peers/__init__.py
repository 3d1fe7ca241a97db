"""The causal-LM recipe beside transformers' run_clm_no_trainer.py and TRL's SFTTrainer, on the same tokens.

models     weights, as an ordinary model folder
material   one text, and the order in which all sides see its blocks
meter      what is read off a side while it runs: time of a step, loss, batches, memory
sides      how each side is launched, the same settings in its own words
job        one side in a process of its own
page       docs/peers.md
"""
