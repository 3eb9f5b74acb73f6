"""Byte-level BPE with DeepSeek-V3's pretokeniser: trained on a sample of the corpus, or taken from a tokenizer.json.

The pretokeniser (V3's tokenizer.json, report section 4.1) cuts text three times, at runs of up to three digits, at
runs of Chinese and Japanese characters, and at words, punctuation with the line ends after it, and white space; then
bytes become characters. Merges never cross a cut. Control tokens carry V3's strings and have the first ids; no text
encodes to them (see `engine`). The special tokens of a file are those of the `tokenizer_config.json` beside it, or
V3's.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, __version__, decoders, models, pre_tokenizers, trainers

from headrace.artifacts.files import hash_file, read_json, write_atomic, write_json
from headrace.config.addresses import is_address, repository
from headrace.config.schema import TokenizerConfig
from headrace.errors import UserError
from headrace.tokens.engine import open_engine

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
CONTROL = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
"""The control tokens of a trained tokenizer; the place of each is its id."""

_CUTS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_MEASURED_BYTES = 1_000_000  # validation text on which bytes per token are measured


def pretokeniser() -> Any:
    """V3's pretokeniser as an object of the `tokenizers` library."""
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _CUTS]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(texts: Iterator[str], vocab_size: int) -> Any:
    """Learn at most `vocab_size` ids: control tokens, 256 bytes, merges seen twice or more. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pretokeniser()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(
    config: TokenizerConfig, corpus_folder: Path, out: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer_report.json` into `out`; returns the report.

    Raises `UserError` for a file that is no tokenizer.json, has more ids than `vocab_size`, or names no special tokens.
    """
    target = out / "tokenizer.json"
    if config.source == "train":
        documents, size, texts = _sample(corpus_folder / "sample.parquet", config.sample_bytes)
        write_atomic(target, train(texts, config.vocab_size).to_str(pretty=True).encode())
        special, sample = (
            {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
            {"documents": documents, "bytes": size},
        )
    else:
        path = _fetched(config.path) if is_address(config.path) else Path(config.path or "")
        if not path.is_file():
            raise UserError(f"tokenizer.path: {config.path!r} is not a file; give the path of a tokenizer.json")
        special, sample = _special_tokens_beside(path), None
        write_atomic(target, path.read_bytes())
    ids = _ids(target)
    _check(target, ids, special, config)
    write_json(out / "tokenizer_config.json", _transformers_config(special))
    report = {
        "source": config.source,
        "sha256": hash_file(target, "sha256"),
        "vocab_size": max(ids.values()) + 1,
        "special": {role: {"token": token, "id": ids[token]} for role, token in special.items()},
        "sample": sample,
        "bytes_per_token": _bytes_per_token(target, corpus_folder),
        "library": f"tokenizers {__version__}",
    }
    write_json(out / "tokenizer_report.json", report)
    log(f"tokenizer: {report['vocab_size']:,} ids, {report['bytes_per_token']:.2f} bytes of text per token")
    return report


def _fetched(address: str) -> Path:
    """The tokenizer.json of a Hub repository, in the Hub's cache on this machine, its tokenizer_config.json beside it.

    Raises `UserError` where it is not there or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, revision = repository(address)
    try:
        files = ["tokenizer.json", "tokenizer_config.json"]
        folder = snapshot_download(repo, revision=revision, allow_patterns=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer.path={address}: {said}; check name and network, or give a local file") from None
    return Path(folder) / "tokenizer.json"


def special_id(folder: Path, role: str) -> int:
    """The id of `bos_token`, `eos_token` or `pad_token` of a tokenizer folder."""
    token = _content(read_json(folder / "tokenizer_config.json").get(role))
    ids = _added(folder / "tokenizer.json")
    if token not in ids:
        raise UserError(f"{folder / 'tokenizer_config.json'}: {role} {token!r} is no added token of tokenizer.json")
    return ids[token]


def control_ids(folder: Path, tokens: Sequence[str], setting: str) -> list[int]:
    """The ids of control tokens of a tokenizer folder; `setting`, for the message, is what needs them."""
    ids = _added(folder / "tokenizer.json")
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise UserError(f"{setting}: {folder / 'tokenizer.json'} has no control token {missing[0]!r}; set it to 0")
    return [ids[token] for token in tokens]


def vocab_size(folder: Path) -> int:
    """The number of ids of a tokenizer folder: its largest id and one."""
    return max(_ids(folder / "tokenizer.json").values()) + 1


def _ids(tokenizer_json: Path) -> dict[str, int]:
    """The ids of the vocabulary and of the added tokens."""
    tree = read_json(tokenizer_json)
    try:
        return {**tree["model"]["vocab"], **{added["content"]: added["id"] for added in tree["added_tokens"]}}
    except (KeyError, TypeError):
        raise UserError(f"{tokenizer_json}: not a tokenizer.json with a BPE vocabulary") from None


def _added(tokenizer_json: Path) -> dict[str, int]:
    """The ids of the added tokens: of all words, these alone are kept from text (see `engine`)."""
    return {added["content"]: added["id"] for added in read_json(tokenizer_json).get("added_tokens") or ()}


def _special_tokens_beside(path: Path) -> dict[str, str]:
    beside = path.with_name("tokenizer_config.json")
    settings = read_json(beside) if beside.exists() else {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    special = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        content = _content(settings.get(role))
        if content:
            special[role] = content
    special.setdefault("pad_token", special.get("eos_token", EOS))  # padding is masked, any control token serves
    return special


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json, which some write with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return str(content) if content else None


def _check(target: Path, ids: dict[str, int], special: dict[str, str], config: TokenizerConfig) -> None:
    added, remedy = _added(target), "put a tokenizer_config.json that names another beside the file"
    for role in ("bos_token", "eos_token", "pad_token"):
        if special.get(role) not in added:
            lacking = "which tokenizer.json lacks among its added_tokens: text could produce it"
            found = f"{special[role]!r}, {lacking}" if role in special else "not given"
            raise UserError(f"tokenizer.path: {role} is {found}; {remedy}")
    if special["eos_token"] == read_json(target)["model"].get("unk_token"):
        raise UserError(f"tokenizer.path: eos_token stands for all unknown text, too, as unk_token; {remedy}")
    if max(ids.values()) >= config.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size} is less than the {max(ids.values()) + 1} ids of {config.path}; "
            f"set tokenizer.vocab_size={max(ids.values()) + 1} and a model.vocab_size that holds it"
        )


def _transformers_config(special: dict[str, str]) -> dict[str, Any]:
    """What transformers' AutoTokenizer needs to load the folder; nothing is added to encoded text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _sample(path: Path, sample_bytes: int) -> tuple[int, int, Iterator[str]]:
    """Documents that fit, tried in the order of a hash of their ids: number, bytes, and the texts in file order."""
    file = pq.ParquetFile(path)
    sizes: dict[int, int] = {}
    for batch in file.iter_batches(columns=["id", "text"]):
        sizes |= zip(batch["id"].to_pylist(), pc.binary_length(batch["text"]).to_pylist(), strict=True)
    chosen, total = set(), 0
    for number in sorted(sizes, key=lambda number: hashlib.blake2b(f"sample {number}".encode()).digest()):
        if total + sizes[number] <= sample_bytes:
            chosen.add(number)
            total += sizes[number]
    if not chosen:
        raise UserError(f"tokenizer.sample_bytes={sample_bytes} is smaller than every training document; raise it")
    texts = (
        text
        for batch in file.iter_batches(columns=["id", "text"])
        for number, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
        if number in chosen
    )
    return len(chosen), total, texts


def _bytes_per_token(tokenizer_json: Path, corpus_folder: Path) -> float:
    """Bytes of text per token on the first validation documents (on the sample where there are none)."""
    for name in ("validation", "sample"):
        texts, total = [], 0
        for batch in pq.ParquetFile(corpus_folder / f"{name}.parquet").iter_batches(64, columns=["text"]):
            texts += batch["text"].to_pylist()
            total = sum(len(text.encode()) for text in texts)
            if total >= _MEASURED_BYTES:
                break
        if texts:
            return total / len(open_engine("tokenizers", tokenizer_json).encode(texts)[0])
    raise UserError(f"{corpus_folder}: the corpus has no document; run the corpus stage again")
