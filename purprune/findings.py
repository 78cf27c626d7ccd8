"""Findings: what the validator found in a value, in one line that leads out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from purprune.errors import near_misses

_WORDS = {
    **dict.fromkeys(("amount", "sparsity", "target", "final_sparsity"), "target_sparsity"),
    **dict.fromkeys(("density", "keep", "keep_ratio"), "1 - target_sparsity"),
}
"""What a rule's target is called elsewhere."""

_EXAMPLES = {"Rule": "Rule(0.5)", "Pattern": "Channel() or NM(2, 4)", "n_m_ratio": "[2, 4]"}
"""What is often written otherwise, or forgotten around what it holds."""

_N_M = dict.fromkeys(
    ("n_m", "nm", "NM", "n:m", "2:4"),
    " N:M is a rule's n_m_ratio: [2, 4], or the group {'kind': 'every', 'zeros': 2, 'm': 4}.",
)
"""Names of N:M, which is no kind: what to write."""

_FOLDED = "CoremltoolsKeys."
"""The title of flat keys, which nobody typed."""

_OWNERS: dict[str, dict[str, str]] = {}
"""By key: the values and functions that have it, and of which class is what they build."""


def own_keys(cls: Any, keys: Iterable[str], built: str) -> None:
    """Remember for errors which value, or function that builds one, has which keys."""
    for key in keys:
        _OWNERS.setdefault(key, {})[cls.__name__] = built


def keys_of(cls: Any) -> list[str]:
    """Return the keys of a value in the order of its arguments, those by name alone last."""
    in_order = sorted(fields(cls), key=lambda f: f.kw_only is True)
    return [f.name for f in in_order]


def one_line(error: ValidationError, title: str, cls: Any) -> str:
    """Put what pydantic found into one clear line for each finding.

    Args:
        error: what pydantic raised.
        title: the name of the value that was built.
        cls: its class; a finding about argument 0 is about the first of its keys.
    """
    found = [dict(e) for e in error.errors()]
    if any(e["type"] == "unexpected_positional_argument" for e in found):
        by_name = [f.name for f in fields(cls) if f.kw_only is True]
        return too_many(title, keys_of(cls), by_name)  # what else was found is out of place
    return "\n".join(_finding(e, title, cls) for e in found)


def _finding(found: dict[str, Any], title: str, cls: Any) -> str:
    first, *rest = found["loc"] or ("",)
    keys = keys_of(cls)
    if isinstance(first, int) and first < len(keys):
        first = keys[first]
    path = ".".join(str(part) for part in (title, first, *rest) if part not in {"", "[key]"})
    kind, given = found["type"], found["input"]
    if kind in {"value_error", "assertion_error"}:
        error = str(found["ctx"]["error"])
        return error.replace(_FOLDED, f"{path}.") if _FOLDED in error else f"{path}: {error}"
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        *place, key = found["loc"]
        way_out = _place_of_kind(given, cls, place) if key == "kind" else ""
        way_out = way_out or meant(str(key), *_known_at(cls, place))
        return f"{path}: unknown key {key!r}.{way_out}"
    if kind in {"missing", "missing_argument"}:
        return f"{path}: expected a value; got none."
    if kind in {"model_attributes_type", "union_tag_invalid", "union_tag_not_found"}:
        return f"{path}: {_one_of_kinds(given, _kinds(_values_at(cls, found['loc'])))}"
    message = _message(found, str(first))
    if hasattr(given, "__name__"):  # a class, or a function that builds a value
        return f"{path}: {message}; got {given.__name__} itself. Write {given.__name__}(...)."
    return f"{path}: {message}; got {given!r}."


def _message(found: dict[str, Any], key: str) -> str:
    """Return what was expected under a key."""
    context = found.get("ctx", {})
    name = context.get("class_name", key)
    example = f" such as {_EXAMPLES[name]}" if name in _EXAMPLES else ""
    if found["type"] == "dataclass_type":
        return f"expected a {name}{example}, or a dict of its keys"
    if found["type"] == "tuple_type":
        return f"expected a list{example}"
    if found["type"] == "too_long":
        return f"expected at most {context['max_length']} values{example}"
    return str(found["msg"]).replace("Input should be ", "expected ")


def _kinds(classes: Iterable[Any]) -> list[str]:
    return [one.kind for one in classes if hasattr(one, "kind")]


def _one_of_kinds(given: Any, kinds: Sequence[str]) -> str:
    word = given.get("kind", "") if isinstance(given, Mapping) else given
    way_out = _N_M.get(str(word)) or near_misses(str(word), kinds)
    if isinstance(given, str) and given in kinds:
        way_out = f" Write {{'kind': {given!r}}}."
    return f"expected a dict whose kind is one of {', '.join(kinds)}; got {given!r}.{way_out}"


def _place_of_kind(kind: Any, cls: Any, place: Sequence[str | int]) -> str:
    """Say where a kind belongs that stands beside what has one."""
    for one in _values_at(cls, place):
        for key, classes in _taken(one).items():
            if kind in _kinds(classes):
                return f" Write {{{key!r}: {{'kind': {kind!r}}}}}."
    return _N_M.get(str(kind), "")


def _known_at(cls: Any, place: Sequence[str | int]) -> tuple[list[str], dict[str, set[str]]]:
    """Return the keys of the value that is found along a place, and the classes that each takes."""
    found = _values_at(cls, place)
    keys = [key for one in found for key in (*keys_of(one), *getattr(one, "_also", ()))]
    taken = {key: {c.__name__ for c in kinds} for c in found for key, kinds in _taken(c).items()}
    return list(dict.fromkeys(keys)), taken


def _values_at(cls: Any, place: Sequence[str | int]) -> list[Any]:
    """Return the classes of values that may be found along a place."""
    found, parts = [cls], iter(place)
    for part in parts:
        inner = [c for one in found for c in _taken(one).get(str(part), ())]
        tagged = [one for one in found if getattr(one, "kind", None) == part]
        found = inner or tagged or found  # or else a place in a list
        if str(part).endswith("_configs"):
            next(parts, None)  # the name of a module, whatever that is
    return found


def _taken(cls: Any) -> dict[str, list[Any]]:
    """Return by key the classes of values that may stand there."""
    return {key: _values_in(hint) for key, hint in get_type_hints(cls).items()}


def _values_in(hint: Any) -> list[Any]:
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [one for part in get_args(hint) for one in _values_in(part)]


def meant(
    key: str, own: Iterable[str], taken: Mapping[str, Set[str]] = MappingProxyType({})
) -> str:
    """Return what may be meant: a key of this value, or of which others it is one.

    Args:
        key: what was given.
        own: the keys of the value.
        taken: by key the names of the classes that it takes.
    """
    own = [name for name in own if name != "kind"]
    if key in _WORDS:
        is_own = _WORDS[key] in own
        return f" Did you mean {_WORDS[key]!r}?" if is_own else f" In a Rule it is {_WORDS[key]}."
    known = f" Known here: {', '.join(own)}." if own else ""
    whose, place = _whose(key, taken)
    return f"{whose}{place or known}" if whose else near_misses(key, own) or known


def _whose(key: str, taken: Mapping[str, Set[str]]) -> tuple[str, str]:
    """Return which values have a key, and what to write where one of them may stand."""
    import purprune  # what it exports has a name that users know

    owners = {n: built for n, built in _OWNERS.get(key, {}).items() if hasattr(purprune, n)}
    if not owners:
        return "", ""
    *others, last = owners
    names = f"{', '.join(others)} and {last}" if others else last
    fitting = [(at, n) for n, built in owners.items() for at in taken if built in taken[at]]
    written = [f" Write {at}={name}({key}=...)." for at, name in fitting]
    return f" It is a key of {names}.", next(iter(written), "")


def too_many(title: str, fields: Sequence[str], by_name: Sequence[str]) -> str:
    """Say which values come in order, and how the others are written."""
    order = ", ".join(name for name in fields if name not in by_name)
    others = ", ".join(f"{name}=..." for name in by_name if name != "kind")
    expected = f"at most {order} without a name" if order else "no value without its name"
    way_out = f" Write the others so: {title}({others})." if others else ""
    return f"{title}: expected {expected}; got more.{way_out}"
