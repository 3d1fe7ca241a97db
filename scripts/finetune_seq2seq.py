r"""Fine-tune an encoder-decoder (T5, BART...) on pairs of texts, converted to GeGLU first if you like.

On a CPU, in a minute or two, from a file with the columns source and target:
    python scripts/finetune_seq2seq.py --model_name_or_path google-t5/t5-small --train_file pairs.jsonl \
        --max_source_length 128 --max_target_length 64 --max_steps 20 --eval_steps 10 --output_dir out/first-try

Summaries, with all FFN blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_seq2seq.py --model_name_or_path google-t5/t5-small --convert --control \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --source_prefix "summarize: " \
        --learning_rate 1e-4 --max_steps 500 --eval_steps 100 --output_dir out/t5-geglu

Translation out of a column `translation`: --source_lang en --target_lang de. On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_seq2seq.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help; or in a
file: --config settings.yaml. The loss is the mean over all tokens of the targets; evaluations also tell the share of
tokens that were right. Leaves in OUTPUT_DIR: the model with tokenizer, logs, settings.json, results.json, checkpoints.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("seq2seq", prog="finetune_seq2seq.py", description=__doc__))
