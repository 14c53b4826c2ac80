"""What a tokenizer puts around a text, and what is spelled out in it."""

from __future__ import annotations

import pytest
from samples import random_llama_folder
from tokenizers import processors

from cpmtp.pretrained import load_language_model

END = "<|endoftext|>"


@pytest.fixture
def lm(tmp_path):
    return load_language_model(random_llama_folder(tmp_path / "m"))


@pytest.mark.parametrize(
    ("template", "begins", "added"),
    [
        ("$A", False, 0),
        (f"{END} $A", True, 0),
        (f"$A {END}", False, 1),
        (f"{END} $A {END}", True, 1),
    ],
)
def test_a_prompt_goes_on_after_its_text(lm, template, begins, added):
    tokenizer = lm.tokenizer
    end = tokenizer.convert_tokens_to_ids(END)
    bare = tokenizer.encode("def", add_special_tokens=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(END, end)]
    )
    assert len(tokenizer.encode("def")) == len(bare) + begins + added
    assert lm.encode("def").tolist() == [end] * begins + bare
    assert lm.encode_document("def").tolist() == bare


def test_a_special_token_spelled_out_in_a_document_is_text(lm):
    lm.tokenizer.split_special_tokens = False
    end = lm.tokenizer.convert_tokens_to_ids(END)
    assert end in lm.encode(f"a {END}").tolist()
    ids = lm.encode_document(f"a {END} b")
    assert end not in ids.tolist() and len(ids) == len(f"a {END} b")
