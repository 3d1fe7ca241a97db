"""Every error this package raises on purpose.

    HfGegluError
    ├── VariantError          unknown GLU variant, or its name already taken in ACT2FN
    ├── SiteError             a site that cannot be what it is said to be
    │   └── NoSitesError      a model without FFN blocks
    ├── IdentifyError         something that cannot be identified, because it is no unit
    ├── SelectionError        `layers=` matches nothing, or cannot be read
    ├── PlanError             a plan that does not fit the model, or that cannot be read
    │   └── ConversionError   no conversion leads from this site to that variant
    ├── StreamError           a model that cannot be run layer by layer
    ├── SurgeryError          the model cannot be changed (it was left as it was)
    ├── VerificationError     what came out is not what the plan promised (the model was put back)
    ├── WeightsError          NaN or infinite weights, missing or truncated tensors
    ├── AdapterError          an adapter that was trained on another base
    ├── KernelError           a kernel that would compute another function, or that cannot run
    ├── OutputError           an output folder that must not be written
    ├── ManifestError         a saved variant whose manifest is missing, damaged or not true
    ├── PushError             a folder that must not be published
    ├── DataError             a dataset that cannot be trained on
    └── TrainingError         a run that cannot start, continue or resume
        └── ConfigurationError  contradictory or impossible settings of a run

Each message says what was given, what was expected, and what to do next. All of them are also ValueErrors, so that code
which knows nothing of this package can still catch them. A checkpoint that is loaded wrongly raises
`modeling_geglu.VariantLoadError`, which lives in the file that travels with the checkpoint.
"""

from __future__ import annotations


class HfGegluError(ValueError):
    """Root of the tree."""


class VariantError(HfGegluError):
    """Unknown GLU variant, or its name already taken in ACT2FN."""


class SiteError(HfGegluError):
    """A site that cannot be what it is said to be."""


class NoSitesError(SiteError):
    """A model without FFN blocks."""


class IdentifyError(HfGegluError):
    """Something that cannot be identified, because it is no unit."""


class SelectionError(HfGegluError):
    """`layers=` matches nothing, or cannot be read."""


class PlanError(HfGegluError):
    """A plan that does not fit the model, or that cannot be read."""


class ConversionError(PlanError):
    """No conversion leads from this site to that variant."""


class StreamError(HfGegluError):
    """A model that cannot be run layer by layer."""


class SurgeryError(HfGegluError):
    """The model cannot be changed; it was left as it was."""


class VerificationError(HfGegluError):
    """What came out is not what the plan promised; the model was put back."""


class WeightsError(HfGegluError):
    """NaN or infinite weights, missing or truncated tensors."""


class AdapterError(HfGegluError):
    """An adapter that was trained on another base."""


class KernelError(HfGegluError):
    """A kernel that would compute another function, or that cannot run on what it was given."""


class OutputError(HfGegluError):
    """An output folder that must not be written."""


class ManifestError(HfGegluError):
    """A saved variant whose manifest is missing, damaged or not true."""


class PushError(HfGegluError):
    """A folder that must not be published; nothing was uploaded."""


class DataError(HfGegluError):
    """A dataset that cannot be trained on."""


class TrainingError(HfGegluError):
    """A run that cannot start, continue or resume."""


class ConfigurationError(TrainingError):
    """Contradictory or impossible settings of a run."""
