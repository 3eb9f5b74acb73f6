"""The model in each phase of a recipe: context extension gives its rotary embedding another scaling.

No parameter changes, so a checkpoint of one phase is loaded into the model of the next (report, section 4.3).
"""

from dataclasses import replace

from headrace.config.recipe import RopeScaling
from headrace.config.schema import Config, ModelConfig
from headrace.recipe.schedule import Phase


def model_in_phase(model: ModelConfig, phase: Phase) -> ModelConfig:
    """The configured model, with the phase's YaRN where it brings one."""
    return _scaled(model, phase.rope_scaling) if phase.rope_scaling else model


def final_model(config: Config) -> ModelConfig:
    """The model of the last phase: what is exported and evaluated."""
    extensions = config.recipe.extensions
    return _scaled(config.model, extensions[-1].rope_scaling) if extensions else config.model


def _scaled(model: ModelConfig, scaling: RopeScaling) -> ModelConfig:
    """As in the published config.json, the longest position is the original length times the factor."""
    reach = round(scaling.factor * scaling.original_max_position_embeddings)
    return replace(model, rope_scaling=scaling, max_position_embeddings=reach)
