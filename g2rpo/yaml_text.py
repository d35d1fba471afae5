"""YAML 1.2 (core schema) with PyYAML.

PyYAML implements YAML 1.1, where ``24:00:00`` is 86400, ``no`` is false, ``017`` is 15 and ``1e-5``
is text. Here scalars are read as in YAML 1.2 and JSON; merge keys (``<<``) still work.
"""

import re
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import yaml

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_INTEGER = re.compile(r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"
    r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


# In this order: integers also match the pattern of floats.
_SCALARS: tuple[tuple[str, re.Pattern[str], str, Callable[[str], Any]], ...] = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~", lambda _: None),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF",
     lambda text: text.lower() == "true"),
    ("int", _INTEGER, "-+0123456789", _integer),
    ("float", _FLOAT, "-+.0123456789", _float),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Safe YAML that rejects duplicate keys."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map", None)
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # Depth first, so that recursive anchors are an error.
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"duplicate key {key!r} in line {line}")
            if isinstance(key, Hashable):
                keys.add(key)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """YAML whose scalars are kept as text."""


def _constructor(
    name: str, form: re.Pattern[str], convert: Callable[[str], Any]
) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not form.match(text):  # with an explicit tag, e.g. !!int 12:30
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{text!r} in line {line} is not a valid {name}")
        return convert(text)

    return construct


_Loader.yaml_implicit_resolvers = {}
_TextLoader.yaml_implicit_resolvers = {}
for _name, _form, _first, _convert in _SCALARS:
    _starts = [*_first, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(_TAG + _name, _form, _starts)
    _Loader.add_constructor(_TAG + _name, _constructor(_name, _form, _convert))
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor(_MERGE, lambda _, node: node.value)  # as a value it is text


def parse_yaml(text: str, *, as_text: bool = False) -> Any:
    """Parses YAML; with ``as_text`` scalars are kept as text.

    Raises:
        ValueError: it is not valid YAML, or has duplicate keys, recursive anchors or tags other
            than of JSON's types; one line.
    """
    try:
        return yaml.load(text, _TextLoader if as_text else _Loader)  # noqa: S506 - both are safe
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        where = str(error).replace('in "<unicode string>", ', "in ")
        raise ValueError(" ".join(where.split())) from None
