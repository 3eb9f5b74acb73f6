"""tokenizer: training documents to a byte-level BPE, or a tokenizer.json taken over."""

import sys

from headrace.stages.run import Door, Outcome, Run, main
from headrace.tokens.tokenizer import build_tokenizer


def body(run: Run) -> Outcome:
    """Learn the merges on a sample of the corpus, or load the file that the configuration names."""
    report = build_tokenizer(run.config.tokenizer, run.input("corpus"), run.output, run.log.info)
    summary = {"vocab_size": report["vocab_size"], "bytes_per_token": report["bytes_per_token"]}
    return Outcome(f"{report['vocab_size']:,} ids, {report['bytes_per_token']:.2f} bytes per token", summary)


DOOR = Door("tokenizer", body)

if __name__ == "__main__":
    sys.exit(main(DOOR))
