"""The table of architectures in llmopt/model/README.md: made from the code, and read back.

    python -m tests.table [--write]         print it, or put it into the README
"""
import re
import sys
from pathlib import Path

from llmopt.model.abilities import abilities, abilities_of
from llmopt.model.architectures import REFUSED, SPECS
from llmopt.model.levels import lacking
from tests import tiny

README = Path(__file__).parents[1] / "llmopt/model/README.md"
TABLE = re.compile(r"^\| model types .*?(?=\n## )", re.M | re.S)
PLAIN = ("widths by layer", "heads by layer")


def answers() -> dict[str, tuple[str, dict[str, str | None]]]:
    """{model type: (the highest level that holds, {column: None where it works, else why not})}, as the code has it.

    Those that no table knows are looked at as tiny models.
    """
    found = {kind: ("structure", abilities(kind)) for kind in SPECS}
    for kind in tiny.MORE.keys() - SPECS.keys():
        model = tiny.make(kind)
        found[kind] = ("weights" if lacking(model)["run time"] else "run time", abilities_of(model))
    return found


def made() -> str:
    """The table, a row for all model types of equal answers, and its notes."""
    rows: dict[tuple[str, ...], list[str]] = {}
    reasons: list[str] = []
    found = answers()
    order = sorted(found, key=lambda kind: (["structure", "run time", "weights"].index(found[kind][0]),
                                            [*SPECS].index(kind) if kind in SPECS else len(SPECS), kind))
    for kind in order:
        level, works = found[kind]
        reasons += [why for why in dict.fromkeys(works.values()) if why and why not in reasons]
        cells = level, *("yes" if why is None else str(1 + reasons.index(why)) for why in works.values())
        rows.setdefault(cells, []).append(f"`{kind}`")
    columns = [part if part in PLAIN else f"`{part}`" for part in abilities(next(iter(SPECS)))]
    lines = [["model types", "level", *columns], ["---"] * (2 + len(columns)),
             *([" ".join(kinds), *cells] for cells, kinds in rows.items())]
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    none = "; ".join(f"`{kind}`: {why}" for kind, why in REFUSED.items())
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *notes, "", f"Not at all: {none}.", ""])


def read() -> dict[tuple[str, str], str | None]:
    """{(model type, column): None where supported, else the reason given in the notes below the table}."""
    section = TABLE.search(README.read_text(encoding="utf-8")).group()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines() if line.startswith("|")]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", section, flags=re.M))
    columns = [column.strip("`") for column in rows[0][2:]]
    return {(kind, column): None if cell == "yes" else notes[cell] for kinds, _, *cells in rows[2:]
            for kind in re.findall("`([^`]+)`", kinds) for column, cell in zip(columns, cells, strict=True)}


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = README.read_text(encoding="utf-8")
        README.write_text(TABLE.sub(lambda _: made(), text), encoding="utf-8")
    else:
        sys.stdout.write(made())
