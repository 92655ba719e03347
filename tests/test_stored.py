"""stored.py: what a linear layer is stored as."""

import pytest

from cupyq.formats.stored import stored_kind, stored_tensors

EXL2 = ["q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"]


@pytest.mark.parametrize(
    "stored, kind, tensors",
    [
        ([*EXL2, "q_perm", "bias"], "exl2", EXL2),
        (["q_weight", "qweight", "weight", "g_idx"], "exl2", EXL2),  # those that are missing are told by whoever looks for them
        (["qweight", "qzeros", "scales", "bias"], "gptq", ["qweight", "qzeros", "scales"]),
        (["g_idx", "weight", "qweight"], "gptq", ["qweight", "qzeros", "scales", "g_idx"]),
        (["bias", "weight"], "plain", ["weight"]),
        (["bias", "scales", "g_idx"], None, []),
        ([], None, []),
    ],
)
def test_the_first_tensor_tells(stored, kind, tensors):
    names = {f"a.{short}" for short in stored} | {"b.q_weight", "a.b.weight", "weight"}
    assert stored_kind(names, "a") == kind
    assert list(stored_tensors(names, "a")) == tensors
