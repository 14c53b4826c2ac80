"""Documents from the standard library, from files and folders."""

from __future__ import annotations

import pytest

from cpmtp.corpora import (
    Document,
    corpus_hash,
    installed_code_documents,
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
