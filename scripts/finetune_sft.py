r"""Supervised fine-tuning on conversations or prompts and completions: the loss is on the answers only.

On a CPU, in a minute or two, from a file whose rows have messages, or prompt and completion, as TRL takes them:
    python scripts/finetune_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file chats.jsonl \
        --max_length 256 --per_device_train_batch_size 2 --max_steps 20 --eval_steps 10 --output_dir out/first-try

The same with all SwiGLU blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --convert --control \
        --dataset_name trl-lib/Capybara --packing --learning_rate 2e-5 --max_steps 500 --eval_steps 100 --bf16 \
        --output_dir out/chat-geglu

A model without a chat template: --chat_template_path template.jinja. On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_sft.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help; or in a
file: --config settings.yaml. Leaves in OUTPUT_DIR: the model with tokenizer and template, logs, settings.json,
results.json, the newest checkpoints, and for --control the folder control.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("sft", prog="finetune_sft.py", description=__doc__))
