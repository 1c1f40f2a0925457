"""The schemas say exactly what their targets take."""

import dataclasses
import inspect

import pytest
from hydra.utils import get_object

from latentdm.schemas import SCHEMAS

CASES = {f"{group}/{name}": schema for group, schemas in SCHEMAS.items() for name, schema in schemas.items()}


@pytest.mark.parametrize("schema", CASES.values(), ids=CASES.keys())
def test_fields_are_the_parameters_of_the_target(schema):
    fields = {field.name: field for field in dataclasses.fields(schema)}
    target = get_object(fields["_target_"].default)
    parameters = inspect.signature(target).parameters
    named = {name for name in fields if not name.startswith("_")}
    exclusive = {"grow_mask_by", "mask_offset"}  # one schema each: they exclude each other
    assert named - exclusive == set(parameters) - exclusive
    for name in named - exclusive:
        default = fields[name].default
        if default is dataclasses.MISSING and fields[name].default_factory is not dataclasses.MISSING:
            default = tuple(fields[name].default_factory())
        if parameters[name].default is not inspect.Parameter.empty:
            assert default == parameters[name].default, name
