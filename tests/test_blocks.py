"""Layers put together as the blocks of recorded models, against what exllamav2 computed: attention on either side of the
attention itself, and MLPs, with norms, residuals, adapters and EXL2 matrices."""

import numpy as np
import pytest
from conftest import golden
from kernel_checks import host, move, on_both

from cupyq.layers import MLP, Attention, HeadNorm, LayerNorm, Linear, RMSNorm, Step
from cupyq.layers.lora import LoraWeights, Selection
from cupyq.ops.elementwise import add
from cupyq.ops.qmatrix import QMatrix

GOLDEN = golden("blocks")
ATTENTIONS = [case for case in GOLDEN if case.startswith("attn")]
MLPS = [case for case in GOLDEN if case.startswith("mlp")]


def close(found, expected, tolerance=3e-3):
    """Norm-wise; recorded values carry fp16 sums in the order of their arrival, so that they vary from run to run."""
    found, expected = host(found).astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


class Block:
    """The layers of one recorded case, on one library."""

    def __init__(self, case, library):
        self.inputs, self.outputs, self.arguments = GOLDEN[case]
        self.library = library

    def array(self, name):
        return move(self.library, self.inputs[name]) if name in self.inputs else None

    def linear(self, key):
        names = {name.removeprefix(f"{key}."): name for name in self.inputs if name.startswith(f"{key}.")}
        if not names:
            return None
        tensors = {short: self.array(name) for short, name in names.items() if not short.startswith("lora")}
        linear = Linear(QMatrix.from_tensors(tensors, name=key), name=key)
        if "lora_a" in names:
            linear.lora = LoraWeights.of(self.array(names["lora_a"]), self.array(names["lora_b"]), 0)
        return linear

    def adapters(self):
        """One adapter, in full, for all rows."""
        return Selection(move(self.library, np.ones((1, 1), np.float32)), frozenset({0}))

    def norm(self, key):
        weight, eps = self.array(key), self.arguments["epsilon"]
        if weight is None:
            return None
        if self.arguments["norm"] == "layer":
            return LayerNorm(weight, self.array(f"{key}_bias"), eps)
        return RMSNorm(weight, eps)

    def head_norm(self, key, kind):
        weight = self.array(key)
        return None if weight is None else HeadNorm(weight, eps=self.arguments["epsilon"], kind=kind)

    def attention(self, head_kind="rms", **changes):
        projections = [self.linear(f"{name}_proj") for name in "qkvo"]
        norms = {name: self.head_norm(name, head_kind) for name in ("q_norm", "k_norm")}
        sizes = {"head_dim": self.arguments["head_dim"], "scale": self.arguments["head_dim"] ** -0.5}
        return Attention(*projections, layer=0, **sizes, **{"rope_style": self.arguments["rope"]} | norms | changes)

    def mlp(self, activation=None):
        activation = activation or {"silu": "silu", "gelu": "gelu_tanh"}[self.arguments["act"]]
        return MLP(*(self.linear(f"{name}_proj") for name in ("gate", "up", "down")), activation)

    def step(self):
        # The recorded tables hold each value twice: as two halves for NeoX, side by side for GPT-J.
        once = np.s_[:, :32] if self.arguments["rope"] == "neox" else np.s_[:, ::2]
        sin, cos = (move(self.library, np.ascontiguousarray(self.inputs[name][once])) for name in ("sin", "cos"))
        return Step(sin, cos, self.array("past_lens"), adapters=self.adapters())

    def hidden(self):
        """The residual: a copy of x, [batch, seq, hidden]."""
        shape = (self.arguments.get("batch_size", 1), -1, self.inputs["x"].shape[-1])
        return move(self.library, self.inputs["x"].reshape(shape).copy())

    def plus(self, hidden, y):
        """The residual after a block has given y."""
        post_norm = self.norm("post_layernorm")
        if post_norm is not None:
            return post_norm(y, residual=hidden, out=hidden)
        return add(hidden, y, out=hidden) if self.arguments.get("residual", True) else y


@on_both
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_before_and_after(case, library):
    block = Block(case, library)
    attention, step, hidden = block.attention(), block.step(), block.hidden()
    found = attention.project(block.norm("layernorm")(hidden, np.float16), step)
    for name, y in zip("qkv", found, strict=True):
        assert y.dtype == np.float16 and close(y, block.outputs[name]), name
    mixed = block.array("attn_output").reshape(found[0].shape)
    hidden = block.plus(hidden, attention.output(mixed, step))
    assert hidden.dtype == block.outputs["x"].dtype and close(hidden, block.outputs["x"])


@on_both
@pytest.mark.parametrize("case", MLPS)
def test_mlp(case, library):
    block = Block(case, library)
    hidden = block.hidden()
    y = block.mlp()(block.norm("layernorm")(hidden, np.float16), adapters=block.adapters())
    hidden = block.plus(hidden, y)
    assert hidden.dtype == block.outputs["x"].dtype and close(hidden, block.outputs["x"])


def test_the_tolerance_bites():
    """Each part left out or exchanged is seen."""

    def projections(case, norm="layernorm", adapters=True, **changes):
        block = Block(case, "numpy")
        step, hidden = block.step(), block.hidden()
        step.adapters = step.adapters if adapters else None
        x = hidden.astype(np.float16) if norm is None else block.norm(norm)(hidden, np.float16)
        return block.attention(**changes).project(x, step), block

    wrong = {
        "no head norm": ("q", projections("attn_qwen3_headnorm", q_norm=None)),
        "the other kind of head norm": ("k", projections("attn_qwen3_headnorm", head_kind="layer")),
        "the other pairs": ("q", projections("attn_gptj_rope", rope_style="neox")),
        "no rotation": ("k", projections("attn_llama", rope_style=None)),
        "no norm": ("v", projections("attn_gemma2_post_fp32", norm=None)),
        "another norm's weight": ("v", projections("attn_gemma2_post_fp32", norm="post_layernorm")),
        "no adapter": ("v", projections("attn_lora", adapters=False)),
    }
    for name, (part, (found, block)) in wrong.items():
        assert not close(found["qkv".index(part)], block.outputs[part]), name
    for case in MLPS:
        block = Block(case, "numpy")
        hidden = block.hidden()
        x = block.norm("layernorm")(hidden, np.float16)
        y, other = (block.mlp(activation)(x, adapters=block.adapters()) for activation in (None, "relu"))
        assert not close(block.plus(hidden.copy(), other), block.outputs["x"]), f"{case}: another activation"
        assert not close(y, block.outputs["x"]), f"{case}: no residual"
        if "post_layernorm" in block.inputs:
            assert not close(add(hidden, y), block.outputs["x"]), f"{case}: no post-norm"
        if block.array("layernorm_bias") is not None:
            x = LayerNorm(block.array("layernorm"), None, 1e-5)(hidden)
            assert not close(add(hidden, block.mlp()(x)), block.outputs["x"]), f"{case}: no bias of the norm"
