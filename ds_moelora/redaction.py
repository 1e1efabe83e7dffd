"""Keeps tokens, keys, secrets and passwords out of whatever is written, printed or uploaded.

Three nets, from the exact to the coarse:

    redact          values in mappings, by the names above them
    redact_words    values on a command line, by the flags before them
    redact_text     free text: values that `remember` has seen, user:password@ in addresses, `name=value`, Hub tokens

A name is split into words (`hub_token`, `WANDB_API_KEY`, `apiKey`). It names a secret if a word says password,
secret or credential, or says token or key, except where its neighbours say that this is another kind of token or key:
`pad_token`, `eos_token_id`, `max_new_tokens`, `num_input_tokens_seen`, `num_key_value_heads`. Numbers under a token's
or key's name are hidden as well; True, False and None never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
# Shorter values are left in free text: they would blot out words that happen to be equal.
SHORTEST = 6

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ALWAYS = re.compile(r".*(secrets?|passwords?|passwd|passphrase|passcode|credentials?)|pwd|pat")
_TOKEN = re.compile(r".*token")
_KEY = re.compile(r"key|.*(api|access|auth|private|secret|ssh|license|encryption|signing)key")
_PLURAL = re.compile(r"(.*token|.*key)s")
# Whose plural names credentials; other tokens and keys are counted or listed.
_OWNERS = {"api", "access", "auth", "bearer", "hub", "hf", "private", "session", "refresh", "ssh"}
# Tokens of a vocabulary: what stands before or after the word.
_SPECIAL = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "video", "audio", "boi", "eoi", "boa", "eoa",
            "bot", "eot", "boc", "eoc", "special", "start", "end", "stop", "next", "first", "last", "vision", "per",
            "num", "max", "min", "new", "trainable", "mean", "of", "forced", "prefix", "suffix", "middle"}  # fmt: skip
_OF_VOCABULARY = {"id", "ids", "type", "types", "index", "indices", "count", "counts", "length", "len", "embedding",
                  "embeddings", "classification", "level", "accuracy", "dropout", "logits", "loss", "dim",
                  "fraction"}  # fmt: skip
_OF_ATTENTION = {"value", "values", "heads", "head", "padding", "states", "proj", "mask", "cache", "dim", "length",
                 "norm", "bias", "query", "layer", "layers", "error", "multiplier"}  # fmt: skip

_USER = re.compile(r"(?<=://)[^/\s'\"]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_ASSIGNED = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<between>["']\s*:\s*|\s*=\s*)(?P<value>"[^"]*"|'[^']*'|[^\s"'&,;)}\]]+)"""
)

_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a flag, variable or field of this name holds a secret; the module has the rule."""
    words = [word.lower() for word in _WORD.findall(name)]
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if _ALWAYS.fullmatch(word):
            return True
        if _TOKEN.fullmatch(word) and before not in _SPECIAL and after not in _OF_VOCABULARY:
            return True
        if _KEY.fullmatch(word) and before != "num" and after not in _OF_ATTENTION:
            return True
        if _PLURAL.fullmatch(word) and before in _OWNERS:
            return True
    return False


def remember(values: Any) -> None:
    """Takes note of the secrets in a (nested) mapping, so that `redact_text` finds them in any text.

    Args:
        values: e.g. `os.environ`, a recipe, a DeepSpeed config.
    """
    _known.update(found for found in _secrets(values, False) if len(found) >= SHORTEST)


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain values (mappings, lists, texts) without secrets; other objects are returned as they are.

    Args:
        value: what may hold some.
        name: what it is called.
    """
    return _redact(value, is_secret(name))


def redact_words(words: Sequence[str]) -> str:
    """A command line as one text: `--hub_token X`, `--hub_token=X`, JSON with a token in it, addresses."""
    shown, hide = [], False
    for word in words:
        flag, separator, _ = word.partition("=")
        if word.startswith("-"):
            hide = is_secret(flag)
            shown.append(f"{flag}={REDACTED}" if hide and separator else _redact_word(word))
        else:
            shown.append(REDACTED if hide else _redact_word(word))
    return " ".join(shown)


def remember_words(words: Sequence[str]) -> None:
    """Takes note of the secrets on a command line."""
    flag = ""
    for word in words:
        if word.startswith("-"):
            flag, _, value = word.partition("=")
            remember({flag: _parsed(value)})
        else:
            remember({flag: _parsed(word)})


def redact_text(text: str) -> str:
    """Free text, such as an error message, without secrets that can be told from their surroundings."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _HUB_TOKEN.sub(REDACTED, _USER.sub(f"{REDACTED}@", text))
    return _ASSIGNED.sub(_redact_assignment, text)


def _redact(value: Any, hide: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _redact(item, hide or is_secret(str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, hide) for item in value]
    if hide and value is not None and not isinstance(value, bool):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def _redact_word(word: str) -> str:
    flag, separator, value = word.partition("=") if word.startswith("-") else ("", "", word)
    parsed = _parsed(value)
    if isinstance(parsed, dict | list):
        return f"{flag}{separator}{json.dumps(redact(parsed))}" if redact(parsed) != parsed else word
    return redact_text(word)


def _parsed(word: str) -> Any:
    """The JSON that a word is, as transformers reads it; otherwise the word."""
    if not word.startswith(("{", "[")):
        return word
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return word


def _secrets(value: Any, hidden: bool) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, hidden or is_secret(str(key)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, hidden)
    elif hidden and value is not None and not isinstance(value, bool):
        yield str(value)


def _redact_assignment(match: re.Match[str]) -> str:
    value = match["value"].strip("\"'")
    if not is_secret(match["name"]) or value in ("", REDACTED, "None", "True", "False", "null"):
        return match[0]
    return f"{match['name']}{match['between']}{match['value'].replace(value, REDACTED)}"
