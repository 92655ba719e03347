"""What a quantized checkpoint holds, layer by layer: python examples/inspect_checkpoint.py [FOLDER]"""

import sys
from collections import defaultdict
from pathlib import Path

import cupyq
from cupyq.formats.safetensors import Checkpoint

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models/shakespeare-exl2-2.5"

with Checkpoint(folder) as checkpoint:
    layers = defaultdict(dict)
    for name in checkpoint.names:
        layer, _, tensor = name.rpartition(".")
        if layer:
            layers[layer][tensor] = checkpoint.array(name)  # a view of the file: nothing is read yet

    print(f"{'layer':<36}{'K':>7}{'N':>7}  {'kind':<8}{'code bits':<14}{'groups':>7}{'bits/weight':>13}")
    bits = weights = 0
    for layer, tensors in layers.items():
        if not {"q_weight", "qweight"} & tensors.keys():
            continue  # embeddings and norms are not quantized
        q = cupyq.QMatrix.from_tensors(tensors, name=layer)
        widths = ", ".join(map(str, q.bits))
        print(f"{layer:<36}{q.k:>7}{q.n:>7}  {q.kind:<8}{widths:<14}{q.group_count:>7}{q.bits_per_weight:>13.3f}")
        bits += q.storage_bits
        weights += q.k * q.n
if not weights:
    raise SystemExit(f"{folder}: no quantized layer")
print(f"{weights:,} quantized weights, {bits / weights:.3f} bits each, scales and permutations included")
