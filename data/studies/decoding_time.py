"""What decoding with heads takes and earns, cycle by cycle, beside plain decoding.

Run from the checkout: python data/studies/decoding_time.py OUT MODEL HEADS... [--dtype D] with
options for what is measured: --domains, --temperatures, --batches, --horizons, --tokens, --rounds,
--threads.
MODEL is an embedded model or a folder; HEADS are folders, or `recommended` and `baseline`.

Prompts are of held-out documents (sources of the standard library, or their docstrings). Every
round decodes the same prompts by every way in turn: transformers' own generation, this library's
loop without drafts, and with each head; medians over rounds. A row per head, domain, temperature
and batch:

* `tokens_per_call`; `target_1` and `target_n`: seconds of the target's call without and with drafts
* `speedup`: tokens per second over the faster of the two plain ways
* `of_bound`: that speedup over ``tokens_per_call target_1 / target_n``, which it would be if drafts
  and their verification took no time
* `running_share`: of the requests of a batch, how many still ran in a cycle: all have the same
  number of tokens to write, and wait for the slowest
* `full_speedup`, `full_of_bound`: the same over the cycles in which all requests still ran, which
  is what a server sees that puts another request in the place of one that has ended
* `draft_share`, `verification_share`, `rest_share`: of a cycle
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import pandas as pd
import torch

import cpmtp
from cpmtp.corpora import split_held_out, standard_library_documents
from cpmtp.heads.draft_head import DraftHead
from cpmtp.pretrained import embedded_heads
from cpmtp.validation.measurements import decode_in_turns
from cpmtp.whole_files import write_text

PROMPT = 48
STAGES = ("target", "draft", "verification", "rest")


def prompts_of(lm, domain: str, count: int) -> list[torch.Tensor]:
    """Beginnings (PROMPT,) of pieces of held-out documents."""
    documents = split_held_out(standard_library_documents(domain), 0.05)[1]
    encoded = [lm.encode_document(document.text) for document in documents]
    encoded = [ids for ids in encoded if len(ids) > 2 * PROMPT]
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(count):
        ids = encoded[i % len(encoded)]
        start = int(torch.randint(len(ids) - PROMPT, (1,), generator=generator))
        found.append(ids[start : start + PROMPT])
    return found


def shortened(head: DraftHead, horizon: int) -> DraftHead:
    """The same head, which drafts fewer tokens: the leading rows of what it has per position."""
    own = {"form": head.form, "rank": head.rank, "gated": head.gated, "anchored": head.anchored}
    own |= {"hidden_size": head.hidden_size, "vocab_size": head.vocab_size}
    own |= {"transition_rank": head.transition_rank, "vocabulary": head.vocabulary}
    own |= {"width": head.maps.shape[-1], "blocks": len(getattr(head, "blocks", ()))}
    short = DraftHead(horizon=horizon, base_sha256=head.base_sha256, **own)
    sizes = {name: len(weight) for name, weight in short.state_dict().items()}
    weights = head.state_dict()
    short.load_state_dict({name: weights[name][:size] for name, size in sizes.items()})
    return short.eval().requires_grad_(False)


def rows_of(table: list[dict], key: dict, threads: int) -> list[dict]:
    """The heads' rows, against the faster of the first two."""
    transformers, plain, *heads = table
    faster = max(transformers["tokens_per_second"], plain["tokens_per_second"])
    found = []
    for row in heads:
        cycle = sum(row[f"{stage}_seconds"] for stage in STAGES)
        speedup = row["tokens_per_second"] / faster
        bound = row["tokens_per_call"] * plain["target_seconds"] / row["target_seconds"]
        full = max(transformers["tokens_per_second"], plain["full_tokens_per_second"])
        full_speedup = row["full_tokens_per_second"] / full
        values = {
            "horizon": row["horizon"],
            "tokens_per_call": row["tokens_per_call"],
            "target_1": plain["target_seconds"],
            "target_n": row["target_seconds"],
            "tokens_per_second": row["tokens_per_second"],
            "plain": plain["tokens_per_second"],
            "transformers": transformers["tokens_per_second"],
            "speedup": speedup,
            "of_bound": speedup / bound,
            "running_share": row["running_share"],
            "full_speedup": full_speedup,
            "full_of_bound": full_speedup / bound,
        }
        values |= {f"{stage}_share": row[f"{stage}_seconds"] / cycle for stage in STAGES[1:]}
        where = {"threads": threads, "processor": processor(), "torch": torch.__version__}
        found.append({"head": row["head"]} | key | values | {"rounds": row["rounds"]} | where)
    return found


def processor() -> str:
    """Its name and the units it has for half precision."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor()
    text = file.read_text("utf-8")
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in text]
    return " ".join([names[0] if names else platform.processor(), *units])


def main() -> None:
    """A cell after another; what was measured before is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("heads", nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--domains", default="code,prose")
    parser.add_argument("--temperatures", default="0,0.7,1")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--horizons", type=int, nargs="*", help="shorter ones of each head")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = cpmtp.load_language_model(given.model, dtype=given.dtype)
    stored = embedded_heads(given.model)
    heads = {}
    for name in given.heads:
        folder = stored.get(name, Path(name))
        head = DraftHead.from_pretrained(folder).attach(lm).requires_grad_(False)
        for horizon in given.horizons or (head.horizon,):
            if horizon <= head.horizon:
                name = folder.name if horizon == head.horizon else f"{folder.name} to {horizon}"
                heads[name] = shortened(head, horizon).attach(lm)
    for domain in given.domains.split(","):
        for batch in map(int, given.batches.split(",")):
            prompts = prompts_of(lm, domain, batch * (given.rounds + 1))
            turns = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
            for temperature in map(float, given.temperatures.split(",")):
                how = {"new_tokens": given.tokens, "temperature": temperature}
                table = decode_in_turns(lm, heads, turns, **how)
                key = {"model": lm.name, "dtype": given.dtype, "domain": domain}
                key |= {"temperature": temperature, "batch": batch}
                written(given.out, rows_of(table, key, given.threads))


def written(out: Path, rows: list[dict]) -> None:
    """The table with these rows, in the place of those of the same cells."""
    table = pd.DataFrame(rows).round(5)
    if out.exists():
        table = pd.concat([pd.read_csv(out), table])
    cell = ["head", "model", "dtype", "domain", "temperature", "batch"]
    table = table.drop_duplicates(cell, keep="last")
    write_text(out, table.to_csv(index=False))
    shown = ["head", "domain", "temperature", "batch", "tokens_per_call", "speedup", "of_bound"]
    shown += ["running_share", "full_speedup", "full_of_bound", "target_1", "target_n"]
    shown += ["draft_share", "verification_share", "rest_share"]
    print(pd.DataFrame(rows)[shown].round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
