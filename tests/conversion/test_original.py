"""The check's own reading of a checkpoint: the numbers that were written, and blind to the reading that exports."""

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_models import checkpoint_of, part_of, reference_model, sliced, tiny_model, tokenizer_folder
from headrace.checkpoint.reader import SlicedTensors
from headrace.conversion.check import expected_values, verify_export
from headrace.conversion.export import export
from headrace.conversion.original import open_original
from headrace.errors import UserError

EXPERTS = "model.layers.1.mlp.experts.down_proj.weight"


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory):
    """A plain file, and a checkpoint with it and its double as moving average."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_model()
    tensors = checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    average = {name: 2 * tensor for name, tensor in tensors.items()}
    whole = sliced(folder, model=tensors, ema=average, optimizer={f"{name}/m": t for name, t in tensors.items()})
    part_of(whole, folder / "checkpoint", "model", "ema")
    tokenizer_folder(folder / "tokenizer")
    return folder


def test_slices_and_a_file_give_the_numbers_that_were_written(made):
    written = load_file(made / "model.safetensors")
    for path, kind, factor in (("model.safetensors", "model", 1), ("checkpoint", "model", 1), ("checkpoint", "ema", 2)):
        original = open_original(made / path, kind)
        assert {name: tuple(shape) for name, shape in original.shapes().items()} == {
            name: tuple(tensor.shape) for name, tensor in written.items()
        }
        assert all(torch.equal(original.read(name), factor * tensor) for name, tensor in written.items())
        for name in ("lm_head.weight", "model.norm.weight"):  # past the end there are no rows
            for rows in (slice(128, 200), slice(256, 384)):
                assert torch.equal(original.read(name, rows=rows), factor * written[name][rows])
        for expert in range(8):
            assert torch.equal(original.read(EXPERTS, expert), factor * written[EXPERTS][expert])
            assert torch.equal(original.read(EXPERTS, expert, slice(0, 9)), factor * written[EXPERTS][expert, :9])


@pytest.mark.parametrize("path", ["model.safetensors", "checkpoint"])
def test_what_is_not_there_is_said(made, path):
    original = open_original(made / path, "model")
    for name, expert in ((EXPERTS, 8), ("model.layers.9.mlp.experts.down_proj.weight", 0), ("lm_head.bias", None)):
        with pytest.raises(KeyError):
            original.read(name, expert)


def test_a_kind_that_was_not_saved_is_refused_in_one_line(made, tmp_path):
    alone = part_of(sliced(tmp_path, model=load_file(made / "model.safetensors")), tmp_path / "alone", "model")
    with pytest.raises(UserError, match=r"slices.json: has no tensors of kind 'ema'"):
        open_original(alone, "ema")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("kind", ["model", "ema"])
def test_a_folder_of_slices_is_exported_like_a_plain_file(made, dtype, kind, tmp_path):
    config, tokenizer = tiny_model(), made / "tokenizer"
    plain = tmp_path / "plain.safetensors"
    if kind == "model":
        plain = made / "model.safetensors"
    else:
        save_file({name: 2 * t for name, t in load_file(made / "model.safetensors").items()}, plain)
    whole = next(made.glob("step-*"))
    export(plain, config, tokenizer, tmp_path / "one", dtype, 300_000)
    for name, source in (("two", made / "checkpoint"), ("three", whole)):
        export(source, config, tokenizer, tmp_path / name, dtype, 300_000, kind=kind)
        ours = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert ours == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
        assert verify_export(tmp_path / name, source, config, kind) == verify_export(tmp_path / "one", plain, config)
    expected, values = (
        expected_values(tmp_path / "one", *source) for source in ((plain,), (made / "checkpoint", kind))
    )
    assert expected.keys() == values.keys()
    assert all(torch.equal(expected[name], values[name]) for name in values)


def test_the_wrong_kind_does_not_pass_for_the_right_one(made, tmp_path):
    export(made / "checkpoint", tiny_model(), made / "tokenizer", tmp_path / "hub", "bf16", 1 << 30, kind="ema")
    with pytest.raises(UserError, match="differs from the checkpoint"):
        verify_export(tmp_path / "hub", made / "checkpoint", tiny_model())


def test_a_fault_in_the_checkpoints_own_reader_is_found(made, tmp_path, monkeypatch):
    """Two elements in exchanged places, with all hashes right: only a reading of another kind can tell."""
    read = SlicedTensors.read_into

    def exchanged(self, name, start, target):
        read(self, name, start, target)
        if name == EXPERTS:
            target[[70, 71]] = target[[71, 70]]

    monkeypatch.setattr(SlicedTensors, "read_into", exchanged)
    export(made / "checkpoint", tiny_model(), made / "tokenizer", tmp_path / "hub", "fp32", 1 << 30)
    with pytest.raises(UserError, match=r"experts.0.down_proj.weight differs from the checkpoint in 2 of \d+ elements"):
        verify_export(tmp_path / "hub", made / "checkpoint", tiny_model())


def test_a_flipped_bit_is_named_before_it_is_exported(made, tmp_path):
    damaged = part_of(next(made.glob("step-*")), tmp_path / "damaged", "model")
    path = damaged / "model-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model-00001\.safetensors: damaged: tensor 'model") as caught:
        export(damaged, tiny_model(), made / "tokenizer", tmp_path / "hub", "bf16", 1 << 30)
    assert "\n" not in str(caught.value)


def test_memory_is_one_tensor_not_the_model(tmp_path):
    """At any moment at most the tensor that is written and the one that is read are alive."""
    config = tiny_model(num_hidden_layers=6)
    tensors = checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    folder = part_of(sliced(tmp_path, model=tensors), tmp_path / "checkpoint", "model")
    largest = max(tensor.numel() for tensor in tensors.values())
    alive, peak = [], [0]
    get = SlicedTensors.get

    def counted(self, name):
        tensor = get(self, name)
        alive[:] = [one for one in alive if one() is not None]
        alive.append(weakref.ref(tensor))
        peak[0] = max(peak[0], sum(one().numel() for one in alive if one() is not None))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlicedTensors, "get", counted)
        export(folder, config, tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "hub", "bf16", 1 << 30)
    assert peak[0] <= 2 * largest < sum(tensor.numel() for tensor in tensors.values()) / 4
