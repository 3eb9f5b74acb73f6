"""The gate lets a model out and nothing else."""

import json
import os
import random
import socket
import string

import pytest
from safetensors.numpy import save_file

from headrace.errors import UserError
from headrace.publication.gate import inspect, looks_random
from publication.publication_fixtures import model_folder


@pytest.fixture
def tree(tmp_path):
    folder = model_folder(tmp_path / "tree")
    (folder / "manifest.json").unlink()
    (folder / "README.md").write_text("# A model\n")
    return folder


def refused(tree, *parts):
    with pytest.raises(UserError) as caught:
        inspect(tree)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_a_clean_tree_passes_and_is_listed(tree):
    assert inspect(tree) == sorted(path.name for path in tree.iterdir())
    for name in ("chat_template.jinja", "LICENSE", "LICENSE-MODEL", "LICENSE.txt", "NOTICE"):
        (tree / name).write_text("text")
    assert inspect(tree) == sorted(path.name for path in tree.iterdir())
    (tree / ".eval_results").mkdir()
    (tree / ".eval_results" / "a.yaml").write_text("- dataset: {id: me/data, task_id: a}\n  value: 1\n")
    assert inspect(tree)[0] == ".eval_results/a.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "modeling.py",
        "pytorch_model.bin",
        "x.pt",
        "state.pkl",
        "model.safetensors.sh",
        "run.exe",
        ".env",
        "config.json.bak",
        "sub/config.json",
        ".eval_results/x.py",
        ".git/config",
        "model-1-of-2.safetensors",
        "config.json\n",
        "README.MD",
        "LICENSE.py",
        "other.jinja",
    ],
)
def test_names_off_the_list_are_refused(tree, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("{}")
    refused(tree, name.strip(), "publish:")


def test_code_is_named_as_code(tree):
    (tree / "modeling.py").write_text("")
    refused(tree, "modeling.py", "never published")


def test_links_and_special_files_are_refused(tree, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tree / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    refused(tree, "special_tokens_map.json", "symbolic link")
    (tree / "special_tokens_map.json").unlink()
    (tree / ".eval_results").symlink_to(tmp_path)
    refused(tree, ".eval_results", "symbolic link")
    (tree / ".eval_results").unlink()
    os.mkfifo(tree / "LICENSE")
    refused(tree, "LICENSE", "ordinary file")
    (tree / "LICENSE").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "LICENSE"))
        refused(tree, "LICENSE", "ordinary file")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.X"}}),
        ("config.json", {"_attn_implementation": "flash"}),
        ("config.json", {"text_config": {"_attn_implementation_internal": "evil/kernel"}}),
        ("config.json", {"layers": [{"trust_remote_code": True}]}),
        ("tokenizer_config.json", {"auto_map": {}}),
        ("tokenizer.json", {"auto_map": {}}),
    ],
)
def test_keys_that_loaders_act_upon_are_refused(tree, name, change):
    path = tree / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tree, name, "loaders act upon")


@pytest.mark.parametrize("secret", ["hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0iL", "https://me:s3cret@host/x"])
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "generation_config.json"])
def test_secrets_are_refused_by_line_and_never_repeated(tree, name, secret):
    text = (tree / name).read_text()
    if name.endswith(".json"):
        (tree / name).write_text(json.dumps(json.loads(text) | {"note": secret}, indent=1))
    else:
        (tree / name).write_text(f"one\ntwo {secret}\n")
    message = refused(tree, name, "line ", "looks like")
    assert secret not in message and "s3cret" not in message


TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0iL"
ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in TOKEN)


def header(tree, text):
    """The first shard with another header before the same data."""
    path = tree / "model-00001-of-000002.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[size:])
    return path.name


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        (f'{{"note": "{TOKEN}"}}', "layer.1.weight"),
        (f'{{"{TOKEN}": ""}}', "layer.1.weight"),
        (f'{{"note": "{ESCAPED}"}}', "layer.1.weight"),
        (f'{{"note": "{ESCAPED}", "note": "x"}}', "layer.1.weight"),
        ('{"password": "aB3dE6gH9jK2"}', "layer.1.weight"),
        ('{"note": "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0iLuR5t"}', "layer.1.weight"),
        ('{"format": "pt"}', f"layer.{TOKEN}.weight"),
    ],
)
def test_secrets_in_the_header_of_weights_are_refused_and_never_repeated(tree, metadata, name):
    entry = '{"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}'
    shard = header(tree, f'{{"__metadata__": {metadata}, "{name}": {entry}}}')
    message = refused(tree, shard, "of the text in its header holds")
    assert TOKEN not in message and "aB3dE6" not in message


def test_metadata_twice_hides_nothing(tree):
    entry = '"layer.1.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}'
    refused(tree, header(tree, f'{{"__metadata__": {{"a": "{TOKEN}"}}, {entry}, "__metadata__": {{"a": "b"}}}}'))


def test_a_header_without_secrets_passes(tree):
    entry = '{"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}'
    digest = "d0" * 32
    name = "model.layers.11.mlp.experts.255.down_proj.weight_scale_inv"
    header(tree, f'{{"__metadata__": {{"format": "pt", "sha256": "{digest}"}}, "{name}": {entry}}}')
    assert "model-00001-of-000002.safetensors" in inspect(tree)


def test_random_words_are_refused_and_common_ones_are_not(tree):
    generator = random.Random(5)
    letters = string.ascii_letters + string.digits
    keys = ["".join(generator.choices(letters, k=40)) for _ in range(300)]
    assert sum(looks_random(key) for key in keys) >= 297
    for word in (
        "ab12" * 16,
        string.ascii_uppercase + string.ascii_lowercase + string.digits,
        "DeepseekV3ForCausalLMWithMultiTokenPrediction2",
        "model-00001-of-000163-Safetensors-index",
        "ICASSP2024TransformersForLongSequences",
    ):
        assert not looks_random(word), word
    (tree / "README.md").write_text(f"# A\n\nsee {keys[0]}\n")
    assert keys[0] not in refused(tree, "README.md", "line 3", "random-looking")


def test_strange_words_of_a_vocabulary_pass(tree):
    generator = random.Random(6)
    words = ["".join(generator.choices(string.ascii_letters + string.digits, k=40)) for _ in range(50)]
    model = {"type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": [["pass", "word"]]}
    (tree / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    assert "tokenizer.json" in inspect(tree)


def test_damage_is_refused(tree):
    (tree / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    refused(tree, "config.json")
    (tree / "config.json").write_bytes(b"\xff\xfe{}")
    refused(tree, "config.json", "UTF-8")
    (tree / "config.json").write_text("{}")
    shard = tree / "model-00001-of-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tree, shard.name)


def test_sizes_are_capped(tree):
    (tree / "README.md").write_text("x" * ((1 << 20) + 1))
    refused(tree, "README.md", "more than")


def test_a_tree_without_a_model_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A\n")
    refused(tmp_path, "no model here")
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path, "no model here")
