r"""Fine-tune a classifier of texts or pairs of texts, converted to GeGLU first if you like.

On a CPU, in a minute or two, from a file with the columns text and label:
    python scripts/finetune_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file reviews.csv --max_seq_length 128 --max_steps 20 --eval_steps 10 --output_dir out/first-try

GLUE, with all FFN blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_text_classification.py --model_name_or_path google-bert/bert-base-uncased --convert \
        --control --dataset_name nyu-mll/glue --dataset_config_name mrpc --per_device_train_batch_size 32 \
        --learning_rate 2e-5 --num_train_epochs 3 --eval_steps 50 --output_dir out/bert-mrpc-geglu

A model without a padding token: --pad_token '<|endoftext|>'. On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_text_classification.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help; or in a
file: --config settings.yaml. The loss is the mean over all examples of a step; evaluations also tell accuracy and F1.
Leaves in OUTPUT_DIR: the model with tokenizer, logs, settings.json, results.json, the newest checkpoints.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("text_classification", prog="finetune_text_classification.py", description=__doc__))
