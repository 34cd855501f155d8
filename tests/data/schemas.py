"""200 JSON schemas of the kinds that public suites test and that applications send: made here, the same every time."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ["name", "age", "id", "tags", "price", "items", "address", "city", "zip", "active", "score", "unit", "kind"]
WORDS += ["note", "owner", "date", "email", "url", "count", "total"]


def closed(properties: Schema, *required: str) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


INTEGER, NULL = {"type": "integer"}, {"type": "null"}
WEATHER = closed({"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}}, "city")
TREE = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
PAIR = [INTEGER, {"type": "boolean"}]

HAND_MADE: dict[str, Schema] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": {"type": "string", "maxLength": 20},
    "types": {"type": ["string", "null"], "maxLength": 12},
    "const text": {"const": 'fixed "text" with \\ and ü'},
    "const object": {"const": {"a": [1, None, True], "b": {}}},
    "enum mixed": {"enum": ["a", 1, None, False, {"k": [1.5]}]},
    "range": {"type": "integer", "minimum": -5, "maximum": 17},
    "exclusive range": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    "float range": {"type": "number", "minimum": 0, "maximum": 1},
    "length": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern alternatives": {"type": "string", "pattern": "^(yes|no|maybe)$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "array": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    "array of at least": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": PAIR, "items": False, "minItems": 2},
    "nested arrays": {
        "type": "array",
        "maxItems": 2,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "empty object": {"type": "object", "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "free object": {"type": "object"},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}, {"type": "null"}]},
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "ref": {
        "$defs": {"point": closed({"x": INTEGER}, "x")},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "maxItems": 3,
    },
    "recursion": {"$defs": {"tree": closed({"v": INTEGER, "sub": TREE}, "v")}, "$ref": "#/$defs/tree"},
    "definitions": {"definitions": {"n": INTEGER}, **closed({"a": {"$ref": "#/definitions/n"}}, "a")},
    "tool call": closed({"name": {"const": "get_weather"}, "arguments": WEATHER}, "name", "arguments"),
    "one of several tools": {
        "anyOf": [
            closed({"name": {"const": tool}, "arguments": closed({"x": INTEGER}, "x")}, "name", "arguments")
            for tool in ("add", "subtract")
        ]
    },
    "odd keys": closed({"a b": NULL, 'q"uote': NULL, "ü": NULL}, "a b", 'q"uote', "ü"),
    "true": {},
}


def scalar(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": rng.randint(1, 16)},
            {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 8)},
            {"type": "string", "pattern": rng.choice(["^[a-z]{1,8}$", "^#[0-9a-f]{6}$", "^[0-9]{3}$", "^v[0-9]+$"])},
            {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])},
            {"enum": rng.sample(WORDS, 3)},
            {"const": rng.choice(WORDS)},
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        ]
    )


def schema(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return scalar(rng)
    if kind < 0.5:
        low = rng.randint(0, 2)
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    names = rng.sample(WORDS, rng.randint(1, 4))
    properties = {name: schema(rng, depth - 1) for name in names}
    return closed(properties, *(name for name in names if rng.random() < 0.7))


def cases(count: int = 200) -> list[tuple[str, Schema]]:
    """(name, schema): the hand-made ones, then random ones of growing depth."""
    found = list(HAND_MADE.items())
    for seed in range(count - len(found)):
        found.append((f"random {seed}", schema(random.Random(seed), 1 + seed % 3)))
    return found[:count]
