"""Hydra composition: a list of overrides in, one validated `Config` out.

The same function serves the Snakefile, every stage program and the tests, so that the same words always mean the same
configuration. It uses Hydra's compose API: no `hydra.main`, no run directories, no change of the working directory.
Every problem is collected and reported at once, as one `UserError` with one line per problem.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from headrace.config.checks import problems
from headrace.config.schema import Config
from headrace.errors import UserError

CONF = Path(__file__).resolve().parents[3] / "conf"

_ADAPTER = TypeAdapter(Config)


def load(overrides: Sequence[str] = (), conf: Path = CONF) -> Config:
    """Compose `conf/config.yaml` with Hydra `overrides` and validate the result.

    Raises `UserError` with one line per unknown key, wrong type or impossible combination.
    """
    unsafe = [word for word in overrides if "${" in word]
    if unsafe:
        raise UserError(f"config: {unsafe[0]!r}: interpolations are not accepted on the command line; write the value")
    # Here, so that ranks, which are started again after a fault and compose nothing, start half a second earlier.
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("row_lengths", _row_lengths, replace=True)
    try:
        with hydra.initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            tree = hydra.compose("config", overrides=list(overrides))
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"config: {_one_line(error)}") from None
    return validate(plain)


def validate(tree: Any) -> Config:
    """Build a `Config` from plain containers; raises `UserError` that lists everything that is wrong."""
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise UserError("\n".join(f"config: {line}" for line in _describe(error))) from None
    wrong = problems(config)
    if wrong:
        raise UserError("\n".join(f"config: {line}" for line in wrong))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as JSON-ready containers, in the spelling of the YAML files."""
    plain: dict[str, Any] = _ADAPTER.dump_python(config, mode="json", by_alias=True)
    return plain


def group_to_dict(group: Any) -> Any:
    """One group of the tree as JSON-ready containers."""
    return TypeAdapter(type(group)).dump_python(group, mode="json", by_alias=True)


def groups_to_dict(config: Config, groups: Sequence[str]) -> dict[str, Any]:
    """Some groups of the tree as JSON-ready containers."""
    return {name: group_to_dict(getattr(config, name)) for name in groups}


def groups_from(tree: Mapping[str, Any]) -> Config:
    """What `groups_to_dict` gave: a tree that has these groups and no others; a value that does not fit is an error."""
    types = get_type_hints(Config)
    try:
        groups = {name: TypeAdapter(types[name]).validate_python(value) for name, value in tree.items()}
    except ValidationError as error:
        raise UserError("\n".join(_describe(error))) from None
    return cast(Config, SimpleNamespace(**groups))


def overrides_from(snakemake_config: Mapping[str, Any]) -> list[str]:
    """Translate Snakemake's `config` into Hydra overrides.

    `--config experiment=tiny` chooses a group; `--config set="recipe.tokens=1e6 model=nano"` takes Hydra's whole
    grammar, separated by spaces outside quotes and brackets; nested YAML (`--config recipe='{tokens: 1000000}'`) is
    flattened.
    """
    overrides: list[str] = []
    for key, value in snakemake_config.items():
        if key == "runs":  # names finished runs for `snakemake compare`; it is no setting
            continue
        if key == "set":
            overrides += split_words(_with_last_quote(str(value)))
        elif isinstance(value, Mapping):
            overrides += [f"{name}={in_hydras_words(item)}" for name, item in _flatten(key, value)]
        else:
            overrides.append(f"{key}={in_hydras_words(value)}")
    return overrides


def split_words(text: str) -> list[str]:
    """Split at white space outside quotes and brackets; the quotes stay, since Hydra's grammar reads them."""
    words: list[str] = []
    current, depth, quote = "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character.isspace() and depth == 0 and not quote:
            words, current = ([*words, current] if current else words), ""
        else:
            current += character
    return [*words, current] if current else words


def _row_lengths(recipe: Any) -> list[int]:
    """Tokens of a row in each phase of a recipe, its own first: what `tokens.row_lengths` is where nobody sets it."""
    return list(dict.fromkeys([recipe.sequence_length, *(phase.sequence_length for phase in recipe.extensions)]))


def in_hydras_words(value: Any) -> str:
    """A value that YAML has parsed, as Hydra's grammar spells it."""
    if isinstance(value, list):
        return f"[{','.join(map(in_hydras_words, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if re.fullmatch(r"[\w.@%+/-]+", text, re.ASCII) or text.startswith("["):
        return text
    # In Hydra's grammar backslashes count only before a quote, where each must be doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _with_last_quote(text: str) -> str:
    """Snakemake strips quotes from the ends of a value, so that `set="a.b='x y'"` arrives without its last one."""
    quote = ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
    return text + quote


def _flatten(prefix: str, tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        leaves += _flatten(name, value) if isinstance(value, Mapping) else [(name, value)]
    return leaves


def _describe(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden" or problem["type"] == "unexpected_keyword_argument":
            lines.append(f"{where}: unknown key; see conf/{problem['loc'][0]!s}/ for the keys that there are")
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})")
    return lines


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
