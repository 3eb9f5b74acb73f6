"""Composition: the same words mean the same tree; everything that is wrong is said at once."""

import dataclasses
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.config.compose import CONF, load, overrides_from, split_words, to_dict, validate
from headrace.config.schema import Fp8Config, PrecisionConfig, RecomputeConfig
from headrace.errors import UserError

LEAVES = [path for path in sorted(CONF.rglob("*.yaml")) if path.name != "config.yaml"]


def test_bare_means_the_demo() -> None:
    assert load() == load(["experiment=demo"])


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_named_run_composes(path: Path) -> None:
    load([f"experiment={path.stem}"])


@pytest.mark.parametrize(
    "group", [path for path in sorted(CONF.iterdir()) if path.is_dir()], ids=lambda path: path.name
)
def test_every_choice_of_every_group_is_documented(group: Path) -> None:
    for choice in group.glob("*.yaml"):
        assert choice.read_text().startswith("#"), f"{choice}: the first line says what the choice is"


TAKEN_FROM = dict.fromkeys((PrecisionConfig, Fp8Config, RecomputeConfig), "precision")


def documented_keys() -> dict[str, str]:
    """Keys whose line carries a comment in at least one choice of their group, as `group.key`.

    A group that takes in another one (`/precision@baseline`) has its keys documented there.
    """
    found = {}
    for path in LEAVES:
        for line in path.read_text().splitlines():
            name, colon, rest = line.strip().partition(":")
            if colon and not name.startswith("#"):
                found[f"{path.parent.name}.{name}"] = (
                    found.get(f"{path.parent.name}.{name}", "") + rest.partition("#")[2]
                )
    return found


def leaves(prefix: str, value: object) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [
            name
            for field in dataclasses.fields(value)
            for name in leaves(
                f"{TAKEN_FROM.get(type(value), prefix.split('.')[0])}.{field.name.rstrip('_')}",
                getattr(value, field.name),
            )
        ]
    return [prefix]


def test_every_setting_is_explained_where_it_is_set() -> None:
    documented, config = documented_keys(), load(["model=v3_671b_128k", "precision=fp8"])
    names = [name for group in dataclasses.fields(config) for name in leaves(group.name, getattr(config, group.name))]
    assert [name for name in names if not documented.get(name, "").strip()] == []


def test_every_value_that_is_wrong_is_named_in_one_go() -> None:
    with pytest.raises(UserError) as caught:
        load(["model.n_group=3", "model.topk_group=9", "model.qk_rope_head_dim=15"])
    message = str(caught.value)
    assert "model.n_group=3" in message
    assert "model.topk_group=9" in message
    assert "model.qk_rope_head_dim=15" in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["recipe.tokenz=1"], "recipe.tokenz"),
        (["+recipe.tokenz=1"], "recipe.tokenz"),
        (["recipe.tokens=many"], "recipe.tokens"),
        (["recipe.learning_rate.constant=sixty"], "recipe.learning_rate.constant"),
        (["model=unheard_of"], "unheard_of"),
        (["model.n_routed_experts=6", "model.n_group=4"], "model.n_group"),
        (["model.n_group=16", "model.topk_group=8"], "fewer than 2"),
        (["model.num_experts_per_tok=9"], "model.num_experts_per_tok"),
        (["model.first_k_dense_replace=5"], "model.first_k_dense_replace"),
        (["model.vocab_size=1000"], "tokenizer.vocab_size"),
        (["recipe.sequence_length=8192"], "model.max_position_embeddings"),
        (["recipe.tokens=10"], "recipe.tokens"),
        (["recipe.learning_rate.constant=90%", "recipe.learning_rate.cosine=20%"], "recipe.learning_rate"),
        (["recipe.learning_rate.final=1"], "recipe.learning_rate.final"),
        (["corpus=files"], "corpus.paths"),
        (["tokenizer=file"], "tokenizer.path"),
        (["parallel.data=3"], "parallel.data"),
        (["parallel.microbatch=3"], "parallel.microbatch"),
        (["train.from=nonsense"], "train.from"),
        (["publish.repo_id='a b'"], "publish.repo_id"),
        (["paths.results=${oc.env:HOME}"], "interpolations"),
    ],
)
def test_impossible_settings_are_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=r"^config: ") as caught:
        load(words)
    assert named in str(caught.value)


def test_a_whole_number_for_a_fraction_is_the_same_configuration() -> None:
    assert to_dict(load(["recipe.learning_rate.peak=2"])) == to_dict(load(["recipe.learning_rate.peak=2.0"]))
    assert load(["recipe.tokens=3e6"]) == load(["recipe.tokens=3000000"])


def test_the_tree_survives_a_round_trip() -> None:
    config = load(["experiment=tiny", "train.from=0123456789ab@40"])
    assert validate(to_dict(config)) == config
    assert to_dict(config)["train"]["from"] == "0123456789ab@40"


def test_snakemake_words_become_hydra_overrides() -> None:
    words = overrides_from(
        {"experiment": "tiny", "set": "a.b=[1, 2] c='x y'", "recipe": {"optimizer": {"name": "adamw"}}}
    )
    assert words == ["experiment=tiny", "a.b=[1, 2]", "c='x y'", "recipe.optimizer.name=adamw"]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)


@settings(deadline=None)
@given(st.lists(TEXT.filter(lambda text: "${" not in text and not text.startswith("[")), min_size=10, max_size=30))
@example(["\\'", "\\\\'\\"])
def test_any_text_from_yaml_reaches_hydra_as_it_is(texts: list[str]) -> None:
    words = [word for text in texts for word in overrides_from({"a": {"title": f"a {text}"}, "b": {"step": None}})]
    values = [override.value() for override in OverridesParser.create().parse_overrides(words)]
    assert values == [value for text in texts for value in (f"a {text}", None)]


@settings(deadline=None, max_examples=10)  # composing takes half a second; each time with many texts
@given(st.lists(TEXT.filter(lambda text: "${" not in text), min_size=15, max_size=30))
def test_any_text_from_yaml_is_the_value_of_the_setting(texts: list[str]) -> None:
    words = overrides_from({"corpus": "files", "set": "", "publish": {"title": f"a {texts[0]}"}})
    paths = overrides_from({"corpus.paths": [f"a {text}" for text in texts]})
    config = load([*words, *paths])
    assert config.publish.title == f"a {texts[0]}" and config.corpus.paths == tuple(f"a {text}" for text in texts)


@pytest.mark.parametrize("text", ["\\'", "\\\\'\\", '"x" = {y: [z]}, \N{SNOWMAN}', "a=b;c %d #e ~f"])
def test_such_text_is_the_value_of_the_setting(text: str) -> None:
    config = load(overrides_from({"publish": {"title": f"a {text}"}, "convert": {"step": None}}))
    assert (config.publish.title, config.convert.step) == (f"a {text}", None)


def test_a_quote_that_snakemake_strips_is_put_back() -> None:
    assert overrides_from({"set": "a.b=1 publish.title='Another title"}) == ["a.b=1", "publish.title='Another title'"]


@given(
    st.lists(
        st.text(st.characters(codec="ascii", exclude_characters="'\"()[]{} \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"), min_size=1)
    )
)
def test_words_without_quotes_split_like_white_space(words: list[str]) -> None:
    assert split_words("  ".join(words)) == words
