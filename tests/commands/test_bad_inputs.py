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
        "bytes.bin": bytes(range(256)),
        "column.csv": b"batch,tokens\n1,2\n",
        "sign.csv": b"batch,tokens,seconds\n1,2,-1\n",
        "word.csv": b"batch,tokens,seconds\n1,two,1\n",
        "nothing.csv": b"",
    }
    for name, content in raw.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(json.dumps(config))
    (folder / "no_sizes").mkdir()
    (folder / "no_sizes" / "config.json").write_text("{}")
    head = cpmtp.CPHead(hidden_size=96, vocab_size=99, horizon=3, rank=2, anchored=True, blocks=1)
    head.save_pretrained(folder / "head")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_bytes((folder / "head/config.json").read_bytes())
    (folder / "damaged" / "model.safetensors").write_bytes(b"xx")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "no_json").mkdir()
    (folder / "no_json" / "config.json").write_text("{")
    return folder


STUDY = ("study", "--model", "samples:characters", "--contexts", 1, "--context-length", 4)
STUDY += ("--methods", "em", "--workers", 1, "--horizons", 2, "--ranks", 1)
GENERATE = ("generate", "--model", "{model}", "--max-new-tokens", 2)
TRAIN = ("train-head", "--model", "{model}", "--steps", 1, "--rank", 1, "--horizon", 3)
FORECAST = ("forecast", "--model", "{model}", "--budget", "20k", "--minutes", "0.2")
LATENCY = ("latency", "--model", "{model}", "--tokens", "1,2", "--context", 8, "--seconds", 1)
CURVE = (*LATENCY, "--engine", "one", "--engine-curve")
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
    ((*STUDY, "--corpus", "{dangling.txt}"), "no such file, folder or match"),
    ((*STUDY, "--top-p", "0"), "top_p 0.0"),
    ((*STUDY, "--top-k", "100"), "top_k 100 over a vocabulary of 6"),
    ((*STUDY, "--width", "nan"), "width nan"),
    ((*STUDY, "--temperatures", "0,-0"), "holds one twice"),
    ((*STUDY, "--max-gigabytes", "inf"), "--max-gigabytes inf"),
    ((*STUDY, "--dtype", "bf16", "--model", "code"), "unknown dtype 'bf16'"),
    ((*STUDY, "--ranks", "99999999999999999999"), "below 2 ** 31"),
    ((*STUDY, "--methods", "em;als"), "unknown method 'em;als'"),
    ((*STUDY, "--domain", "a={text.txt}", "--domain", "a={text.txt}"), "hold one twice"),
    ((*GENERATE, "--prompt", ""), "an empty prompt"),
    ((*GENERATE, "--eos", ""), "--eos is empty"),
    (("generate", "{no_sizes}", *GENERATE[1:]), "holds no head: its config.json has nothing"),
    (("generate", "{damaged}", *GENERATE[1:]), "does not hold this head's weights"),
    (("generate", "{head}", "--rule", "luck", *GENERATE[1:]), "unknown rule 'luck'"),
    (("generate", "{head}", "--model", "code"), "does not fit"),
    (("generate", "{head}", *GENERATE[1:], "--expect", "{column.csv}"), "no column forecast_low"),
    (("generate", "{head}", *GENERATE[1:], "--monitor", "{empty}"), "Is a directory"),
    ((*TRAIN, "--out", "{model}"), "holds a model: choose another for the head"),
    ((*TRAIN, "--out", "{text.txt}"), "is a file: choose another folder"),
    ((*TRAIN, "--form", "hmm"), "unknown form 'hmm'"),
    ((*TRAIN, "--form", "markov", "--rank", 3), "which has one component"),
    ((*TRAIN, "--transition-rank", 3), "which has no transitions"),
    ((*TRAIN, "--width", 0), "width 0"),
    (
        (
            *TRAIN,
            "--blocks=-1",
        ),
        "blocks -1",
    ),
    ((*TRAIN, "--vocabulary", 100), "vocabulary 100: 99 tokens are all"),
    ((*TRAIN, "--vocabulary", 0), "vocabulary 0"),
    ((*TRAIN, "--seconds", "inf"), "seconds inf"),
    ((*TRAIN, "--positions", 0), "positions 0"),
    ((*TRAIN, "--objective", "luck"), "unknown objective 'luck'"),
    ((*TRAIN, "--precision", "int8"), "unknown precision 'int8'"),
    ((*TRAIN, "--start", "{head}"), "has rank 2 where 1 is asked for"),
    ((*TRAIN, "--rank", 2, "--start", "{head}", "--width", 7), "has width 96 where 7"),
    ((*TRAIN, "--rank", 2, "--start", "{head}", "--model", "code"), "has vocab_size 99 where 104"),
    ((*TRAIN, "--start", "{damaged}"), "does not hold this head's weights"),
    ((*FORECAST, "--forms", "magic"), "--forms 'magic'"),
    ((*FORECAST, "--forms", ","), "no candidates"),
    ((*FORECAST, "--horizons", "1"), "horizons (1,)"),
    ((*FORECAST, "--horizons", "2,x"), "--horizons '2,x'"),
    ((*FORECAST, "--ranks", "0"), "rank 0 of form 'cp'"),
    ((*FORECAST, "--ranks", ""), "--ranks is empty"),
    ((*FORECAST, "--transition-ranks", ""), "--transition-ranks is empty"),
    ((*FORECAST, "--budget", "lots"), "--budget 'lots'"),
    ((*FORECAST, "--budget", "inf"), "budget inf"),
    ((*FORECAST, "--probe-budget", "x"), "--probe-budget 'x'"),
    ((*FORECAST, "--minutes", "nan"), "minutes nan"),
    ((*FORECAST, "--loads", "0"), "loads (0,)"),
    ((*FORECAST, "--temperature", "nan"), "temperature nan"),
    ((*FORECAST, "--top-p", "0"), "top_p 0.0"),
    ((*FORECAST, "--top-k", "1000"), "top_k 1000 over a vocabulary of 99"),
    ((*FORECAST, "--latency", "{latency.json}"), "it has no plain_step, base"),
    ((*FORECAST, "--latency", "{bytes.bin}"), "expected JSON such as"),
    ((*FORECAST, "--curves", "{column.csv}"), "expected the columns group, horizon"),
    ((*FORECAST, "--curves", "{bytes.bin}"), "is no table"),
    ((*FORECAST, "--curves", "{forecast.parquet}"), "is no table"),
    ((*FORECAST, "--out", "{text.txt}"), "is a file: choose another folder"),
    ((*LATENCY, "--tokens", ""), "verified_tokens ()"),
    ((*LATENCY, "--batches", "0"), "batches (0,)"),
    ((*LATENCY, "--context", "64"), "no room for 1 tokens after 64"),
    ((*LATENCY, "--seconds", "nan"), "seconds nan"),
    ((*LATENCY, "--engine", "one"), "go together"),
    ((*CURVE, "{column.csv}"), "no column seconds"),
    ((*CURVE, "{sign.csv}"), "seconds -1.0"),
    ((*CURVE, "{word.csv}"), "expected a CSV file with the columns"),
    ((*CURVE, "{nothing.csv}"), "expected a CSV file with the columns"),
    ((*LATENCY, "--out", "{empty}"), "is a folder: name a file"),
    ((*LATENCY, "--out", "{text.txt}/latency.json"), "is a file"),
    (("validate", "--preset", "huge"), "unknown preset 'huge'"),
    (("validate", "--stage", "luck"), "unknown stage 'luck'"),
    (("validate", "--budget-seconds", "nan"), "budget_seconds nan"),
    (
        (
            "validate",
            "--budget-seconds=-1",
        ),
        "budget_seconds -1",
    ),
    (("validate", "--out", "{text.txt}"), "is a file"),
    (("train-base", "poetry"), "unknown domain 'poetry'"),
    (("train-base", "code", "--threads=-2"), "--threads -2"),
    (("train-base", "code", "--out", "{text.txt}"), "is a file"),
    (("models", "--convert", "{model}"), "each needs the other"),
    (("models", "--convert", "{model}", "--out", "{other}"), "is there already"),
    (("models", "--check", "{text.txt}"), "it is a file"),
    (("models", "--check", "{model}", "--length", "0"), "--length 0"),
    (("report", "{empty}", "--price", "nan"), "--price nan"),
    (("report", "{empty}", "--learned-share", "2"), "--learned-share 2"),
    (("export", "{empty}", "--to", "vllm"), "nothing to export"),
    (("export", "{text.txt}", "--to", "vllm"), "no folder"),
    (("export", "{empty}", "--to", "magic"), "no format 'magic'"),
    (("report", "{empty}"), "no finished study"),
    (("compare", "{empty}", "{empty}"), "no finished study"),
]


@pytest.mark.parametrize(("arguments", "said"), COMMANDS)
def test_a_bad_command_is_one_line_and_writes_nothing(
    monkeypatch, capsys, tmp_path, place, arguments, said
):
    filled = [str(a) for a in arguments]
    filled = [_filled(a, place) for a in filled]
    elsewhere = filled[0] in ("report", "compare", "generate", "models", "export")
    out = () if elsewhere or "--out" in filled else ("--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    status, shown, err = run(monkeypatch, capsys, *filled, *out)
    assert status == 2 and len(err.strip().splitlines()) == 1 and said in err, err
    assert shown == "" and not list(tmp_path.iterdir()) and sorted(place.rglob("*")) == before


def _filled(argument: str, place) -> str:
    head, found, rest = argument.partition("{")
    return head + str(place / rest.replace("}", "")) if found else argument


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
