"""One run that proves or refutes a forecast: base model, heads, forecast, real decoding, report.

Read `presets.py` for what is run at which size, `stages.py` for the way from a base model to
decoded text, `measurements.py` for decoding beside its forecast, `checks.py` for what is checked
beside it, `summary.py` for the report, `run.py` for order, resumption and time limits.
"""

from cpmtp.validation.presets import PRESETS, BasePlan, Preset
from cpmtp.validation.run import STAGES, validate

__all__ = ["PRESETS", "STAGES", "BasePlan", "Preset", "validate"]
