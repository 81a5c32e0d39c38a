"""Names with placeholders, and lists of names shortened for people."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.rules.names import NameIndex, Names, Template, grouped, skeleton

SEGMENTS = st.one_of(
    st.sampled_from(["layers", "w", "mlp", "up_proj", "{0..3}", "{1,3}", "{", "a{0}b", "007", "1a"]),
    st.integers(0, 6).map(str),
)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


def test_format_takes_numbers_and_choices() -> None:
    template = Template("layers.{layer}.attn.{kv:k_proj|v_proj}.weight")
    assert template.axes == ("layer", "kv")
    assert template.numbered == ("layer",)
    assert template.choices == {"kv": ("k_proj", "v_proj")}
    assert template.format({"layer": 12, "kv": 1}) == "layers.12.attn.v_proj.weight"


def test_a_name_without_placeholders_is_itself() -> None:
    template = Template("lm_head.weight")
    assert template.axes == () and template.format({}) == "lm_head.weight"


@given(st.integers(0, 999), st.integers(0, 1), st.integers(0, 999))
def test_an_index_reads_names_back(layer: int, word: int, block: int) -> None:
    template = Template("a.{layer}.{kv:k|v}.{block}.w")
    at = {"layer": layer, "kv": word, "block": block}
    assert NameIndex({template: "w"}).find(template.format(at)) == ("w", at)


@given(st.integers(0, 999), st.integers(0, 999))
def test_an_index_reads_paths_back(layer: int, block: int) -> None:
    template = Template("layer_{layer}/{block}/q_einsum/w", "/")
    at = {"layer": layer, "block": block}
    assert NameIndex({template: "w"}, "/").find(template.format(at)) == ("w", at)


@pytest.mark.parametrize("name", ["a.007.w", "a.x.w", "a.1", "a.1.w.2", "a..w", "", "b.1.w", "a.1_000.w"])
def test_an_index_knows_no_other_names(name: str) -> None:
    assert NameIndex({Template("a.{layer}.w"): "w"}).find(name) is None


def test_of_two_templates_the_more_literal_names_a_weight() -> None:
    index = NameIndex({Template("a.{layer}.w"): "any", Template("a.0.w"): "the first"})
    assert index.find("a.0.w") == ("the first", {}) and index.find("a.1.w") == ("any", {"layer": 1})


def test_forms_are_one_per_pick() -> None:
    template = Template("{a:x|y}.{b:p|q|r}.{n}")
    assert len({form for form, _ in template.forms()}) == 6


@pytest.mark.parametrize("text", ["layer{n}.w", "a.{n}w", "a.{n", "a.n}", "a.{}", "a.{n:}", "a.{n.m}"])
def test_a_placeholder_is_a_whole_segment(text: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"weight name {text!r}: a placeholder must be a whole segment")
    ):
        _ = Template(text).segments


@pytest.mark.parametrize("text", ["a/{n}w", "a/{n", "a/n}", "a/{}", "a/{n:}", "a/{n.m}", "a/{n}{m}"])
def test_a_placeholder_of_a_path_ends_its_segment(text: str) -> None:
    with pytest.raises(ValueError, match="a placeholder must end its segment"):
        _ = Template(text, "/").segments


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("layers.17.w", (17,)),
        ("layers.0.w", (0,)),
        ("layers.007.w", ()),
        ("layers.00.w", ()),
        ("layers.-1.w", ()),
        ("layers.1e3.w", ()),
        ("layers.٣.w", ()),  # an Arabic digit: int() would read it as 3
        ("layers.²", ()),
        ("layers.1234567890", ()),
        ("", ()),
        ("..", ()),
    ],
)
def test_what_a_number_is(name: str, numbers: tuple[int, ...]) -> None:
    assert skeleton(name)[1] == numbers


def test_grouped_ranges_and_lists() -> None:
    assert grouped(f"layers.{n}.w" for n in range(18)) == ["layers.{0..17}.w"]
    assert grouped(f"layers.{n}.w" for n in (7, 0, 3)) == ["layers.{0,3,7}.w"]
    assert grouped(["layers.5.w"]) == ["layers.5.w"]
    assert grouped(["a.w", "b.w"]) == ["a.w", "b.w"]
    assert grouped(f"x.{m}.y.{n}" for m in range(2) for n in (1, 4)) == ["x.{0..1}.y.{1,4}"]
    assert grouped([]) == []


def test_grouped_lists_an_incomplete_product_one_by_one() -> None:
    names = ["x.0.y.0", "x.0.y.1", "x.1.y.0"]
    assert grouped(names) == names


def test_grouped_keeps_families_apart_and_in_order() -> None:
    names = [f"{kind}.{n}.w" for n in range(3) for kind in ("b", "a")]
    assert grouped(names) == ["b.{0..2}.w", "a.{0..2}.w"]


def test_grouped_keeps_braces_of_names_as_they_are() -> None:
    assert grouped(["{0..3}.w", "{a}.1", "{a}.2"]) == ["{0..3}.w", "{a}.{1..2}"]


def spread(line: str) -> set[str]:
    """Every name that a shortened line can stand for, its own text (braces in a name) included."""
    names = {""}
    for part in line.split("."):
        words = {part}
        if match := re.fullmatch(r"\{(\d+)\}|\{([\d,]+)\}", part):
            words |= set((match[1] or match[2]).split(","))
        names = {f"{name}.{word}" if name else word for name in names for word in words}
    return names


@given(st.lists(NAMES, max_size=12))
def test_grouped_loses_and_invents_no_name(names: list[str]) -> None:
    plain = [name for name in names if "{" not in name]
    shown: list[str] = []
    for line in grouped(plain):
        # a range as the list it stands for; the dots inside would otherwise part it
        line = re.sub(
            r"\{(\d+)\.\.(\d+)\}",
            lambda m: "{" + ",".join(map(str, range(int(m[1]), int(m[2]) + 1))) + "}",
            line,
        )
        shown += [name for name in spread(line) if "{" not in name]
    assert sorted(shown) == sorted(set(plain))


@given(st.lists(NAMES, max_size=12))
def test_grouped_takes_any_name(names: list[str]) -> None:
    lines = grouped(names)
    assert len(lines) <= len(set(names)) and all(isinstance(line, str) for line in lines)
    assert bool(lines) == bool(names)


def test_a_name_is_known_however_many_numbers_its_words_are() -> None:
    name = ".".join(map(str, range(12)))
    assert NameIndex({Template(name): "w"}).find(name) == ("w", {})


def test_an_index_refuses_a_name_that_could_be_read_in_too_many_ways() -> None:
    # each segment is a word of one template and a number of the other
    words, numbers = ".".join(["0"] * 30), ".".join(f"{{n{i}}}" for i in range(30))
    index = NameIndex({Template(words + ".a"): "words", Template(numbers + ".b"): "numbers"})
    assert index.find(words + ".c") is None


WEIGHTS = {
    Template("a.{layer}.{kv:k|v}.w"): "stacked",
    Template("a.{layer}.norm.{block}.w"): "two numbers",
    Template("head.w"): "plain",
}


@pytest.mark.parametrize(
    "more", [{}, {Template("a.0.k.w"): "a number as it stands"}], ids=["open", "literal"]
)
@given(st.lists(NAMES | st.sampled_from(["a", "b"]).flatmap(
    lambda head: st.tuples(st.integers(0, 3), st.sampled_from(["k", "v", "q", "norm.2"])).map(
        lambda at: f"{head}.{at[0]}.{at[1]}.w"
    )
) | st.just("head.w"), max_size=12))  # fmt: skip
def test_many_names_are_known_as_each_is(more: dict[Template, str], listed: list[str]) -> None:
    index = NameIndex({**WEIGHTS, **more})
    names = Names.of(listed)
    expected = {name: place for name in dict.fromkeys(listed) if (place := index.find(name)) is not None}
    found = index.find_all(names)
    assert found == expected and [*found] == [*expected]
    forms, known = index.forms_of(names)
    assert forms == {index.form_of(name) for name in expected}
    assert [name for name in names.apart if known(name)] == [*expected]


@given(st.lists(NAMES, min_size=1), st.sampled_from(["x.", "x.0.", "module.y."]))
def test_a_prefix_is_taken_off_names_taken_apart(listed: list[str], prefix: str) -> None:
    names = Names.of(prefix + name for name in listed)
    assert names.without(prefix) == Names.of(listed)
    assert [*names.without(prefix).apart] == [*Names.of(listed).apart]


@given(st.integers(0, 99), st.integers(0, 1))
def test_a_name_is_formatted_whether_or_not_all_is_given(layer: int, kv: int) -> None:
    template = Template("a.{layer}.{kv:k|v}.{block}.w")
    assert template.format({"layer": layer, "kv": kv}) == f"a.{layer}.{'kv'[kv]}.{{block}}.w"
    assert template.format({"layer": layer, "kv": kv, "block": 7, "x": 1}) == f"a.{layer}.{'kv'[kv]}.7.w"
