"""Run by an environment that has the package speculators: reads folders with it, and writes what it has read and computes.

    python read_with_speculators.py INPUTS OUTPUT FOLDER...

INPUTS holds for each folder, by its name, `NAME.input_ids` [1, rows], `NAME.document_ids` [1, rows] and `NAME.hidden_states` [1, rows,
taps * hidden]; OUTPUT gets `NAME.tensors.*`, the model's own tensors, and `NAME.logits` [steps, rows, draft vocab].
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

inputs, output, folders = load_file(sys.argv[1]), sys.argv[2], [Path(folder) for folder in sys.argv[3:]]
results = {}
for folder in folders:
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"  # of the choices it runs on a CPU, the one it runs without a compiler
    model = Eagle3DraftModel.from_pretrained(folder, config=config).float().eval()
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, arguments, result, logits=logits: logits.append(result[0]))
    steps = config.speculators_config.proposal_methods[0].speculative_tokens
    given = {name.removeprefix(f"{folder.name}."): tensor for name, tensor in inputs.items() if name.startswith(f"{folder.name}.")}
    with torch.no_grad():
        model(**given, ttt_steps=steps)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("verifier_")}
    results |= {f"{folder.name}.tensors.{name}": tensor.clone() for name, tensor in own.items()}
    results[f"{folder.name}.logits"] = torch.stack(logits)
save_file(results, output)
