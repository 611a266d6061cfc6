"""Settings of a recipe, from a file and its overrides, put into the groups of the recipe's fields."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from optprune.errors import InputError
from optprune.models import UNITS, Units, Weights
from optprune.patterns import ANYWHERE
from optprune.recipe.groups import GROUPS, NONE, DepthSearch, Group
from optprune.recipe.names import read_pattern, read_units, sentence
from optprune.system.wording import nearest, one_line, shown

RENAMED = {
    "pattern": "units.weights",
    "width_multiple": "allocation.multiple",
    "budget": "allocation.currency",
    "budget_tokens": "allocation.tokens",
    "probe_tokens": "allocation.probe_tokens",
    "least_kept": "allocation.least",
    "most_kept": "allocation.most",
    "depth_parts": "allocation.parts",
    "depth_score": "allocation.score",
    "depth_tokens": "allocation.score_tokens",
    "output_metric": "metric.kind",
    "metric_tokens": "metric.tokens",
    "metric_width": "metric.width",
    "metric_damping": "metric.damping",
    "held_out": "refit.held_out",
    "refit_damping": "refit.dampings",
    "recovery": "refit.recovery",
    "recovery_steps": "refit.recovery.steps",
    "recovery_tokens": "refit.recovery.tokens",
    "recovery_damping": "refit.recovery.damping",
}
"""former names of fields, which are refused with the present name"""
REMOVED = {"refit.matching": "it was better in no comparison; heal the model instead (optprune heal)"}
"""groups of fields that were removed, with the reason; a file that says `none` is still read"""


@dataclass(frozen=True)
class Given:
    """Value of a field, with its origin."""

    value: Any
    spelling: str
    """the field as it was written"""
    layer: int
    """the number of the mapping that sets it; later mappings override earlier ones"""

    def refused(self, reason: str, value: Any = ..., *within: object) -> InputError:
        """Return the error for a wrong value, or for a wrong part of it."""
        key = one_line(".".join([self.spelling, *map(str, within)]))
        return InputError(
            f"the recipe field {key!r} cannot be {shown(self.value if value is ... else value)}: {one_line(reason)}"
        )

    def read(self, reader: Callable[[Any], Any]) -> Any:
        """Return the value as a reader converts it; the reader's ValueError becomes an InputError."""
        try:
            return reader(self.value)
        except ValueError as error:
            raise self.refused(str(error)) from error


@dataclass
class Settings:
    """Values that were set, by the path of their field, such as metric.width."""

    given: dict[str, Given] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Iterable[Mapping[Any, Any]]) -> "Settings":
        """Merge mappings field by field; later mappings override earlier ones."""
        found = cls()
        for number, layer in enumerate(layers):
            fresh = cls()
            for name, value in ((str(key), value) for key, value in layer.items()):
                if name in RENAMED:
                    raise InputError(f"the recipe field {name!r} was renamed: write {RENAMED[name]}")
                fresh.add(name, Given(value, name, number))
            found.given |= fresh.given
        return found

    def add(self, path: str, given: Given) -> None:
        """Set a field; a group is set by its fields or by the value of its switch."""
        value, spelling, layer = given.value, given.spelling, given.layer
        if path in REMOVED and value in (None, NONE):
            return
        for group, reason in REMOVED.items():
            if f"{path}.".startswith(f"{group}."):
                raise InputError(f"the recipe field {one_line(spelling)!r} was removed: {reason}")
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
        """Return the values by field of the recipe, with those of groups as group objects."""
        units = self._units()
        self._check_sparsity()
        found: dict[str, Any] = {} if units is None else {"units": units}
        for path, given in self.given.items():
            top = path.partition(".")[0]
            if top in GROUPS:
                found[top] = self._group(top)
            elif path not in ("units", "units.weights"):
                found[path] = given.value
        return found

    def refused(self, error: ValidationError, *group: str) -> InputError:
        """Return the error for the first field that pydantic refuses, of a group or of the recipe itself."""
        first = error.errors()[0]
        name, *within = map(str, first["loc"]) if first["loc"] else ("",)  # no name: a group as a whole
        path = ".".join(filter(None, [*group, name]))
        given = self.given.get(path) or Given(first["input"], path, 0)
        return given.refused(sentence(error), first["input"], *within)

    def _units(self) -> Units | None:
        """Return the units; the later of units and allocation decides whether whole sub-blocks are removed."""
        units, kind = self._units_and_pattern(), self.given.get("allocation.kind")
        chosen, depth = self.given.get("units"), kind is not None and kind.read(GROUPS["allocation"].of) is DepthSearch
        if (units is not None and units.sub_blocks) == depth or chosen is None:
            return UNITS["blocks"] if depth else units
        if kind is None or chosen.layer > kind.layer:
            self.given["allocation.kind"] = Given("uniform" if depth else "depth", "units", chosen.layer)
            return units
        if chosen.layer == kind.layer or not depth:
            raise InputError(
                f"units 'blocks' and the allocation 'depth' go together, not {shown(chosen.value)} and "
                f"{shown(kind.value)}: leave one out"
            )
        return UNITS["blocks"]

    def _units_and_pattern(self) -> Units | None:
        """Return the units as they were set, single weights with their pattern."""
        chosen, pattern = self.given.get("units"), self.given.get("units.weights")
        units = None if chosen is None else chosen.read(read_units)
        if pattern is None:
            return units
        family, age = pattern.read(read_pattern), -1 if chosen is None else chosen.layer - pattern.layer
        if units is None or units.family is None:
            if family == ANYWHERE or age > 0:
                return units
            raise InputError(
                f"the pattern {family.name} is for single weights, but units are {(units or UNITS['mlp']).name}: "
                "choose a recipe with units weights, such as sparsegpt"
            )
        if units.family in (ANYWHERE, family) or age < 0:
            return Weights(family)
        if age == 0:
            raise InputError(f"the pattern {family.name} differs from {units.family.name}, that of the units: give one")
        return units

    def _check_sparsity(self) -> None:
        """Raise InputError where a sparsity overrides a recipe that lists what every block keeps."""
        share, kind = self.given.get("sparsity"), self.given.get("allocation.kind")
        if share is None or kind is None or kind.value != "given" or share.layer <= kind.layer:
            return
        raise share.refused("the recipe lists what every block keeps: set allocation too, such as uniform")

    def _group(self, path: str) -> Group | None:
        """Return the group object of the values that were set; None where the group is off."""
        choice = GROUPS[path]
        switch = self.given.get(f"{path}.{choice.switch}", Given(choice.default, path, -1))
        model = switch.read(choice.of)
        values: dict[str, Any] = {choice.switch: switch.value}
        for key in [key for key in self.given if key.startswith(f"{path}.")]:
            name = key.removeprefix(f"{path}.").partition(".")[0]
            if model is None or name not in model.model_fields:
                self._check_unused(path, key, switch)
            else:
                inner = f"{path}.{name}"
                values[name] = self._group(inner) if inner in GROUPS else self.given[key].value
        try:
            return None if model is None else model.model_validate(values)
        except ValidationError as error:
            raise self.refused(error, path) from error

    def _check_unused(self, off: str, path: str, switch: Given) -> None:
        """Raise InputError for a field without its group, unless it has its default or the group went off later.

        The group that is off, or is of another kind, may be one around that of the field.
        """
        given, (group, _, name) = self.given[path], path.rpartition(".")
        owners = GROUPS[group].owners(name) if group in GROUPS else []
        if not owners:
            raise unknown_field(path, GROUPS[off].names, off)
        if name == GROUPS[group].switch and given.read(GROUPS[group].of) is None:
            return
        if given.value == owners[0].model_fields[name].default or given.layer < switch.layer:
            return
        kinds = [kind for kind, model in GROUPS[off].kinds.items() if name in model.model_fields]
        raise InputError(
            f"the recipe field {one_line(given.spelling)!r} has no effect without {off}.{GROUPS[off].switch}"
            f"{' ' if kinds else ''}{' or '.join(kinds)}: set that too, or leave it out"
        )


def unknown_field(path: str, known: Iterable[str], group: str = "") -> InputError:
    """Return the error for a field that a recipe, or a group of its fields, does not have."""
    name, known = path.removeprefix(f"{group}."), list(known)
    inner = {} if group else {field: f"{path}.{field}" for path in GROUPS for field in GROUPS[path].names}
    places = inner | ({} if group else RENAMED) | {path: path for path in (*inner.values(), *known)}
    found = nearest(name, places)
    question = "" if found is None else f" (did you mean {places[found]}?)"
    return InputError(f"{group or 'a recipe'} has no field {one_line(name)!r}{question}: it has {', '.join(known)}")
