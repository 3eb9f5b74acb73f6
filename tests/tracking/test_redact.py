"""Secrets are found by name, by look and by neighbourhood; what only resembles one stays."""

import logging
import sys

import pytest

from headrace.tracking.redact import MASK, RedactingFilter, Redactor, find_secrets, is_secret_name

_SECRETS = [
    "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0iL",
    "wandb_v1_abcDEF123456789012345678901234567890",
    "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "ghp_" + "A1b2C3d4E5" * 4,
    "sk-proj-" + "A1b2C3d4E5" * 4,
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdefghijklmnop",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "https://me:s3cret-word@proxy.example:3128/",
    'password: "correct-h0rse-battery"',
    "api_key='Zx81-9901-aa77-bb'",
]
_INNOCENT = [
    "commit 0123456789abcdef0123456789abcdef01234567",
    "sha256:" + "ab" * 32,
    "recipe.tokens=6000000 eos_token=<|end|> bos_token_id: 0",
    "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README.md",
    "see http://127.0.0.1:8080/path and mail me@example.com",
    "the secret of the token: a password is asked for",
    "tokenizer.json 1234567 bytes, keys=4096",
]


@pytest.mark.parametrize("secret", _SECRETS)
def test_secrets_that_look_like_one_are_replaced(secret):
    clean = Redactor({}).text(f"before {secret} after")
    assert MASK in clean and clean.startswith("before ") and clean.endswith(" after")
    core = secret.split("=")[-1].split(": ")[-1].strip("'\"")
    assert core not in clean


@pytest.mark.parametrize("text", _INNOCENT)
def test_what_only_resembles_a_secret_stays(text):
    assert Redactor({}).text(text) == text
    assert list(find_secrets(text)) == []


def test_values_of_secret_variables_are_replaced_wherever_they_stand():
    redactor = Redactor(
        {"HF_TOKEN": "canary-one", "MY_SECRET_2": "canary-one-longer", "SHORT_KEY": "1", "HOME": "/root"}
    )
    assert redactor.text("x canary-one-longer canary-one 1 /root") == f"x {MASK} {MASK} 1 /root"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("DB_PASSWORD", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("HF_TOKEN_PATH", False),
        ("KEYBOARD", False),
        ("AWS_ACCESS_KEY_ID", False),
    ],
)
def test_names_of_variables(name, secret):
    assert is_secret_name(name) is secret


def test_trees_are_cleaned_by_field_and_by_value():
    tree = {
        "api_key": "plain",
        "list": ["canary-value", 3, {"url": "https://a:b2@c"}],
        "tokens": 5,
        "eos_token": "<|e|>",
    }
    clean = Redactor({"A_TOKEN": "canary-value"}).tree(tree)
    assert clean == {
        "api_key": MASK,
        "list": [MASK, 3, {"url": f"https://a:{MASK}@c"}],
        "tokens": 5,
        "eos_token": "<|e|>",
    }


def test_log_records_leave_without_secrets():
    lines = []
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.emit = lambda record: lines.append(handler.format(record))
    handler.addFilter(RedactingFilter(Redactor({"HF_TOKEN": "canary-value"})))
    logger = logging.Logger("redact")
    logger.addHandler(handler)
    logger.info("token %s of %d", "canary-value", 3)
    try:
        raise ValueError("canary-value was refused")
    except ValueError:
        logger.error("failed", exc_info=sys.exc_info())
    text = "\n".join(lines)
    assert "canary-value" not in text
    assert f"INFO token {MASK} of 3" in text and f"ValueError: {MASK} was refused" in text
