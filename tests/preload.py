"""What the processes of tests need sooner or later; importing it takes seconds, and here once for all of them."""

# ruff: noqa: F401
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import lightning_dgmp
from tests.compat import harness

torch.set_num_threads(1)
