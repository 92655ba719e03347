"""The bytes of quantized caches: the golden vector, recorded outputs of exllamav2, and loops over single values."""

import bisect
import math
import zlib
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from conftest import golden

from cupyq.formats import kv_cache
from cupyq.formats.kv_cache import decode, encode

LEVELS = {"q4": 8, "q8": 128}

GOLDEN_X = ((37 * np.arange(512) % 101 - 50) / 16).astype(np.float16)
# kind: first 16 bytes of codes, every scale, first 8 decoded values, CRC-32 of the codes, of the scales
GOLDEN = {
    "q4": (
        "79 97 9b 0e a4 86 8a 86 46 86 0a 86 8a 86 82 86",
        0x4250,
        "c250 bbe4 3d86 c0bc b250 4057 bfe5 3650",
        0x2742A237,
        0xFF3AE93D,
    ),
    "q8": (
        "92 69 69 89 b2 92 e0 00 44 a4 60 80 a0 80 60 80",
        0x3250,
        "c23e ba91 3e04 c0f8 b1ec 4041 bf7f 36ff",
        0xC6F84631,
        0xBDEED354,
    ),
}


def bits_of(values):
    return values.view(np.uint16)


@np.errstate(over="ignore")
def loop_hadamard(values, stages, stride_of_vectors):
    """Each stage of the transform, value by value; float64 sums of two float16 values are exact, so one rounding each."""
    t = [float(v) for v in values]
    vectors = (range(0, 64, 2), range(1, 64, 2)) if stride_of_vectors == 2 else (range(0, 32), range(32, 64))
    for places in vectors:
        for stage in range(stages):
            before = [t[place] for place in places]
            for i, place in enumerate(places):
                own, partner = before[i], before[i ^ (1 << stage)]
                t[place] = float(np.float16((-own if i & (1 << stage) else own) + partner))
    return t


def loop_encode(x, kind, *, stages=5, stride_of_vectors=2, rint=round, divisor=None, last=None, low_first=True):
    """Codes and scales chunk by chunk. The options are mistakes one could make."""
    levels = LEVELS[kind]
    last = 2 * levels - 1 if last is None else last
    codes, scales = [], []
    for start in range(0, len(x), 64):
        t = loop_hadamard(x[start : start + 64], stages, stride_of_vectors)
        for group in (t[:32], t[32:]):
            largest = max(map(abs, group))
            scales.append(np.float16(largest / (levels if divisor is None else divisor)))
            for value in group:
                quotient = value / largest if largest else 0.0
                u = float(np.float16(quotient))
                codes.append(min(max(rint(float(np.float16(u * levels + levels))), 0), last) if largest else 0)
    codes = np.array(codes, np.uint8)
    if kind == "q4":
        codes = codes[::2] | codes[1::2] << 4 if low_first else codes[1::2] | codes[::2] << 4
    return codes, np.array(scales, np.float16)


def loop_decode(codes, scales, kind):
    nibbles = [n for byte in codes.tolist() for n in (byte & 15, byte >> 4)] if kind == "q4" else codes.tolist()
    x = []
    for start in range(0, len(nibbles), 64):
        t = [
            float(np.float16((code - LEVELS[kind]) * float(scales[(start + i) // 32])))
            for i, code in enumerate(nibbles[start : start + 64])
        ]
        x += [np.float16(value / 32) for value in loop_hadamard(t, 5, 2)]
    return np.array(x, np.float16)


@pytest.mark.parametrize("kind", LEVELS)
def test_golden_vector(kind):
    first_codes, scale, first_values, codes_crc, scales_crc = GOLDEN[kind]
    codes, scales = encode(GOLDEN_X, kind)
    assert codes[:16].tobytes().hex(" ") == first_codes
    assert np.all(bits_of(scales[:4]) == scale)
    assert zlib.crc32(codes.tobytes()) == codes_crc and zlib.crc32(scales.tobytes()) == scales_crc
    assert codes.size == 512 * (4 if kind == "q4" else 8) // 8 and scales.size == 16
    decoded = decode(codes, scales, kind)
    assert " ".join(f"{value:04x}" for value in bits_of(decoded[:8])) == first_values


@pytest.mark.parametrize("kind", LEVELS)
def test_the_golden_vector_rejects_other_codecs(kind):
    def crcs(**mistake):
        return tuple(zlib.crc32(a.tobytes()) for a in loop_encode(GOLDEN_X, kind, **mistake))

    expected = GOLDEN[kind][3:]
    assert crcs() == expected
    for mistake in (
        {"stages": 0},
        {"stages": 4},
        {"stride_of_vectors": 1},
        {"divisor": LEVELS[kind] - 1},
        {"rint": int},
        {"last": 2 * LEVELS[kind] - 2},
        *([{"low_first": False}] if kind == "q4" else []),
    ):
        assert crcs(**mistake) != expected, mistake


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 900.0], ids=str)
def test_against_loops(kind, scale):
    """Ordinary values, values whose steps are subnormal, and values near the end of the range."""
    x = (np.random.default_rng(7).standard_normal(64 * 24) * scale).astype(np.float16)
    codes, scales = encode(x, kind)
    loop_codes, loop_scales = loop_encode(x, kind)
    np.testing.assert_array_equal(codes, loop_codes)
    np.testing.assert_array_equal(bits_of(scales), bits_of(loop_scales))
    np.testing.assert_array_equal(bits_of(decode(codes, scales, kind)), bits_of(loop_decode(codes, scales, kind)))


@pytest.mark.parametrize("kind", LEVELS)
def test_any_bytes_decode(kind):
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 256, 64 * 12, dtype=np.uint8)
    size = codes.size * (2 if kind == "q4" else 1)
    scales = rng.uniform(-4, 4, size // 32).astype(np.float16)
    np.testing.assert_array_equal(bits_of(decode(codes, scales, kind)), bits_of(loop_decode(codes, scales, kind)))


def test_the_transform_is_the_sylvester_matrix():
    """Where nothing rounds: scales are maxima of products with (-1)^popcount(r & c), and decoding gives x back."""
    matrix = np.array([[(-1) ** (r & c).bit_count() for c in range(32)] for r in range(32)])
    x = np.random.default_rng(9).integers(-8, 9, (50, 64))
    t = np.empty_like(x)
    t[:, ::2], t[:, 1::2] = x[:, ::2] @ matrix, x[:, 1::2] @ matrix
    largest = np.abs(t).reshape(-1, 32).max(axis=1)
    _, scales = encode(x.astype(np.float16), "q4")
    np.testing.assert_array_equal(scales.astype(np.float64) * 8, largest)
    # One value: every entry of t is that value, with a sign; q8 and q4 keep -1 exactly and clamp +1.
    for place in range(64):
        one = np.zeros(64, np.float16)
        one[place] = 4
        codes, scales = encode(one, "q8")
        np.testing.assert_array_equal(np.where(codes[place % 2 :: 2] > 128, 1, -1), matrix[:, place // 2])
        assert np.all(codes[1 - place % 2 :: 2] == 128) and np.all(scales == 4 / 128)


def test_recorded_outputs_of_exllamav2():
    compared = 0
    for case, (inputs, outputs, arguments) in golden("cache").items():
        if case.startswith("q_kv"):
            tokens = slice(arguments["offset"], arguments["offset"] + arguments["width"])
            parts = {name: array[:, tokens] for name, array in outputs.items()}
            parts |= {f"{side}_rows": inputs[side][:, tokens] for side in "kv"}
        elif case.startswith("paged"):
            parts = inputs | outputs
        else:
            continue
        for side in "kv":
            kind = "q8" if arguments["wbits"] == 8 or (arguments["wbits"] == 6 and side == "k") else "q4"
            codes, scales = encode(parts[f"{side}_rows"], kind)
            np.testing.assert_array_equal(codes, parts[f"{side}q"].ravel())
            np.testing.assert_array_equal(bits_of(scales), bits_of(parts[f"{side}s"].ravel()))
            np.testing.assert_array_equal(bits_of(decode(codes, scales, kind)), bits_of(parts[side].ravel()))
            compared += 1
    assert compared == 10


def test_recorded_matrix_fp16_to_q4():
    inputs, outputs, _ = golden("element")["q4"]
    codes, scales = encode(inputs["x"], "q4")
    np.testing.assert_array_equal(codes, outputs["q"])
    np.testing.assert_array_equal(bits_of(scales), bits_of(outputs["scales"]))
    np.testing.assert_array_equal(bits_of(decode(codes, scales, "q4")), bits_of(outputs["y"].ravel()))


def test_fp8_is_the_upper_byte():
    every = np.arange(1 << 16, dtype=np.uint16)
    codes, scales = encode(every.view(np.float16), "fp8")
    assert scales is None and codes.dtype == np.uint8
    assert codes.tolist() == [value // 256 for value in range(1 << 16)]
    decoded = decode(codes, None, "fp8")
    assert bits_of(decoded).tolist() == [value // 256 * 256 for value in range(1 << 16)]
    finite = np.isfinite(every.view(np.float16))
    assert np.all(np.abs(decoded[finite]) <= np.abs(every.view(np.float16)[finite]))


@pytest.mark.parametrize("kind", LEVELS)
def test_values_that_are_no_numbers(kind):
    x = np.random.default_rng(3).standard_normal((7, 64)).astype(np.float16)
    x[0] = 0
    x[1] = -0.0
    x[2, 5] = np.nan
    x[3, 40] = np.inf
    x[4] = 60000  # overflows in the transform
    x[5, 2], x[5, 3] = np.nan, -np.inf
    codes, scales = encode(x, kind)
    codes = (np.stack((codes & 15, codes >> 4), -1) if kind == "q4" else codes).reshape(7, 64)
    scales, levels = scales.reshape(7, 2), LEVELS[kind]
    assert not codes[:2].any() and not scales[:2].any()
    # Odd values of row 2 were transformed apart from the NaN, but share its scale.
    assert np.all(bits_of(scales)[[2, 5]] == 0x7FFF) and not codes[[2, 5]].any()
    assert np.all(np.isposinf(scales[3]))
    assert np.all(codes[3, ::2] == 0) and np.all(codes[3, 1::2] == levels)
    decoded = decode(*encode(x, kind), kind).reshape(7, 64)
    assert np.all(decoded[:2] == 0)
    assert np.all(bits_of(decoded[[2, 5]]) == 0x7FFF)
    assert not np.isfinite(decoded[3:5]).any()
    assert np.isfinite(decoded[6]).all()


# --- e4m3 -------------------------------------------------------------------------------------------------------------


def e4m3_of(code):
    """The value of a code, from its definition: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * math.ldexp(mantissa, -9)
    return math.nan if code & 0x7F == 0x7F else sign * math.ldexp(8 + mantissa, exponent - 10)


POSITIVE = [e4m3_of(code) for code in range(0x7F)]  # in rising order


def nearest_code(value, *, ties_to_even=True):
    """The code of the nearest float8 to a float, saturating; exact, as differences of these numbers are."""
    magnitude = Fraction(min(abs(value), 448.0))
    above = min(bisect.bisect_left(POSITIVE, magnitude), len(POSITIVE) - 1)
    below = max(above - 1, 0)
    up, down = POSITIVE[above] - magnitude, magnitude - Fraction(POSITIVE[below])
    even = above if above % 2 == 0 else below
    code = above if up < down else below if down < up else even if ties_to_even else above
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def nearest_float16(value):
    """A Fraction >= 0 rounded once to float16, by whole numbers."""
    exponent = max(math.frexp(float(value))[1] - 11, -24)
    return np.float16(math.ldexp(round(value / Fraction(2) ** exponent), exponent))


def loop_e4m3(head, *, largest=448, least=2.0**-14, most=146.125, **options):
    """Codes and scale of one head, value by value. The options are mistakes one could make."""
    a = max(abs(float(v)) for v in head)
    if a == 0:
        return [0] * len(head), np.float16(0)
    scale = min(max(nearest_float16(Fraction(a) / largest), np.float16(least)), np.float16(most))
    return [nearest_code(float(np.float32(v) / np.float32(scale)), **options) for v in head], scale


def test_codes_of_e4m3_are_those_of_ml_dtypes():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(values, [e4m3_of(code) for code in range(256)])
    decoded = decode(np.arange(256, dtype=np.uint8), np.ones(1, np.float16), "e4m3")
    np.testing.assert_array_equal(decoded, values.astype(np.float16))
    assert bits_of(decoded[[0x7F, 0xFF]]).tolist() == [0x7FFF, 0x7FFF] and np.signbit(decoded[0x80])


def test_e4m3_of_every_float16():
    """Under the scale 1 every value up to 448 becomes its nearest float8."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.abs(every) <= 448]
    x = np.full((-(-every.size // 63), 64), 448, np.float16)
    x[:, 1:] = np.resize(every, (len(x), 63))
    codes, scales = encode(x, "e4m3")
    assert np.all(scales == 1) and np.all(codes[::64] == 0x7E)
    found = codes.reshape(-1, 64)[:, 1:].ravel()[: every.size]
    expected = np.array([nearest_code(v) for v in every.tolist()], np.uint8)
    np.testing.assert_array_equal(found, expected)
    assert (found != [nearest_code(v, ties_to_even=False) for v in every.tolist()]).any()


def test_e4m3_scales_of_every_float16():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    codes, scales = encode(every.reshape(-1, 1), "e4m3")
    finite = np.isfinite(every)
    expected = [loop_e4m3([v]) for v in every[finite].tolist()]
    np.testing.assert_array_equal(bits_of(scales[finite]), bits_of(np.array([s for _, s in expected], np.float16)))
    np.testing.assert_array_equal(codes[finite], [c[0] for c, _ in expected])
    assert np.all(bits_of(scales[~finite]) == 0x7FFF) and np.all(codes[~finite] == 0x7F)
    decoded = decode(codes, scales, "e4m3")
    assert np.all(bits_of(decoded[~finite]) == 0x7FFF) and np.isfinite(decoded[finite]).all()
    # Half a step of a float8 between 256 and 448 and the scale's own rounding; below the least scale, half of its least code.
    error = np.abs(decoded[finite].astype(np.float64) - every[finite])
    assert np.all(error <= np.maximum(np.abs(every[finite].astype(np.float64)) * (16 / 256), 2.0**-14 * 2.0**-10))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 2e-4, 20000.0], ids=str)
def test_e4m3_against_loops(scale):
    with np.errstate(over="ignore"):
        x = (np.random.default_rng(7).standard_normal((40, 24)) * scale).astype(np.float16).clip(-65504, 65504)
    x[3], x[4, 1:], x[5, 0] = 0, 0, 65504
    codes, scales = encode(x, "e4m3")
    expected = [loop_e4m3(head) for head in x]
    np.testing.assert_array_equal(codes.reshape(x.shape), [c for c, _ in expected])
    np.testing.assert_array_equal(bits_of(scales), bits_of(np.array([s for _, s in expected], np.float16)))
    values = [
        [np.float16(e4m3_of(int(c)) * float(s)) for c in head] for head, s in zip(codes.reshape(x.shape), scales, strict=True)
    ]
    np.testing.assert_array_equal(bits_of(decode(codes, scales, "e4m3")), bits_of(np.array(values, np.float16).ravel()))
    assert np.isfinite(np.array(values)).all()


def test_the_loops_of_e4m3_reject_other_codecs():
    x = np.random.default_rng(7).standard_normal((400, 24)).astype(np.float16)
    x[0], x[1] = 65504, x[1] * np.float16(2.0**-14)
    codes, scales = encode(x, "e4m3")

    def is_same(**mistake):
        found = [loop_e4m3(head, **mistake) for head in x]
        return np.array_equal(codes.reshape(x.shape), [c for c, _ in found]) and np.array_equal(scales, [s for _, s in found])

    assert is_same()
    for mistake in ({"largest": 240}, {"largest": 447}, {"least": 0}, {"most": 147}, {"ties_to_even": False}):
        assert not is_same(**mistake), mistake


def test_e4m3_of_values_that_are_no_numbers():
    x = np.ones((5, 64), np.float16)
    x[0], x[1, 7], x[2, 9], x[3, 1] = -0.0, np.nan, -np.inf, np.array(0xFE01, np.uint16).view(np.float16)
    codes, scales = encode(x, "e4m3")
    codes = codes.reshape(x.shape)
    assert not codes[0].any() and np.all(codes[1:4] == 0x7F) and np.all(codes[4] == 0x7E)
    assert bits_of(scales)[:4].tolist() == [0, 0x7FFF, 0x7FFF, 0x7FFF]
    decoded = decode(codes, scales, "e4m3").reshape(x.shape)
    assert not bits_of(decoded[0]).any() and np.all(bits_of(decoded[1:4]) == 0x7FFF)
    assert np.allclose(decoded[4].astype(np.float64), 1, rtol=2.0**-11)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 64), (3, 2, 0)])
def test_e4m3_of_nothing(shape):
    codes, scales = encode(np.zeros(shape, np.float16), "e4m3")
    assert codes.size == np.prod(shape) and scales.size == np.prod(kv_cache.scale_shape(shape or (1,), "e4m3"))
    assert decode(codes, scales, "e4m3").size == codes.size


@pytest.mark.parametrize(("kind", "bound"), [("q4", 0.11), ("q8", 0.008), ("e4m3", 0.03)])
def test_what_is_lost(kind, bound):
    """Root mean square error of normal values, relative to theirs."""
    x = np.random.default_rng(4).standard_normal((1 << 7, 1 << 7)).astype(np.float16)
    error = decode(*encode(x, kind), kind).reshape(x.shape).astype(np.float64) - x
    relative = np.sqrt(np.mean(error**2) / np.mean(x.astype(np.float64) ** 2))
    assert bound / 2 < relative < bound


@pytest.mark.parametrize("kind", kv_cache.KINDS)
def test_passes_leave_no_seams(kind, monkeypatch):
    x = np.random.default_rng(5).standard_normal((9, 64)).astype(np.float16)
    whole = encode(x, kind)
    values = decode(*whole, kind)
    monkeypatch.setattr(kv_cache, "_PASS_VALUES", 128)
    parts = encode(x, kind)
    np.testing.assert_array_equal(whole[0], parts[0])
    if kind != "fp8":
        np.testing.assert_array_equal(bits_of(whole[1]), bits_of(parts[1]))
    np.testing.assert_array_equal(bits_of(values), bits_of(decode(*parts, kind)))


@pytest.mark.parametrize("kind", kv_cache.KINDS)
def test_shapes_strides_and_nothing(kind):
    x = np.random.default_rng(6).standard_normal((2, 3, 128)).astype(np.float16)
    x.setflags(write=False)
    view = x[:, ::2, ::-1]
    codes, scales = encode(view, kind)
    again = encode(view.copy(), kind)
    np.testing.assert_array_equal(codes, again[0])
    assert codes.size == np.prod(kv_cache.code_shape(view.shape, kind))
    if kind == "fp8":
        assert scales is None and kv_cache.scale_shape(view.shape, kind) is None
    else:
        assert scales.size == np.prod(kv_cache.scale_shape(view.shape, kind))
        scales = scales.reshape(2, -1)
    np.testing.assert_array_equal(decode(codes.reshape(2, -1), scales, kind), decode(*again, kind))
    empty = encode(x[:0], kind)
    assert empty[0].size == 0 and decode(*empty, kind).shape == (0,)


ERRORS = [
    (lambda: encode(np.zeros(64, np.float16), "q6"), ValueError, "kind: 'q6', expected one of fp8, q4, q8, e4m3"),
    (lambda: kv_cache.code_shape((1, 64), "q2"), ValueError, "kind: 'q2'"),
    (lambda: encode(np.zeros(64, np.float32), "q4"), TypeError, "x: dtype float32, expected float16"),
    (lambda: encode(np.zeros(96, np.float16), "q4"), ValueError, "x: 96 values, expected a multiple of 64"),
    (lambda: decode(np.zeros(32, np.int8), np.zeros(2, np.float16), "q4"), TypeError, "codes: dtype int8, expected uint8"),
    (
        lambda: decode(np.zeros(48, np.uint8), np.zeros(3, np.float16), "q4"),
        ValueError,
        "codes: 48 bytes, expected a multiple of 32",
    ),
    (
        lambda: decode(np.zeros(96, np.uint8), np.zeros(3, np.float16), "q8"),
        ValueError,
        "codes: 96 bytes, expected a multiple of 64",
    ),
    (lambda: decode(np.zeros(64, np.uint8), None, "q8"), ValueError, "scales: None, expected 2 float16 values"),
    (lambda: decode(np.zeros(64, np.uint8), np.zeros(2, np.float32), "q8"), TypeError, "scales: dtype float32"),
    (lambda: decode(np.zeros(64, np.uint8), np.zeros(4, np.float16), "q8"), ValueError, "scales: 4 values, expected 2 for 64"),
    (
        lambda: decode(np.zeros(64, np.uint8), np.zeros(2, np.float16), "fp8"),
        ValueError,
        'scales: given, but kind "fp8" has none',
    ),
    (lambda: encode(np.zeros(64, np.float32), "e4m3"), TypeError, "x: dtype float32, expected float16"),
    (lambda: decode(np.zeros(64, np.uint8), None, "e4m3"), ValueError, "scales: None, expected one for each head of float16"),
    (
        lambda: decode(np.zeros(64, np.uint8), np.zeros(3, np.float16), "e4m3"),
        ValueError,
        "scales: 3 values, expected one for each head of 64 codes",
    ),
    (lambda: decode(np.zeros(64, np.uint8), np.zeros(0, np.float16), "e4m3"), ValueError, "scales: 0 values, expected one"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
