"""The tasks of the recipes, one file each."""

from collections.abc import Mapping

from hf_geglu.training.objectives.objective import Task
from hf_geglu.training.tasks.chat import SFT
from hf_geglu.training.tasks.image_classes import IMAGE_CLASSIFICATION
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind
from hf_geglu.training.tasks.language import CLM, MLM
from hf_geglu.training.tasks.seq2seq import SEQ2SEQ
from hf_geglu.training.tasks.text_classes import TEXT_CLASSIFICATION
from hf_geglu.training.tasks.token_classes import TOKEN_CLASSIFICATION

TASKS: Mapping[Task, TaskKind] = {
    kind.name: kind
    for kind in (CLM, MLM, SEQ2SEQ, SFT, TEXT_CLASSIFICATION, TOKEN_CLASSIFICATION, IMAGE_CLASSIFICATION)
}

__all__ = ["TASKS", "Prepared", "Request", "TaskKind"]
