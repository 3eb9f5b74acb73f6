"""Batches of token shards: every shard in one batch, and batches that lead nowhere stop."""

import pytest

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.stages import tokenize_shards
from headrace.stages.tokenize_shards import batch_units
from headrace.tokens.shards import plan


@pytest.mark.parametrize("per_job", [1, 2, 3, 4, 100])
def test_every_shard_is_in_one_batch(per_job: int) -> None:
    units = plan(load().tokens)
    count = -(-len(units) // per_job)
    together = [unit for batch in range(count) for unit in batch_units(f"{batch:05d}", units, per_job)]
    assert together == units
    for wrong in (f"{count:05d}", "-1", "x", ""):
        with pytest.raises(UserError, match="give a number"):
            batch_units(wrong, units, per_job)


def test_the_same_75_three_times_stops_with_the_reason(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    words = [
        "00000",
        "experiment=tiny",
        "corpus=files",
        f"corpus.paths=[{tmp_path}/text.txt]",
        f"paths.results={tmp_path}",
    ]

    def stop(*_: object) -> None:
        raise tokenize_shards.StopRequested("SIGTERM")

    monkeypatch.setattr(tokenize_shards.manifests, "verify", stop)
    assert [tokenize_shards.main(words) for _ in range(4)] == [75, 75, 75, 1]
    assert "without progress" in capsys.readouterr().err.splitlines()[-1]
