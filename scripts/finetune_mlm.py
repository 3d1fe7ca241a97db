r"""Fine-tune a masked language model, converted to GeGLU first if you like.

On a CPU, in a minute or two:
    python scripts/finetune_mlm.py --model_name_or_path google-bert/bert-base-uncased --train_file my_text.txt \
        --max_seq_length 128 --per_device_train_batch_size 4 --max_steps 20 --eval_steps 10 --output_dir out/first-try

The same with all FFN blocks turned into GeGLU, beside the unconverted model on the same batches and masks:
    python scripts/finetune_mlm.py --model_name_or_path google-bert/bert-base-uncased --convert --control \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --mlm_probability 0.15 \
        --per_device_train_batch_size 32 --learning_rate 5e-5 --warmup_ratio 0.03 --max_steps 500 --eval_steps 100 \
        --bf16 --output_dir out/bert-geglu

One block a document instead of packing documents end to end: --line_by_line (and --text_unit line for txt files
with one document a line). On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_mlm.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help.
Leaves in OUTPUT_DIR: the model with tokenizer, train_log.jsonl (one object a step), eval_log.jsonl, settings.json,
results.json, the newest checkpoints, and for --control the folder control.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("mlm", prog="finetune_mlm.py", description=__doc__))
