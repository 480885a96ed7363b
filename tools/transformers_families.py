"""transformers' common tests of a model, of two families that `rlhf_kernels.patch` knows.

The source distribution has these tests (`tests/test_modeling_common.py`) but not the files of the families,
which give them a small configuration and inputs, as is done here, nor two mixins of other tests.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    cp tools/transformers_families.py transformers-5.23.0/tests/test_families.py
    cd transformers-5.23.0/tests && mkdir exporters generation && touch {.,exporters,generation}/__init__.py
    echo "class ExportTesterMixin: pass" > exporters/test_export.py
    echo "class GenerationTesterMixin: pass" > generation/test_utils.py

Then `python tools/target_tests.py transformers --tests transformers-5.23.0/tests --select test_families.py`;
the tests import `parameterized`.
"""

import unittest
from typing import ClassVar

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: F401  # what is replaced

from .test_modeling_common import ModelTesterMixin


class Sizes:
    """What the common tests ask of a family's tester."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        """A small one."""
        return self.config_class(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        """A configuration and inputs with a mask."""
        tokens = torch.randint(3, 99, (self.batch_size, self.seq_length))
        mask = torch.ones_like(tokens).tril()
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class Family(ModelTesterMixin):
    """The common tests, for the classes of a family."""

    config_class = None
    all_generative_model_classes = ()
    pipeline_model_mapping: ClassVar[dict] = {}

    def setUp(self):
        self.model_tester = Sizes(self.config_class)


class LlamaTest(Family, unittest.TestCase):
    """Norm, rotary embedding, gated activation and loss are replaced."""

    config_class = LlamaConfig
    all_model_classes = (LlamaModel, LlamaForCausalLM)


class GPTNeoXTest(Family, unittest.TestCase):
    """The loss is replaced."""

    config_class = GPTNeoXConfig
    all_model_classes = (GPTNeoXModel, GPTNeoXForCausalLM)
