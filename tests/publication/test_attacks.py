"""Hand-made attacks on whoever takes or passes on a model's folder: refused with exit 2 and one line, nothing written.

Each goes through the doors that could let it through: `headrace import`, `convert source=`, the gate for incoming
folders that both ask, the gate of publish. An attack that a door lets pass because it never looks there is not listed
for that door.
"""

import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_models import our_network, tiny_model, tokenizer_folder
from headrace import cli
from headrace.conversion.export import export
from headrace.errors import UserError
from headrace.publication.gate import inspect
from headrace.publication.incoming import inspect_incoming
from headrace.publication.repository import build_repository
from headrace.stages.convert import program as convert
from headrace.stages.run import explain
from publication.publication_fixtures import card_facts

INDEX = "model.safetensors.index.json"


@pytest.fixture(name="original", scope="module")
def _original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save_file(our_network(tiny_model()).state_dict(), folder / "model.safetensors")
    tokenizer = tokenizer_folder(folder / "tokenizer")
    export(folder / "model.safetensors", tiny_model(), tokenizer, folder / "hub", "bf16", 400_000)
    (folder / "hub" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder / "hub"


@pytest.fixture(name="hub")
def _hub(original, tmp_path):
    return shutil.copytree(original, tmp_path / "hub")


def shard(hub: Path) -> Path:
    return hub / json.loads((hub / INDEX).read_text())["weight_map"]["lm_head.weight"]


def header(entries: object, data: bytes = b"") -> Callable[[Path], None]:
    """One shard becomes a file with this header, taken as it is where it is bytes."""

    def attack(hub: Path) -> None:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        shard(hub).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return attack


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def raw_shard(data: bytes) -> Callable[[Path], None]:
    return lambda hub: shard(hub).write_bytes(data) and None


def edit(file: str, **changes: object) -> Callable[[Path], None]:
    """Keys of a JSON file, added or replaced."""

    def attack(hub: Path) -> None:
        (hub / file).write_text(json.dumps(json.loads((hub / file).read_text()) | changes))

    return attack


def write(file: str, content: bytes | str) -> Callable[[Path], None]:
    def attack(hub: Path) -> None:
        path = hub / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return attack


def twice(file: str, line: str) -> Callable[[Path], None]:
    """A key that is there already, once more at the end, where readers differ on which of the two holds."""

    def attack(hub: Path) -> None:
        (hub / file).write_text((hub / file).read_text().rstrip().removesuffix("}") + f", {line}}}")

    return attack


def misdirect(name: str) -> Callable[[Path], None]:
    """The index sends a tensor to another file."""

    def attack(hub: Path) -> None:
        index = json.loads((hub / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = name
        (hub / INDEX).write_text(json.dumps(index))

    return attack


def polyglot(hub: Path) -> None:
    shard(hub).write_bytes(shard(hub).read_bytes() + zipped("evil.py", b"print()"))


def zipped(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO(b""))
    return buffer.getvalue()


def linked_config(hub: Path) -> None:
    shutil.move(hub / "config.json", hub.parent / "outside.json")
    (hub / "config.json").symlink_to("../outside.json")


def linked_shard(hub: Path) -> None:
    path = shard(hub)
    shutil.move(path, hub.parent / "outside.safetensors")
    path.symlink_to(hub.parent / "outside.safetensors")


def linked_folder(hub: Path) -> None:
    (hub / "inference").symlink_to("/etc")


def blob_lookalike(hub: Path) -> None:
    """A link to a folder that is only called as the Hub's cache calls it."""
    (hub.parent / "blobs").mkdir()
    shutil.move(hub / "tokenizer.json", hub.parent / "blobs" / "1234")
    (hub / "tokenizer.json").symlink_to("../blobs/1234")


def fifo(hub: Path) -> None:
    (hub / "generation_config.json").unlink()
    os.mkfifo(hub / "generation_config.json")


def smuggled_tensor(hub: Path) -> None:
    path = shard(hub)
    save_file({**load_file(path), "../../escaped": torch.zeros(2)}, path, {"format": "pt"})


IMPORT, CONVERT, INCOMING, GATE, TREE = "import", "convert", "incoming", "gate", "tree"
ALL = (IMPORT, CONVERT, INCOMING, GATE)
FOREIGN = (IMPORT, CONVERT)  # both gates leave to the index what it says
READ = (IMPORT, CONVERT, GATE)  # the gate for incoming folders leaves the keys of config.json to their closed list
OPENED = (IMPORT, CONVERT, INCOMING)  # what the gate of publish has made itself
# Publish writes a card of its own, so the gate is asked about the tree as it is.
CARD = (IMPORT, CONVERT, INCOMING, TREE)


def yaml_bomb() -> str:
    """Each line has the one before it nine times."""
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 13))]
    return "---\n" + "\n".join(lines) + "\n---\n"


@dataclass(frozen=True)
class Attack:
    name: str
    make: Callable[[Path], None]
    doors: tuple[str, ...]
    says: str = ""


ATTACKS = [
    # safetensors headers
    Attack("header_longer_than_the_cap", raw_shard(struct.pack("<Q", 1 << 62) + b"{}"), ALL, "header of"),
    Attack("header_longer_than_the_file", raw_shard(struct.pack("<Q", 1 << 20) + b"{}"), ALL, "safetensors"),
    Attack("empty_file", raw_shard(b""), ALL, "safetensors"),
    Attack("header_no_json", header(b"\x80\x04\x95pickle"), ALL, "safetensors"),
    Attack("header_a_list", header([1, 2]), ALL, "no object"),
    Attack("header_nested_without_end", header(b"[" * 100_000), ALL, "safetensors"),
    Attack("endless_shape", header(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'), ALL, "malformed"),
    Attack("tensor_named_like_a_path", smuggled_tensor, ALL, "not allowed"),
    Attack("tensor_named_absolutely", header({"/etc/passwd": tensor()}, bytes(8)), ALL, "not allowed"),
    Attack("tensor_named_with_a_line_end", header({"a\nb": tensor()}, bytes(8)), ALL, "not allowed"),
    Attack(
        "more_tensors_than_the_cap",
        header({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_001)}),
        ALL,
        "200001 tensors",
    ),
    Attack("metadata_of_two_megabytes", header({"__metadata__": {"a": "x" * (2 << 20)}}), ALL, "metadata"),
    Attack("tensors_that_overlap", header({"a": tensor(), "b": tensor(data_offsets=[4, 12])}, bytes(12)), ALL),
    Attack("a_gap_between_tensors", header({"a": tensor(), "b": tensor(data_offsets=[16, 24])}, bytes(24)), ALL),
    Attack("tensor_past_the_end", header({"a": tensor(shape=[1 << 20], data_offsets=[0, 4 << 20])}, bytes(8)), ALL),
    Attack("shape_that_overflows", header({"a": tensor(shape=[1 << 32, 1 << 32])}, bytes(8)), ALL),
    Attack("shape_below_zero", header({"a": tensor(shape=[-2])}, bytes(8)), ALL),
    Attack("offsets_reversed", header({"a": tensor(data_offsets=[8, 0])}, bytes(8)), ALL),
    Attack("dtype_unknown", header({"a": tensor(dtype="PICKLE")}, bytes(8)), ALL),
    Attack("zip_behind_the_tensors", polyglot, ALL),
    # the index
    Attack("index_climbs_out", misdirect("../../outside.safetensors"), FOREIGN, "plain file name"),
    Attack("index_names_an_absolute_path", misdirect("/etc/model.safetensors"), FOREIGN, "plain file name"),
    Attack("index_names_an_address", misdirect("http://host/a.safetensors"), FOREIGN, "plain file name"),
    Attack("index_with_a_key_twice", twice(INDEX, '"weight_map": {}'), ALL, "duplicate key"),
    # config.json
    Attack("config_asks_for_code", edit("config.json", auto_map={"AutoModel": "evil--a.M"}), READ, "auto_map"),
    Attack("config_trusts_code", edit("config.json", trust_remote_code=True), READ, "trust_remote_code"),
    Attack("config_pipelines", edit("config.json", custom_pipelines={"a": {"impl": "evil.P"}}), READ, "custom"),
    Attack("config_private_key", edit("config.json", _attn_implementation="evil/kernel"), READ, "_attn"),
    Attack("config_private_key_below", edit("config.json", rope_parameters={"_name": "x"}), READ),
    Attack("config_key_twice", twice("config.json", '"hidden_size": 1'), ALL, "duplicate key"),
    Attack("config_nested_without_end", write("config.json", '{"a":' * 100_000), ALL, "JSON"),
    Attack("config_nested_deeply", write("config.json", '{"a":' * 400 + "1" + "}" * 400), READ),
    Attack("config_of_five_megabytes", write("config.json", '{"a": "' + "x" * (5 << 20) + '"}'), ALL),
    Attack("config_no_object", write("config.json", "[1]"), ALL, "object"),
    Attack("config_layers_without_end", edit("config.json", num_hidden_layers=10**9), OPENED, "matrices"),
    Attack("config_number_past_all_floats", edit("config.json", hidden_size=10**400), OPENED, "hidden_size"),
    Attack("config_width_past_all_memory", edit("config.json", hidden_size=10**30), OPENED, "hidden_size"),
    # tokenizer.json and what stands beside it
    Attack("tokenizer_asks_for_code", edit("tokenizer.json", auto_map={"AutoTokenizer": "evil.T"}), ALL, "auto_map"),
    Attack("tokenizer_settings_ask_for_code", edit("tokenizer_config.json", auto_map={}), ALL, "auto_map"),
    Attack("tokenizer_no_object", write("tokenizer.json", "[]"), ALL, "object"),
    Attack("tokenizer_key_twice", twice("tokenizer.json", '"model": {}'), ALL, "duplicate key"),
    Attack("tokenizer_nested_deeply", write("tokenizer.json", '{"decoder":' * 500 + "1" + "}" * 500), ALL, "deep"),
    Attack("tokenizer_a_zip", write("tokenizer.json", zipped("a", b"\xff\xfe")), ALL),
    Attack("token_id_below_zero", edit("tokenizer.json", model={"vocab": {"a": -1}}), OPENED, "ids"),
    Attack("token_id_a_truth_value", edit("tokenizer.json", model={"vocab": {"a": True}}), OPENED, "ids"),
    # the card
    Attack("card_makes_an_object", write("README.md", "---\na: !!python/name:os.system\n---\n"), CARD, "YAML"),
    Attack("card_that_grows", write("README.md", yaml_bomb()), CARD, "YAML"),
    Attack("card_with_an_empty_number", write("README.md", "---\na: !!int ''\n---\n"), CARD, "YAML"),
    Attack("card_with_a_truth_value_of_its_own", write("README.md", "---\na: !!bool x\n---\n"), CARD, "YAML"),
    Attack("card_with_a_time_of_its_own", write("README.md", "---\na: !!timestamp x\n---\n"), CARD, "YAML"),
    Attack("card_no_mapping", write("README.md", "---\n- a\n---\n"), CARD, "mapping"),
    Attack("card_no_text", write("README.md", b"\xff\x00\xfe"), CARD, "UTF-8"),
    Attack("card_of_two_megabytes", write("README.md", "x" * (2 << 20)), CARD, "bytes"),
    # names and places
    Attack("name_with_a_line_end", write("config.json\n", "{}"), ALL),
    Attack("name_with_backslashes", write("..\\..\\evil.json", "{}"), ALL),
    Attack("name_that_reads_backwards", write("model\u202egnp.json", "{}"), ALL),
    Attack("name_that_is_an_option", write("--trust.json", "{}"), ALL),
    Attack("name_with_an_escape", write("\x1b[2Ja.json", "{}"), ALL),
    Attack("code_beside_the_model", write("modeling_evil.py", "print()"), ALL, "code"),
    Attack("code_in_a_folder", write("sub/evil.py", "print()"), ALL),
    Attack("library", write("fast.so", b"\x7fELF"), ALL, "code"),
    Attack("stray_shard", write("other.safetensors", b""), ALL),
    Attack("name_of_no_model", write("payload.dat", b""), ALL),
    Attack("environment", write(".env", "A=b"), ALL),
    Attack("settings_below", write("sub/config.json", "{}"), ALL),
    Attack("weights_below", lambda hub: write("sub/model.safetensors", shard(hub).read_bytes())(hub), ALL),
    Attack("name_without_a_type", write("run", "text"), ALL),
    Attack("link_to_a_file_outside", linked_config, ALL, "config.json"),
    Attack("link_to_weights_outside", linked_shard, ALL),
    Attack("link_to_a_folder", linked_folder, ALL),
    Attack("link_to_blobs_that_are_none", blob_lookalike, ALL),
    Attack("pipe_that_blocks", fifo, ALL, "ordinary file"),
    # archives and pickles
    Attack("zip", write("weights.zip", zipped("a", b"a")), ALL),
    Attack("tar_that_escapes", write("weights.tar.gz", tarred()), ALL),
    Attack("pickle", write("pytorch_model.bin", b"\x80\x04."), ALL, "code"),
    Attack("pickle_in_capitals", write("MODEL.PT", b"\x80\x04."), ALL, "code"),
    Attack("arrays", write("weights.npz", zipped("a.npy", b"\x93NUMPY")), ALL),
]  # fmt: skip


def everything(folder: Path) -> dict[str, bytes | str | None]:
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        kept = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = kept
    return found


def through(door: str, hub: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what is said."""
    if door == IMPORT:
        code = cli.main(["import", str(hub), f"paths.results={out}"])
        return code, capsys.readouterr().err.rstrip("\n")
    if door == CONVERT:
        code = convert([f"source={hub}", f"paths.results={out}"])
        return code, "" if code == 0 else capsys.readouterr().err.rstrip("\n")
    try:
        if door == INCOMING:
            inspect_incoming(hub)
        elif door == GATE:
            build_repository(out, hub, card_facts())
        else:
            inspect(hub)
    except UserError as error:
        return explain(error)
    return 0, ""


def test_there_are_enough_and_none_twice():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 30


@pytest.mark.parametrize("door", [IMPORT, CONVERT, INCOMING, GATE, TREE])
def test_the_folder_passes_before_the_attack(door, hub, tmp_path, capsys):
    """Or a refusal below would prove nothing."""
    (hub / "manifest.json").unlink(missing_ok=True)
    assert through(door, hub, tmp_path / "out", capsys) == (0, "")


@pytest.mark.parametrize(
    ("attack", "door"), [pytest.param(one, door, id=f"{one.name}-{door}") for one in ATTACKS for door in one.doors]
)
def test_an_attack_is_refused_in_one_line_and_nothing_is_written(attack, door, hub, tmp_path, capsys):
    (hub / "manifest.json").unlink(missing_ok=True)
    attack.make(hub)
    before = everything(tmp_path)
    code, line = through(door, hub, tmp_path / "out", capsys)
    assert code == 2, line
    assert attack.says in line
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert everything(tmp_path) == before


def test_links_of_the_hubs_cache_pass(original, tmp_path):
    snapshot = tmp_path / "models--me--a" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(original.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    inspect_incoming(snapshot)


def test_a_release_of_deepseek_passes(original, tmp_path):
    hub = shutil.copytree(original, tmp_path / "hub")
    for name in RELEASE:
        write(name, "text")(hub)
    inspect_incoming(hub)


RELEASE = (  # beside config, weights and tokenizer, in DeepSeek's releases, a clone and a download
    "modeling_deepseek.py", "configuration_deepseek.py", "LICENSE", "LICENSE-CODE", "LICENSE-MODEL",
    "README_WEIGHTS.md",
    ".gitattributes", "figures/benchmark.png", "figures/niah.png", "figures/benchmark.jpg", "inference/convert.py",
    "inference/fp8_cast_bf16.py", "inference/generate.py", "inference/kernel.py", "inference/model.py",
    "inference/requirements.txt", "inference/configs/config_16B.json", "inference/configs/config_236B.json",
    "inference/configs/config_671B.json", "assets/chat_template.jinja", "assets/code_agent_trajectory.html",
    ".git/hooks/post-checkout", ".cache/huggingface/download/config.json.metadata",
)  # fmt: skip


@pytest.mark.parametrize("name", RELEASE)
def test_each_file_of_a_release_is_known(name, original, tmp_path):
    hub = shutil.copytree(original, tmp_path / "hub")
    write(name, "text")(hub)
    inspect_incoming(hub)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.model", "added_tokens.json", "vocab.json", "NOTICE"]
)
def test_what_repositories_hold_beside_the_model_is_passed_over(name, original, tmp_path):
    hub = shutil.copytree(original, tmp_path / "hub")
    write(name, "text")(hub)
    inspect_incoming(hub)


def test_what_publish_makes_comes_in(original, tmp_path):
    model = shutil.copytree(original, tmp_path / "model")
    (model / "README.md").unlink()
    build_repository(tmp_path / "tree", model, card_facts())
    assert (tmp_path / "tree" / ".eval_results").is_dir()
    inspect_incoming(tmp_path / "tree")
