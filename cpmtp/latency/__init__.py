"""What tokens per call are worth: step times as a formula and as a file, throughput, cost."""

from cpmtp.latency.measured import (
    OURS,
    HeadTime,
    MeasuredLatency,
    PlainTime,
    StepCurve,
    StepTime,
    read_latency,
)
from cpmtp.latency.model import (
    LatencyModel,
    Throughput,
    cost_per_million_tokens,
    memory_bound_latency,
    predicted_speedup,
    tokens_until_paid,
)

__all__ = [
    "OURS",
    "HeadTime",
    "LatencyModel",
    "MeasuredLatency",
    "PlainTime",
    "StepCurve",
    "StepTime",
    "Throughput",
    "cost_per_million_tokens",
    "memory_bound_latency",
    "predicted_speedup",
    "read_latency",
    "tokens_until_paid",
]
