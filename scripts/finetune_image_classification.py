r"""Fine-tune a classifier of pictures, converted to GeGLU first if you like.

On a CPU, in a minute or two, from a folder with a folder of pictures for each class:
    python scripts/finetune_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_dir pictures --per_device_train_batch_size 4 --max_steps 20 --eval_steps 10 --output_dir out/first-try

With all FFN blocks turned into GeGLU, beside the unconverted model on the same batches:
    python scripts/finetune_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k --convert \
        --control --dataset_name AI-Lab-Makerere/beans --per_device_train_batch_size 16 --learning_rate 5e-5 \
        --num_train_epochs 3 --eval_steps 50 --output_dir out/vit-beans-geglu

On several GPUs:
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/finetune_image_classification.py ...

Go on after an interruption: the same command with --resume. All flags, with dashes or underscores: --help; or in a
file: --config settings.yaml. Pictures are cropped and mirrored at random while training (--augment false: not).
Leaves in OUTPUT_DIR: the model with image processor, logs, settings.json, results.json, the newest checkpoints.
"""

import sys

from hf_geglu.training.command_line import main

if __name__ == "__main__":
    sys.exit(main("image_classification", prog="finetune_image_classification.py", description=__doc__))
