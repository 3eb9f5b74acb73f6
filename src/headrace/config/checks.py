"""Conditions across fields: what no single value's type can express.

`problems(config)` returns every violated condition as one sentence that names the keys, so that a user mends all at
once. The router's conditions are those under which group-limited top-k is defined (report, section 2.1.2).
"""

from itertools import pairwise

from headrace.config.phases import MAIN, RAMP, batches_of, layout_of, microbatch_of, phase_names, tokens_in
from headrace.config.recipe import BatchRampConfig, ExtensionConfig, RecipeConfig, RopeScaling
from headrace.config.schema import Config, CorpusConfig, Fp8Config, ModelConfig, ParallelConfig

_DEEPEP_NODE = 8  # ranks of a node, in DeepEP's kernels
_TWO_STAGES = ("interleaved_1f1b", "zb_v", "dualpipe_v")
"""Schedules with two pipeline stages on each rank."""


def problems(config: Config) -> list[str]:
    """Every impossible combination in `config`, as one sentence each; empty when there is none."""
    return [
        *model_problems(config.model),
        *_recipe(config.recipe),
        *_extensions(config.recipe.extensions),
        *_rows(config),
        *_precision(config.precision.fp8, "precision.fp8"),
        *_precision(config.study.candidate.fp8, "study.candidate.fp8"),
        *_corpus(config.corpus),
        *_mixture(config.recipe, config.corpus),
        *_across_groups(config),
        *_layouts(config),
    ]


def model_problems(model: ModelConfig) -> list[str]:
    """Impossible combinations within the network alone, for configurations that come from elsewhere."""
    return [*_router(model), *_shapes(model)]


def _router(model: ModelConfig) -> list[str]:
    wrong = []
    experts, groups = model.n_routed_experts, model.n_group
    if experts % groups:
        wrong.append(f"model.n_group={groups} must divide model.n_routed_experts={experts}")
    elif experts // groups < 2:
        wrong.append(f"model.n_group={groups} leaves fewer than 2 of model.n_routed_experts={experts} per group")
    if model.topk_group > groups:
        wrong.append(f"model.topk_group={model.topk_group} must not exceed model.n_group={groups}")
    reachable = model.topk_group * (experts // groups)
    if model.num_experts_per_tok > reachable:
        wrong.append(
            f"model.num_experts_per_tok={model.num_experts_per_tok} exceeds the {reachable} experts that "
            f"model.topk_group={model.topk_group} groups hold"
        )
    if model.first_k_dense_replace > model.num_hidden_layers:
        wrong.append(
            f"model.first_k_dense_replace={model.first_k_dense_replace} exceeds "
            f"model.num_hidden_layers={model.num_hidden_layers}"
        )
    return wrong


def _shapes(model: ModelConfig) -> list[str]:
    wrong = []
    if model.qk_rope_head_dim % 2:
        wrong.append(f"model.qk_rope_head_dim={model.qk_rope_head_dim} must be even: RoPE rotates pairs")
    if model.rope_theta <= 1:
        wrong.append(f"model.rope_theta={model.rope_theta} must exceed 1")
    if model.rope_scaling:
        wrong += _scaling(model.rope_scaling, "model.rope_scaling")
        original = model.rope_scaling.original_max_position_embeddings
        if original > model.max_position_embeddings:
            wrong.append(
                f"model.rope_scaling.original_max_position_embeddings={original} exceeds "
                f"model.max_position_embeddings={model.max_position_embeddings}"
            )
    return wrong


def _scaling(scaling: RopeScaling, where: str) -> list[str]:
    if scaling.beta_fast > scaling.beta_slow:
        return []
    return [f"{where}.beta_fast={scaling.beta_fast} must exceed {where}.beta_slow={scaling.beta_slow}"]


def _recipe(recipe: RecipeConfig) -> list[str]:
    wrong = _ramp(recipe, recipe.batch_ramp) if recipe.batch_ramp else []
    step = recipe.sequence_length * recipe.batch_sequences
    if recipe.tokens < step:
        wrong.append(f"recipe.tokens={recipe.tokens} is less than one step of {step} tokens")
    rate = recipe.learning_rate
    spans = [rate.constant, rate.cosine, *(phase.tokens for phase in rate.tail)]
    total = sum(tokens_in(span, recipe.tokens) for span in spans)
    if total > recipe.tokens + len(spans):
        wrong.append(
            f"recipe.learning_rate: constant, cosine and tail cover {total} tokens, "
            f"more than recipe.tokens={recipe.tokens}"
        )
    if rate.final > rate.peak:
        wrong.append(f"recipe.learning_rate.final={rate.final} exceeds recipe.learning_rate.peak={rate.peak}")
    return wrong


def _ramp(recipe: RecipeConfig, ramp: BatchRampConfig) -> list[str]:
    wrong = []
    for name, sequences in (
        ("batch_ramp.from_sequences", ramp.from_sequences),
        ("batch_sequences", recipe.batch_sequences),
    ):
        if sequences % ramp.multiple:
            wrong.append(f"recipe.batch_ramp.multiple={ramp.multiple} must divide recipe.{name}={sequences}")
    if ramp.from_sequences >= recipe.batch_sequences:
        wrong.append(
            f"recipe.batch_ramp.from_sequences={ramp.from_sequences} must be less than "
            f"recipe.batch_sequences={recipe.batch_sequences}"
        )
    tokens, step = tokens_in(ramp.tokens, recipe.tokens), recipe.sequence_length * recipe.batch_sequences
    if recipe.tokens >= step > recipe.tokens - tokens - step:
        wrong.append(
            f"recipe.batch_ramp.tokens={ramp.tokens} leaves less than two whole steps of {step} tokens of "
            f"recipe.tokens={recipe.tokens}"
        )
    return wrong


def _extensions(extensions: tuple[ExtensionConfig, ...]) -> list[str]:
    wrong, names = [], [RAMP, MAIN]
    for extension in extensions:
        where, scaling = f"recipe.extensions.{extension.name}", extension.rope_scaling
        if extension.name in names:
            wrong.append(f"recipe.extensions: {extension.name} is the name of another phase")
        names.append(extension.name)
        reach = scaling.factor * scaling.original_max_position_embeddings
        if extension.sequence_length > reach:
            wrong.append(
                f"{where}.sequence_length={extension.sequence_length} does not fit {reach:.0f} positions, "
                f"{where}.rope_scaling.factor x original_max_position_embeddings"
            )
        wrong += _scaling(scaling, f"{where}.rope_scaling")
    return wrong


def _mixture(recipe: RecipeConfig, corpus: CorpusConfig) -> list[str]:
    wrong, names = [], sorted(source.name for source in corpus.sources)
    starts = [tokens_in(entry.since, recipe.tokens) for entry in recipe.mixture]
    if starts and (starts[0] != 0 or any(after <= before for before, after in pairwise(starts))):
        wrong.append(f"recipe.mixture: since={starts} must begin with 0 and rise")
    for number, entry in enumerate(recipe.mixture):
        where = f"recipe.mixture[{number}].weights"
        if sorted(entry.weights) != names:
            wrong.append(f"{where} names {sorted(entry.weights)}, and corpus.sources are {names}")
        elif not any(entry.weights.values()):
            wrong.append(f"{where} are all 0")
    return wrong


def published_tiles(fp8: Fp8Config) -> bool:
    """Whether tiles and accumulation are the report's; every back end but `reference` has only these."""
    tiles = (fp8.activation_tile, fp8.gradient_tile, fp8.weight_tile)
    return tiles == ("1x128", "1x128", "128x128") and fp8.accumulation == "fp32"


def _precision(fp8: Fp8Config | None, where: str) -> list[str]:
    if fp8 is None or fp8.backend in ("auto", "reference"):
        return []
    wrong = []
    if not published_tiles(fp8):
        wrong.append(f"{where}.backend={fp8.backend} has the report's tiles and accumulation only; use reference")
    if fp8.transposed_scales != "power_of_two":
        wrong.append(f"{where}.backend={fp8.backend} has {where}.transposed_scales=power_of_two only; use reference")
    return wrong


def _rows(config: Config) -> list[str]:
    """Every phase finds rows of its length among those that token shards are packed for."""
    wrong, lengths = [], config.tokens.row_lengths
    if len(set(lengths)) < len(lengths):
        wrong.append(f"tokens.row_lengths={list(lengths)} names a length twice")
    needed = {"recipe.sequence_length": config.recipe.sequence_length}
    needed |= {
        f"recipe.extensions.{phase.name}.sequence_length": phase.sequence_length for phase in config.recipe.extensions
    }
    wrong += [
        f"{key}={n} is not in tokens.row_lengths={list(lengths)}; add it"
        for key, n in needed.items()
        if n not in lengths
    ]
    return wrong


def _across_groups(config: Config) -> list[str]:
    wrong = []
    if config.model.vocab_size < config.tokenizer.vocab_size:
        wrong.append(
            f"model.vocab_size={config.model.vocab_size} is smaller than "
            f"tokenizer.vocab_size={config.tokenizer.vocab_size}"
        )
    if config.recipe.sequence_length > config.model.max_position_embeddings:
        wrong.append(
            f"recipe.sequence_length={config.recipe.sequence_length} does not fit "
            f"model.max_position_embeddings={config.model.max_position_embeddings}"
        )
    if config.convert.weights == "ema" and config.recipe.ema_decay is None:
        wrong.append(
            "convert.weights=ema needs recipe.ema_decay, since no moving average of the weights is kept without"
        )
    if config.tokenizer.source == "train" and config.tokenizer.sample_bytes > config.corpus.sample_bytes:
        wrong.append(
            f"tokenizer.sample_bytes={config.tokenizer.sample_bytes} exceeds "
            f"corpus.sample_bytes={config.corpus.sample_bytes}, the text that is put aside for it"
        )
    if config.tokenizer.source == "train" and config.tokenizer.path:
        wrong.append(
            f"tokenizer.path={config.tokenizer.path} is not read by tokenizer.source=train; say tokenizer=file"
        )
    if config.tokenizer.source == "file" and not config.tokenizer.path:
        wrong.append("tokenizer.source=file needs tokenizer.path, the path of a tokenizer.json")
    publish = config.publish
    if publish.push and not any(
        (publish.repo_id, publish.kernels, publish.dataset, publish.cache, publish.checkpoints)
    ):
        wrong.append(
            "publish.push=true has nothing to send; name publish.repo_id, kernels, dataset, cache or checkpoints"
        )
    return wrong


def _corpus(corpus: CorpusConfig) -> list[str]:
    wrong = []
    if corpus.source == "files" and bool(corpus.paths) == bool(corpus.sources):
        which = "both are given" if corpus.paths else "neither is given"
        wrong.append(
            f"corpus.source=files needs corpus.paths, e.g. set='corpus.paths=[data/*.jsonl]', or corpus.sources, "
            f"not both ({which})"
        )
    names = [source.name for source in corpus.sources]
    wrong += [f"corpus.sources: two are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    wrong += [f"corpus.sources: {source.name} has no paths" for source in corpus.sources if not source.paths]
    reserved = [name for name in names if name in ("environment", "files", "all")]
    wrong += [f"corpus.sources: {name} is a name of headrace's own; name the source otherwise" for name in reserved]
    if corpus.min_document_bytes > corpus.max_document_bytes:
        wrong.append(
            f"corpus.min_document_bytes={corpus.min_document_bytes} exceeds "
            f"corpus.max_document_bytes={corpus.max_document_bytes}"
        )
    for name, source in (("", None), *((f"sources: {each.name}: ", each) for each in corpus.sources)):
        if sum(corpus.fractions_of(source)) >= 1:
            wrong.append(f"corpus.{name}validation_fraction and heldout_fraction leave no training text")
    return wrong


def _layouts(config: Config) -> list[str]:
    """Every phase has a layout that the pipeline and the expert dispatch can run: microbatches, layers, experts."""
    names = phase_names(config.recipe)
    own = [given.phase for given in config.parallel.phases]
    wrong = [f"parallel.phases names {name}; the recipe has {', '.join(names)}" for name in own if name not in names]
    wrong += [f"parallel.phases names {name} more than once" for name in dict.fromkeys(own) if own.count(name) > 1]
    for name in names:
        layout = layout_of(config.parallel, name)
        found = [*_batches(config.recipe, name, layout), *_stages(layout, config.model), *_experts(config, layout)]
        wrong += [f"in phase {name}: {line}" for line in found] if name in own else found
    return list(dict.fromkeys(wrong))


def _batches(recipe: RecipeConfig, phase: str, layout: ParallelConfig) -> list[str]:
    """The first batch of the phase that does not divide over the layout, or whose schedule does not exist."""
    ramp, own = "a step of recipe.batch_ramp with batch", f"recipe.extensions.{phase}.batch_sequences"
    key = {MAIN: "recipe.batch_sequences", RAMP: ramp}.get(phase, own)
    for sequences in batches_of(recipe, phase):
        if wrong := _batch(f"{key}={sequences}", sequences, layout):
            return wrong
    return []


def _batch(key: str, sequences: int, layout: ParallelConfig) -> list[str]:
    if sequences % layout.data:
        return [f"parallel.data={layout.data} must divide {key}"]
    rows = sequences // layout.data
    size = microbatch_of(layout, rows)
    if rows % size:
        return [
            f"parallel.microbatch={layout.microbatch} must divide the {rows} rows that each data rank gets of {key}"
        ]
    return _schedule(key, layout, rows // size)


def _schedule(key: str, layout: ParallelConfig, microbatches: int) -> list[str]:
    """Where each schedule exists; 1f1b, zb1p and zb_v do for all numbers (see `pipeline/generators.py`)."""
    ranks, name = layout.pipeline, layout.schedule
    needed = {
        "dualpipe": (
            ranks % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * ranks,
            f"an even parallel.pipeline and an even number of microbatches, at least {2 * ranks}",
        ),
        "dualpipe_v": (microbatches >= 2 * ranks, f"at least {2 * ranks} microbatches"),
        "interleaved_1f1b": (
            microbatches % max(1, microbatches // ranks) == 0,
            "microbatches in equal rounds of at least parallel.pipeline, such as a multiple of it",
        ),
    }
    exists, needs = needed.get(name, (True, ""))
    if exists:
        return []
    return [
        f"parallel.schedule={name} with parallel.pipeline={ranks} needs {needs}; {key}, parallel.data "
        f"and parallel.microbatch make {microbatches} of them (zb1p and auto take any number)"
    ]


def _stages(layout: ParallelConfig, model: ModelConfig) -> list[str]:
    if layout.layers is None:
        return []
    wrong = []
    stages = layout.pipeline * (2 if layout.schedule in _TWO_STAGES else 1)
    if len(layout.layers) != stages:
        wrong.append(
            f"parallel.layers has {len(layout.layers)} numbers; parallel.pipeline={layout.pipeline} with "
            f"parallel.schedule={layout.schedule} makes {stages} pipeline stages"
        )
    if sum(layout.layers) != model.num_hidden_layers:
        wrong.append(
            f"parallel.layers sums to {sum(layout.layers)}, not to model.num_hidden_layers={model.num_hidden_layers}"
        )
    return wrong


def _experts(config: Config, layout: ParallelConfig) -> list[str]:
    model, fp8 = config.model, config.precision.fp8
    expert, node = layout.expert, layout.node_size
    wrong = []
    if layout.data % expert:
        wrong.append(f"parallel.expert={expert} must divide parallel.data={layout.data}")
    if model.n_routed_experts % expert:
        wrong.append(f"parallel.expert={expert} must divide model.n_routed_experts={model.n_routed_experts}")
    if expert % node and node % expert:
        wrong.append(
            f"one of parallel.expert={expert} and parallel.node_size={node} must divide the other, so that expert "
            "groups fill nodes or lie within one"
        )
    elif model.n_group % (nodes := max(1, expert // node)):
        wrong.append(
            f"parallel.expert={expert} spans {nodes} nodes of parallel.node_size={node}, which must divide "
            f"model.n_group={model.n_group}, so that each node holds whole groups"
        )
    if expert > 1 and fp8 is not None and fp8.activation_tile != "1x128":
        wrong.append(
            f"precision.fp8.activation_tile={fp8.activation_tile} is not possible with parallel.expert={expert}: "
            "a token travels with its own scales, use 1x128"
        )
    return wrong + (_deepep(config, layout) if layout.dispatch == "deepep" else [])


def _deepep(config: Config, layout: ParallelConfig) -> list[str]:
    """What DeepEP's kernels cannot do; whether it is there, and a GPU for it, shows at the start."""
    name, wrong = "parallel.dispatch=deepep", []
    if config.launch.device == "cpu":
        wrong.append(f"{name} runs on GPUs only, and launch.device=cpu; use all_to_all")
    if config.precision.compute != "bf16":
        wrong.append(f"{name} sums in BF16 only, and precision.compute={config.precision.compute}; use all_to_all")
    if min(layout.expert, layout.node_size) != min(layout.expert, _DEEPEP_NODE):
        wrong.append(
            f"{name} knows nodes of {_DEEPEP_NODE} ranks, and up to so many as one node: "
            f"parallel.expert={layout.expert} does not fit parallel.node_size={layout.node_size}; change it or use "
            "all_to_all"
        )
    return wrong
