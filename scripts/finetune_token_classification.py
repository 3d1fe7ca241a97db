r"""Fine-tune a classifier of words, such as named entities, converted to GeGLU first if you like.

On a CPU, in a minute or two, from a file with the columns tokens and ner_tags (lists of names, or of numbers):
    python scripts/finetune_token_classification.py --model_name_or_path google-bert/bert-base-cased \
        --train_file entities.jsonl --max_seq_length 128 --max_steps 20 --eval_steps 10 --output_dir out/first-try

With all FFN blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_token_classification.py --model_name_or_path google-bert/bert-base-cased --convert \
        --control --dataset_name eriktks/conll2003 --dataset_revision refs/convert/parquet \
        --per_device_train_batch_size 16 --learning_rate 3e-5 --num_train_epochs 3 --output_dir out/bert-ner-geglu

On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_token_classification.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help; or in a
file: --config settings.yaml. The loss is the mean over all words of a step; evaluations also tell precision, recall
and F1 of whole entities. Leaves in OUTPUT_DIR: the model with tokenizer, logs, settings.json, results.json...
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("token_classification", prog="finetune_token_classification.py", description=__doc__))
