"""Conditions across fields: what no single value's type can express.

`problems(config)` returns every violated condition as one sentence that names the keys, so that a user mends all at
once. The router's conditions are those under which group-limited top-k is defined (report, section 2.1.2).
"""

from headrace.config.schema import Config, Fp8Config, ModelConfig, RecipeConfig, TokenSpan


def problems(config: Config) -> list[str]:
    """Every impossible combination in `config`, as one sentence each; empty when there is none."""
    return [
        *model_problems(config.model),
        *_recipe(config.recipe),
        *_precision(config.precision.fp8, "precision.fp8"),
        *_precision(config.study.candidate.fp8, "study.candidate.fp8"),
        *_across_groups(config),
        *_layout(config),
    ]


def model_problems(model: ModelConfig) -> list[str]:
    """Impossible combinations within the network alone, for configurations that come from elsewhere."""
    return [*_router(model), *_shapes(model)]


def tokens_in(span: TokenSpan, budget: int) -> int:
    """Tokens that a `TokenSpan` means under a budget of `budget` tokens."""
    if isinstance(span, int):
        return span
    return round(float(span.removesuffix("%")) * budget / 100)


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
    scaling = model.rope_scaling
    if scaling and scaling.beta_fast <= scaling.beta_slow:
        wrong.append(
            f"model.rope_scaling.beta_fast={scaling.beta_fast} must exceed "
            f"model.rope_scaling.beta_slow={scaling.beta_slow}"
        )
    if scaling and scaling.original_max_position_embeddings > model.max_position_embeddings:
        wrong.append(
            f"model.rope_scaling.original_max_position_embeddings={scaling.original_max_position_embeddings} exceeds "
            f"model.max_position_embeddings={model.max_position_embeddings}"
        )
    return wrong


def _recipe(recipe: RecipeConfig) -> list[str]:
    wrong = []
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
    if config.corpus.source == "files" and not config.corpus.paths:
        wrong.append("corpus.source=files needs corpus.paths, e.g. set='corpus.paths=[data/*.jsonl]'")
    if config.tokenizer.source == "file" and not config.tokenizer.path:
        wrong.append("tokenizer.source=file needs tokenizer.path, the path of a tokenizer.json")
    if config.corpus.min_document_bytes > config.corpus.max_document_bytes:
        wrong.append(
            f"corpus.min_document_bytes={config.corpus.min_document_bytes} exceeds "
            f"corpus.max_document_bytes={config.corpus.max_document_bytes}"
        )
    if config.corpus.validation_fraction + config.corpus.heldout_fraction >= 1:
        wrong.append("corpus.validation_fraction and corpus.heldout_fraction leave no training text")
    return wrong


def _layout(config: Config) -> list[str]:
    wrong = []
    layout, recipe = config.parallel, config.recipe
    world = layout.pipeline * layout.data
    if world != 1:
        wrong.append(f"parallel.pipeline x parallel.data is {world}; this version trains in one process (use 1 and 1)")
    if layout.data % layout.expert:
        wrong.append(f"parallel.expert={layout.expert} must divide parallel.data={layout.data}")
    if layout.microbatch and recipe.batch_sequences % layout.microbatch:
        wrong.append(
            f"parallel.microbatch={layout.microbatch} must divide recipe.batch_sequences={recipe.batch_sequences}"
        )
    return wrong
