"""secateur list."""

from __future__ import annotations

import json

import pytest

from secateur.cli.listing import KINDS


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("methods", "wanda"), ("refinements", "refit"), ("patterns", "n:m"), ("allocations", "owl"),
        ("texts", "gutenberg"), ("models", "smollm2"), ("tasks", "piqa"),
    ],
)  # fmt: skip
def test_a_table_with_a_line_and_the_source_of_each(cli, kind, name):
    ran = cli("list", kind)
    assert ran.code == 0 and not ran.err
    assert ran.out.split()[:3] == ["name", "what", "source"]
    assert any(line.split()[0] == name for line in ran.out.splitlines())


def test_every_entry_says_what_it_is(cli):
    lists = cli("list", "--json", "-").record
    assert list(lists) == list(KINDS)
    for kind, rows in lists.items():
        for row in rows:
            assert row["name"] and row["summary"] and "\n" not in row["summary"]
            assert row["source"] or kind == "patterns"


def test_json_to_a_file_shows_the_table_as_well(cli, here):
    ran = cli("list", "methods", "--json", "m.json")
    assert ran.code == 0 and "wanda" in ran.out
    assert {row["name"] for row in json.loads((here / "m.json").read_text())["methods"]} >= {"wanda", "sparsegpt"}


def test_an_unknown_list_names_the_nearest(cli):
    ran = cli("list", "method")
    assert ran.code == 2 and "Did you mean 'methods'?" in ran.error
