"""What is wrong with a config, in words: pydantic's faults as what, where, got, expected, fix."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel

_CREDENTIALS = re.compile(r"://([^/]*|[^/:]+:(?!\d+/)[^@]*)@")
"""`user:secret@` in any URL of a chain. AWS secrets may hold slashes; `host:8020/` is no secret."""
_SIGNED = re.compile(r"[?&](x-amz-\w+|x-goog-\w+|signature|sig|(access_)?token)=", re.IGNORECASE)
"""A presigned URL is a credential itself."""
_NAMED_USER = re.compile(r"\b(az|abfss?|hdfs|webhdfs)://[^/:@]+@", re.IGNORECASE)
"""Of Azure `container@account`. It is no secret, but not a part of the path either."""


def carries_credentials(text: str) -> bool:
    """Whether a URL in the text holds a password, a key or a signature."""
    text = _NAMED_USER.sub(r"\1://", text)
    return bool(_CREDENTIALS.search(text) or _SIGNED.search(text))


_MISTYPED = re.compile(
    r"[a-z][a-z0-9+.]+:(/(?!/)|/*$)|(s3a?|gc?s|az|abfss?|hdfs|https?):///", re.IGNORECASE
)
"""fsspec takes `s3:/bucket/x` for a local path, and `s3://`: what `s3://$BUCKET` may come to."""


def fault_of_url(url: str) -> str | None:
    """What is wrong with a URL or path, to the eye."""
    if carries_credentials(url):
        return (
            "a URL carries credentials. Only references travel: take them out and set them in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    if any(map(_NAMED_USER.match, url.split("::"))):  # links of a chain
        return (
            f"got {url}, expected a URL without '@': what is in front of it is lost where files "
            "are listed. Write az://CONTAINER/PATH, with AZURE_STORAGE_ACCOUNT_NAME in the "
            "environment, or hdfs://HOST/PATH, with HADOOP_USER_NAME"
        )
    if _MISTYPED.match(url):
        return f"got {url}, expected a path, or a URL such as s3://BUCKET/KEY"
    return None


_EXPECTED = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("decimal_type", "decimal_parsing", "float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a section of keys"),
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
}
"""By pydantic's names of faults."""


def describe(faults: list[dict[str, Any]], model: type[BaseModel]) -> list[str]:
    """Pydantic's faults as what, where, got, expected, fix: a line for each key.

    Of a union each branch has its fault: what our own validators say counts, else those that look
    furthest into the value.
    """
    by_key: dict[str, list[dict[str, Any]]] = {}
    for fault in faults:
        by_key.setdefault(_key(fault, model), []).append(fault)
    lines = []
    for key, some in by_key.items():
        own = [fault for fault in some if fault["type"] not in _EXPECTED]
        deepest = max(len(fault["loc"]) for fault in some)
        furthest = [fault for fault in some if len(fault["loc"]) == deepest]
        lines.append(_describe(key, own or furthest, model))
    return lines


def _key(fault: dict[str, Any], model: type[BaseModel]) -> str:
    """The key of the config; unions add names of their branches ('int', 'literal[...]')."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "missing"):  # its parents are there: no branches
        return key
    known = all_keys(model)
    while key not in known and "." in key:
        key = key.rpartition(".")[0]
    return key


def _describe(key: str, faults: list[dict[str, Any]], model: type[BaseModel]) -> str:
    """The faults of one key."""
    first = faults[0]
    if first["type"] == "extra_forbidden":
        known = all_keys(model)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        same_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
        best = near or same_leaf
        hint = f" Did you mean '{best[0]}'?" if best else f" Valid keys: {', '.join(known)}."
        return f"key '{key}' is unknown.{hint}"
    if first["type"] == "missing":
        return f"key '{key}' is missing and has no default."
    got = first["input"]
    shown = "" if isinstance(got, (dict, BaseModel)) else f" got {got!r}"
    if carries_credentials(shown):
        shown = " got a URL with credentials"
    if first["type"] not in _EXPECTED:  # said by our own validators
        said = str(first["msg"]).removeprefix("Value error, ")
        said = said[:1].lower() + said[1:]
        if not key:  # which says itself what it is about
            return said
        shown = "" if said.startswith("got ") else f"{shown};" * bool(shown)
        return f"key '{key or 'config'}':{shown} {said}"
    expected = [_EXPECTED[f["type"]].format_map(f.get("ctx", {})) for f in faults]
    hint = ""
    if isinstance(got, str):
        choices = re.findall(r"'([^']+)'", " ".join(expected))
        near = difflib.get_close_matches(got, choices, n=1, cutoff=0.4)
        hint = f". Did you mean '{near[0]}'?" if near else ""
    comma = "," if shown else ""
    reasons = ", or ".join(dict.fromkeys(expected))
    return f"key '{key or 'config'}':{shown}{comma} expected {reasons}{hint}"


def all_keys(model: type[BaseModel]) -> list[str]:
    """Every section, and every key of one as `section.key`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(name)
        kinds = get_args(field.annotation) or (field.annotation,)  # X, or X | None
        for section in kinds:
            if isinstance(section, type) and issubclass(section, BaseModel):
                keys.extend(f"{name}.{sub}" for sub in all_keys(section))
    return keys
