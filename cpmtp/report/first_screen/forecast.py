"""The answer from a forecast of trained heads, in four lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from cpmtp.report.blocks import Section, Text
from cpmtp.report.first_screen.stored_forecast import HEAD, PLAIN, PLAIN_NAME, HeadsForecast
from cpmtp.report.words import memory, multiple, served_as

TITLE = "Forecast of trained heads"
_SURE = 0.8
_FEW_GROUPS = 4  # fewer say little of how far a forecast is off
_MILLION = 1e6 / 3600  # tokens, and hours in a second


def forecast_answer(found: HeadsForecast, price: float, models: Sequence[str] = ()) -> Section:
    """The forecast in four lines, cautions above them."""
    named = found.told.get("studied_as")
    title = TITLE if named is None else f"{named} · {TITLE[0].lower()}{TITLE[1:]}"
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
    why = found.told["status"].removeprefix("not enough for a forecast: ")
    model = f" --model {models[0]}" if len(models) == 1 else ""
    return (
        Text("No recommendation: not enough time to decide.", "line", "Undecided"),
        Text(f"{why[:1].upper()}{why[1:]}.", "line", "Why"),
        Text(
            f"`cpmtp study{model}` with more `--minutes`; ceilings below say what no training can "
            "exceed, not what a head will earn.",
            "line",
            "Next",
        ),
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
        f"{low:.2f} to {high:.2f} times the speed of plain decoding ({found.confidence:.0%} "
        f"range, {mean:.2f} expected), from {fewest:.2f} to {most:.2f} tokens per call instead of "
        f"1; {costs[2]:.2f} to {costs[1]:.2f} per million tokens instead of {plain:.2f} (price "
        f"{price:.2f} a device-hour)"
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
    words = f"{choice['sure']:.0%} likely the fastest of what was tried"
    if found.row["kind"] != PLAIN:
        words = f"{_chance_to_pay(found)}; {words}"
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
    ('93%', 'over 99%', 'under 1%')
    """
    if share > 0.99:
        return "over 99%"
    return "under 1%" if share < 0.01 else f"{share:.0%}"


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


_LONGER = (
    "longer probes, for a narrower range: the same command with more `--minutes` and another "
    "`--out`"
)


def _next_step(found: HeadsForecast, models: Sequence[str]) -> str:
    row, label = found.row, _verdict(found)[0]
    if row["kind"] != HEAD:
        return "decode that way; a larger budget, another load or a cheaper call could change it."
    told = found.told
    of = (
        models[0]
        if len(models) == 1
        else told.get("studied_as") or told.get("model", {}).get("name")
    )
    model = f" --model {of}" if of else ""
    sizes = {"rank": "rank", "transition_rank": "transition-rank"}
    given = "".join(
        f" --{option} {row[column]:.0f}"
        for column, option in sizes.items()
        if row[column] > (0 if column == "transition_rank" or row["form"] == "cp" else 1)
    )
    command = (
        f"cpmtp train-head{model} --form {row['form']} --horizon {row['horizon']}{given} "
        f"--positions {found.choice['budget']:.0f}"
    )
    steps = [] if label == "Train" else [_LONGER]
    steps += [f"`{command}`", "the pilot plan at the end."]
    return " ".join(f"({place}) {step}" for place, step in enumerate(steps, 1))


def _cautions(found: HeadsForecast, models: Sequence[str]) -> Iterator[str]:
    shapes = found.told["shapes"]
    groups = len(shapes["groups"])
    if found.is_far:
        assert found.ahead is not None  # nothing is far where that is not stored
        yield (
            f"The answer is for a training {multiple(found.ahead)} times as long as the longest "
            f"probe; forecasts were compared with real training up to {shapes['farthest']:.0f} "
            "times only. Take the figures as a direction."
        )
    elif groups < _FEW_GROUPS:
        yield (
            f"Forecasts were compared with real training on {groups} kinds of model and text only: "
            "ranges are wide."
        )
    of = found.told.get("studied_as") or found.told.get("model", {}).get("name")
    if of is None and len(models) > 1:
        yield f"The study is of {len(models)} models; the forecast is of one that it does not name."
    elif of is not None and models and list(models) != [of]:
        yield f"The study is of {', '.join(models)}; the forecast is of {of}."
    rows = found.table[found.table["budget"] == found.budget]
    if rows["too_many"].any():
        yield (
            f"The training would read the text {rows['passes'].max():.0f} times over: more text "
            "would teach more."
        )
