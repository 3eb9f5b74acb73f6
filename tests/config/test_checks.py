"""Layouts that cannot run are refused in words, and exactly those; the pipeline's own code is the judge."""

from dataclasses import replace

import pytest

from headrace.config.checks import problems
from headrace.config.compose import load
from headrace.config.phases import batches_of, layout_of, microbatch_of, phase_names
from headrace.config.recipe import BatchRampConfig
from headrace.config.schema import PhaseLayoutConfig
from headrace.errors import UserError
from headrace.pipeline.engine import microbatches_of, schedule_of
from headrace.pipeline.generators import generate
from headrace.recipe.schedule import Schedule

SCHEDULES = ["1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]


@pytest.fixture(scope="module")
def tiny():
    return load(["experiment=tiny", "recipe.batch_ramp=null", "recipe.extensions=[]", "recipe.tokens=1e6"])


@pytest.fixture(scope="module")
def published():
    return load(["experiment=v3_671b"])


def with_layout(config, sequences=8, **parallel):
    recipe = replace(config.recipe, batch_sequences=sequences)
    return replace(config, recipe=recipe, parallel=replace(config.parallel, **parallel))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_refused_exactly_where_it_does_not_exist(tiny, name):
    for ranks in range(1, 7):
        for microbatches in range(1, 20):
            config = with_layout(tiny, microbatches, pipeline=ranks, schedule=name, microbatch=1)
            try:
                generate(name, ranks, microbatches)
            except UserError:
                assert len(problems(config)) == 1, (ranks, microbatches)
            else:
                assert problems(config) == [], (ranks, microbatches)


@pytest.mark.parametrize("name", [*SCHEDULES, "auto"])
def test_layers_are_given_per_stage_of_the_schedule(tiny, name):
    picked, _ = schedule_of(with_layout(tiny, pipeline=2, schedule=name, microbatch=1))
    stages = generate(picked, 2, 8).stages
    for given in range(1, 6):
        layers = (tiny.model.num_hidden_layers, *[0] * (given - 1))
        config = with_layout(tiny, pipeline=2, schedule=name, microbatch=1, layers=layers)
        assert (problems(config) == []) == (given == stages)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"data": 3}, "parallel.data=3 must divide recipe.batch_sequences=8"),
        ({"data": 2, "microbatch": 8}, "parallel.microbatch=8 must divide the 4 rows"),
        ({"data": 2, "expert": 4}, "parallel.expert=4 must divide parallel.data=2"),
        ({"data": 3, "expert": 3}, "parallel.expert=3 must divide model.n_routed_experts=8"),
        ({"data": 8, "expert": 8}, "spans 8 nodes of parallel.node_size=1, which must divide model.n_group=4"),
        ({"data": 2, "expert": 2, "node_size": 3}, "one of parallel.expert=2 and parallel.node_size=3"),
        ({"layers": (1, 1)}, "parallel.layers has 2 numbers"),
        ({"layers": (1,)}, "parallel.layers sums to 1, not to model.num_hidden_layers=2"),
        ({"pipeline": 2, "schedule": "dualpipe", "microbatch": 4}, "make 2 of them"),
    ],
)
def test_what_is_wrong_is_named(tiny, parallel, words):
    assert words in "\n".join(problems(with_layout(tiny, **parallel)))


@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 4, "expert": 4, "node_size": 2},
        {"data": 4, "expert": 2, "node_size": 8},
        {"data": 8, "expert": 8, "node_size": 2, "microbatch": 1},
        {"pipeline": 3, "schedule": "auto", "microbatch": 2},
    ],
)
def test_what_can_run_is_not_refused(tiny, parallel):
    assert problems(with_layout(tiny, **parallel)) == []


def test_what_deepep_cannot_do_is_refused(tiny):
    def wrong(expert, node_size, compute="bf16", device="auto"):
        config = with_layout(tiny, data=8, expert=expert, node_size=node_size, microbatch=1, dispatch="deepep")
        precision, launch = replace(tiny.precision, compute=compute), replace(tiny.launch, device=device)
        return problems(replace(config, precision=precision, launch=launch))

    assert wrong(1, 1) == wrong(4, 4) == wrong(4, 8) == wrong(8, 8) == []
    for expert, node_size in ((2, 1), (4, 2), (8, 4)):
        (line,) = wrong(expert, node_size)
        assert f"parallel.expert={expert} does not fit parallel.node_size={node_size}" in line
    found = wrong(8, 8, "fp32", "cpu")
    assert [line.split(", ")[0] for line in found] == [
        "parallel.dispatch=deepep runs on GPUs only",
        "parallel.dispatch=deepep sums in BF16 only",
    ]


def test_a_token_cannot_travel_with_the_scale_of_a_whole_tensor():
    words = ["experiment=tiny", "precision=fp8", "precision.fp8.activation_tile=tensor"]
    config = load([*words, "precision.fp8.backend=reference"])
    assert problems(config) == []
    wrong = problems(with_layout(config, data=2, expert=2))
    assert [line.split()[0] for line in wrong] == ["precision.fp8.activation_tile=tensor"]


def test_the_published_layout_and_the_demo_on_two_ranks_compose(published):
    assert (microbatches_of(published), schedule_of(published)[0]) == ([120], "dualpipe")
    for experiment in ("demo", "tiny"):
        config = load([f"experiment={experiment}", "parallel=dualpipe", "parallel.microbatch=1"])
        assert (microbatches_of(config), schedule_of(config)[0]) == ([8], "dualpipe")


def test_every_step_of_every_phase_has_a_schedule(published):
    """The ramp's 24 to 118 microbatches, in twos; both extensions' 15; all on the 2,048 ranks of the published run."""
    numbers = {"ramp": list(range(24, 119, 2)), "main": [120], "context_32k": [15], "context_128k": [15]}
    assert phase_names(published.recipe) == tuple(numbers)
    for phase, expected in numbers.items():
        layout = layout_of(published.parallel, phase)
        assert layout.pipeline * layout.data == 2048
        assert microbatches_of(published, phase) == expected
        name, _ = schedule_of(published, phase)
        for microbatches in expected[:3] + expected[-1:]:
            assert generate(name, layout.pipeline, microbatches).ranks == layout.pipeline
        assert {step.sequences for step in steps_in(published.recipe, phase)} <= set(
            batches_of(published.recipe, phase)
        )


def steps_in(recipe, phase):
    return [step for step in Schedule(recipe).table(2000) if step.phase == phase]


def phase_layout(phase, **changes):
    nothing = dict.fromkeys(("pipeline", "expert", "data", "schedule", "layers", "microbatch"))
    return PhaseLayoutConfig(phase=phase, **nothing | changes)


def test_a_phase_without_a_layout_of_its_own_must_run_on_the_general_one(published):
    """At 3,072 sequences DualPipe has too few microbatches on V3's layout, and 480 do not divide by 128 data ranks."""
    wrong = problems(replace(published, parallel=replace(published.parallel, phases=())))
    assert len(wrong) == 3
    assert "recipe.batch_ramp with batch=3072" in wrong[0] and "make 24 of them" in wrong[0]
    assert "recipe.extensions.context_32k.batch_sequences=1920" in wrong[1] and "make 15 of them" in wrong[1]
    assert wrong[2] == "parallel.data=128 must divide recipe.extensions.context_128k.batch_sequences=480"


def test_a_phase_takes_what_is_given_and_keeps_the_rest(published):
    layout = layout_of(published.parallel, "context_128k")
    assert (layout.pipeline, layout.data, layout.expert, layout.microbatch, layout.node_size) == (64, 32, 32, 1, 8)
    assert layout_of(published.parallel, "main") == published.parallel


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([{"phase": "rampe"}], "parallel.phases names rampe; the recipe has main"),
        ([{"phase": "main"}, {"phase": "main"}], "parallel.phases names main more than once"),
        ([{"phase": "main", "data": 3}], "in phase main: parallel.data=3 must divide recipe.batch_sequences=8"),
        ([{"phase": "main", "layers": (1, 1)}], "in phase main: parallel.layers has 2 numbers"),
        ([{"phase": "main", "expert": 2}], "in phase main: parallel.expert=2 must divide parallel.data=1"),
    ],
)
def test_what_is_wrong_with_a_phases_layout_is_named(tiny, phases, words):
    assert words in "\n".join(problems(with_layout(tiny, phases=tuple(phase_layout(**phase) for phase in phases))))


@pytest.mark.parametrize("name", [*SCHEDULES, "auto"])
def test_a_ramp_is_refused_exactly_where_one_of_its_batches_has_no_schedule(tiny, name):
    for least in range(1, 8):
        for multiple in (1, 2, 3):
            full = least + 3 * multiple
            ramp = BatchRampConfig(least * multiple, 1000, "linear", multiple)
            config = with_layout(tiny, full * multiple, pipeline=2, schedule=name, microbatch=1)
            config = replace(config, recipe=replace(config.recipe, batch_ramp=ramp))
            exists = True
            for phase in ("ramp", "main"):
                picked, _ = schedule_of(config, phase)
                for microbatches in microbatches_of(config, phase):
                    try:
                        generate(picked, 2, microbatches)
                    except UserError:
                        exists = False
            assert (problems(config) == []) == exists
            assert exists or name != "auto"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["recipe.batch_ramp.multiple=3"], "recipe.batch_ramp.multiple=3 must divide recipe.batch_sequences=8"),
        (["recipe.batch_ramp.from_sequences=8"], "recipe.batch_ramp.from_sequences=8 must be less than"),
        (["recipe.batch_ramp.tokens=100%"], "recipe.batch_ramp.tokens=100% leaves less than two whole steps"),
        (["parallel.data=8"], "parallel.data=8 must divide a step of recipe.batch_ramp with batch=4"),
        (["parallel=dualpipe", "parallel.microbatch=2"], "a step of recipe.batch_ramp with batch=4"),
    ],
)
def test_an_impossible_ramp_is_named(words, named):
    ramp = "recipe.batch_ramp={from_sequences:4,tokens:2000,shape:linear,multiple:4}"
    with pytest.raises(UserError, match=r"^config: ") as caught:
        load(["experiment=tiny", "recipe.tokens=61440", ramp, *words])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": "main"}, "recipe.extensions: main is the name of another phase"),
        ({"sequence_length": 257}, "recipe.extensions.longer.sequence_length=257 does not fit 256 positions"),
        ({"batch_sequences": 3}, "parallel.data=2 must divide recipe.extensions.longer.batch_sequences=3"),
        ({"beta_fast": 1.0}, "recipe.extensions.longer.rope_scaling.beta_fast=1.0 must exceed"),
    ],
)
def test_an_impossible_extension_is_named(tiny, changed, named):
    extension = load(["experiment=v3_671b"]).recipe.extensions[0]
    scaling = replace(extension.rope_scaling, factor=2.0, original_max_position_embeddings=128)
    if "beta_fast" in changed:
        changed = {"rope_scaling": replace(scaling, **changed)}
    good = {"name": "longer", "sequence_length": 256, "batch_sequences": 4, "rope_scaling": scaling}

    def wrong(**fields):
        config = with_layout(tiny, data=2)
        recipe = replace(config.recipe, extensions=(replace(extension, **good | fields),))
        lengths = (128, recipe.extensions[0].sequence_length)
        return problems(replace(config, recipe=recipe, tokens=replace(config.tokens, row_lengths=lengths)))

    assert wrong() == []
    (line,) = wrong(**changed)
    assert named in line


def test_two_extensions_need_two_names(published):
    first, second = published.recipe.extensions
    recipe = replace(published.recipe, extensions=(first, second, second))
    assert problems(replace(published, recipe=recipe)) == [
        "recipe.extensions: context_128k is the name of another phase"
    ]


def test_a_moving_average_is_converted_only_where_one_is_kept():
    words = ["convert.weights=ema"]
    assert load([*words, "recipe.ema_decay=0.9"]).convert.weights == "ema"
    with pytest.raises(UserError, match=r"convert\.weights=ema needs recipe\.ema_decay"):
        load([*words, "recipe.ema_decay=null"])


def test_token_shards_are_packed_for_the_rows_of_every_phase(published):
    assert published.tokens.row_lengths == (4096, 32768, 131072)  # as it stands, what the recipe reads
    assert load(["experiment=tiny", "recipe.sequence_length=64"]).tokens.row_lengths == (64, 256)

    def wrong(*lengths):
        return problems(replace(published, tokens=replace(published.tokens, row_lengths=lengths)))

    assert wrong(131072, 4096, 8, 32768) == []
    assert wrong(4096, 32768) == [
        "recipe.extensions.context_128k.sequence_length=131072 is not in tokens.row_lengths=[4096, 32768]; add it"
    ]
    assert "recipe.sequence_length=4096 is not in tokens.row_lengths=[32768, 131072]; add it" in wrong(32768, 131072)
    assert wrong(4096, 32768, 131072, 4096) == ["tokens.row_lengths=[4096, 32768, 131072, 4096] names a length twice"]


SOURCES = (
    "corpus.sources=[{name: web, paths: [web/*.parquet], text_field: content},"
    "{name: books, paths: [b], text_field: text}]"
)


def test_named_sources_and_options_of_the_corpus_compose() -> None:
    config = load(["corpus=files", SOURCES, "corpus.near_duplicates={threshold: 0.8, shingle_words: 5}"]).corpus
    assert [source.name for source in config.sources] == ["web", "books"] and config.sources[0].text_field == "content"
    assert config.near_duplicates is not None and config.near_duplicates.threshold == 0.8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "corpus.source=files needs corpus.paths.*neither is given"),
        ([SOURCES, "corpus.paths=[x]"], "not both .both are given"),
        ([SOURCES.replace("books", "web")], "corpus.sources: two are named web"),
        ([SOURCES.replace("[b]", "[]")], "corpus.sources: books has no paths"),
        ([SOURCES.replace("web,", "Web/1,")], "corpus.sources.0.name"),
        (
            ["corpus.paths=[x]", "corpus.sample_bytes=1000"],
            "tokenizer.sample_bytes=16000000 exceeds corpus.sample_bytes=1000",
        ),
        (["corpus.paths=[x]", "corpus.quality_filters=[c4]"], "corpus.quality_filters.0"),
    ],
)
def test_corpora_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(["corpus=files", *words])


@pytest.mark.parametrize(
    ("pipeline", "rows", "size"),
    [(1, 8, 8), (2, 8, 2), (2, 4, 1), (2, 12, 3), (2, 10, 1), (2, 3, 1), (2, 7, 1), (4, 64, 8), (16, 480, 15)],
)
def test_a_microbatch_that_is_not_given_leaves_dualpipe_its_microbatches(tiny, pipeline, rows, size):
    layout = with_layout(tiny, pipeline=pipeline, microbatch=None).parallel
    assert microbatch_of(layout, rows) == size
    assert microbatch_of(replace(layout, microbatch=5), rows) == 5


def test_the_demo_runs_dualpipe_on_two_ranks_in_every_phase():
    config = load([])
    for phase in phase_names(config.recipe):
        assert layout_of(config.parallel, phase).pipeline == 2
        assert schedule_of(config, phase)[0] == "dualpipe"
        assert min(microbatches_of(config, phase)) >= 4
