"""Heads of a real model with a draft vocabulary, side by side; goes on where it was stopped.

Run from the checkout: python data/studies/real_heads.py STAGE OUT MODEL [--threads T], where MODEL
is a folder of a causal language model (the figures of the pages are of SmolLM2-135M-Instruct) and
STAGE one of

* ``samples``: windows of 256 tokens. Half of them code (sources of the standard library), half
  prose (their docstrings, and the language reference); of each, 512 windows are text, and 192 are
  written by the model itself after 32 tokens of such a text, a third each at temperature 1, 0.7
  and 0. Held-out documents give none of them.
* ``rates``: a recurrent head at three learning rates, for 32k positions each.
* ``forms``: four candidates side by side on the same windows and kept hidden states.
* ``long``: a head of the best form for longer.
* ``judge``: what heads earn on held-out documents, and what prompt lookup does.

Every head drafts the 4,096 most frequent tokens of the windows. `heads/NAME` holds a head, its
recipe and what it earned step by step; `heads.csv` says of all of them what they earn on windows
of held-out documents, by the forecast that weighs positions as decoding's cycles do.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

import cpmtp
from cpmtp.corpora import split_held_out, standard_library_documents
from cpmtp.forecasting.cycles import forecast_cycles, forecast_from_ratios
from cpmtp.forecasting.held_out import lookup_matches
from cpmtp.heads.draft_head import DraftHead
from cpmtp.training.head_settings import HeadTrainingSettings
from cpmtp.training.heads import train_heads, windows_of_text
from cpmtp.whole_files import write_tensors, write_text

DOMAINS, TEMPERATURES = ("code", "prose"), (1.0, 0.7, 0.0)
LENGTH, PROMPT = 256, 32
# Windows of each domain: of text, and written by the model at each temperature.
WINDOWS = {"training": (512, 64), "held_out": (0, 16)}
SHARED = HeadTrainingSettings(
    width=576,
    blocks=1,
    vocabulary=4096,
    rows=4,
    length=LENGTH,
    precision="bfloat16",
    learning_rate=6e-3,
)
FORMS = {
    "recurrent": {"form": "recurrent", "horizon": 6},
    "markov": {"form": "markov", "transition_rank": 64, "horizon": 6},
    "markov_mixture": {
        "form": "markov_mixture",
        "rank": 4,
        "transition_rank": 32,
        "horizon": 4,
    },
    "cp": {"form": "cp", "rank": 4, "horizon": 4},
}
STAGES = {
    "rates": {
        f"rate-{rate:g}": {"learning_rate": rate, "positions": 32 * 1024} | FORMS["recurrent"]
        for rate in (4e-3, 8e-3, 1.6e-2)
    },
    "forms": {name: {"positions": 128 * 1024} | form for name, form in FORMS.items()},
    # Narrower than the others: a draft is to cost little beside a call of the model.
    "long": {
        "recurrent-long": {
            "form": "recurrent",
            "horizon": 5,
            "width": 384,
            "learning_rate": 8e-3,
            "positions": 512 * 1024,
        },
    },
}


def windows_of(lm, out: Path, part: str) -> Tensor:
    """Windows (count, length) of training or of held-out documents, written once."""
    file = out / f"{part}.safetensors"
    if not file.exists():
        found = []
        for place, domain in enumerate(DOMAINS):
            kept, held_out = split_held_out(standard_library_documents(domain), 0.05)
            texts = [document.text for document in (held_out if part == "held_out" else kept)]
            windows = windows_of_text(lm, texts, LENGTH)
            generator = torch.Generator().manual_seed(place)
            order = torch.randperm(len(windows), generator=generator)
            text, own = WINDOWS[part]
            found.append(windows[order[:text]])
            for k, temperature in enumerate(TEMPERATURES):
                begin = text + k * own
                prompts = windows[order[begin : begin + own], :PROMPT]
                found.append(continued(lm, prompts, temperature, generator))
                print(time.strftime("%H:%M:%S"), part, domain, temperature, flush=True)
        write_tensors(file, {"tokens": torch.cat(found).to(torch.int32)})
    return load_file(file)["tokens"].long()


@torch.inference_mode()
def continued(lm, prompts: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Prompts (count, PROMPT) with what the model writes after them, (count, LENGTH)."""
    tokens, cache, last = prompts, None, prompts
    while tokens.shape[1] < LENGTH:
        logits, cache = lm.step(last, cache)
        scores = logits[:, -1].float()  # (count, vocab)
        if temperature:
            probs = (scores / temperature).softmax(-1)
            last = torch.multinomial(probs, 1, generator=generator)  # (count, 1)
        else:
            last = scores.argmax(-1, keepdim=True)  # (count, 1)
        tokens = torch.cat([tokens, last], 1)
    return tokens


def trained(lm, out: Path, stage: str) -> None:
    """The heads of a stage, those that are there already left as they are."""
    wanted = {
        name: options
        for name, options in STAGES[stage].items()
        if not (out / "heads" / name / "config.json").exists()
    }
    if not wanted:
        return
    tokens = windows_of(lm, out, "training")
    settings = [replace(SHARED, **options) for options in wanted.values()]
    folders = [out / "heads" / name for name in wanted]

    def told(index: int, step: int, loss) -> None:
        if step % 16 == 0:
            name = folders[index].name
            print(time.strftime("%H:%M:%S"), step, name, f"{loss.tokens_per_call:.3f}", flush=True)

    train_heads(lm, settings, folders, tokens=tokens, callback=told)


def judged(lm, out: Path, names: list[str] | None, measured: int) -> None:
    """What heads earn after prompts of held-out documents, by domain and temperature; decoded as
    well where so many tokens after each prompt are asked for.
    """
    tokens = windows_of(lm, out, "held_out").view(len(DOMAINS), len(TEMPERATURES), -1, LENGTH)
    found = sorted(path.parent.name for path in (out / "heads").glob("*/config.json"))
    for name in names or found:
        head = DraftHead.from_pretrained(out / "heads" / name).attach(lm).requires_grad_(False)
        for domain, texts_of_domain in zip(DOMAINS, tokens, strict=True):
            for temperature, texts in zip(TEMPERATURES, texts_of_domain, strict=True):
                row = {"head": name, "form": head.form, "horizon": head.horizon}
                row |= {"domain": domain, "temperature": temperature}
                row |= earned(lm, head, texts, temperature, measured)
                print(pd.DataFrame([row]).round(3).to_string(index=False), flush=True)
                written(out / "heads.csv", row)


def written(file: Path, row: dict) -> None:
    """The table with this row, in the place of an older one of the same head and texts."""
    table = pd.DataFrame([row])
    if file.exists():
        table = pd.concat([pd.read_csv(file), table])
    table = table.drop_duplicates(["head", "domain", "temperature"], keep="last")
    write_text(file, table.round(4).to_csv(index=False))


def earned(lm, head: DraftHead, texts: Tensor, temperature: float, measured: int) -> dict:
    """Forecast of a head and of prompt lookup on texts, and what decoding from their prompts
    gives, with its audit.
    """
    found = forecast_cycles(lm, head, texts, start=PROMPT, temperature=temperature)
    row = {"tokens_per_call": found.tokens_per_call}
    row |= dict(zip(("low", "high"), found.interval, strict=True))
    row |= {f"survival_{k + 1}": s for k, s in enumerate(found.survival.tolist())}
    matches = torch.stack([lookup_matches(text, PROMPT, head.horizon) for text in texts])
    row["lookup"] = forecast_from_ratios(matches).tokens_per_call
    if measured:
        how = {"max_new_tokens": measured, "temperature": temperature, "audit": True, "seed": 3}
        stats = cpmtp.speculative_generate(lm, head, list(texts[:, :PROMPT]), **how).stats
        by_row = torch.tensor(stats.tokens_per_call_by_row)
        error = float(by_row.std()) / len(by_row) ** 0.5
        row |= {"measured": stats.tokens_per_call, "measured_error": error}
        audit = stats.audit_findings
        row |= {"total_variation": audit.largest, "rounding": audit.rounding}
        row |= {"distance": audit.distance, "allowed": audit.allowed}
    return row


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("samples", *STAGES, "judge"))
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--heads", nargs="*", help="whom to judge; default: all")
    parser.add_argument("--measured", type=int, default=0, help="tokens decoded after each prompt")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    lm = cpmtp.load_language_model(given.model, dtype="bfloat16")
    if given.stage == "samples":
        windows_of(lm, given.out, "training")
        windows_of(lm, given.out, "held_out")
    elif given.stage == "judge":
        judged(lm, given.out, given.heads, given.measured)
    else:
        trained(lm, given.out, given.stage)


if __name__ == "__main__":
    main()
