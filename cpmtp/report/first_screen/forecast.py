"""The answer from a forecast of trained heads, in four lines."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence

import pandas as pd

from cpmtp.report.blocks import Section, Text
from cpmtp.report.first_screen.stored_forecast import HEAD, PLAIN, PLAIN_NAME, HeadsForecast
from cpmtp.report.words import memory, percent, served_as

TITLE = "Forecast of trained heads"
_SURE = 0.8
_FEW_GROUPS = 4  # fewer say little of how far a forecast is off
_MILLION = 1e6 / 3600  # tokens, and hours in a second


def forecast_answer(found: HeadsForecast, price: float, models: Sequence[str] = ()) -> Section:
    """The forecast in four lines, cautions above them.

    Parameters
    ----------
    found : HeadsForecast
    price : float
        Of a device-hour.
    models : sequence of str
        Those of the study that it stands beside; none where it stands alone.
    """
    title = f"{found.model} · {TITLE[0].lower()}{TITLE[1:]}" if found.model else TITLE
    settings = found.told["settings"]
    served = {
        name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings
    }
    title += served_as(**served)
    if not found.known:
        return Section(title, _not_enough(found, models))
    blocks = [Text(text, "caution") for text in _cautions(found, models)]
    lines = (
        _verdict(found),
        ("Brings", _brings(found, price)),
        ("How sure", _certainty(found)),
        ("Next", _next_step(found, models)),
    )
    blocks += [Text(text, "line", label) for label, text in lines]
    return Section(title, tuple(blocks))


def _not_enough(found: HeadsForecast, models: Sequence[str]) -> tuple[Text, ...]:
    """What is said where probes were too short."""
    status = found.told["status"].removeprefix("not enough for a forecast: ")
    why, _, remedy = status.partition("; ")
    model = f" --model {models[0]}" if len(models) == 1 else ""
    remedy = re.sub(r"(--[\w-]+)", r"`\1`", remedy) or "give more minutes"
    again = f"run `cpmtp forecast` again and {remedy}."
    if models:
        again = (
            f"`cpmtp study{model}` with more `--minutes`; ceilings below say what no training can "
            "exceed, not what a head will earn."
        )
    return (
        Text("No recommendation: not enough time to decide.", "line", "Undecided"),
        Text(f"{why[:1].upper()}{why[1:]}.", "line", "Why"),
        Text(again, "line", "Next"),
    )


def _verdict(found: HeadsForecast) -> tuple[str, str]:
    choice, row = found.choice, found.row
    if row["kind"] != HEAD:
        name = PLAIN_NAME if row["kind"] == PLAIN else "prompt lookup, which needs none,"
        return "Do not train", f"{name} is the fastest with {requests(choice['load'])}."
    sure = choice["sure"] >= _SURE and not (found.may_not_pay or found.is_far)
    what = f"{_in_words(row)}, trained on {positions(choice['budget'])} of text"
    if not math.isnan(found.another_doubling):
        more = round(100 * found.another_doubling)
        what += f" (twice as many would add {f'{more} %' if more else 'less than 1 %'})"
    why = ""
    if found.may_not_pay:
        why = "; it may not beat plain decoding"
    elif found.is_far:
        why = "; no forecast was checked so far ahead"
    elif not sure:
        why = "; it beats plain decoding, but another option may be as good"
    return ("Train" if sure else "Pilot first"), f"{what}{why}."


def _in_words(row: pd.Series) -> str:
    """A head by form, ranks and horizon."""
    ranks = [("rank", "rank"), ("transition_rank", "transition rank")]
    shown = {"cp": ranks[:1], "markov": ranks[1:], "recurrent": []}.get(row["form"], ranks)
    sizes = " and ".join(f"{name} {row[column]:.0f}" for column, name in shown)
    form = str(row["form"]).replace("_", " ").replace("markov", "Markov")
    return f"a {form} head{' of ' * bool(sizes)}{sizes}, horizon {row['horizon']}"


def positions(number: float) -> str:
    """Training positions as a reader takes them in.

    Examples
    --------
    >>> positions(9_306_112), positions(50e6), positions(72_704), positions(640)
    ('9.3 million positions', '50 million positions', '73 thousand positions', '640 positions')
    """
    for unit, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= unit:
            shown = f"{number / unit:.1f}" if number < 10 * unit else f"{number / unit:.0f}"
            return f"{shown.removesuffix('.0')}{name} positions"
    return f"{number:.0f} positions"


def requests(load: int) -> str:
    """A load in words."""
    return "one request at a time" if load == 1 else f"{load} requests decoded together"


def _brings(found: HeadsForecast, price: float) -> str:
    mean, low, high = found.speedup
    if found.row["kind"] == PLAIN:
        return _brings_nothing(found, price)
    costs = [price * _MILLION / speed for speed in found.choice["tokens_per_second"]]
    plain = _plain_cost(found, price)
    _, fewest, most = found.choice["tokens_per_call"]
    words = (
        f"{low:.2f} to {high:.2f} times the speed of plain decoding ({percent(found.confidence)} "
        f"range, {mean:.2f} expected) at the same output distribution, from {fewest:.2f} to "
        f"{most:.2f} tokens per call instead of 1; {costs[2]:.2f} to {costs[1]:.2f} per million "
        f"tokens instead of {plain:.2f} (price {price:.2f} a device-hour)"
    )
    if found.row["kind"] != HEAD:
        return f"{words}; no training, no memory."
    return f"{words}. Costs {device_hours(found.choice['device_hours'])} of training{_held(found)}."


def _plain_cost(found: HeadsForecast, price: float) -> float:
    """Of a million tokens by plain decoding."""
    return price * _MILLION * found.plain_seconds / found.choice["load"]


def _held(found: HeadsForecast) -> str:
    """What serving the head holds in memory."""
    weights = found.row.get("weight_bytes")
    return "" if weights is None else f" and {memory(float(weights))} of memory beside the model"


def _brings_nothing(found: HeadsForecast, price: float) -> str:
    plain = _plain_cost(found, price)
    words = f"no option is forecast to be faster; {plain:.2f} per million tokens as now"
    others = found.candidates[found.candidates["kind"] == HEAD]
    if len(others):
        best = others.iloc[0]
        words += (
            f". The best head, {best['option']}: {best['speedup_low']:.2f} to "
            f"{best['speedup_high']:.2f} times the speed"
        )
    return f"{words}."


def device_hours(hours: float) -> str:
    """Two digits, and one hour is one.

    Examples
    --------
    >>> device_hours(1.034), device_hours(1.454), device_hours(0.002)
    ('1 device-hour', '1.5 device-hours', '0.002 device-hours')
    """
    shown = f"{hours:.2g}" if hours < 100 else f"{hours:,.0f}"
    return f"{shown} device-hour{'' if shown == '1' else 's'}"


def _certainty(found: HeadsForecast) -> str:
    choice = found.choice
    words = f"{_percent(choice['sure'])} likely the fastest of what was tried"
    if found.row["kind"] != PLAIN:
        words = f"{_chance_to_pay(found)}; {words}"
    if found.is_far:  # no range was held against a training so long
        words = f"if the ranges hold so far ahead, {words}"
    # Whether it pays at all is asked before which head pays most.
    ties = sorted(map(option_name, choice["ties"]), key=lambda name: name != PLAIN_NAME)
    if ties:
        more = f" and {len(ties) - 2} more" if len(ties) > 2 else ""
        words += f", too close to tell from {', '.join(ties[:2])}{more}"
    return f"{words}. Could change it: {', '.join(_changes(found))}."


def _chance_to_pay(found: HeadsForecast) -> str:
    """How likely the choice is faster than plain decoding, as far as that was stored."""
    pays = found.choice.get("pays")
    if pays is not None:
        return f"{_percent(pays)} likely faster than plain decoding"
    where = "is above" if found.speedup[1] > 1 else "reaches below"
    return f"its range {where} plain decoding"


def _percent(share: float) -> str:
    """Draws never make certain.

    Examples
    --------
    >>> _percent(0.934), _percent(1.0), _percent(0.0)
    ('93 %', 'over 99 %', 'under 1 %')
    """
    if share > 0.99:
        return "over 99 %"
    return "under 1 %" if share < 0.01 else percent(share)


def _changes(found: HeadsForecast) -> Iterator[str]:
    choice = found.choice
    for other in found.choices[1:]:
        if (other["name"], other["horizon"]) != (choice["name"], choice["horizon"]):
            yield f"{requests(other['load'])} ({option_name(other['name'])})"
            break
    if choice["overtaken"]:
        name, budget = choice["overtaken"]
        yield f"{positions(budget)} or more ({option_name(name)})"
    model = found.told.get("model", {})
    device = f" (times are of {model['device']}, {model['dtype']})" if "device" in model else ""
    yield f"another device{device}"
    yield "other text"


def option_name(name: str) -> str:
    """An option as a reader meets it.

    Examples
    --------
    >>> option_name("lookup (n = 3)"), option_name("cp 4")
    ('prompt lookup (horizon 3)', 'cp 4')
    """
    name = name.replace("(n = ", "(horizon ")
    return name.replace("lookup", "prompt lookup") if name.startswith("lookup") else name


# Positions of all of a candidate's probes, as a multiple of its longest.
_ALL_BUDGETS = 1.75
_LONGER = (
    "longer probes, for a narrower range: the same command with more `--minutes` and another "
    "`--out`"
)


def _next_step(found: HeadsForecast, models: Sequence[str]) -> str:
    row, label = found.row, _verdict(found)[0]
    if row["kind"] != HEAD:
        return "decode that way; a larger budget, another load or a cheaper call could change it."
    command = " ".join(
        f"--{option} {shlex.quote(value)}" for option, value in _training(found, models)
    )
    steps = [_LONGER] if label != "Train" and _worth_probing(found) else []
    steps += [f"`cpmtp train-head {command}`", "the pilot plan at the end."]
    return " ".join(f"({place}) {step}" for place, step in enumerate(steps, 1))


def _worth_probing(found: HeadsForecast) -> bool:
    """Whether probes twice as long take less time than the training that they are to foresee: they
    train every candidate to twice the longest budget, and to half of that and a quarter.
    """
    heads = int((found.candidates["kind"] == HEAD).sum())
    return found.ahead is None or found.ahead > 2 * _ALL_BUDGETS * heads


def _training(found: HeadsForecast, models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options that train the choice as it was forecast: on the same text, with the same steps."""
    row, told = found.row, found.told
    asked, settings, model = told.get("asked", {}), told["settings"], told.get("model", {})
    alone = models[0] if len(models) == 1 else ""
    of = asked.get("model") or told.get("studied_as") or alone or found.model
    yield from [("model", of)] if of else []
    yield from (("corpus", place) for place in asked.get("corpus", ()))
    if asked.get("text_field", "text") != "text":
        yield "text-field", asked["text_field"]
    yield "form", row["form"]
    yield "horizon", f"{row['horizon']}"
    if row["rank"] > (0 if row["form"] == "cp" else 1):
        yield "rank", f"{row['rank']:.0f}"
    if row["transition_rank"] > 0:
        yield "transition-rank", f"{row['transition_rank']:.0f}"
    sizes = told.get("candidates", {}).get(found.choice["name"], {})
    for name in ("width", "vocabulary"):
        yield from [(name, f"{sizes[name]}")] if sizes.get(name) else []
    yield from [("blocks", f"{sizes['blocks']}")] if sizes.get("blocks", 1) != 1 else []
    for name in ("rows", "length"):
        yield from [(name, f"{settings[name]}")] if name in settings else []
    passes, budget = told.get("most_passes"), found.choice["budget"]
    if passes and not asked.get("corpus"):  # own samples, read no more often than by the probes
        yield "sequences", f"{math.ceil(budget / settings['length'] / passes)}"
    for name, usual in (("device", "cpu"), ("dtype", "float32")):
        yield from [(name, model[name])] if model.get(name, usual) != usual else []
    yield "positions", f"{budget:.0f}"


def _cautions(found: HeadsForecast, models: Sequence[str]) -> Iterator[str]:
    shapes = found.told["shapes"]
    groups = len(shapes["groups"])
    if found.is_far:
        yield found.reach
    elif groups < _FEW_GROUPS:
        yield (
            f"Forecasts were compared with real training on {groups} kinds of model and text only: "
            "ranges are wide."
        )
    if not found.model and len(models) > 1:
        yield f"The study is of {len(models)} models; the forecast is of one that it does not name."
    elif found.model and models and list(models) != [found.model]:
        yield f"The study is of {', '.join(models)}; the forecast is of {found.model}."
    rows = found.table[found.table["budget"] == found.budget]
    if rows["too_many"].any():
        yield (
            f"The training would read the text {rows['passes'].max():.0f} times over: more text "
            "would teach more."
        )
