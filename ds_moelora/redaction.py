"""Keeps tokens, keys, secrets and passwords out of whatever is written, printed or uploaded.

Three nets, from the exact to the coarse:

    redact          values in mappings, by the names above them
    redact_words    values on a command line, by the flags before them
    redact_text     free text: values that `remember` has seen, user:password@ in addresses, `name=value`, Hub tokens
                    and those behind "Bearer"

A name is split into words (`hub_token`, `WANDB_API_KEY`, `apiKey`). It names a secret if a word says password, secret,
credential or authorization; if token or key, also in the plural, follows an owner (`api`, `hub`, `access`); or if it
ends with token, key or pass, but for those of a vocabulary (`pad_token`). Other tokens and keys are counted
(`max_new_tokens`), numbered (`eos_token_id`) or attention's (`num_key_value_heads`). Numbers under a secret name are
hidden as well; True, False and None never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
# Shorter values are left in free text: they would blot out words that happen to be equal.
SHORTEST = 6

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ALWAYS = re.compile(r".*(secrets?|passwords?|passwd|passphrase|passcode|credentials?|authorization)|pwd|pat|bearer")
_LAST = re.compile(r".*token|key|pass|.*(api|access|auth|private|secret|ssh|license|encryption|signing)key")
_OWNED = re.compile(r"(token|key)s?")
_OWNERS = {"api", "access", "auth", "bearer", "hub", "hf", "private", "session", "refresh", "ssh", "deploy"}
# What stands before the token of a vocabulary.
_SPECIAL = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "video", "audio", "boi", "eoi", "boa", "eoa",
            "bot", "eot", "boc", "eoc", "special", "start", "end", "stop", "next", "first", "last", "vision", "per",
            "num", "max", "min", "new", "mean", "forced", "prefix", "suffix", "middle"}  # fmt: skip

_USER = re.compile(r"(?<=://)[^/\s'\"]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b|(?<=\bBearer )[\w.~+/-]{6,}=*")
_ASSIGNED = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<between>["']\s*:\s*|\s*=\s*)(?P<value>"[^"]*"|'[^']*'|\[[^]]*\]|[^\s"'&,;)}\]]+)"""
)

_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a flag, variable or field of this name holds a secret; the module has the rule."""
    words = [word.lower() for word in _WORD.findall(name)]
    pairs = list(zip(["", *words], words, strict=False))
    owned = any(before in _OWNERS and _OWNED.fullmatch(word) for before, word in pairs)
    last = any(before not in _SPECIAL and _LAST.fullmatch(word) for before, word in pairs[-1:])
    return owned or last or any(_ALWAYS.fullmatch(word) for word in words)


def remember(values: Any) -> None:
    """Takes note of the secrets in a (nested) mapping, so that `redact_text` finds them in any text.

    Args:
        values: e.g. `os.environ`, a recipe, a DeepSpeed config.
    """

    def note(value: Any, hide: bool) -> None:
        if hide and len(str(value)) >= SHORTEST:
            _known.add(str(value))

    _map(values, False, note)


def remember_words(words: Sequence[str]) -> None:
    """Takes note of the secrets on a command line."""
    for flag, _, value in _flags(words):
        remember({flag: _parsed(value)})


def redact(value: Any) -> Any:
    """A copy of plain values (mappings, lists, texts) without secrets; other objects are returned as they are."""
    return _map(value, False, _redact_leaf)


def redact_words(words: Sequence[str]) -> str:
    """A command line as one text: `--hub_token X`, `--hub_token=X`, JSON with a token in it, addresses."""
    shown = []
    for flag, before, value in _flags(words):
        plain = _parsed(value)
        safe = _map(plain, is_secret(flag), _redact_leaf) if value else value
        shown.append(before + (value if safe == plain else safe if isinstance(safe, str) else json.dumps(safe)))
    return " ".join(shown)


def redact_text(text: str) -> str:
    """Free text, such as an error message, without secrets that can be told from their surroundings."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _TOKEN.sub(REDACTED, _USER.sub(f"{REDACTED}@", text))
    return _ASSIGNED.sub(_redact_assignment, text)


def _map(value: Any, hide: bool, leaf: Callable[[Any, bool], Any]) -> Any:
    """`leaf` of every value in nested mappings and lists, told whether a name above it is a secret's."""
    if isinstance(value, Mapping):
        return {key: _map(item, hide or is_secret(str(key)), leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, hide, leaf) for item in value]
    return leaf(value, hide and value is not None and not isinstance(value, bool))


def _redact_leaf(value: Any, hide: bool) -> Any:
    return REDACTED if hide else redact_text(value) if isinstance(value, str) else value


def _flags(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """(flag that a word belongs to, what is shown as it is, value) of every word of a command line."""
    found, flag = [], ""
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            found.append((flag, flag + equals, value))
        else:
            found.append((flag, "", word))
    return found


def _parsed(word: str) -> Any:
    """The JSON that a word is, as transformers reads it; otherwise the word."""
    if not word.startswith(("{", "[")):
        return word
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return word


def _redact_assignment(match: re.Match[str]) -> str:
    value = match["value"].strip("\"'")
    if not is_secret(match["name"]) or value in ("", REDACTED, "None", "True", "False", "null"):
        return match[0]
    return f"{match['name']}{match['between']}{match['value'].replace(value, REDACTED)}"
