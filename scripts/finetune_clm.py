r"""Fine-tune a causal language model, converted to GeGLU first if you like.

On a CPU, in a minute or two:
    python scripts/finetune_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file my_text.txt \
        --block_size 128 --per_device_train_batch_size 4 --max_steps 20 --eval_steps 10 --output_dir out/first-try

The same with all SwiGLU blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --convert --control \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --learning_rate 1e-4 --warmup_ratio 0.03 \
        --lr_scheduler_type cosine --max_steps 500 --eval_steps 100 --bf16 --output_dir out/smollm2-geglu

On several GPUs (every flag stays as it is; the batch of a step grows with the number of processes):
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_clm.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help.
Leaves in OUTPUT_DIR: the model with tokenizer and generation config, train_log.jsonl (one object a step),
eval_log.jsonl, settings.json, results.json, the newest checkpoints, and for --control the folder control.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("clm", prog="finetune_clm.py", description=__doc__))
