"""Nested records as tensors with dotted names and a rest for JSON, and back.

    Progress(best=Made(images, z), step=3)  <->  {"best.images": ..., "best.z": ...} and {"step": 3}

A record is a named tuple, a dataclass, a mapping with string keys, a list or a tuple, of records, tensors, numbers,
strings and None. Safetensors hold the tensors and JSON the rest, so that any language reads what was written.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from solvers.errors import UserError

Tensors = Mapping[str, Tensor]


class Encoded(NamedTuple):
    """A record's tensors by dotted name, and all else, nested as the record was."""

    tensors: dict[str, Tensor]
    info: Any


def encode(record: Any) -> Encoded:
    """The tensors of a record, and the rest of it for JSON; what is None is left out.

    An item of a list with tensors is named by its index, as in "told.000002". The tensors are the record's own: see
    `apart`. Raises ValueError for a key with a dot whose value holds named tensors, TypeError for what is not a record.
    """
    if isinstance(record, Tensor):
        return Encoded({"": record}, None)
    parts = _parts(record)
    if parts is None:
        return Encoded({}, record)
    found = {name: encode(part) for name, part in parts.items()}
    for name, part in found.items():
        if "." in name and part.tensors.keys() - {""}:
            raise UserError(f"the key {name!r} has a dot, and what it holds has names: they could not be told apart")
    tensors = {f"{name}.{key}" if key else name: t for name, part in found.items() for key, t in part.tensors.items()}
    if isinstance(record, list | tuple) and not _named(record) and not tensors:
        return Encoded({}, [part.info for part in found.values()])
    return Encoded(tensors, {name: part.info for name, part in found.items() if part.info not in (None, {})})


def decode(kind: Any, tensors: Tensors, info: Any = None) -> Any:
    """The record of the type `kind`, as in `Made` or dict[str, Tensor], of what `encode` gave.

    What is absent is None, an empty container or its field's default. Raises KeyError, with the name, for anything else
    that is absent.
    """
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if not tensors and info is None else decode(kind, tensors, info)
    if kind is Tensor:
        return tensors[""]
    base = get_origin(kind) or kind
    if isinstance(base, type) and (hasattr(base, "_fields") or is_dataclass(base)):
        return base(**_fields(base, tensors, info or {}))
    if isinstance(base, type) and issubclass(base, Mapping):
        if inner[1] in (Tensor, Any):
            return {**(info or {}), **tensors}
        return {name: decode(inner[1], *_under(name, tensors, info)) for name in _heads(tensors, info)}
    if isinstance(base, type) and issubclass(base, Sequence) and base is not str:
        items = [({}, part) for part in info] if isinstance(info, list) else _items(tensors, info)
        kinds = inner if base is tuple and inner and ... not in inner else (inner or (Any,))[:1] * len(items)
        return (tuple if base is tuple else list)(decode(k, *item) for k, item in zip(kinds, items, strict=True))
    return info


def apart(tensors: Tensors) -> dict[str, Tensor]:
    """Copies on the CPU, no two of which share memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _named(record: Any) -> bool:
    return hasattr(record, "_fields")


def _parts(record: Any) -> dict[str, Any] | None:
    """The fields of a record by name; None for a number, a string and None."""
    if isinstance(record, Mapping):
        return dict(record)
    if _named(record):
        return record._asdict()
    if is_dataclass(record):
        return {field.name: vars(record)[field.name] for field in fields(record)}
    if isinstance(record, list | tuple):
        return {f"{i:06d}": part for i, part in enumerate(record)}
    if record is None or isinstance(record, bool | int | float | str):
        return None
    raise TypeError(f"a {type(record).__name__} is not a tensor, number, string or record of them")


def _fields(kind: type, tensors: Tensors, info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record, without those that are absent and have a default."""
    hints, defaults, found = get_type_hints(kind), _defaults(kind), {}
    for name in [field for field in hints if field in _names(kind)]:
        part, rest = _under(name, tensors, info)
        if not part and rest is None and name in defaults:
            continue
        try:
            found[name] = decode(hints[name], part, rest)
        except KeyError as error:
            raise KeyError(f"{name}.{error.args[0]}" if error.args[0] else name) from None
        if found[name] is None and not _optional(hints[name]):
            raise KeyError(name)
    return found


def _names(kind: Any) -> Iterable[str]:
    return kind._fields if _named(kind) else [field.name for field in fields(kind)]


def _defaults(kind: Any) -> set[str]:
    if _named(kind):
        return set(kind._field_defaults)
    return {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}


def _optional(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def _under(name: str, tensors: Tensors, info: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the info under a name, by the rest of their names."""
    inner = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return inner | ({"": tensors[name]} if name in tensors else {}), (info or {}).get(name)


def _heads(tensors: Tensors, info: Any) -> list[str]:
    return list(dict.fromkeys([*(info or {}), *(name.partition(".")[0] for name in tensors)]))


def _items(tensors: Tensors, info: Any) -> list[tuple[dict[str, Tensor], Any]]:
    return [_under(name, tensors, info) for name in sorted(_heads(tensors, info), key=int)]
