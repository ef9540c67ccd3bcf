"""The table of architectures in llmopt/model/README.md is what the code says, cell by cell."""
from llmopt.model.architectures import SPECS
from tests import table, tiny


def test_the_table_is_what_the_code_says():
    found = {(kind, part): why for kind, (_, works) in table.answers().items() for part, why in works.items()}
    assert table.read() == found and {kind for kind, _ in found} == {*SPECS, *tiny.MORE}
    assert table.TABLE.search(table.README.read_text()).group() == table.made(), "python -m tests.table --write"
