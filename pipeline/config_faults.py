"""What is wrong with a config, in words: pydantic's faults as what, where, got, expected, fix."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel

_CREDENTIALS = re.compile(r"://([^/]*|[^/:]+:(?!\d+/)[^@]*)@")
"""`user:secret@` in any URL of a chain. AWS secrets may hold slashes; `host:8020/` is no secret."""
_SIGNED = re.compile(r"[?&](x-amz-\w+|x-goog-\w+|signature|sig|(access_)?token)=", re.IGNORECASE)
"""A presigned URL is a credential itself."""


def carries_credentials(text: str) -> bool:
    """Whether a URL in the text holds a password, a key or a signature."""
    return bool(_CREDENTIALS.search(text) or _SIGNED.search(text))


_EXPECTED = {
    "bool": "true or false",
    "decimal": "a number",
    "dict": "a section of keys",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a section of keys",
    "string": "text",
}
"""By what pydantic's names of faults begin with: int_type, int_parsing, int_from_float."""

_LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} of them",
}


def describe(faults: list[dict[str, Any]], model: type[BaseModel]) -> list[str]:
    """Pydantic's faults as what, where, got, expected, fix; branches of a union as one."""
    said: dict[str, list[str]] = {}
    for fault in faults:
        what, expected = _describe(fault, model)
        said.setdefault(what, []).append(expected)
    return [f"{what}{', or '.join(dict.fromkeys(expected))}" for what, expected in said.items()]


def _describe(fault: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """What is wrong, and what was expected."""
    # Union branches add their own names to the location ('int', 'literal[...]'): keep the keys.
    known = all_keys(model)
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    while key not in known and "." in key and fault["type"] != "extra_forbidden":
        key = key.rpartition(".")[0]
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        same_leaf = [k for k in known if k.rpartition(".")[2] == location[-1]]
        best = near or same_leaf
        hint = f" Did you mean '{best[0]}'?" if best else f" Valid keys: {', '.join(known)}."
        return f"key '{key}' is unknown.{hint}", ""
    if fault["type"] == "missing":  # its parents are there: no branch of a union
        return f"key '{'.'.join(location)}' is missing and has no default.", ""
    got = fault["input"]
    shown = "" if isinstance(got, (dict, BaseModel)) else f" got {got!r}"
    if carries_credentials(shown):
        shown = " got a URL with credentials"
    reason = _EXPECTED.get(fault["type"].partition("_")[0])
    if limit := _LIMITS.get(fault["type"]):
        reason = limit.format_map(fault["ctx"])
    if fault["type"] == "literal_error" and isinstance(got, str):
        choices = re.findall(r"'([^']+)'", str(fault["ctx"]["expected"]))
        near = difflib.get_close_matches(got, choices, n=1, cutoff=0.4)
        reason = f"{reason}. Did you mean '{near[0]}'?" if near else reason
    if reason:
        return f"key '{key or 'config'}':{shown}{',' if shown else ''} expected ", reason
    own = str(fault["msg"]).removeprefix("Value error, ")
    own = own[:1].lower() + own[1:]
    return f"key '{key or 'config'}':{shown}{';' if shown else ''} {own}", ""


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
