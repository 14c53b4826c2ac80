"""What tokens per call are worth: step times as a formula and as a file, throughput, cost."""

from cpmtp.latency.measured import OURS as OURS
from cpmtp.latency.measured import HeadTime as HeadTime
from cpmtp.latency.measured import MeasuredLatency as MeasuredLatency
from cpmtp.latency.measured import PlainTime as PlainTime
from cpmtp.latency.measured import StepCurve as StepCurve
from cpmtp.latency.measured import StepTime as StepTime
from cpmtp.latency.measured import read_latency as read_latency
from cpmtp.latency.model import LatencyModel as LatencyModel
from cpmtp.latency.model import Throughput as Throughput
from cpmtp.latency.model import cost_per_million_tokens as cost_per_million_tokens
from cpmtp.latency.model import memory_bound_latency as memory_bound_latency
from cpmtp.latency.model import predicted_speedup as predicted_speedup
from cpmtp.latency.model import tokens_until_paid as tokens_until_paid
