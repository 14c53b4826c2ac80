"""Bad input of any kind is one line, exit status 2 or a ValueError, and nothing half-written."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from command_line import run
from samples import BigramTable, CharacterTable, random_joint, random_llama_folder

import cpmtp
from cpmtp.corpora import read_corpus
from cpmtp.joint_distribution import JointDistribution
from cpmtp.pretrained import load_language_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model, texts of many kinds, and a head's folder that holds none."""
    folder = tmp_path_factory.mktemp("place")
    random_llama_folder(folder / "model", window=64)
    (folder / "empty").mkdir()
    raw = {
        "text.txt": b"def add(a, b):\n    return a + b\n" * 60,
        "short.txt": b"a + b",
        "blank.txt": b" \n\t\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0" + bytes(range(256)),
        "utf16.txt": ("words " * 40).encode("utf-16-le"),
        "broken.gz": gzip.compress(b"words " * 90)[:-8],
        "field.jsonl": b'{"body": "words"}\n',
        "broken.jsonl": b'{"text": "words"}\n{"text": \n',
        "number.jsonl": b'{"text": 3}\n',
        "list.jsonl": b"[1, 2]\n",
        "forecast.parquet": b"no table",
        "latency.json": b"{}",
        "latency.txt": b"no json",
    }
    for name, content in raw.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(json.dumps(config))
    (folder / "no_json").mkdir()
    (folder / "no_json" / "config.json").write_text("{")
    return folder


STUDY = ("study", "--model", "samples:characters", "--contexts", 1, "--context-length", 4)
STUDY += ("--methods", "em", "--workers", 1, "--horizons", 2, "--ranks", 1)
GENERATE = ("generate", "--model", "{model}", "--max-new-tokens", 2)
TRAIN = ("train-head", "--model", "{model}", "--steps", 1, "--rank", 1, "--horizon", 3)
COMMANDS = [
    ((*STUDY, "--corpus", "{picture.png}"), "zero bytes"),
    ((*STUDY, "--corpus", "{utf16.txt}"), "UTF-16 without its mark"),
    ((*STUDY, "--corpus", "{broken.gz}"), "packed by gzip and damaged"),
    ((*STUDY, "--corpus", "{blank.txt}"), "the corpus is empty"),
    ((*STUDY, "--corpus", "{empty}"), "no such file, folder or match"),
    ((*STUDY, "--corpus", "{field.jsonl}"), "fields body"),
    ((*STUDY, "--corpus", "{broken.jsonl}"), "broken.jsonl:2: no line of JSON"),
    ((*STUDY, "--corpus", "{number.jsonl}"), "no text in the field 'text'"),
    ((*STUDY, "--corpus", "{list.jsonl}"), "no object"),
    ((*STUDY, "--corpus", "{field.jsonl}", "--text-field", "title"), "the field 'title'"),
    ((*STUDY, "--corpus", "{text.txt}", "--text-field", ""), "text_field ''"),
    ((*STUDY, "--domain", "texts={text.txt}"), "this name is taken"),
    ((*STUDY, "--model", "{other}"), "could not be loaded"),
    ((*STUDY, "--model", "{no_json}"), "could not be loaded"),
    ((*STUDY, "--model", "{text.txt}"), "it is a file"),
    ((*STUDY, "--model", "{model}", "--context-length", 64), "--context-length"),
    ((*GENERATE, "--eos", "x"), "--eos 'x'"),
    ((*GENERATE, "--eos", "1.5"), "--eos '1.5'"),
    ((*GENERATE, "--eos", "100000"), "eos_token_id 100000"),
    (
        (
            *GENERATE,
            "--eos=-1",
        ),
        "eos_token_id -1",
    ),
    ((*GENERATE, "--eos", "1", "--ignore-eos"), "give one of them"),
    ((*GENERATE, "--stop", ""), "stop string ''"),
    ((*GENERATE, "--compare"), "--compare without a head"),
    ((*GENERATE, "--max-new-tokens", 64), "run past the model's 64 positions"),
    ((*GENERATE, "--max-new-tokens", "many"), "--max-new-tokens"),
    (
        (
            *GENERATE,
            "--max-new-tokens=-1",
        ),
        "max_new_tokens -1",
    ),
    ((*GENERATE, "--top-p", "0"), "top_p 0.0"),
    ((*GENERATE, "--top-p", "1.5"), "top_p 1.5"),
    ((*GENERATE, "--top-k", "0"), "top_k 0"),
    ((*GENERATE, "--temperature", "nan"), "temperature nan"),
    ((*GENERATE, "--rule", "greedy"), "at temperature 0 only"),
    (("generate", "{empty}", *GENERATE[1:]), "holds no head"),
    (("generate", "{text.txt}", *GENERATE[1:]), "holds no head"),
    (("generate", "recommended", *GENERATE[1:]), "'recommended' holds no head"),
    ((*TRAIN, "--length", 65), "windows of 65 tokens exceed the model's 64 positions"),
    ((*TRAIN, "--length", 3), "windows of 3 tokens for a horizon of 3"),
    ((*TRAIN, "--length", 0), "windows of 0 tokens"),
    ((*TRAIN, "--length", "x"), "--length"),
    ((*TRAIN, "--corpus", "{short.txt}"), "no text is 64 tokens long"),
    ((*TRAIN, "--corpus", "{picture.png}"), "zero bytes"),
    ((*TRAIN, "--corpus", "{field.jsonl}"), "--text-field"),
    ((*TRAIN, "--start", "{empty}"), "holds no head"),
    ((*TRAIN, "--rank", 0), "rank 0"),
    ((*TRAIN, "--horizon", 0), "horizon"),
    (
        (
            *TRAIN,
            "--steps=-1",
        ),
        "steps -1",
    ),
    ((*TRAIN, "--seconds", 0), "seconds 0"),
    (("report", "{empty}"), "no finished study"),
    (("compare", "{empty}", "{empty}"), "no finished study"),
]


@pytest.mark.parametrize(("arguments", "said"), COMMANDS)
def test_a_bad_command_is_one_line_and_writes_nothing(
    monkeypatch, capsys, tmp_path, place, arguments, said
):
    filled = [str(a) for a in arguments]
    filled = [_filled(a, place) for a in filled]
    out = () if filled[0] in ("report", "compare", "generate") else ("--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    status, shown, err = run(monkeypatch, capsys, *filled, *out)
    assert status == 2 and len(err.strip().splitlines()) == 1 and said in err, err
    assert shown == "" and not list(tmp_path.iterdir()) and sorted(place.rglob("*")) == before


def _filled(argument: str, place) -> str:
    head, found, rest = argument.partition("{")
    return head + str(place / rest.rstrip("}")) if found else argument


TABLE = BigramTable()
JOINT = JointDistribution(random_joint(4, 2, 0))
HEAD = cpmtp.CPHead(hidden_size=4, vocab_size=6, horizon=3, rank=1)
CALLS = [
    (lambda: cpmtp.exact_joint(TABLE, [1, 9], 2), r"in \[0, 6\): got 1 to 9"),
    (lambda: cpmtp.exact_joint(TABLE, [-1], 2), "got -1"),
    (lambda: cpmtp.exact_joint(TABLE, None, 2), "a NoneType"),
    (lambda: cpmtp.exact_joint(TABLE, "text", 2), "no encode"),
    (lambda: cpmtp.exact_joint(TABLE, [1], 0), "horizon 0"),
    (lambda: cpmtp.truncated_joint(TABLE, [[1], [2]], 2), "one row of token ids"),
    (lambda: cpmtp.truncated_joint(3, [1], 2), "a int for a language model"),
    (lambda: cpmtp.speculative_generate(TABLE, None, []), "an empty prompt"),
    (lambda: cpmtp.speculative_generate(TABLE, None, [[1], []]), "an empty prompt"),
    (lambda: cpmtp.speculative_generate(TABLE, None, [0.5]), "is a float"),
    (lambda: cpmtp.speculative_generate(TABLE, None, [6]), "prompt tokens must be"),
    (lambda: cpmtp.speculative_generate(TABLE, None, [1], eos_token_id=[6]), "eos_token_id 6"),
    (lambda: cpmtp.speculative_generate(TABLE, None, [1], stop_strings="a"), "without decode"),
    (lambda: cpmtp.speculative_generate(CharacterTable(), None, [1], stop_strings=[1]), "string 1"),
    (lambda: cpmtp.speculative_generate("code", None, [1]), "load_language_model"),
    (lambda: cpmtp.fit(JOINT, 0), "rank 0"),
    (lambda: cpmtp.fit(JOINT, 1.5), "rank 1.5"),
    (lambda: cpmtp.fit(JOINT, True), "rank True"),
    (lambda: cpmtp.fit(JOINT, 1, restarts=0), "restarts 0"),
    (lambda: cpmtp.fit(JOINT.probs * 2, 1), "sum to 1"),
    (lambda: cpmtp.fit(-JOINT.probs, 1), "non-negative"),
    (lambda: cpmtp.fit(JOINT.probs[:, :3], 1), "differ in length"),
    (lambda: cpmtp.fit(torch.ones(2, 2).long(), 1), "expected probabilities"),
    (lambda: cpmtp.fit(JOINT, 1, "magic"), "magic"),
    (lambda: cpmtp.fit_path(JOINT, []), "no ranks"),
    (lambda: cpmtp.implied_acceptance(JOINT, 3), "a int as draft"),
    (lambda: cpmtp.implied_acceptance(JOINT, JOINT, rule="luck"), "luck"),
    (lambda: cpmtp.divergences(JOINT, cpmtp.fit(random_joint(3, 2, 0), 1)), "vocab|3"),
    (lambda: cpmtp.CPHead.from_pretrained("recommended"), "embedded_heads"),
    (lambda: cpmtp.CPHead.from_pretrained(""), "config.json|no folder"),
    (lambda: read_corpus([]), "empty"),
    (lambda: cpmtp.run_study(models=[]), "models is empty"),
    (lambda: cpmtp.run_study(ranks=0), "rank 0"),
]


@pytest.mark.parametrize(("call", "said"), CALLS)
def test_a_bad_call_is_a_value_error_of_one_line(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_head_does_not_go_with_another_model(place):
    lm = load_language_model(place / "model")
    with pytest.raises(ValueError, match="does not fit"):
        cpmtp.speculative_generate(lm, HEAD, "def", max_new_tokens=2)
