"""Ids come from the tokenizer's own files."""

import json

import pytest

from conversion_models import tokenizer_folder
from headrace.conversion.special_tokens import SpecialTokens, copy_tokenizer, read_special_tokens
from headrace.errors import UserError


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tokenizer_folder(tmp_path / "tokenizer")


def edit(folder, **changes):
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_ids_are_looked_up(folder):
    assert read_special_tokens(folder, 290) == SpecialTokens(bos=0, eos=1, pad=2)
    edit(folder, eos_token={"__type": "AddedToken", "content": "unused7"}, pad_token=None)
    tokens = read_special_tokens(folder, 290)
    assert tokens.pad is None
    assert tokens.eos == json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["unused7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<eos>"}, "eos_token '<eos>' is not in tokenizer.json"),
        ({"bos_token": None}, "bos_token and eos_token must both be given"),
        ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map asks for code"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_special_tokens(folder, 290)


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder):
    with pytest.raises(UserError, match=r"has token id 289, model\.vocab_size=289 is too small"):
        read_special_tokens(folder, 289)


def test_something_else_than_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(UserError, match="not a tokenizer"):
        read_special_tokens(folder, 290)


def test_files_are_copied_byte_for_byte(folder, tmp_path):
    (tmp_path / "out").mkdir()
    copy_tokenizer(folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
