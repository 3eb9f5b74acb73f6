"""tokenize: gather the token shards into a dataset, making those that no batch job has made."""

import sys
from pathlib import Path

from headrace.artifacts.files import link_or_copy
from headrace.stages.run import Door, Outcome, Run, main
from headrace.tokens.shards import finish, make_shard, plan


def shard_folder(run_folder: Path) -> Path:
    """Where shards lie until the dataset is whole."""
    return run_folder / "shards"


def body(run: Run) -> Outcome:
    """Finished shards are verified and taken over; the others are made here."""
    corpus, tokenizer = run.input("corpus"), run.input("tokenizer")
    shards, config, units = shard_folder(run.folder), run.config.tokens, plan(run.config.tokens)
    shards.mkdir(exist_ok=True)
    for unit in units:
        make_shard(unit, corpus, tokenizer, config, shards)
    dataset = finish(shards, units)
    for path in sorted(shards.iterdir()):
        link_or_copy(path, run.output / path.name)
    train = dataset["splits"]["train"]
    summary = {"tokens": train["tokens"], "shards": len(train["shards"])}
    return Outcome(f"{train['tokens']:,} training tokens in {len(train['shards'])} shards", summary)


def finished_shards(run_folder: Path) -> int:
    """How far an interrupted stage has got."""
    return len(list(shard_folder(run_folder).glob("*.json")))


DOOR = Door("tokenize", body, progress=finished_shards)

if __name__ == "__main__":
    sys.exit(main(DOOR))
