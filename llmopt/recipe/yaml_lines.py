"""YAML text -> plain data and the line of every key; what no recipe needs is refused before anything is built."""
import re
from collections.abc import Iterator
from typing import Any

import yaml

from llmopt.errors import LlmoptError

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_NUMBER = 1_000_000, 20, 20_000, 2**63
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}")
KeyPath = tuple[str | int, ...]


def read_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """(plain data, line of every key path); tabs, duplicate keys, tags, aliases, deep nesting and bombs are refused."""
    if len(text) > MAX_BYTES:
        raise LlmoptError(f"{source}: {len(text):,} characters; a recipe has at most {MAX_BYTES:,}")
    lines: dict[KeyPath, int] = {}
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        tab = " (tabs may not indent YAML: use spaces)" if "\\t" in str(error) else ""
        raise LlmoptError(f"{source}:{line}: not valid YAML: {fact_of_yaml(error)}{tab}") from error
    return (None if node is None else _construct(node, (), lines, source)), lines


def _check_events(events: Iterator[yaml.Event], source: str) -> None:
    """Raise LlmoptError before a tree is made of the stream: only the tree takes Python's stack, so no depth harms."""
    depth = 0
    for count, event in enumerate(events):
        where = f"{source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise LlmoptError(f"{where}: aliases (*name) are not allowed in a recipe")
        if getattr(event, "tag", None):
            raise LlmoptError(f"{where}: tags ({event.tag}) are not allowed in a recipe")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise LlmoptError(f"{where}: too deep or too long for a recipe")


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, i), lines, source) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines, source)
    if ":" in node.value and node.tag.endswith((":int", ":float")):         # 2:4, which is 124 in YAML 1.1
        return node.value
    if node.style is None and EXPONENT.fullmatch(node.value):                # 1e-4, which is a word in YAML 1.1
        return float(node.value)
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        raise LlmoptError(f"{source}:{line}: {node.value!r} cannot be read: {fact_of_yaml(error)}") from error
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        raise LlmoptError(f"{source}:{line}: {node.value[:40]}: too large a number")
    return value


def _mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], source: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key_node, child in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise LlmoptError(f"{source}:{line}: a key must be a word")
        if key in made:
            raise LlmoptError(f"{source}:{line}: the key {key!r} is given twice")
        lines[(*path, key)] = line
        made[key] = _construct(child, (*path, key), lines, source)
    return made


def fact_of_yaml(error: Exception) -> str:
    """The message of a YAML error, without the copy of the text that it carries along."""
    return getattr(error, "problem", None) or str(error).splitlines()[0]
