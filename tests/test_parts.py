"""Fields are checked strictly and told everywhere; named pieces are taken by name, by fields, or as an instance."""
import copy
import dataclasses
import math
import pickle
import pydoc
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from llmopt.errors import FieldError, KeyUnknown, LlmoptError
from llmopt.parts import _REGISTRY, Part, Several, choices, field_lines, get, register


class Spice(Part):
    kind: ClassVar[str] = "spice"


@dataclass(frozen=True)
class Salt(Spice):
    """Plain salt."""

    grams: float = Field(2, ge=0, lt=10, description="for a litre")
    coarse: bool = False


@dataclass(frozen=True)
class Pepper(Spice):
    """Black or white."""

    corns: int = Field(description="how many", ge=1)


@dataclass(frozen=True)
class Mixture(Spice):
    """A spice in which another one is."""

    base: Spice = Field(Salt(), description="what most of it is")


class Dish(Part):
    kind: ClassVar[str] = "dish"


@dataclass(frozen=True)
class Soup(Dish):
    """Hot."""

    litres: float = Field(1, gt=0, description="of it")
    guests: int | None = Field(None, ge=1)
    size: int | float = 4
    kind_of: Literal["clear", "thick"] = "clear"
    sizes: Several[Annotated[int, Field(ge=2, le=8)] | Literal[16]] = (2, 3)
    notes: dict[str, Any] = Field(default_factory=dict)
    spice: Spice = Field(Salt(), description="what goes in")
    second: Salt | None = None


@pytest.fixture(autouse=True)
def registered():
    """The toy pieces under their names, and gone afterwards."""
    texts = {cls: cls.__doc__ for cls in (Soup, Salt, Pepper, Mixture)}
    for name, cls in (("salt", Salt), ("soup", Soup), ("pepper", Pepper), ("mixture", Mixture)):
        register(name)(cls)
    yield
    for cls, text in texts.items():
        cls.__doc__ = text
        del _REGISTRY[cls.kind][cls.name]


@pytest.mark.parametrize(("given", "key", "words"), [
    (dict(litres=0), "litres", "a number above 0"), (dict(litres="3"), "litres", "'3' given"),
    (dict(litres=True), "litres", "a number"), (dict(litres=math.inf), "litres", "a finite number"),
    (dict(guests=True), "guests", "a whole number at least 1, or null"), (dict(guests=2.0), "guests", "2.0 given"),
    (dict(size=math.nan), "size", "a finite number"), (dict(size=True), "size", "a number expected"),
    (dict(kind_of="thik"), "kind_of", "one of clear, thick expected (did you mean 'thick'?)"),
    (dict(sizes=[3, 9]), "sizes[1]", "a whole number from 2 to 8, or 16"), (dict(sizes="23"), "sizes", "a list"),
    (dict(notes=[]), "notes", "a mapping"), (dict(spice="slat"), "spice", "did you mean 'salt'"),
    (dict(spice={"salt": {"grams": 10}}), "spice.salt.grams", "at least 0 and below 10"),
    (dict(spice={"salt": {"gram": 1}}), "spice.salt.gram", "did you mean 'grams'"),
    (dict(spice={"salt": {}, "pepper": {}}), "spice", "one spice, as NAME or {NAME: {fields}}"),
    (dict(spice={"salt": 3}), "spice", "{NAME: {fields}}"), (dict(spice=None), "spice", "None given"),
    (dict(second="pepper"), "second", "one of salt"), (dict(gests=1), "gests", "did you mean 'guests'"),
])
def test_a_value_that_does_not_fit_is_named_by_its_whole_key(given, key, words):
    with pytest.raises(FieldError) as caught:
        Soup(**given)
    assert caught.value.key == key
    assert key in str(caught.value) and words in str(caught.value)


def test_pieces_may_hold_pieces_of_their_kind():
    made = Soup(spice={"mixture": {"base": {"pepper": {"corns": 5}}}})
    assert made.spice.base == Pepper(corns=5) and Soup(**made.to_dict()["soup"]) == made
    with pytest.raises(FieldError, match="corns: 0") as caught:
        Soup(spice={"mixture": {"base": {"pepper": {"corns": 0}}}})
    assert caught.value.key == "spice.mixture.base.pepper.corns"


def test_a_missing_field_and_an_unknown_one_are_told_apart():
    with pytest.raises(LlmoptError, match=r"spice\.pepper: the field 'corns' is missing"):
        Soup(spice="pepper")
    with pytest.raises(KeyUnknown, match="'corn'.*did you mean 'corns'"):
        Pepper(corn=1)


def test_numbers_become_what_their_field_holds():
    made = Soup(litres=4, size=3, sizes=[2, 16])
    assert (type(made.litres), type(made.size), made.sizes) == (float, int, (2, 16))
    assert type(Soup(size=3.0).size) is float


@pytest.mark.parametrize("given", ["pepper", {"pepper": {"corns": 3}}, Pepper(corns=3)])
def test_a_piece_is_taken_by_name_by_fields_or_as_it_is(given):
    spices = {"salt": Salt(), "pepper": Pepper(corns=3)}
    if given == "pepper":
        given, expected = "salt", spices["salt"]
    else:
        expected = spices["pepper"]
    made = Soup(spice=given)
    assert made.spice == expected
    assert Soup(**made.to_dict()["soup"]) == made == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)


def test_a_piece_with_all_its_defaults_is_written_as_its_name():
    assert Soup().to_dict()["soup"]["spice"] == "salt"
    assert Soup(spice={"salt": {"grams": 3}}).to_dict()["soup"]["spice"] == {"salt": {"grams": 3.0, "coarse": False}}
    assert Soup(second="salt").to_dict()["soup"]["second"] == "salt"


def test_instances_are_frozen_and_a_changed_copy_is_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Soup().litres = 3.0
    assert dataclasses.replace(Soup(), guests=2).guests == 2
    with pytest.raises(FieldError, match="guests"):
        dataclasses.replace(Soup(), guests=0)


def test_help_tells_every_field_and_those_of_the_pieces():
    text = pydoc.plain(pydoc.render_doc(Soup)).replace("\n |  ", "\n")
    assert "\nHot.\n" in text and "litres: of it (a number above 0; default 1)" in text
    assert "spice.salt.grams: for a litre (a number at least 0 and below 10; default 2)" in text
    assert "spice.pepper.corns: how many (a whole number at least 1; default (needed))" in text
    rows = {key: rest for key, *rest in field_lines(Soup)}
    assert rows["guests"] == ["a whole number at least 1, or null", "null", ""]
    assert rows["sizes"][1] == "[2, 3]"
    assert rows["spice.mixture.base"][1:] == ["salt", "what most of it is"] and "spice.mixture.base.salt" not in rows


def test_names_are_of_a_kind_and_may_not_clash():
    assert choices(Spice) == ["mixture", "pepper", "salt"] and choices(Salt) == ["salt"]
    assert get("salt", "spice") is Salt
    with pytest.raises(RuntimeError, match="are called 'salt'"):
        register("salt")(Salt)
    with pytest.raises(LlmoptError, match="there is no spice 'slt' .did you mean 'salt'"):
        get("slt", "spice")


def test_a_plain_dataclass_is_no_piece():
    @dataclasses.dataclass(frozen=True)
    class Sugar(Spice):
        spoons: int = 1

    with pytest.raises(RuntimeError, match=r"pydantic\.dataclasses"):
        register("sugar")(Sugar)
