"""Settings: the fields of a recipe as people spell them, from a file and what overrides it, put into their groups."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.models import UNITS, Blocks, Units, Weights
from optprune.patterns import ANYWHERE
from optprune.recipe.aliases import ALIASES, NEEDS
from optprune.recipe.groups import GROUPS, DepthSearch, Group
from optprune.recipe.names import read_pattern, read_units
from optprune.system.wording import one_line, shown


@dataclass(frozen=True)
class Given:
    """A value that somebody set."""

    value: Any
    spelling: str
    """the field as it was spelled"""
    layer: int
    """the number of the mapping it is from: a later one overrides"""

    def refused(self, reason: str, value: Any = ..., *within: object) -> InputError:
        """The sentence on a value that is wrong, or on something within it."""
        key = one_line(".".join([self.spelling, *map(str, within)]))
        return InputError(
            f"the recipe field {key!r} cannot be {shown(self.value if value is ... else value)}: {one_line(reason)}"
        )

    def read(self, reader: Callable[[Any], Any]) -> Any:
        """What the value says to a function that raises ValueError for what it does not know."""
        try:
            return reader(self.value)
        except ValueError as error:
            raise self.refused(str(error)) from error


@dataclass
class Settings:
    """Everything that was set, by the path of a field, such as metric.width."""

    given: dict[str, Given] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Iterable[Mapping[Any, Any]]) -> "Settings":
        """What layers come to, each over those before, field by field."""
        found = cls()
        for number, layer in enumerate(layers):
            fresh = cls()
            for key, value in layer.items():
                fresh.add(ALIASES.get(str(key), str(key)), Given(value, str(key), number))
            found.given |= fresh.given
        return found

    def add(self, path: str, given: Given) -> None:
        """Set a field, the fields of a group, or its switch alone."""
        value, spelling, layer = given.value, given.spelling, given.layer
        if path in GROUPS and isinstance(value, Mapping | Group):
            for key, item in dict(value).items():
                self.add(f"{path}.{key}", Given(item, f"{spelling}.{key}", layer))
        elif path in GROUPS:
            self.add(f"{path}.{GROUPS[path].switch}", given)
        elif path == "units" and isinstance(value, Mapping) and len(value) == 1:
            [(kind, pattern)] = value.items()
            self.add(path, Given(kind, spelling, layer))
            self.add("units.weights", Given(pattern, spelling, layer))
        elif path in self.given:
            both = f"as {one_line(self.given[path].spelling)} and as {one_line(spelling)}"
            raise InputError(f"the recipe field {one_line(path)!r} is given twice, {both}: give one")
        else:
            self.given[path] = given

    def fields(self) -> dict[str, Any]:
        """The fields of a recipe of which something was set, with its groups made."""
        units = self._units()
        self._check_share()
        found: dict[str, Any] = {} if units is None else {"units": units}
        for path, given in self.given.items():
            top = path.partition(".")[0]
            if top in GROUPS:
                found[top] = self._group(top)
            elif path not in ("units", "units.weights"):
                found[path] = given.value
        return found

    def refused(self, error: ValidationError, *group: str) -> InputError:
        """The sentence on the first field, of a group or of the recipe itself, that pydantic finds wrong."""
        first = error.errors()[0]
        name, *within = map(str, first["loc"]) if first["loc"] else ("",)  # a group as a whole
        path = ".".join(filter(None, [*group, name]))
        given = self.given.get(path) or Given(first["input"], path, 0)
        return given.refused(first["msg"].removeprefix("Value error, "), first["input"], *within)

    def _units(self) -> Units | None:
        """The units; those of depth are whole sub-blocks, and whole sub-blocks are of depth, where one is not given."""
        units, kind = self._patterned(), self.given.get("allocation.kind")
        chosen, depth = self.given.get("units"), kind is not None and kind.read(GROUPS["allocation"].of) is DepthSearch
        if isinstance(units, Blocks) == depth or chosen is None:
            return UNITS["blocks"] if depth else units
        # A flat recipe of blocks was one of depth whatever its allocation.
        flat = kind is not None and kind.spelling == "allocation" and not depth
        if kind is None or flat or chosen.layer > kind.layer:
            self.given["allocation.kind"] = Given("uniform" if depth else "depth", "units", chosen.layer)
            return units
        if chosen.layer == kind.layer or not depth:
            raise InputError(
                f"units 'blocks' and the allocation 'depth' go together, not {shown(chosen.value)} and "
                f"{shown(kind.value)}: leave one out"
            )
        return UNITS["blocks"]

    def _check_share(self) -> None:
        """Refuse a sparsity that was set after what every block keeps, which it would not change."""
        share, kind = self.given.get("sparsity"), self.given.get("allocation.kind")
        if share is None or kind is None or kind.value != "given" or share.layer <= kind.layer:
            return
        raise share.refused("the recipe says what every block keeps: set allocation too, such as uniform")

    def _patterned(self) -> Units | None:
        """The units that were set, single weights in the pattern that was set."""
        chosen, pattern = self.given.get("units"), self.given.get("units.weights")
        units = None if chosen is None else chosen.read(read_units)
        if pattern is None:
            return units
        family = pattern.read(read_pattern)
        if chosen is None or not isinstance(units, Weights):
            replaced = chosen is not None and chosen.layer > pattern.layer and pattern.spelling not in ALIASES
            if replaced or family == ANYWHERE:
                return units
            raise InputError(
                f"the pattern {family.name} is one of single weights, but units are {(units or UNITS['mlp']).name}: "
                "choose a recipe with units weights, such as sparsegpt"
            )
        if units.family in (ANYWHERE, family) or chosen.layer < pattern.layer:
            return Weights(family)
        if chosen.layer == pattern.layer:
            raise InputError(f"the pattern {family.name} is not {units.family.name}, that of the units: give one")
        return units

    def _group(self, path: str) -> Group | None:
        """A group, made of what was set of it."""
        choice = GROUPS[path]
        switch = self.given.get(f"{path}.{choice.switch}", Given(choice.default, path, -1))
        model = switch.read(choice.of)
        made: dict[str, Any] = {choice.switch: switch.value}
        for key in [key for key in self.given if key.startswith(f"{path}.")]:
            name = key.removeprefix(f"{path}.").partition(".")[0]
            if model is None or name not in model.model_fields:
                self._idle(path, key, switch)
            else:
                inner = f"{path}.{name}"
                made[name] = self._group(inner) if inner in GROUPS else self.given[key].value
        try:
            return None if model is None else model.model_validate(made)
        except ValidationError as error:
            raise self.refused(error, path) from error

    def _idle(self, off: str, path: str, switch: Given) -> None:
        """Let go what a group has no use for, if that may be: what is flat, or older than the group's switch.

        The group that is off, or another than it was, may be one around that of the field.
        """
        given, (group, _, name) = self.given[path], path.rpartition(".")
        owners = GROUPS[group].owners(name) if group in GROUPS else []
        if not owners:
            inside = one_line(path.removeprefix(f"{off}."))
            raise InputError(f"{off} has no field {inside!r}: it has {', '.join(GROUPS[off].names)}")
        if name == GROUPS[group].switch and given.read(GROUPS[group].of) is None:
            return
        info = owners[0].model_fields[name]
        kind: Any = Annotated[info.annotation, info]  # type: ignore[valid-type]  # a type all the same
        adapter = TypeAdapter[Any](kind, config=ConfigDict(allow_inf_nan=False))
        try:
            value = adapter.validate_python(given.value)
        except ValidationError as error:
            first = error.errors()[0]
            raise given.refused(first["msg"].removeprefix("Value error, "), first["input"], *first["loc"]) from error
        flat, older = given.spelling in ALIASES, given.layer < switch.layer
        if value == info.default:
            return
        if path in NEEDS and (flat or switch.spelling in ALIASES or not older):
            raise InputError(NEEDS[path].format(value))
        if not flat and not older:
            kinds = [kind for kind, model in GROUPS[off].kinds.items() if name in model.model_fields]
            raise InputError(
                f"the recipe field {one_line(given.spelling)!r} does nothing without {off}.{GROUPS[off].switch}"
                f"{' ' if kinds else ''}{' or '.join(kinds)}: set that too, or leave it out"
            )
