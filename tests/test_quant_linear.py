"""LoRAX's QuantLinear: its constructor, its reading of the zeros, every width, where the tensors are."""

import numpy as np
import pytest
from kernel_checks import host
from product_checks import relative_error
from test_gptq import dequantize_by_loop

from cupyq.errors import FormatError
from cupyq.formats.gptq import pack_gptq
from cupyq.layers import QuantLinear
from cupyq.layers.quant_linear import create_exllama_buffers, set_device

K, N = 96, 64
WIDTHS = (2, 3, 4, 8)


def layer_tensors(bits, groupsize, *, act_order=False, has_bias=True, seed=0):
    """The arguments of the constructor; one stored zero in eight is the largest, which wraps to 0."""
    rng = np.random.default_rng([bits, seed])
    groups = 1 if groupsize == -1 else -(-K // groupsize)
    row_group = rng.integers(0, groups, K) if act_order else np.arange(K) // (K if groupsize == -1 else groupsize)
    zeros = rng.integers(0, 2**bits, (groups, N))
    zeros[:, ::8] = 0
    scales = (0.01 + 0.02 * rng.random((groups, N))).astype(np.float16)
    tensors = pack_gptq(rng.integers(0, 2**bits, (K, N)), zeros, scales, row_group, bits, "v1-wrapped")
    return dict(tensors, bias=rng.standard_normal(N).astype(np.float16) if has_bias else None, bits=bits, groupsize=groupsize)


def exact_product(x, arguments):
    row_group = arguments["g_idx"].tolist()
    weight = dequantize_by_loop(arguments, arguments["bits"], row_group, wrap=True).astype(np.float64)
    return x.astype(np.float64) @ weight + (0 if arguments["bias"] is None else arguments["bias"].astype(np.float64))


CASES = [(bits, groupsize, act_order) for bits in WIDTHS for groupsize, act_order in ((32, False), (-1, False), (32, True))]


def check_layer(bits, groupsize, act_order, place):
    arguments = layer_tensors(bits, groupsize, act_order=act_order)
    placed = {name: place(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    before = {name: value.tobytes() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    layer = QuantLinear(**placed)
    assert (layer.infeatures, layer.outfeatures, layer.bits, layer.groupsize) == (K, N, bits, groupsize)
    x = np.random.default_rng(1).standard_normal((2, 5, K)).astype(np.float16)
    for call in (layer, layer.forward):
        y = call(place(x), force_cuda=True)
        assert y.shape == (2, 5, N) and y.dtype == np.float16
        assert relative_error(host(y), exact_product(x, arguments)) < 6e-4
    assert {name: host(placed[name]).tobytes() for name in before} == before


@pytest.mark.parametrize("bits, groupsize, act_order", CASES)
def test_layer(bits, groupsize, act_order):
    check_layer(bits, groupsize, act_order, np.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("bits, groupsize, act_order", CASES)
def test_layer_on_the_gpu(cupy, bits, groupsize, act_order):
    check_layer(bits, groupsize, act_order, cupy.asarray)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_zero_that_is_not_wrapped_would_be_seen(bits):
    arguments = layer_tensors(bits, 32)
    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float16)
    unwrapped = dequantize_by_loop(arguments, bits, arguments["g_idx"].tolist(), wrap=False).astype(np.float64)
    wrong = x.astype(np.float64) @ unwrapped + arguments["bias"].astype(np.float64)
    assert relative_error(QuantLinear(**arguments)(x), wrong) > 0.05


def test_g_idx_and_bias_may_be_missing():
    arguments = layer_tensors(4, 32, has_bias=False)
    x = np.ones((3, K), np.float16)
    expected = QuantLinear(**arguments)(x)
    for g_idx in (None, np.zeros(K, np.int32)):
        np.testing.assert_array_equal(QuantLinear(**{**arguments, "g_idx": g_idx})(x), expected)


def test_lorax_calls_around_it_do_nothing():
    assert set_device("cuda:0") is None
    assert create_exllama_buffers() is None
    assert create_exllama_buffers(4096) is None


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"bits": 3}, FormatError, "the shapes say 4 bits, but bits=3"),
        ({"groupsize": 64, "g_idx": None}, FormatError, "3 groups, but 96 rows in groups of 64 make 2"),
        ({"qzeros": None}, FormatError, "qzeros"),
        ({"scales": np.ones((2, N), np.float16)}, FormatError, "scales"),
        ({"g_idx": np.full(K, 3, np.int32)}, FormatError, "row 0 is in group 3"),
        ({"bias": np.ones(N + 1, np.float16)}, FormatError, "bias"),
        ({"qweight": [[1]]}, TypeError, "qweight must be a NumPy or CuPy array"),
    ],
)
def test_unfit_tensors_get_clear_errors(change, error, text):
    with pytest.raises(error, match=text):
        QuantLinear(**{**layer_tensors(4, 32), **change})


def test_unfit_x_gets_a_clear_error():
    layer = QuantLinear(**layer_tensors(4, 32))
    with pytest.raises(ValueError, match="x must have 96 as its last dimension"):
        layer(np.zeros((2, 95), np.float16))
