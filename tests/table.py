"""The table of architectures in llmopt/model/README.md, read back: what is refused there, and why."""
import re
from pathlib import Path

README = Path(__file__).parents[1] / "llmopt/model/README.md"
HEADING = "## Architectures"


def read() -> dict[tuple[str, str], str | None]:
    """{(architecture, column): None where supported, else the reason given in the notes below the table}."""
    section = README.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")]
            for line in section.splitlines() if line.startswith("|")]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", section, flags=re.M))
    columns, found = rows[0][1:], {}
    for name, *cells in rows[2:]:
        for column, cell in zip(columns, cells, strict=True):
            found[name, column] = None if cell == "yes" else notes[cell]
    return found
