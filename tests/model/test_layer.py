"""A layer takes the dispatcher it is given. (Its steps run apart are tested with the pipeline that runs them so.)"""

import torch

import transformers_peer as peers
from headrace.fp8.gemms import PlainGemms
from headrace.model.dispatch import LocalDispatcher
from headrace.model.transformer import Transformer


def test_the_dispatcher_handed_in_is_used():
    calls = []

    class Recording(LocalDispatcher):
        def send(self, x_ND, routing):
            calls.append("send")
            return super().send(x_ND, routing)

        def collect(self, rows_SD, received):
            calls.append("collect")
            return super().collect(rows_SD, received)

    config = peers.random_config(4)
    model = Transformer(config, "fp32", dispatcher=Recording(PlainGemms("fp32")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert calls == ["send", "collect"] * (config.num_hidden_layers - config.first_k_dense_replace)
