"""Bad input is refused in one line before any work, through Python and the command line; good input
runs.
"""

from __future__ import annotations

import math

import pytest
import torch
from command_line import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import rounding
from unchecked import unchecked

from cpmtp.cli import main
from cpmtp.study.plan import study_cells
from cpmtp.study.running import read_study, run_study
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import column_descriptions
from cpmtp.training.heads import HeadTrainingSettings

SMALL = {
    "models": ("samples:bigram",),
    "horizons": (2,),
    "ranks": (1, 2),
    "methods": ("em",),
    "contexts": 1,
    "context_length": 3,
}

BAD_SETTINGS = [
    ({"models": ()}, "models is empty"),
    ({"models": ("",)}, "name is empty"),
    ({"models": None}, "models None"),
    ({"models": ("a", "a")}, "holds one twice"),
    ({"horizons": ()}, "horizons is empty"),
    ({"horizons": (0,)}, "horizon 0"),
    ({"horizons": (-2,)}, "horizon -2"),
    ({"horizons": (1,)}, "at least 2"),
    ({"horizons": (2.5,)}, "horizon 2.5"),
    ({"horizons": ("2",)}, "horizon 2"),
    ({"horizons": (True,)}, "horizon True"),
    ({"horizons": (2, 2)}, "holds one twice"),
    ({"horizons": (17,)}, "truncated_joint"),
    ({"horizons": None}, "horizons None"),
    ({"ranks": ()}, "ranks is empty"),
    ({"ranks": (0,)}, "rank 0"),
    ({"ranks": (-1,)}, "rank -1"),
    ({"ranks": (1.5,)}, "rank 1.5"),
    ({"ranks": ("x",)}, "rank x"),
    ({"ranks": (3, 3)}, "holds one twice"),
    ({"ranks": ([1],)}, "ranks"),
    ({"methods": ()}, "methods is empty"),
    ({"methods": ("magic",)}, "unknown method 'magic'"),
    ({"methods": ("em", "em")}, "holds one twice"),
    ({"methods": (1,)}, "unknown method 1"),
    ({"contexts": 0}, "contexts 0"),
    ({"contexts": -4}, "contexts -4"),
    ({"contexts": 1.5}, "contexts 1.5"),
    ({"contexts": "many"}, "contexts many"),
    ({"context_length": 0}, "context_length 0"),
    ({"context_length": None}, "context_length None"),
    ({"restarts": 0}, "restarts 0"),
    ({"restarts": 2.0}, "restarts 2.0"),
    ({"max_bytes": 0}, "max_bytes 0"),
    ({"max_bytes": -5}, "max_bytes -5"),
    ({"seed": "x"}, "seed 'x'"),
    ({"seed": 1.5}, "seed 1.5"),
    ({"temperatures": ()}, "temperatures is empty"),
    ({"temperatures": (-1.0,)}, "temperature -1.0"),
    ({"temperatures": (math.nan,)}, "temperature nan"),
    ({"temperatures": (math.inf,)}, "temperature inf"),
    ({"temperatures": ("hot",)}, "temperature 'hot'"),
    ({"temperatures": (1.0, 1.0)}, "holds one twice"),
    ({"top_k": 0}, "top_k 0"),
    ({"top_k": "all"}, "top_k 'all'"),
    ({"top_p": 1.5}, "top_p 1.5"),
    ({"anchored": ()}, "anchored is empty"),
    ({"anchored": ("yes",)}, "anchored"),
    ({"anchored": (True,), "horizons": (2,)}, "horizon of at least 3"),
    ({"anchored": (True,), "horizons": (2, 3)}, "horizon of at least 3"),
    ({"tree_mass": 1.0}, "tree_mass 1.0"),
    ({"tree_mass": 0}, "tree_mass 0"),
    ({"tree_nodes": 0}, "tree_nodes 0"),
    ({"samples": 1}, "samples 1"),
    ({"samples": "many"}, "samples many"),
    ({"width": 0}, "width 0"),
    ({"width": math.inf}, "width inf"),
    ({"width": "narrow"}, "width 'narrow'"),
    ({"domains": {"": "x.txt"}}, "name is empty"),
    ({"domains": {"law": ""}}, "path is empty"),
    ({"domains": {"own samples": "x"}}, "is taken"),
    ({"domains": (("law",),)}, "expected a name and a path"),
    ({"domains": (("law", "x"), ("law", "x"))}, "hold one twice"),
    ({"domains": 3}, "expected a name and a path"),
]


@pytest.mark.parametrize(("change", "said"), BAD_SETTINGS)
def test_bad_settings_are_a_value_error_of_one_line(change, said):
    with pytest.raises(ValueError) as error:
        unchecked(StudySettings, **SMALL | change)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("horizons", "anchored"),
    [((3,), (True,)), ((4, 3), (True,)), ((2,), (False,)), ((2, 3), (False,))],
)
def test_drafts_are_told_the_first_token_unless_a_horizon_leaves_nothing_after_it(
    horizons, anchored
):
    assert StudySettings(horizons=horizons).anchored == anchored


def test_a_study_and_a_head_are_alike_by_default():
    chosen = StudySettings()
    assert chosen.anchored == (HeadTrainingSettings().anchored,) == (True,)
    assert {cell.anchored for cell in study_cells(chosen)} == {True}
    assert set(chosen.horizons) == {cell.horizon for cell in study_cells(chosen)}


BAD_STUDIES = [
    ({"models": ("samples:broken",)}, "NaN"),
    ({"models": ("samples:not_a_model",)}, "expected vocab_size and next_token_log_probs"),
    ({"models": ("samples:nothing_there",)}, "nothing_there"),
    ({"models": ("samples:needs_an_argument",)}, "factory without arguments"),
    ({"models": ("samples:raises",)}, "no such file of weights"),
    ({"models": ("no_such_module:factory",)}, "no_such_module"),
    ({"models": ("no/such-model",)}, "unknown model 'no/such-model'"),
    ({"models": ("samples:wide",), "horizons": (4,), "methods": ("als",)}, "only em, gradient"),
    ({"max_bytes": 8, "methods": ("hals",)}, "only em, gradient, acceptance fit"),
    ({"top_k": 7}, "top_k 7 over a vocabulary of 6 tokens"),
    ({"models": ("code",), "dtype": "float8"}, "unknown dtype 'float8': expected one of float32"),
    ({"models": ("code",), "device": "abacus"}, "unknown device 'abacus'"),
    ({"corpus": ("nowhere/*.txt",)}, "no such file"),
    ({"domains": {"law": "nowhere"}}, "no such file"),
    ({"corpus": (__file__,)}, "encode_document"),
    ({"models": ("samples:characters",), "corpus": ("/dev/null",)}, "no such file"),
]


@pytest.mark.parametrize(("change", "said"), BAD_STUDIES)
def test_what_cannot_be_studied_is_a_value_error_and_nothing_is_written(change, said, tmp_path):
    with pytest.raises(ValueError) as error:
        run_study(unchecked(StudySettings, **SMALL | change), tmp_path / "out", workers=1)
    assert said in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda out: run_study(StudySettings(**SMALL), out, workers=0), "workers 0"),
        (lambda out: run_study(StudySettings(**SMALL), out, workers=-1), "workers -1"),
        (lambda out: read_study(out), "no finished study"),
    ],
)
def test_bad_calls_are_value_errors(call, said, tmp_path):
    with pytest.raises(ValueError) as error:
        call(tmp_path / "out")
    assert said in str(error.value) and not (tmp_path / "out").exists()


BASE = words("--model samples:bigram --contexts 1 --context-length 3 --methods em --workers 1")
BAD_COMMANDS = [
    (("study", *BASE, "--ranks", "0"), "rank 0"),
    (("study", *BASE, "--ranks", "1,two"), "--ranks '1,two'"),
    (("study", *BASE, "--ranks", ""), "ranks is empty"),
    (("study", *BASE, "--ranks", "1,1"), "holds one twice"),
    (("study", *BASE, "--horizons", "1"), "at least 2"),
    (("study", *BASE, "--horizons", "x"), "--horizons 'x'"),
    (("study", *BASE, "--horizons", "40"), "truncated_joint"),
    (("study", *BASE, "--methods", "magic"), "unknown method"),
    (("study", *BASE, "--methods", ","), "methods is empty"),
    (("study", *BASE, "--contexts", "0"), "contexts 0"),
    (("study", *BASE, "--contexts", "1.5"), "--contexts"),
    (("study", *BASE, "--context-length", "-1"), "context_length -1"),
    (("study", *BASE, "--restarts", "0"), "restarts 0"),
    (("study", *BASE, "--seed", "x"), "--seed"),
    (("study", *BASE, "--workers", "0"), "workers 0"),
    (("study", *BASE, "--temperatures", "hot"), "--temperatures 'hot'"),
    (("study", *BASE, "--temperatures", "1,-1"), "temperature -1"),
    (("study", *BASE, "--temperatures", "nan"), "temperature nan"),
    (("study", *BASE, "--anchored", "maybe"), "--anchored 'maybe'"),
    (("study", *BASE, "--anchored", "yes", "--horizons", "2"), "horizon of at least 3"),
    (("study", *BASE, "--domain", "law"), "NAME=PATH"),
    (("study", *BASE, "--domain", "=x.txt"), "name is empty"),
    (("study", *BASE, "--domain", "law="), "path is empty"),
    (("study", *BASE, "--domain", "law=nowhere.txt"), "no such file"),
    (("study", *BASE, "--corpus", "nowhere.txt"), "no such file"),
    (("study", *BASE, "--max-gigabytes", "0"), "--max-gigabytes 0"),
    (("study", *BASE, "--max-gigabytes", "nan"), "--max-gigabytes nan"),
    (("study", *BASE, "--dask", "tcp://127.0.0.1:1"), "--workers counts"),
    (("study", *BASE, "--unknown"), "--unknown"),
    (("study", "--model", "samples:bigram", "--dask", "nonsense"), "no scheduler"),
    (("study", "--model", ""), "name is empty"),
    (("study", "--model", "no_such_module:f"), "no_such_module"),
    (("compare", "nowhere", "nowhere"), "no finished study"),
    (("compare", "nowhere"), "Missing argument"),
    (("report", "nowhere"), "no finished study"),
    (("nonsense",), "nonsense"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_status_two(monkeypatch, capsys, tmp_path, arguments, said):
    out = ("--out", str(tmp_path / "out")) if arguments[0] == "study" else ()
    monkeypatch.setattr("sys.argv", ["cpmtp", *arguments, *out])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert shown == "" and len(err.strip().splitlines()) == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_or_holds_something_else_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        run_study(StudySettings(**SMALL), file, workers=1)
    assert file.read_text() == "mine"
    for text in ("{", "[]", '{"settings": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="choose another --out"):
            run_study(StudySettings(**SMALL), tmp_path, workers=1)
        assert (tmp_path / "manifest.json").read_text() == text


some = st.sampled_from
VALID = {
    "horizons": some([(2,), (3,), (2, 3)]),
    "ranks": some([(1,), (2, 1), (9,)]),
    "methods": some([("em",), ("als", "em"), ("gradient",), ("hals", "mu"), ("acceptance",)]),
    "anchored": some([(False,), (True,), (False, True)]),
    "temperatures": some([(1.0,), (0.0,), (0.5, 1)]),
    "contexts": some([1, 2]),
    "context_length": some([1, 3]),
    "restarts": some([1, 2]),
    # The smaller one still holds a joint of three of the six tokens eight times over.
    "max_bytes": some([4_000_000_000, 20_000]),
    "seed": st.integers(-(2**40), 2**40),
}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.fixed_dictionaries({}, optional=VALID))
def test_valid_settings_run(tmp_path_factory, change):
    if change.get("anchored") == (True,):
        change["horizons"] = (3,)
    chosen = StudySettings(**SMALL | change)
    table = run_study(chosen, tmp_path_factory.mktemp("valid"), workers=1)
    assert len(table) == len(study_cells(chosen)) * chosen.contexts * len(chosen.temperatures)
    assert (table.loc[table["status"] == "failed", "message"] != "").all()
    usable = table[table["status"] != "failed"]
    # Three survivals, each a sum over at most 6 ** 3 texts of products of six conditionals.
    allowed = 3 * rounding(torch.float64, 6**3 + 6 * 2 * 6**2)
    tokens = usable["tokens_per_call_block_target"]
    assert tokens.between(1 - allowed, usable["horizon"] + allowed).all()


@quick
@given(st.fixed_dictionaries({}, optional=VALID), some([*BAD_SETTINGS, *BAD_STUDIES]))
def test_whatever_else_is_said_one_bad_value_is_refused_before_any_work(
    tmp_path_factory, change, bad
):
    out = tmp_path_factory.mktemp("bad") / "out"
    with pytest.raises(ValueError):
        settings = SMALL | change | {"methods": ("als",)} | bad[0]
        run_study(unchecked(StudySettings, **settings), out, workers=1)
    assert not out.exists()


def test_every_column_is_described(tmp_path):
    table = run_study(StudySettings(**SMALL), tmp_path, workers=1)
    described = column_descriptions(2)
    assert list(table.columns) == list(described)
    assert all(described.values())
