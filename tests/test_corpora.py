"""Documents from the standard library, from files and folders."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from cpmtp.corpora import (
    Document,
    corpus_hash,
    installed_code_documents,
    read_corpus,
    read_document,
    read_documents,
    split_held_out,
    split_packages,
    standard_library_documents,
)


@pytest.fixture(scope="module")
def code():
    return standard_library_documents("code")


def test_the_library_has_code_and_prose(code):
    prose = standard_library_documents("prose")
    assert sum(len(d.text) for d in code) > 5_000_000
    assert sum(len(d.text) for d in prose) > 1_000_000
    assert any(d.name.startswith("topics/") for d in prose)
    assert not any("test" in d.name.split("/") for d in code)


def test_the_split_is_by_document_and_does_not_depend_on_the_others(code):
    training, held_out = split_held_out(code)
    names = {d.name for d in held_out}
    assert names.isdisjoint(d.name for d in training)
    assert 0.02 < len(held_out) / len(code) < 0.08
    assert {d.name for d in split_held_out(code[::2])[1]} == {
        d.name for d in code[::2] if d.name in names
    }


def test_bytes_that_are_no_utf8_are_counted_and_replaced(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"ok \xff\xfe \xef\xbf\xbd line\r\nend")
    document = read_document(path)
    assert document.text == "ok \ufffd\ufffd \ufffd line\nend"
    assert document.replaced_bytes == 2


WORDS = "größer ist das\nnächste Wort " * 9


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (WORDS.encode("utf-8-sig"), WORDS),
        (WORDS.encode("utf-16"), WORDS),
        (b"\xfe\xff" + WORDS.encode("utf-16-be"), WORDS),
        (WORDS.encode("utf-32"), WORDS),
        (b"\0\0\xfe\xff" + WORDS.encode("utf-32-be"), WORDS),
        (gzip.compress(WORDS.encode("utf-16"), mtime=0), WORDS),
        (b"a\rb\rc", "a\nb\nc"),
        (b"a\r\nb\r\n", "a\nb\n"),
        ("\u200bzero".encode(), "\u200bzero"),
    ],
)
def test_a_text_is_read_as_it_was_written(tmp_path, raw, text):
    (tmp_path / "a.txt").write_bytes(raw)
    (document,) = read_documents([tmp_path])
    assert (document.text, document.replaced_bytes) == (text, 0)


NO_TEXT = {
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)),
    "no_mark.txt": WORDS.encode("utf-16-le"),
    "cyrillic.txt": ("следующее слово " * 9).encode("cp1251"),
    "controls.bin": bytes(range(1, 9)) * 40,
    "broken.gz": gzip.compress(WORDS.encode())[:-9],
    "picture.gz": gzip.compress(b"\x89PNG\0\0"),
}


def test_what_holds_no_text_is_skipped_and_counted(tmp_path):
    for name, raw in NO_TEXT.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"6 file.s. found, none holds text") as error:
        read_corpus([tmp_path])
    assert "damaged" in str(error.value) and "280 of 320" in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "text.txt").write_text(WORDS)
    corpus = read_corpus([tmp_path])
    assert [d.text for d in corpus.documents] == [WORDS]
    assert sorted(line.split(": ")[0] for line in corpus.skipped) == [
        str(tmp_path / name) for name in sorted(NO_TEXT)
    ]
    with pytest.raises(ValueError, match="is no text: zero bytes"):
        read_document(tmp_path / "picture.png")


@pytest.mark.parametrize("packed", [False, True])
def test_every_line_of_json_is_a_document(tmp_path, packed):
    lines = [{"text": "one\ntwo", "id": 1}, "bare", {"text": " "}, {"text": "half \ud800 pair"}]
    raw = "\n\n".join(map(json.dumps, lines)).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.NDJSON")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    found = read_documents([tmp_path])
    assert [d.text for d in found] == ["one\ntwo", "bare", "half ? pair"]
    assert [d.name for d in found] == [f"{path}:{k}" for k in (1, 3, 7)]


def test_the_field_that_holds_the_text_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "words", "title": "no"}\n')
    assert read_documents([tmp_path], field="body")[0].text == "words"
    for text, said in (
        ('{"body": "words"}', "no text in the field 'text' .fields body.: name the field"),
        ('{"text": 3}', "no text in the field 'text'"),
        ("[1]", "no text in the field 'text' .no object."),
        ("{", "a.jsonl:1: no line of JSON"),
    ):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=said) as error:
            read_documents([tmp_path])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", "größer.txt".encode(), b"a\nb|<i>$.txt"])
def test_any_name_that_the_system_allows_is_read_and_can_be_written_down(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        with open(path, "w") as file:
            file.write("words")
    except OSError:
        pytest.skip("this system allows no such name")
    for patterns in ([tmp_path], [os.fsdecode(path)]):
        (document,) = read_documents(patterns)
        assert document.text == "words" and document.name.encode()
        assert corpus_hash([document])


def test_files_folders_and_globs_are_read_once_each(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / "sub" / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("  \n")
    found = read_documents([tmp_path / "a.txt", tmp_path, f"{tmp_path}/**/*.txt"])
    assert sorted(d.text for d in found) == ["one", "two"]


def test_the_hash_sees_every_change(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = corpus_hash(read_documents([tmp_path]))
    (tmp_path / "a.txt").write_text("One")
    assert corpus_hash(read_documents([tmp_path])) != before


@pytest.mark.parametrize("content", [None, "", " \n\t"])
def test_an_empty_corpus_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match="corpus"):
        read_documents([tmp_path])


def test_unknown_domains_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="code, prose"):
        standard_library_documents("poetry")
    with pytest.raises(ValueError, match="no such file"):
        read_documents([tmp_path / "none.txt"])


def test_no_package_stands_on_both_sides_and_the_held_out_ones_are_about_the_share_asked_for():
    documents = [Document(f"package{k % 40}/file{k}.py", "x" * (50 + k % 7)) for k in range(400)]
    documents.append(Document("large/file.py", "x" * 40_000))
    training, held_out = split_packages(documents, 0.1)
    packages = [{d.name.partition("/")[0] for d in side} for side in (training, held_out)]
    assert not packages[0] & packages[1]
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.1 <= share <= 0.12
    assert "large" in packages[0]


def test_sources_of_installed_packages_are_found_and_their_amount_is_bounded():
    documents = installed_code_documents(2_000_000)
    assert 1_000_000 < sum(len(d.text) for d in documents) < 3_000_000
    assert len({d.name.partition("/")[0] for d in documents}) > 10
    assert len({d.name for d in documents}) == len(documents)
