"""Mask secrets in everything that a run writes about itself."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
# Only the last word of a name counts, so that max_tokens, monkey and keyboard stay readable. A
# vocabulary's tokens, such as pad_token, are not secrets.
_NAME = (
    r"(?:[\w.-]*?[_.-])?(?:api_?key|access_?key|secret_?key|private_?key|secret|"
    r"(?<!pad_)(?<!bos_)(?<!eos_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)token|"
    r"\w*password|\w*passwd|passphrase|credentials?|auth|pat)"
)
_SECRET_NAME = re.compile(_NAME + r"\Z", re.IGNORECASE)
# A number under a name that ends so, such as image_token, may be no secret.
_MAY_COUNT = ("token", "auth", "pat")
_ASSIGNED = re.compile(
    rf"""(?ix) ((?<![\w.-]) ["']? {_NAME} ["']? \s*
    (?:: \s* str \s* (?:\| \s* None \s*)? )? [=:] \s* )
    ( "[^"\n]{{4,}}" | '[^'\n]{{4,}}' | [^\s"',;&\\)\]}}]{{4,}} )"""
)
# An override, whose value may have spaces and quotes, and the same as a word that shlex quoted.
_OVERRIDE = re.compile(
    rf"(\+{{0,2}}{_NAME}=)(?![$<]|(?:null|none|true|false)\Z)[^\n]{{4,}}", re.IGNORECASE
)
_WORD = re.compile(
    rf"""(?ix) (?<![\w'"]) ' (\+{{0,2}}{_NAME}=) (?! [$<] | (?:null|none|true|false)' )
    (?: [^'\n] | '"'"' ){{4,}} ' (?!")"""
)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2})[^\s/@'\"]+@", re.IGNORECASE)
_KNOWN_FORMS = re.compile(
    r"(?:\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-[\w-]{20,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}"
    r"|\bwandb_v1_\w{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=Bearer )[\w.~+/-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
)
_HARMLESS = {"null", "none", "true", "false", "str", MASK}
# No value, a reference, or a marker such as <image>.
_NO_SECRET = re.compile(r"|none|null|<.*>|\$\{.*\}", re.IGNORECASE)


def redact(text: str, secrets: Sequence[str] | None = None) -> str:
    """Return the text with secrets masked; pass `secrets` if they are already known.

    Masks credentials in URLs, assigned secrets, known forms of tokens and the values of this
    process's secret environment variables.
    """
    for value in _environment_secrets() if secrets is None else secrets:
        text = text.replace(value, _masked(value))
    text = _IN_URL.sub(rf"\1{MASK}@", text)
    text = _KNOWN_FORMS.sub(lambda match: _masked(match[0]), text)
    text = _WORD.sub(rf"'\1{MASK}'", text)
    return _ASSIGNED.sub(_mask_assigned, text)


def redact_all(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """Return a nested value with every string redacted; under a secret key, the whole string.

    A number is not masked under a key such as image_token. Strings of a list may be overrides.
    """
    secrets = _environment_secrets() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            key: MASK if _is_secret(str(key), item) else redact_all(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            f"{found[1]}{MASK}"
            if isinstance(item, str) and (found := _OVERRIDE.fullmatch(item))
            else redact_all(item, secrets)
            for item in value
        ]
    return redact(value, secrets) if isinstance(value, str) else value


def _is_secret(key: str, value: Any) -> bool:
    if isinstance(value, str):
        return is_secret_name(key) and not _NO_SECRET.fullmatch(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_long = len(str(value)) > 3  # as in an override; a run's model may need 0.5
    return is_number and is_long and is_secret_name(key) and not key.lower().endswith(_MAY_COUNT)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    return _SECRET_NAME.match(name) is not None


def _masked(secret: str) -> str:
    """Return the mask, with as many lines as the secret: a patch counts its lines."""
    return "\n".join([MASK] * (secret.count("\n") + 1))


def _mask_assigned(match: re.Match[str]) -> str:
    value = match[2].strip("\"'")
    if value.lower() in _HARMLESS or value.startswith(("$", "<", "os.", "self.")):
        return match[0]  # a reference, or a marker such as <pad>, is not a secret
    return match[1] + MASK


def _environment_secrets() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= 8
        and (is_secret_name(name) or name.upper().endswith(("_KEY", "_PASS", "_PWD")))
    }
    # A path (SSH_AUTH_SOCK, GOOGLE_APPLICATION_CREDENTIALS) names a secret but is not one.
    return sorted((v for v in values if not v.startswith("/")), key=len, reverse=True)
