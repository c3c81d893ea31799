"""Recipes: what they hold, how they are overridden and compared, and what comes with the package."""

from __future__ import annotations

import json
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.toml import key_lines, parse_override
from windtunnel.base.units import Length
from windtunnel.laws.loss import NAMED
from windtunnel.model.family import FAMILIES
from windtunnel.program import Program
from windtunnel.recipe import check_files, differences, load_recipe, parse_recipe, shipped, shipped_path, with_defaults
from windtunnel.recipe_errors import table_model, toml_value, unwrapped
from windtunnel.recipe_new import new_recipe
from windtunnel.recipe_reference import recipe_reference
from windtunnel.recipe_schema import NamedLaw, Recipe
from windtunnel.study import search_stages

FIELDS = {
    "": "name seed max_loss max_hours max_cost track corpus tokenizer model budget optimizer tunnel trunk branch evaluate export machine",
    "corpus.x": "source sha256 format split text messages system user assistant prompt chosen rejected template loss on_bad minimum_characters heldout "
    "heldout_tokens heldout_by clean decontaminate language licence",
    "corpus.x.clean": "unicode exact near decontaminate",
    "tokenizer": "vocab corpora path",
    "model": "family size shape tied qk_norm row recompute parametrization vocabulary_regime base_width base_layers init_std scale_emb scale_depth",
    "model.shape": "width layers heads kv_heads ff",
    "budget": "hours gpu_hours flops money law",
    "optimizer": "kind lr beta1 beta2 eps weight_decay decay clip",
    "tunnel": "preset proxies tokens seeds trials space sampler prune per_round on_edge stop noise repeats trial_tokens search_size check_size forms "
    "transfer batch",
    "tunnel.space": "learning_rate init_std scale_emb scale_depth weight_decay beta2 warmup qk_norm optimizer decay",
    "tunnel.transfer": "axes over factors width layers tokens rates spacing centre seeds parametrizations batch_rule "
    "horizon_exponent",
    "tunnel.batch": "sizes batches tokens seeds rate_rule levels factors branch_tokens tolerance",
    "trunk": "start tokens batch batch_schedule warmup mixture masking checkpoint_every keep dynamics",
    "trunk.batch_schedule": "after batch",
    "branch.x": "kind parent at tokens form floor half_life mixture batch batch_schedule stable experts context epochs lr lr_by_role preset loss reference beta betas "
    "smoothing margin warmup decay lora of weights last",
    "branch.x.lora": "rank alpha",
    "branch.x.experts": "count top_k drop router balance z bias",
    "branch.x.context": "row theta scaling factor dynamic_ntk untie long_share long_from items",
    "evaluate": "corpora tokens tasks",
    "export": "branch format",
    "machine": "count tflops price watts currency",
}


def table(path: str) -> type[BaseModel]:
    found = table_model(tuple(path.split("."))) if path else Recipe
    assert found is not None
    return found


@pytest.mark.parametrize("path", FIELDS)
def test_the_fields_of_each_table_are_frozen(path: str) -> None:
    assert list(table(path).model_fields) == FIELDS[path].split()


def test_no_table_is_left_out_of_the_frozen_list() -> None:
    found: set[type[BaseModel]] = set()
    todo: list[type[BaseModel]] = [Recipe]
    while todo:
        here = todo.pop()
        found.add(here)
        for field in here.model_fields.values():
            kind = unwrapped(field.annotation)
            values = [unwrapped(kind), *map(unwrapped, typing.get_args(kind))]
            todo += [v for v in values if isinstance(v, type) and issubclass(v, BaseModel) and v not in found]
    assert found == {table(path) for path in FIELDS}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_says_what_it_is(path: str) -> None:
    assert not [name for name, field in table(path).model_fields.items() if not (field.description or "").strip()]


@pytest.mark.parametrize("path", [p for p in FIELDS if p and not p.startswith("corpus")])
def test_every_example_is_accepted(path: str) -> None:
    for name, field in table(path).model_fields.items():
        for example in field.examples or ():
            table(path).__pydantic_validator__.validate_assignment(table(path).model_construct(), name, example)


def test_the_released_models_have_exactly_the_published_sizes() -> None:
    for name, body, embedding in (("1.2b", 1_247_442_432, 73_440 * 1536), ("2.4b", 2_442_057_984, 122_753 * 2304)):
        recipe = load_recipe(f"minicpm-{name}")
        shape = recipe.target_shape()
        assert shape is not None
        assert (shape.body, shape.embedding) == (body, embedding)
        batches = [recipe.trunk.batch, *(change.batch for change in recipe.trunk.batch_schedule)]
        assert batches[-1] == 3_932_160 == 960 * recipe.model.row
        assert batches[:-1] == ([1_966_080] if name == "1.2b" else [])
        assert recipe.trunk.tokens == (
            Length(279_500, "steps") if name == "2.4b" else Length(279_500 * 3_932_160, "tokens")
        )
        for branch in (recipe.branch[name] for name in recipe.decays):
            assert (branch.tokens, branch.half_life) == (Length(18_500, "steps"), Length(5_000, "steps"))
        assert recipe.optimizer.lr == 0.01
        assert sum(recipe.mixture.values()) == 100


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_say_command_time_and_result_first(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.forecast_branch == "same"
    head = shipped_path(name).read_text(encoding="utf-8").splitlines()[:3]
    assert head[0].startswith("# windtunnel ")
    assert any(word in " ".join(head) for word in ("minutes", "hour", "Seconds"))
    assert any(word in " ".join(head) for word in ("Expect", "N ="))


def test_the_quickstart_target_is_three_times_its_largest_proxy_and_its_decay_data_is_new() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.tunnel is not None
    target = recipe.target_shape()
    assert target is not None
    assert target.body >= 3 * max(recipe.shape_of(size).body for size in recipe.tunnel.proxies)
    assert set(recipe.branch["better"].mixture or ()) > set(recipe.mixture)
    assert {corpus.heldout_by for corpus in recipe.corpus.values()} == {"title"}, (
        "no text is scored that was read in another form"
    )


@pytest.mark.parametrize("name", shipped())
def test_every_key_of_a_recipe_is_found_on_its_line(name: str) -> None:
    text = shipped_path(name).read_text(encoding="utf-8")
    lines = dict(key_lines(text))

    def keys(tables: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        out = []
        for key, value in tables.items():
            out += [(*prefix, key), *(keys(value, (*prefix, key)) if isinstance(value, dict) else [])]
        return out

    for path in keys(tomllib.loads(text)):
        if path in lines:
            assert path[-1] in text.splitlines()[lines[path] - 1]
        else:
            assert any(other[: len(path)] == path for other in lines), path  # [a.b] defines a


def test_lines_survive_strings_comments_arrays_and_inline_tables() -> None:
    text = '''a = "x = 1 # no" # b = 2
"c d" = [
  1, # ]
  "]",
]
e = { f = 1, g = { h = 2 } }
i = """
j = 3
[k]
"""
l.m = 4
[ n . o ]
p = 1979-05-27
[[q]]
r = 1
'''
    found = dict(key_lines(text))
    assert found == {
        ("a",): 1, ("c d",): 2, ("e",): 6, ("e", "f"): 6, ("e", "g"): 6, ("e", "g", "h"): 6, ("i",): 7, ("l", "m"): 11,
        ("n", "o"): 12, ("n", "o", "p"): 13, ("q",): 14, ("q", "r"): 15,
    }  # fmt: skip


@pytest.mark.parametrize("name", shipped())
def test_a_resolved_recipe_reads_back_as_itself(name: str) -> None:
    recipe = load_recipe(name)
    again = parse_recipe(recipe.resolved())
    assert again == recipe
    assert again.hash == recipe.hash
    assert not differences(recipe.resolved(), again.resolved())


def test_a_length_keeps_every_digit_and_equal_recipes_have_equal_hashes() -> None:
    precise = load_recipe("quickstart", ["trunk.tokens=6400123"])
    assert precise.resolved()["trunk"]["tokens"] == 6_400_123
    same = [
        load_recipe("quickstart", [f"trunk.tokens={t}"]).hash for t in ("6.4M", "6400000", "6.4e6", '"6.4M tokens"')
    ]
    assert len(set(same)) == 1
    assert precise.hash != same[0]
    share = load_recipe("quickstart", ["branch.same.tokens=7%"])
    assert share.resolved()["branch"]["same"]["tokens"] == "7%"


def test_overrides_are_toml_or_bare_text_and_none_removes() -> None:
    assert parse_override("a.b=3") == (("a", "b"), 3)
    assert parse_override("a=[1, 2]") == (("a",), [1, 2])
    assert parse_override("a = 6.4M") == (("a",), "6.4M")
    assert parse_override("a=true") == (("a",), True)
    assert parse_override("a=x=y") == (("a",), "x=y")
    assert parse_override("a=1\nb = 2") == (("a",), "1\nb = 2"), "an override sets one key"
    assert parse_override("a=none") == (("a",), None)
    recipe = load_recipe("quickstart", ["model.size=none", "budget.hours=2", "trunk.tokens=none", "seed=7"])
    assert (recipe.model.size, recipe.trunk.tokens, recipe.seed) == (None, None, 7)
    assert recipe.target_shape() is None
    assert recipe.given("seed")
    assert recipe.given("budget.hours")
    assert not recipe.given("model.size")
    assert not recipe.given("optimizer.lr")


def test_differences_name_the_key_and_both_values() -> None:
    old = load_recipe("quickstart", ["trunk.tokens=6.4M"]).resolved()
    new = load_recipe(
        "quickstart", ["trunk.tokens=12.8M", "branch.better=none", "export.branch=none", "optimizer.lr=0.02"]
    ).resolved()
    assert {str(d) for d in differences(old, new)} == {
        "trunk.tokens: 6400000 → 12800000", "branch.better: a table → nothing", "optimizer.lr: nothing → 0.02",
        "export.branch: better → nothing",
    }  # fmt: skip


def test_a_key_that_recipes_have_gained_since_is_no_change():
    now = load_recipe("quickstart").resolved()
    stored = json.loads(json.dumps(now))
    del stored["model"]["recompute"]
    assert [d.key for d in differences(stored, now)] == ["model.recompute"]
    assert not differences(with_defaults(stored), now)
    stored["seed"] = 7
    assert [str(d) for d in differences(with_defaults(stored), now)] == ["seed: 7 → 1"]
    assert with_defaults({"no": "recipe"}) == {"no": "recipe"}


def test_the_budget_names_exactly_the_laws_that_exist() -> None:
    assert set(typing.get_args(NamedLaw)) == set(NAMED)


def test_a_recipe_cannot_change_after_reading() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(Exception, match="frozen"):
        recipe.trunk.keep = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_files_are_relative_to_the_recipe_and_missing_ones_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text("hello")
    file = tmp_path / "mine.toml"
    file.write_text('name = "x"\n[corpus.a]\nsource = "text.md"\n[model]\nsize = "0.3M"\nfamily = "tiny"\n')
    recipe = load_recipe(file)
    assert recipe.base == tmp_path
    check_files(recipe)
    (tmp_path / "text.md").unlink()
    with pytest.raises(
        RecipeError, match=r"mine\.toml:3: corpus\.a\.source: expected an existing file or folder, got 'text\.md'"
    ):
        check_files(recipe)
    with pytest.raises(RecipeError, match="s3://"):
        check_files(load_recipe(file, ["corpus.a.source=s3://bucket/x"]))


@pytest.mark.parametrize("size", [m.name for family in FAMILIES.values() for m in family.members])
def test_new_writes_a_valid_recipe_for_every_size(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    text = new_recipe("mine", size=size, data=["books", "more/*.txt"])
    recipe = parse_recipe(tomllib.loads(text))
    target = recipe.target_shape()
    assert target is not None
    if recipe.tunnel:
        assert target.body >= 2.5 * max(recipe.shape_of(proxy).body for proxy in recipe.tunnel.proxies)
    assert recipe.corpus["text"].source == ("books", "more/*.txt")


def test_a_new_recipe_fits_the_text_that_is_there(tmp_path: Path) -> None:
    """Sixty notes: enough of them held out to be scored, and no more tokens than four readings of them."""
    for i in range(60):
        (tmp_path / f"{i}.md").write_text("A note about nothing in particular. " * 100, encoding="utf-8")
    recipe = parse_recipe(tomllib.loads(new_recipe("mine", data=[tmp_path])))
    assert recipe.corpus["text"].heldout == 0.2
    size = 60 * 100 * 36
    assert 100_000 <= recipe.trunk.tokens.value <= 4 * size / 3 + 10_000
    (tmp_path / "more.jsonl").write_text('{"text": "a record"}', encoding="utf-8")  # who knows how many documents
    recipe = parse_recipe(tomllib.loads(new_recipe("mine", data=[tmp_path])))
    assert (recipe.corpus["text"].heldout, recipe.trunk.tokens.value) == (0.01, 6_400_000)


def test_new_refuses_what_the_recipe_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose one of 0.02M"):
        new_recipe("mine", size="7T", data=[tmp_path])
    with pytest.raises(RecipeError, match="name of letters"):
        new_recipe("a/b", data=[tmp_path])
    with pytest.raises(UserError, match="--data: expected an existing"):
        new_recipe("mine", data=[tmp_path / "absent"])


def test_a_preset_gives_what_the_recipe_leaves_out_and_nothing_else() -> None:
    """Both presets hold the paper's protocol (arXiv 2404.06395, appendix A.1): four axes, ten tokens a parameter, Bayesian."""
    base = {"name": "x", "corpus": {"a": {"source": "a.txt"}}, "branch": {"same": {}}}
    tiny = {**base, "model": {"family": "tiny", "size": "0.3M"}}
    paper = {**base, "model": {"family": "minicpm", "size": "1.2B"}}
    for tables, preset, size in ((paper, "paper", "9M"), (tiny, "paper-tiny", "0.05M")):
        recipe = parse_recipe({**tables, "tunnel": {"preset": preset}})
        assert recipe.tunnel is not None
        assert (recipe.tunnel.search_size, recipe.tunnel.trial_tokens, recipe.tunnel.sampler) == (size, None, "gp")
        assert recipe.tunnel.stop == "enough"  # it ends by itself; the trials are the most it takes
        assert Program(recipe).searched == ("learning_rate", "init_std", "scale_emb", "scale_depth")
        (stage,) = search_stages(Program(recipe), [(0, {"learning_rate": 0.01})])
        assert stage.tokens == pytest.approx(10 * stage.shape.body, rel=0.01)
        own = parse_recipe({**tables, "tunnel": {"preset": preset, "trials": 7, "sampler": "tpe"}})
        assert own.tunnel == recipe.tunnel.model_copy(update={"trials": 7, "sampler": "tpe"})
        assert parse_recipe(own.resolved()) == own
    assert Program(parse_recipe({**paper, "tunnel": {"preset": "paper"}})).recipe.shape_of("9M").body == pytest.approx(
        9e6, rel=0.1
    )
    with pytest.raises(RecipeError, match="tunnel.proxies: expected a size of the family 'tiny', got 9M"):
        parse_recipe({**tiny, "tunnel": {"preset": "paper"}})


def test_the_reference_in_the_documentation_is_the_generated_one() -> None:
    written = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"
    assert written.read_text(encoding="utf-8") == recipe_reference(), (
        "run: python -m windtunnel.recipe_reference > docs/reference/recipe.md"
    )


@pytest.mark.parametrize(
    "value",
    [
        "{{ title }}\n\n{{ extract }}",
        'a "quoted" \\ path',
        "tab\there",
        "".join(map(chr, range(1, 128))),
        "größe 用户",
        ["a\nb", True, 0.5],
    ],
)
def test_a_value_that_we_write_into_a_recipe_is_read_back_as_it_was(value: Any) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}
