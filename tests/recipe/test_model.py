"""The extended model is the published one, and a phase without scaling leaves the model alone."""

from headrace.config.compose import load
from headrace.recipe.model import final_model, model_in_phase
from headrace.recipe.schedule import Schedule


def test_v3_ends_as_the_model_of_the_published_checkpoint() -> None:
    config = load(["experiment=v3_671b"])
    published = load(["experiment=v3_671b", "model=v3_671b_128k"]).model
    assert published.max_position_embeddings == 163_840
    assert final_model(config) == published
    ramp, main, first, second = Schedule(config.recipe).phases
    assert model_in_phase(config.model, ramp) == model_in_phase(config.model, main) == config.model
    assert model_in_phase(config.model, first) == model_in_phase(config.model, second) == published


def test_without_extension_it_is_the_configured_model() -> None:
    config = load(["experiment=tiny", "recipe.extensions=[]"])
    assert final_model(config) == config.model
