"""Studies in between: one context, failed fits, other ways to sample, no time, nothing to gain."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from samples import MANIFEST, study_table
from stored_forecast import stored

from cpmtp.report.document import Report, read_extras
from cpmtp.report.subject import ReportExtras

TABLE = study_table(lambda rank: 0.4 / rank).assign(anchored=True)


def card(table=TABLE, extras=None, place: int = 0):
    """Title, cautions and lines of a first screen."""
    found = Report.of(table, MANIFEST, extras or ReportExtras()).answers[place]
    cautions = [block.text for block in found.blocks if block.kind == "caution"]
    return found.title, cautions, {b.label: b.text for b in found.blocks if b.kind == "line"}


def test_one_context_decides_nothing():
    _, cautions, lines = card(TABLE[TABLE["context"] == 0])
    assert next(iter(lines)) == "Undecided"
    assert lines["Undecided"].startswith("no recommendation yet")
    assert cautions[0].startswith("One context") and "32 documents or more" in lines["Next"]


def test_failed_fits_are_counted_and_the_others_answer():
    table = TABLE.copy()
    table.loc[table.index[:3], ["status", "message"]] = ["failed", "out of memory"]
    _, cautions, lines = card(table)
    assert f"3 of {len(table):,} fits failed." in cautions
    assert next(iter(lines)) == card()[2].__iter__().__next__()


def test_how_the_target_is_sampled_stands_in_the_title_unless_it_is_the_usual():
    assert "temperature" not in card()[0] and "top" not in card()[0]
    served = TABLE.assign(temperature=0.7, top_k=16.0, top_p=0.9)
    assert card(served)[0] == "m · contexts from d, temperature 0.7, top-k 16, top-p 0.9"
    two = pd.concat([TABLE.assign(temperature=1.0), TABLE.assign(temperature=0.7)])
    two = two.reset_index(drop=True).assign(top_k=16.0)
    titles = [card(two, place=place)[0] for place in (0, 1)]
    assert titles == [f"m · contexts from d, temperature {t}, top-k 16" for t in ("1", "0.7")]


def test_a_forecasts_title_says_how_the_target_is_sampled_and_the_set_up_too(tmp_path):
    file = stored(tmp_path) / "forecast.json"
    told = json.loads(file.read_text())
    told["settings"] |= {"temperature": 0.7, "top_k": 16, "top_p": None}
    file.write_text(json.dumps(told))
    assert card(extras=read_extras(tmp_path))[0].endswith("heads, temperature 0.7, top-k 16")
    settings = MANIFEST["settings"] | {"temperature": 0.7, "top_k": 16}
    report = Report.of(TABLE, MANIFEST | {"settings": settings})
    (setup,) = next(s for s in report.sections if s.title == "Set-up").blocks
    assert ("Temperature", "0.7") in setup.rows and ("Top-k", "16") in setup.rows


def test_not_enough_time_decides_nothing_and_says_why(tmp_path):
    folder = tmp_path / "forecast" / "0"
    folder.mkdir(parents=True)
    pd.DataFrame().to_parquet(folder / "forecast.parquet")
    told = {"settings": {}, "shapes": {"groups": []}, "studied_as": "m"}
    told["status"] = "not enough for a forecast: one probe of 32 steps is what there was time for"
    (folder / "forecast.json").write_text(json.dumps(told))
    report = Report.of(TABLE, MANIFEST, read_extras(tmp_path))
    (answer,) = report.answers
    lines = {b.label: b.text for b in answer.blocks}
    assert list(lines) == ["Undecided", "Why", "Next"]
    assert lines["Why"].startswith("One probe of 32 steps") and "`--minutes`" in lines["Next"]
    own = next(s for s in report.sections if s.title.startswith("Diagnosis"))
    said = " ".join(block.text for block in own.blocks)
    assert "there was not enough time to forecast it" in said and "Recommended" not in said


@pytest.mark.parametrize(
    ("best", "said", "gain"),
    [
        ("plain decoding", "plain decoding is the fastest", "no option is forecast to be faster"),
        ("lookup", "prompt lookup, which needs none", "1.00 to 1.18 times the speed"),
    ],
)
def test_where_no_head_pays_the_answer_is_not_to_train_and_what_there_is_instead(
    tmp_path, best, said, gain
):
    _, _, lines = card(extras=read_extras(stored(tmp_path, best=best)))
    assert lines["Do not train"].startswith(said) and lines["Brings"].startswith(gain)
    assert "1.00 to 1.00" not in lines["Brings"] and "train-head" not in lines["Next"]
    if best == "plain decoding":  # what the best head would bring is not kept back
        assert "cp 4: 1.50 to 2.08 times the speed" in lines["Brings"]


def test_parts_of_a_study_stand_side_by_side_and_more_than_three_are_folded():
    two = pd.concat([TABLE, TABLE.assign(domain="e")], ignore_index=True)
    report = Report.of(two, MANIFEST)
    section = next(s for s in report.sections if s.title == "Ceilings side by side")
    assert [row[0] for row in section.blocks[0].rows] == ["m: d", "m: e"]
    assert not any(s.title == "Ceilings side by side" for s in Report.of(TABLE, MANIFEST).sections)

    def open_ones(report):
        return [s for s in report.sections if s.title == "Tokens per call by rank" and not s.folded]

    four = pd.concat([TABLE.assign(domain=name) for name in "defg"], ignore_index=True)
    assert len(open_ones(report)) == 2 and not open_ones(Report.of(four, MANIFEST))


def test_components_stand_with_their_weights_and_tokens_that_can_be_seen():
    rows = [
        dict(component=c, weight=w, position=p, place=1, token_id=0, token=t, probability=0.8)
        for c, w, p, t in ((0, 0.7, 1, " the"), (0, 0.7, 2, "\n"), (1, 0.3, 1, "<b>"))
    ]
    components = pd.DataFrame(rows).assign(model="m", domain="d", context_text="a b", horizon=2)
    report = Report.of(TABLE, MANIFEST, ReportExtras(components=components))
    section = next(s for s in report.sections if s.title == "What components say")
    table = next(block for block in section.blocks if type(block).__name__ == "Table")
    assert table.head == ("weight", "token 1", "token 2")
    assert table.rows == (("0.70", "“␣the” 80 %", "“⏎” 80 %"), ("0.30", "“<b>” 80 %", ""))
    (drawing,) = (svg for name, svg in report.drawings.items() if "components" in name.casefold())
    assert "␣the" in drawing and "⏎" in drawing and "\\n" not in drawing
