"""What other packages must be told about variants, one file a package; none of them is imported before its user does.

Importing hf_geglu leaves a note (`hooks.when_imported`) for each of them. The note is read when that package is
imported, before or after ours.
"""

from __future__ import annotations

from hf_geglu.neighbours.hooks import when_imported


def register() -> None:
    """Leave the notes. Idempotent; imports nothing."""
    when_imported("peft", "hf_geglu.neighbours.peft:register_targets")
    when_imported("peft", "hf_geglu.neighbours.peft:watch_adapters")
    when_imported("transformers.modeling_utils", "hf_geglu.neighbours.pushing:watch_push")
    when_imported("transformers.integrations.peft", "hf_geglu.neighbours.peft:watch_integration")
    when_imported("liger_kernel.transformers.monkey_patch", "hf_geglu.neighbours.liger:guard_functions")
    when_imported("liger_kernel.transformers.auto_model", "hf_geglu.neighbours.liger:guard_auto_class")
    when_imported("liger_kernel.transformers.geglu", "hf_geglu.neighbours.liger:guard_geglu_block")
