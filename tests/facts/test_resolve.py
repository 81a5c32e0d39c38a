"""One value of every fact, by where it comes from: a family of two small files, and directories that disagree."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import Problem, SourceRefused
from bridge.facts.read import MAX_FILES, Place, read_place
from bridge.facts.resolve import Known, resolve
from bridge.formats.disk.location import Location
from bridge.rules.fact import Damage, Fact, FactKind, FactTable, Reading
from bridge.rules.model import Model, Part, Sizes
from bridge.rules.rule import Rule


def whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


LENGTH = FactKind(key="length", title="sequence length", matters=True, flag="length", decode=whole)
NAME = FactKind(key="name", title="name of the data")
MODEL = Model(
    name="toy", parts=(Part("body", (Rule("embed", "embed.weight", "token width -> token width"),)),)
)


def read(model: Model, files: Mapping[str, bytes], chosen: Mapping[str, Any]) -> Reading:
    facts, damaged, kept = [], [], {}
    for file in ("a.json", "b.json"):
        if file not in files:
            continue
        try:
            tree = json.loads(files[file])
        except ValueError as error:
            damaged.append(Damage(LENGTH, Problem(f"{file}: {error}", "mend it")))
            continue
        facts += [Fact(kind, tree[kind.key], file) for kind in (LENGTH, NAME) if kind.key in tree]
        kept[file] = {file: files[file]}
    return Reading(facts=tuple(facts), damaged=tuple(damaged), layout="toy" if kept else "", kept=kept)


def complete(model: Model, sizes: Sizes, facts: Mapping[str, Fact]) -> tuple[Fact, ...]:
    return () if "length" in facts else (Fact(LENGTH, 7, "assumed: the usual", assumed=True),)


TABLE = FactTable(
    kinds=(LENGTH, NAME),
    files=("a.json", "b.json", "c_*.json"),
    read=read,
    given=lambda model, settings: Reading(),
    complete=complete,
)


def place(directory: Path, recorded: Mapping[str, Any] | None = None, /, **files: Any) -> Place:
    """A directory of JSON files, by name without suffix, and the facts in its `bridge.json`."""
    directory.mkdir()
    for name, tree in files.items():
        text = tree if isinstance(tree, str) else json.dumps(tree)
        (directory / f"{name}.json").write_text(text)
    if recorded is not None:
        (directory / "bridge.json").write_text(json.dumps({"facts": recorded}))
    return read_place(Location.parse(directory), TABLE, MODEL, {}, Reading())


def known(*places: Place, given: Mapping[str, Any] | None = None) -> Known:
    kinds = {kind.key: kind for kind in TABLE.kinds}
    facts = tuple(Fact(kinds[key], value, f"--{key}") for key, value in (given or {}).items())
    return resolve(TABLE, MODEL, {}, Reading(facts=facts), places)


def length(known: Known) -> tuple[int, str, bool]:
    fact = known.facts["length"]
    return fact.value, fact.origin, fact.assumed


def test_a_default_is_assumed(tmp_path: Path) -> None:
    found = known(place(tmp_path / "source"))
    assert length(found) == (7, "assumed: the usual", True)
    assert found.stated("length") is None and "name" not in found.facts and not found.problems


def test_origins_count_in_their_order(tmp_path: Path) -> None:
    recorded = {"length": {"value": 3, "origin": "x"}}
    base = place(tmp_path / "base", None, a={"length": 4})
    assert length(known(place(tmp_path / "1"), base)) == (4, "a.json", False)
    assert length(known(place(tmp_path / "2", recorded), base)) == (3, "bridge.json", False)
    own = place(tmp_path / "3", {"length": {"value": 2, "origin": "x"}}, b={"length": 2})
    assert length(known(own, base)) == (2, "b.json", False)
    assert length(known(own, base, given={"length": 1})) == (1, "--length", False)


def test_the_nearest_wins_and_the_other_is_named(tmp_path: Path) -> None:
    found = known(
        place(tmp_path / "adapter", None, b={"length": 2}), place(tmp_path / "base", None, a={"length": 4})
    )
    assert not found.problems
    assert found.notes == (f"sequence length: 2 (b.json) is used, not 4 ({tmp_path}/base/a.json)",)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    source = place(tmp_path / "source", None, a={"length": 4, "name": "x"}, b={"length": 5, "name": "y"})
    (problem,) = known(source).problems
    assert problem.cause == f"{tmp_path}/source: the sequence length is 4 in a.json, but 5 in b.json"
    assert problem.fix == "choose with --length"
    chosen = known(source, given={"length": 5})
    assert not chosen.problems and length(chosen) == (5, "--length", False)
    # the name changes nothing
    assert chosen.facts["name"].value == "x"


def test_files_that_disagree_on_what_no_flag_gives_are_chosen_in_a_copy(tmp_path: Path) -> None:
    """No fix tells people to remove a file: which is right is theirs to say, and the other may be the only copy."""
    kind = replace(LENGTH, flag="")
    table = replace(
        TABLE,
        kinds=(kind,),
        complete=lambda model, sizes, facts: (),
        read=lambda model, files, chosen: replace(
            (reading := read(model, files, chosen)),
            facts=tuple(replace(fact, kind=kind) for fact in reading.facts if fact.kind is LENGTH),
        ),
    )
    (tmp_path / "a.json").write_text('{"length": 4}')
    (tmp_path / "b.json").write_text('{"length": 5}')
    source = read_place(Location.parse(tmp_path), table, MODEL, {}, Reading())
    (problem,) = resolve(table, MODEL, {}, Reading(), [source]).problems
    assert problem.fix == "convert a copy of it with a.json or b.json alone, whichever is right"


def test_a_record_that_disagrees_is_refused(tmp_path: Path) -> None:
    source = place(tmp_path / "source", {"length": {"value": 3, "origin": "x"}}, a={"length": 4})
    (problem,) = known(source).problems
    assert "is 4 in a.json, but 3 in bridge.json" in problem.cause


def test_a_default_written_to_a_file_stays_one(tmp_path: Path) -> None:
    recorded = {"length": {"value": 7, "origin": "assumed: the usual", "assumed": True}}
    written = place(tmp_path / "1", recorded, a={"length": 7})
    assert known(written).facts["length"].assumed
    assert length(known(written, place(tmp_path / "base", None, a={"length": 4}))) == (4, "a.json", False)
    # who edits the file states it
    edited = place(tmp_path / "2", recorded, a={"length": 9})
    assert length(known(edited)) == (9, "a.json", False) and not known(edited).problems


def test_damage_of_the_nearest_is_refused(tmp_path: Path) -> None:
    broken = place(tmp_path / "adapter", None, a="{")
    base = place(tmp_path / "base", None, a={"length": 4})
    assert ["a.json" in problem.cause for problem in known(broken, base).problems] == [True]
    assert not known(broken, base, given={"length": 4}).problems
    whole = place(tmp_path / "whole", None, a={"length": 2})
    assert not known(whole, place(tmp_path / "other", None, a="{")).problems


@pytest.mark.parametrize("entry", [{"value": "x"}, {}, 5, [], {"value": None}])
def test_a_damaged_record_is_refused(entry: Any, tmp_path: Path) -> None:
    (problem,) = known(place(tmp_path / "source", {"length": entry})).problems
    assert "bridge.json: its sequence length is damaged" in problem.cause


def test_files_kept_are_the_nearest_of_each_group(tmp_path: Path) -> None:
    adapter = place(tmp_path / "adapter", None, b={"length": 2})
    base = place(tmp_path / "base", None, a={"length": 2}, b={"length": 4})
    assert known(adapter, base).kept == {
        "a.json": {"a.json": b'{"length": 2}'},
        "b.json": {"b.json": b'{"length": 2}'},
    }


def test_pointers_of_git_lfs_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(SourceRefused, match=r"a\.json is a git-lfs pointer"):
        place(tmp_path / "source", None, a="version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def test_files_are_bounded_in_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"c_{number}": {} for number in range(MAX_FILES + 1)}
    with pytest.raises(SourceRefused, match=f"contains {MAX_FILES + 1} files like c_0.json"):
        place(tmp_path / "many", None, **many)
    monkeypatch.setattr("bridge.facts.read.MAX_BYTES", 1 << 20)
    with pytest.raises(
        SourceRefused, match=r"a\.json exceeds the 1 MB limit for this file\n  fix: see what it is"
    ):
        place(tmp_path / "large", None, a=" " * ((1 << 20) + 1))
