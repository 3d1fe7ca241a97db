"""Fine-tuning on accelerate: `train` and `evaluate` on blocks in memory, `finetune` from a dataset to a saved model.

Importing this needs torch only; accelerate is imported when training starts, datasets when a dataset is read.
"""

from hf_geglu.training.checkpoints.checkpoint import CheckpointFolder
from hf_geglu.training.data.batches import Blocks, MapBlocks
from hf_geglu.training.data.packing import TokenBlocks, blocks_from_texts
from hf_geglu.training.evaluation import EvalResult, evaluate
from hf_geglu.training.loop import train
from hf_geglu.training.objectives.objective import CausalLM, LanguageTask, MaskedLM, Objective, Task, objective_for
from hf_geglu.training.reports.records import EvalRecord, StepRecord, TrainResult
from hf_geglu.training.run import RunResult, finetune
from hf_geglu.training.settings.run import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings

__all__ = [
    "Blocks",
    "CausalLM",
    "CheckpointFolder",
    "DataSettings",
    "EvalRecord",
    "EvalResult",
    "LanguageTask",
    "MapBlocks",
    "MaskedLM",
    "ModelSettings",
    "Objective",
    "OutputSettings",
    "RunResult",
    "RunSettings",
    "StepRecord",
    "Task",
    "TokenBlocks",
    "TrainResult",
    "TrainSettings",
    "blocks_from_texts",
    "evaluate",
    "finetune",
    "objective_for",
    "train",
]
