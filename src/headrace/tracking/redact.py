"""Secrets never reach a file: they are replaced in configurations, log records and strings before anything is written.

Three ways to know one: it is the value of an environment variable that is named like a secret (`HF_TOKEN`,
`WANDB_API_KEY`); it looks like one (`hf_...`, a private key, `user:password@host`); or it stands beside a word such as
`password=`. 40 hex digits alone are not one, although W&B's older keys look so: that is also what a git commit is.
The publication gate uses `find_secrets` on every text file that it lets out.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "[redacted]"
_MIN_LENGTH = 8  # a shorter value ("1", "false") stands in too many innocent places

_SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?:_|\d|$)", re.I)
_INNOCENT_VARIABLE = re.compile(r"_(?:PATH|FILE|DIR|ID|NAME)$", re.I)
_SECRET_FIELD = re.compile(
    r"(?:^|[_-])(?:(?:api|access|private)_?key|password|passwd|secret|(?:access|auth|api|hf)_token)$", re.I
)

_PATTERNS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_(?:oauth_)?[A-Za-z0-9]{30,}",
    "a W&B key": r"\bwandb_v\d+_\w{20,}|wandb[^\n]{0,24}?\b(?:local-)?(?P<secret>[0-9a-f]{40})\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:proj-|ant-)?[\w-]{32,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in a URL": r"://[^\s/:@\"']{0,100}:(?P<secret>[^\s/:@\"']{1,200})@",
    "an assigned secret": (
        r"(?:(?:api|access|secret)_?key|password|passwd|secret|(?:access|auth|api|hf)_token)"
        r"[\"']?\s*[:=]\s*[\"']?(?P<secret>(?=[A-Za-z_+/=.-]*\d)[\w+/=.-]{12,})"
    ),
}
_COMPILED = {kind: re.compile(pattern, re.I if "assigned" in kind else 0) for kind, pattern in _PATTERNS.items()}


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret."""
    return bool(_SECRET_VARIABLE.search(name)) and not _INNOCENT_VARIABLE.search(name)


def find_secrets(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (what it looks like, start, end) of everything in `text` that is written like a secret."""
    for kind, pattern in _COMPILED.items():
        for match in pattern.finditer(text):
            group = "secret" if match.groupdict().get("secret") else 0
            yield kind, match.start(group), match.end(group)


class Redactor:
    """Replaces secrets; knows the values that the environment held when it was made."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        values = {value for name, value in variables.items() if is_secret_name(name) and len(value) >= _MIN_LENGTH}
        self._values = sorted(values, key=len, reverse=True)  # a value may contain another

    def text(self, text: str) -> str:
        """`text` with every secret replaced by `[redacted]`."""
        for value in self._values:
            text = text.replace(value, MASK)
        for _, start, end in sorted(find_secrets(text), key=lambda span: span[1], reverse=True):
            text = text[:start] + MASK + text[end:]
        return text

    def tree(self, value: Any) -> Any:
        """A copy of nested mappings, lists and tuples in which strings, and values under secret names, are clean."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._field(str(key), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def _field(self, name: str, value: Any) -> Any:
        return MASK if isinstance(value, str) and value and _SECRET_FIELD.search(name) else self.tree(value)


class RedactingFilter(logging.Filter):
    """Put it on every handler: message, arguments and traceback of a record leave without secrets."""

    def __init__(self, redactor: Redactor | None = None) -> None:
        super().__init__()
        self._redactor = redactor or Redactor()

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record in place; never drops one."""
        record.msg, record.args = self._redactor.text(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.exc_text:
            record.exc_text = self._redactor.text(record.exc_text)
        return True
