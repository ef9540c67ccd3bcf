"""How hypothesis damages files: as a tree, as text or as bytes."""
import copy
import json
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP = 300


def nested(depth: int, kind: Any = list) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made] if kind is list else {"a": made}
    return made


WEIRD = [None, True, 0, -1, 1, 7, 2**31, 2**63, 10**7, 10**9, 10**18, -10**30, 10**400, 0.5, -0.0, 1e300, float("nan"),
         float("inf"), "", "x", " ", "auto", "null", "3", "*", "\ud800", "\x00", "a\nb", "\x1b[31mred\x07", "[/red]",
         ":smile:", "../x", "/etc/passwd", "é" * 3, "x" * 5000, "evil.Evil", "float32", "llama", "bert", [], {}, [None],
         [1] * 300, ["x", 1], {"": ""}, {"x": {"y": []}}, {"bits": -1}, nested(30), nested(DEEP), nested(DEEP, dict),
         "@DIGITS@"]
TOKENS = [
    b"\x00", b"\t", b"\n", b"'", b'"', b"{", b"}", b"- ", b": ", b"#", b"=", b"~", b"|\n  x", b"? a\n: b", b"\\ud800",
    b"[" * 2000, b"{a: " * 500, b"&a [*a]", b"*a", b"<<: *a", b"---\n", b"...", b"%YAML 9.9\n", b"null", b"2020-99-99",
    b"!!python/object/apply:os.system [x]", b"!!int x", b"!!bool x", b"!!timestamp x", b"!!set {a}", b".nan", b"-.inf",
    b"1:1:1", b"0x", b"0x" + b"f" * 6000, b"9" * 5000, b"1e999", b"\xff\xfe", b"\xef\xbb\xbf", b"\xf0\x9f\x92\xa9"]


def paths(tree: Any, here: tuple = ()) -> list[tuple]:
    """The path of every part of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(path for key, value in items for path in paths(value, (*here, key)))]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def damaged_trees(draw, tree: Any) -> Any:
    """A tree with one to three parts deleted, renamed, repeated, swapped, wrapped or made weird."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(tree)))
        weird = copy.deepcopy(draw(st.sampled_from(WEIRD)))
        if not path:
            tree = draw(st.sampled_from([tree] * 9 + [weird]))
            continue
        above, key = at(tree, path[:-1]), path[-1]
        match draw(st.sampled_from(["weird", "weird", "weird", "delete", "rename", "repeat", "swap", "wrap"])):
            case "weird":
                above[key] = weird
            case "delete":
                del above[key]
            case "rename" if isinstance(above, dict):
                name = draw(st.sampled_from(["x", "", f"{key}s", "__class__", "auto_map", "a\nb", "\ud800"]))
                above[name] = above.pop(key)
            case "repeat" if isinstance(above, list):
                above[:] = above + [above[key]] * draw(st.sampled_from([1, 2, 100]))
            case "swap":
                above[key] = copy.deepcopy(at(tree, draw(st.sampled_from(paths(tree)))))
            case _:
                above[key] = [above[key]]
        if not isinstance(tree, (dict, list)):
            break
    return tree


@st.composite
def damaged_bytes(draw, content: bytes, tokens: list[bytes] = TOKENS) -> bytes:
    """Bytes cut, flipped, repeated, enriched by a token, or all made up."""
    place = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(["cut", "flip", "insert", "insert", "insert", "delete", "repeat", "random"])):
        case "cut":
            return content[:place]
        case "flip":
            made = bytearray(content)
            for spot in draw(st.lists(st.integers(0, max(len(made) - 1, 0)), max_size=8)):
                made[spot] ^= 1 << draw(st.integers(0, 7))
            return bytes(made)
        case "insert":
            return content[:place] + draw(st.sampled_from(tokens)) + content[place:]
        case "delete":
            return content[:place] + content[place + draw(st.integers(1, 40)):]
        case "repeat":
            times = draw(st.sampled_from([1, 2, 50]))
            return content[:place] + content[max(place - 30, 0):place] * times + content[place:]
    return draw(st.binary(max_size=200))


def dumped(tree: Any) -> bytes:
    """JSON with what Python's writer would not write: a number of 5,000 digits."""
    return json.dumps(tree).replace('"@DIGITS@"', "9" * 5000).encode()


def damaged_json(content: bytes) -> st.SearchStrategy[bytes]:
    return damaged_trees(json.loads(content)).map(dumped) | damaged_bytes(content)


def _yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def damaged_yaml(text: str) -> st.SearchStrategy[bytes]:
    trees = damaged_trees(yaml.safe_load(text))
    return trees.map(dumped) | damaged_bytes(text.encode()) | trees.map(_yaml)


def damaged_figures(content: bytes) -> st.SearchStrategy[bytes]:
    """All of llmopt.json but its recipe: with another one, there is nothing to resume."""
    facts = json.loads(content)
    recipe = {"recipe": facts.pop("recipe")}
    return damaged_trees(facts).map(lambda made: dumped(made | recipe if isinstance(made, dict) else made))


def damaged_lines(content: bytes) -> st.SearchStrategy[bytes]:
    first, rest = content.split(b"\n", 1)
    return damaged_trees(json.loads(first)).map(lambda row: dumped(row) + b"\n" + rest) | damaged_bytes(content)


def damaged_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    size = int.from_bytes(content[:8], "little")
    header, values = content[8:8 + size], content[8 + size:]
    lengths = st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
    return st.one_of(
        damaged_json(header).map(lambda made: len(made).to_bytes(8, "little") + made + values),
        lengths.map(lambda length: length.to_bytes(8, "little") + content[8:]),
        damaged_bytes(content[:8 + size]).map(lambda made: made + values), damaged_bytes(content))


def damaged_journal(content: bytes) -> st.SearchStrategy[bytes]:
    """Lines lost, doubled, in another order; or bytes changed anywhere."""
    lines = content.splitlines(keepends=True)
    return damaged_bytes(content) | st.lists(st.sampled_from(lines), max_size=2 * len(lines)).map(b"".join)
