"""What the report recommends, promises and warns of is one and the same everywhere, and right."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from samples import MANIFEST, study_table, with_samples, with_trees

from cpmtp.latency import LatencyModel
from cpmtp.report.document import Report, ReportExtras, read_extras, write_report
from cpmtp.report.learned import LEARNED_SHARE, LearnedShare
from cpmtp.report.subject import subjects_of

# What a component costs makes rank 4 the fastest, where ceilings grow up to rank 8.
LATENCY = LatencyModel(0.01, 0.01, per_component=0.00005)
EXTRAS = ReportExtras(latency=LATENCY)


def loss(rank: int) -> float:
    return 0.4 / rank


def both_horizons() -> pd.DataFrame:
    return pd.concat([study_table(loss, horizon=n) for n in (2, 3)], ignore_index=True)


def page_of(
    table: pd.DataFrame, tmp_path, extras: ReportExtras = EXTRAS, manifest: dict = MANIFEST
) -> str:
    """The Markdown twin as plain text, figures' labels included."""
    path = write_report(table, manifest, tmp_path / "report.md", extras)
    figures = "".join(file.read_text("utf-8") for file in (tmp_path / "report_figures").iterdir())
    return path.read_text("utf-8").replace("\\", "") + figures


@pytest.fixture(scope="module")
def subject():
    return subjects_of(both_horizons(), EXTRAS)[0]


def test_one_recommendation_stands_everywhere_under_one_name(subject, tmp_path):
    horizon, rank = subject.best
    assert rank < subject.saturation.rank[horizon] == 8
    page = page_of(both_horizons(), tmp_path)
    assert f"**Recommended: horizon {horizon} with rank {rank}.**" in page
    bold = re.findall(r"^\| \*\*(\d+)\*\* \| \*\*(\d+)\*\* \|", page, flags=re.MULTILINE)
    assert bold == [(f"{horizon}", f"{rank}")]
    assert re.findall(r"recommended: rank (\d+)", page) == [f"{rank}"]  # in one figure
    named = re.findall(r"[Rr]ecommend[^.|]*?rank (?:at least )?(\d+)", page)
    assert len(named) >= 4 and set(named) == {f"{rank}"}
    assert f"\n### m · contexts from d: horizon {horizon}, rank {rank}\n" in page  # the pilot
    summary = Report.of(both_horizons(), MANIFEST, EXTRAS).summary
    assert f"recommended: horizon {horizon} with rank {rank}," in summary
    assert set(re.findall(r"recommend[^.|]*?rank (?:at least )?(\d+)", summary)) == {f"{rank}"}


def test_where_the_ceiling_saturates_is_never_called_recommended(subject, tmp_path):
    page = page_of(both_horizons(), tmp_path)
    summary = Report.of(both_horizons(), MANIFEST, EXTRAS).summary
    for text in (page, summary):
        assert "ceiling saturates at rank at least 8" in text
        assert not re.search(r"recommended[^.]*rank (at least )?8\b", text, flags=re.IGNORECASE)
    assert "Recommended by tolerance" not in page


def test_the_console_has_the_recommendation_first_then_what_each_horizon_allows():
    lines = Report.of(both_horizons(), MANIFEST, EXTRAS).summary.splitlines()
    starts = [line.split(":")[0].strip() for line in lines]
    assert starts.index("recommended") < starts.index("horizon 2") < starts.index("horizon 3")
    assert lines[1].startswith("  recommended: horizon 3 with rank ")
    assert "tokens per call" in lines[2] and "times the speed of plain decoding" in lines[2]
    assert lines[-1].startswith("calls     measured as 10 + 0 n + 0.05 n r ms")
    assumed = Report.of(both_horizons(), MANIFEST).summary.splitlines()
    assert assumed[-1].startswith("calls     assumed, not measured")
    assert assumed[-2].startswith("forecast  assuming a trained head reaches 80 % of its ceiling")


def test_the_console_says_how_to_train_what_is_recommended():
    table = study_table(loss)
    told = [
        Report.of(part, MANIFEST, EXTRAS).summary
        for part in (table.assign(anchored=True), table.assign(anchored=False), table)
    ]
    command = "train it: cpmtp train-head --model m --horizon 3 --rank 4"
    assert f"{command} --anchored\n" in told[0] and "drafts told the first token" in told[0]
    assert f"{command} --no-anchored\n" in told[1] and "drafts not told" in told[1]
    assert f"{command}\n" in told[2]


def test_truncated_figures_are_bounds_with_what_was_kept_and_never_at_most(tmp_path):
    table = with_trees(study_table(loss), width=0.08, kept_mass=0.97)
    report, page = Report.of(table, MANIFEST, EXTRAS), page_of(table, tmp_path)
    row = subjects_of(table, EXTRAS)[0].row
    bounds = f"between {row.tokens_per_call:.2f} and {row.tokens_per_call_upper:.2f} tokens per"
    assert row.tokens_per_call_upper == pytest.approx(row.tokens_per_call + 0.08)
    first_screen = page[: page.index("How to read this")]
    assert "**Caution:** Horizon 3 is truncated: its figures are certified lower" in first_screen
    assert bounds in page
    assert bounds.replace("between", "r=4:").replace("and", "to").removesuffix(" tokens per") in (
        report.summary
    )
    for text in (page, report.summary):
        assert "truncated" in text
        assert "hold 96.0 % of the probability on average and 95.0 % at least" in text
    for text in (page, report.summary):
        assert "at most" not in text.replace("is at most one standard error", "")
        assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert re.search(rf"{row.tokens_per_call:.3f} to {row.tokens_per_call_upper:.3f}", page)
    assert "Certified lower bounds of ceilings, with upper bounds dashed" in page
    assert "upper bound" in (tmp_path / "report_figures").glob("*against*").__next__().read_text()
    assert "its gains are differences of lower bounds" in page
    assert "| Truncated joints | m: horizon 3 (joints hold 95.0 % at least) |" in page
    # A lower bound of the coupling's survival is no bound of anything.
    coupled = table.assign(
        tokens_per_call_coupling_target=table["tokens_per_call_block_target"],
        survival_coupling_target_1=1.0,
    )
    assert "any verification could reach" not in page_of(coupled, tmp_path)


def test_complete_joints_are_not_called_truncated(tmp_path):
    for table in (study_table(loss), with_trees(study_table(loss), horizons=())):
        assert "runcated" not in page_of(table, tmp_path)
        assert "runcated" not in Report.of(table, MANIFEST, EXTRAS).summary


def test_a_study_of_complete_and_truncated_joints_is_right_per_horizon(tmp_path):
    table = with_trees(both_horizons(), horizons=(3,))
    page, summary = page_of(table, tmp_path), Report.of(table, MANIFEST, EXTRAS).summary
    for text in (page, summary):
        assert "Horizon 3 is truncated" in text and "Horizon 2 is truncated" not in text
    assert "Figures of horizon 2 are exact." in page
    of_two, of_three = (
        re.search(rf"^  horizon {n}: .*$", summary, re.MULTILINE)[0] for n in (2, 3)
    )
    assert "between" not in of_two and "between" in of_three
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| \**[23]\** \|", line)]
    ceilings = {row[1].strip(" *"): row[5] for row in rows if len(row) == 10 and row[4].strip()}
    assert " to " in ceilings["3"] and " to " not in ceilings["2"]
    captions = re.findall(r"^\*\*Tokens per call against rank.*$", page, flags=re.MULTILINE)
    assert "Ceilings rise" in captions[0] and "Certified lower bounds" in captions[1]


def test_bounds_among_estimates_are_told_from_them(tmp_path):
    table = with_samples(study_table(loss))
    manifest = MANIFEST | {"settings": MANIFEST["settings"] | {"samples": 2000}}
    said = "The other contexts count by certified lower bounds"
    assert said not in page_of(table, tmp_path, manifest=manifest)
    table.loc[table["context"] % 4 > 0, "computed"] = "certified"
    page = page_of(table, tmp_path, manifest=manifest)
    for text in (page, Report.of(table, manifest, EXTRAS).summary):
        assert "estimated, of 16 of 64 contexts, from texts drawn" in text and said in text
    assert "horizon 3, 16 contexts; from 2,000 texts per context" in page
    assert "estimate of best fit (mean, 95 % band)" in page


def test_what_upper_bounds_would_change_is_told(tmp_path):
    table = with_trees(study_table(loss))
    assert "the same if every ceiling were its upper bound" in page_of(table, tmp_path)
    column = "tokens_per_call_upper_block_target"
    table[column] = table[column] + np.where(table["rank"] == 1, 0.5, 0.0)
    assert "horizon 3, rank 1 if every ceiling were its upper bound" in page_of(table, tmp_path)


def test_costs_alarms_and_sizes_are_a_trained_heads_and_not_the_ceilings(subject, tmp_path):
    row, found = subject.row, subject.forecast
    assert found.tokens_per_call == pytest.approx(0.8 * row.tokens_per_call)
    assert found.low == pytest.approx(0.7 * row.tokens_per_call_low)
    assert found.high == pytest.approx(0.9 * row.tokens_per_call_high)
    page = page_of(both_horizons(), tmp_path)
    plan = page[page.index("## Pilot plan") :]
    assert "assuming a trained head reaches 80 % of its ceiling" in plan
    expected = f"{found.tokens_per_call:.2f} ({found.low:.2f} to {found.high:.2f}) tokens"
    assert f"| {expected} |" in plan and f"below {found.low:.2f}: look at the traffic" in plan
    assert f"{subject.cost(found.tokens_per_call):.2f} (" in plan
    assert f"below {row.tokens_per_call_low:.2f}: look" not in plan
    # What serves as a stand-in for the head earns what the head is forecast to.
    beyond = both_horizons()["tokens_per_call_block_target"] - 1
    known = {"survival_block_target_2": 0.6 * beyond, "survival_block_target_3": 0.4 * beyond}
    page = page_of(both_horizons().assign(**known), tmp_path)
    rates = re.search(r"synthetic_acceptance_rates \[([\d., ]+)\]", page)[1]
    assert 1 + sum(map(float, rates.split(", "))) == pytest.approx(found.tokens_per_call, abs=1e-3)


def test_a_share_of_the_ceiling_is_never_below_the_one_token_of_plain_decoding():
    share = LearnedShare.assumed(0.5)
    assert share.of(1.2) == 1.0 and share.of(3.0) == 1.5
    assert share.of(pd.Series([1.2, 3.0])).tolist() == [1.0, 1.5]
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="learned share"):
            LearnedShare.assumed(wrong)


def test_the_assumed_share_is_what_the_stored_heads_reached(root):
    heads = pd.read_parquet(root / "data" / "studies" / "head" / "waterfall.parquet")
    best = heads[heads["anchored"]].groupby("model")["share_of_ceiling"].max()
    said = LearnedShare.assumed().source
    for model, share in best.items():
        assert f"{100 * share:.0f} % on {model}" in said
    assert best.min() - 0.03 < LEARNED_SHARE < best.max()


def test_the_share_can_be_given(tmp_path):
    found = subjects_of(both_horizons(), ReportExtras(latency=LATENCY, learned_share=0.6))[0]
    assert found.forecast.tokens_per_call == pytest.approx(0.6 * found.row.tokens_per_call)
    assert "assuming a trained head reaches 60 % of its ceiling (50 to 70 %" in found.forecast.words
    assert read_extras(tmp_path, learned_share=0.6).learned_share == 0.6


HEADS = pd.DataFrame(
    [
        dict(model="m", domain="d", horizon=3, rank=rank, anchored=True, exact_limit=3.0)
        | dict(acceptance_fit=2.5, em_fit=2.4, learned=learned)
        | dict(learned_low=learned - 0.1, learned_high=learned + 0.1)
        for rank, learned in ((4, 2.0), (4, 1.5), (8, 1.9))
    ]
)
DECODED = pd.DataFrame(
    [
        dict(model="m", horizon=3, rank=4, anchored=True, rule=rule, measured=measured)
        | dict(measured_low=measured - 0.05, measured_high=measured + 0.05, forecast=measured)
        for rule, measured in (("block", 1.9), ("token", 2.2))
    ]
)


def forecast(**tables) -> tuple:
    extras = ReportExtras(latency=LATENCY, **tables)
    found = subjects_of(study_table(loss).assign(anchored=True), extras)[0]
    assert found.best == (3, 4)
    known = found.forecast
    return round(known.tokens_per_call, 6), round(known.low, 6), round(known.high, 6), known.words


def test_trained_heads_of_the_folder_are_believed_before_any_share():
    assert forecast(waterfall=HEADS)[:3] == (2.0, 1.9, 2.1)
    assert (
        "the trained head of this horizon and rank in this folder" in forecast(waterfall=HEADS)[3]
    )
    assert forecast(waterfall=HEADS, decoding=DECODED)[:3] == (1.9, 1.85, 1.95)
    assert "in decoding" in forecast(waterfall=HEADS, decoding=DECODED)[3]


def test_trained_heads_of_other_ranks_give_their_share():
    others = HEADS[HEADS["rank"] == 8]
    mean, low, high, words = forecast(waterfall=others)
    assert "reaches 76 % of its ceiling (66 to 86 % for the range; the best trained head" in words
    assert low < mean < high and mean == pytest.approx(0.76 * 2.9, abs=0.02)


@pytest.mark.parametrize("other", [dict(model="n"), dict(anchored=False)])
def test_heads_of_another_model_or_kind_are_not_believed(other):
    expected = forecast()
    assert forecast(waterfall=HEADS.assign(**other), decoding=DECODED.assign(**other)) == expected
    assert "80 %" in expected[3]


def test_what_does_not_pay_is_not_praised(tmp_path):
    dear = ReportExtras(latency=LatencyModel(0.01, 0.05))
    page = page_of(both_horizons(), tmp_path, dear)
    assert "**It does not pay at this cost: plain decoding is faster below 5.00 tokens" in page
    assert "It does not pay" in page[page.index("## Pilot plan") :]
    assert "It does not pay" in Report.of(both_horizons(), MANIFEST, dear).summary
    nearly = ReportExtras(latency=LatencyModel(0.01, 0.024))
    assert "It probably does not pay" in page_of(both_horizons(), tmp_path, nearly)
    assert "not pay" not in page_of(both_horizons(), tmp_path)


def test_a_part_in_which_every_fit_failed_does_not_cost_the_others_their_report(tmp_path):
    table = study_table(loss)
    lost = table.assign(model="n", status="failed", message="no luck")
    both = pd.concat([table, lost], ignore_index=True)
    assert "**Recommended: horizon 3" in page_of(both, tmp_path)
    assert "n · contexts from d: every fit failed" in Report.of(both, MANIFEST, EXTRAS).summary


def test_one_context_gives_no_interval_and_no_share_of_resamples(tmp_path):
    table = study_table(loss, contexts=1, documents=1).assign(joint_entropy_nats=2.0)
    page, summary = page_of(table, tmp_path), Report.of(table, MANIFEST, EXTRAS).summary
    for text in (re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL), summary):
        assert not re.search(r"\bnan\b", text)
    assert "one context was studied" in page and "of resamples" not in summary


@pytest.mark.parametrize(
    ("extras", "documents", "expected"),
    [
        (dict(latency=LATENCY, waterfall=HEADS), 64, "Train"),
        (dict(latency=LATENCY), 64, "Pilot first"),
        (dict(waterfall=HEADS), 64, "Pilot first"),
        (dict(latency=LATENCY, waterfall=HEADS.assign(model="n")), 64, "Pilot first"),
        (dict(latency=LATENCY, waterfall=HEADS), 8, "Pilot first"),
        (dict(latency=LATENCY, waterfall=HEADS), 4, "Undecided"),
        (dict(latency=LatencyModel(0.01, 0.0185), waterfall=HEADS), 64, "Pilot first"),
        (dict(latency=LatencyModel(0.01, 0.05), waterfall=HEADS), 64, "Do not train"),
    ],
)
def test_only_what_is_measured_and_faster_over_its_whole_range_is_to_be_trained(
    extras, documents, expected
):
    table = study_table(loss, documents=documents).assign(anchored=True)
    report = Report.of(table, MANIFEST, ReportExtras(**extras))
    lines = [block for block in report.answers[0].blocks if block.kind == "line"]
    assert [line.label for line in lines] == [expected, "Brings", "How sure", "Next"]
    following = {"Train": "cpmtp train-head", "Do not train": "decode plainly"}
    assert following.get(expected, "") in lines[-1].text
    if expected == "Pilot first":
        assert "train-head" not in lines[-1].text or documents == 64
