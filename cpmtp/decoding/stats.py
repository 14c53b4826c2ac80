"""What a decoding run did and how long it took; one line of JSON per call for whoever watches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpmtp.decoding.audit import AuditFindings

STAGES = ("target", "draft", "verification", "rest")


@dataclass(frozen=True)
class Progress:
    """How far a run is, the prompts having been read.

    Attributes
    ----------
    tokens : int
        Emitted by cycles, of all rows.
    tokens_per_call : float
        Of a row.
    stage_seconds : dict of str to float
        Of the cycles.
    """

    tokens: int
    tokens_per_call: float
    stage_seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Of all rows; 0 where no time was taken."""
        seconds = sum(self.stage_seconds.values())
        return self.tokens / seconds if seconds else 0.0

    def __str__(self) -> str:
        shares = _shares(self.stage_seconds)
        return (
            f"{self.tokens_per_call:.2f} tokens per call, draft {shares['draft']:.0%}, "
            f"verification {shares['verification']:.0%} of the time"
        )


@dataclass(frozen=True)
class GenerationStats:
    """Counts and times of one run.

    Attributes
    ----------
    calls : int
        Forward passes of the target, the reading of the prompts included.
    accepted_counts : tuple of int
        How many cycles of a row accepted exactly 0, 1, … drafted tokens.
    tokens_per_call : float
        Pooled over rows: tokens emitted by cycles over cycles of rows (the reading of the prompts
        is no cycle).
    tokens_per_call_by_row : tuple of float
    seconds : float
        The whole run.
    stage_seconds : dict of str to float
        Of the cycles: target forward passes, draft, verification, the rest.
    token_latencies : tuple of float
        Seconds per emitted token of every cycle: its time over the mean number of tokens a row got.
    tokens : int
        New tokens of all rows.
    way : str
        How the target was followed; see `cpmtp.decoding.trials`.
    audit_findings : AuditFindings, optional
    running_share : float
        Of the rows, how many still ran in a cycle, on average: a row that has ended waits for the
        slowest.
    full_tokens_per_second : float
        Tokens per second over the cycles in which all rows ran: what a server gets that puts
        another request in the place of one that has ended.
    """

    calls: int
    accepted_counts: tuple[int, ...]
    tokens_per_call: float
    tokens_per_call_by_row: tuple[float, ...]
    seconds: float
    stage_seconds: dict[str, float]
    token_latencies: tuple[float, ...]
    tokens: int
    way: str = ""
    audit_findings: AuditFindings | None = None
    running_share: float = 1.0
    full_tokens_per_second: float = 0.0

    def __repr__(self) -> str:
        found = "" if self.audit is None else f", audit={self.audit:.1e}"
        return (
            f"GenerationStats({self.tokens} tokens in {self.calls} calls, "
            f"{self.tokens_per_call:.3f} tokens per call, {self.tokens_per_second:.4g} tokens per "
            f"second{found})"
        )

    @property
    def audit(self) -> float | None:
        """Largest total variation of what was used to full passes; None without an audit."""
        return None if self.audit_findings is None else self.audit_findings.largest

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole run's seconds; 0 where no time was taken."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def cycle_seconds(self) -> dict[str, float]:
        """Mean seconds of a cycle by stage: ``target_seconds``, ``draft_seconds`` and so on."""
        cycles = max(self.calls - 1, 1)
        return {f"{name}_seconds": spent / cycles for name, spent in self.stage_seconds.items()}

    @property
    def stage_shares(self) -> dict[str, float]:
        """Share of the cycles' time, by stage; all 0 where no time was taken."""
        return _shares(self.stage_seconds)

    @property
    def accepted_per_position(self) -> tuple[int, ...]:
        """In how many cycles of a row the k-th drafted token was accepted, k = 1, 2, …."""
        return tuple(int(c) for c in np.cumsum(self.accepted_counts[::-1])[::-1][1:])

    def latency(self, quantile: float) -> float:
        """Seconds per token that this share of the cycles did not exceed, e.g. 0.5 or 0.95."""
        return float(np.quantile(self.token_latencies, quantile)) if self.token_latencies else 0.0


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    whole = sum(seconds.values()) or 1.0
    return {name: spent / whole for name, spent in seconds.items()}


@dataclass
class Recorder:
    """Collects a run's numbers while it goes on; writes a line per cycle to `monitor`, and tells
    `watch`.
    """

    rows: int
    horizon: int
    monitor: Path | None = None
    watch: Callable[[Progress], None] | None = None
    calls: int = 1
    emitted: int = 0
    cycles_of_rows: int = 0
    full: tuple[int, float] = (0, 0.0)  # tokens and seconds of the cycles in which all rows ran
    accepted: list[list[int]] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    latencies: list[float] = field(default_factory=list)

    def cycle(self, accepted: dict[int, int], stages: dict[str, float]) -> None:
        """`accepted` maps the rows that are still running to their number of accepted drafted
        tokens.
        """
        self.calls += 1
        self.accepted.append([accepted.get(row, -1) for row in range(self.rows)])
        for name, spent in stages.items():
            self.stages[name] += spent
        emitted, seconds = sum(accepted.values()) + len(accepted), sum(stages.values())
        self.latencies.append(seconds * len(accepted) / emitted)
        self.emitted += emitted
        if len(accepted) == self.rows:
            self.full = (self.full[0] + emitted, self.full[1] + seconds)
        self.cycles_of_rows += len(accepted)
        if self.watch:
            per_call = self.emitted / self.cycles_of_rows
            self.watch(Progress(self.emitted, per_call, dict(self.stages)))
        if self.monitor:
            line = {"call": self.calls, "accepted": list(accepted.values()), "seconds": stages}
            with self.monitor.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def finish(
        self, seconds: float, tokens: int, way: str = "", audit: AuditFindings | None = None
    ) -> GenerationStats:
        """The run's numbers from what was collected."""
        table = np.array(self.accepted, dtype=int).reshape(-1, self.rows)
        running = table >= 0
        emitted = np.where(running, table + 1, 0)
        per_row = emitted.sum(0) / np.maximum(running.sum(0), 1)
        return GenerationStats(
            calls=self.calls,
            accepted_counts=tuple(int((table == k).sum()) for k in range(self.horizon)),
            tokens_per_call=float(emitted.sum() / max(running.sum(), 1)),
            tokens_per_call_by_row=tuple(per_row.tolist()),
            seconds=seconds,
            stage_seconds=self.stages,
            token_latencies=tuple(self.latencies),
            tokens=tokens,
            way=way,
            audit_findings=audit,
            running_share=self.cycles_of_rows / max((self.calls - 1) * self.rows, 1),
            full_tokens_per_second=self.full[0] / self.full[1] if self.full[1] else 0.0,
        )
