"""`run.json` round-trips and names the run as W&B's API does."""

from headrace.tracking.links import RunRecord, alias


def _record(entity):
    inputs = [{"name": "tokenize-1", "kind": "tokens", "hash": "sha256:" + "ab" * 32}]
    return RunRecord("pretrain-1", "g", "pretrain", "offline", "headrace", entity, 30.0, {"ключ": [1, None]}, inputs)


def test_the_record_is_read_as_written_and_leaves_no_other_file(tmp_path):
    record = _record(None)
    record.write(tmp_path)
    record.exit_code = 0
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_paths_and_aliases():
    assert _record(None).path == "headrace/pretrain-1"
    assert _record("me").path == "me/headrace/pretrain-1"
    assert alias("sha256:" + "ab" * 32) == "ab" * 8
