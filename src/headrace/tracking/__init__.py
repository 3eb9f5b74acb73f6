"""One tracked run per stage: a local JSONL first, Weights & Biases or trackio beside it, secrets redacted.

`metrics.jsonl` is the truth; everything that a service holds is derived from it and can be made again. The service is
called by a process of its own (`mirror`, `backends`) that follows the JSONL, so no fault of it, and no full disk, can
stop or slow the stage.
Offline W&B cannot link a run to its inputs: the links are kept in `run.json` (`links`) and replayed by `sync`.
The room knows nothing of stages, of the configuration's shape or of artifacts: it is handed plain containers and paths.
"""
