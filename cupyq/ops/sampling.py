"""Drawing tokens from logits."""

from typing import NamedTuple

import numpy as np

from cupyq import _device
from cupyq._arrays import FLOATS, check, float32, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import byte_workspace, refuse_overlap, vector_width
from cupyq.ops._settings import Setting, SettingTable, given_settings, is_scalar, may_be, normalise, upload
from cupyq.ops.philox import philox4x32, philox_bits, philox_uniform
from cupyq.ops.sampling_filters import Candidates, kept_weights, probability_of, surprised, token_weights

__all__ = [
    "SamplerTable",
    "kept_weights",
    "philox4x32",
    "philox_bits",
    "philox_uniform",
    "sample",
    "sample_workspace_size",
    "token_weights",
]

MAX_VOCAB = 1 << 23
"""Weights are at most 2**40: their sum stays below 2**63."""
MAX_TOP = 1024
"""The most tokens that top_ids can list: as many as one block sorts in shared memory."""
_LIST_SIZE = 2048  # list_size of sampling.cuh
_MOST_PARTS, _ROW_BYTES = 128, 43048  # most_parts and struct Row of sample_split.cu
_PART_SIZE = 2048  # tokens that are worth a block of their own


def _share(value):
    return (value >= 0) & (value <= 1)


def _not_negative(value):
    return value >= 0


_POSITIVE = "finite in float32, >= 0"
SETTINGS = {
    "temperature": Setting(1.0, expected=_POSITIVE, is_valid=_not_negative),
    "top_k": Setting(0, np.int32),
    "top_p": Setting(1.0, expected="above 0 and at most 1", is_valid=lambda value: (value > 0) & (value <= 1)),
    "min_p": Setting(0.0, expected="from 0 to 1", is_valid=_share),
    "seed": Setting(0, np.uint64, least=-(1 << 63)),
    "step": Setting(0, np.uint64),
    # What only the larger kernel reads, in the order of its table (struct Filters of sample.cu).
    "top_a": Setting(0.0, expected=_POSITIVE, is_valid=_not_negative),
    "tfs": Setting(0.0, expected="from 0 to 1", is_valid=_share),
    "typical": Setting(0.0, expected="from 0 to 1", is_valid=_share),
    "mirostat_tau": Setting(0.0, expected=_POSITIVE, is_valid=_not_negative),
    "mirostat_eta": Setting(0.1, expected=_POSITIVE, is_valid=_not_negative),
    "post_temperature": Setting(1.0, expected="finite in float32, > 0", is_valid=lambda value: value.astype(np.float32) > 0),
    "min_temp": Setting(0.0, expected=_POSITIVE, is_valid=_not_negative),
    "max_temp": Setting(0.0, expected=_POSITIVE, is_valid=_not_negative),
    "temp_exponent": Setting(1.0, expected=_POSITIVE, is_valid=_not_negative),
    "xtc_probability": Setting(0.0, expected="from 0 to 1", is_valid=_share),
    "xtc_threshold": Setting(0.1, expected="from 0 to 1", is_valid=_share),
    "smoothing": Setting(0.0, expected=_POSITIVE, is_valid=_not_negative),
    "skew": Setting(0.0, expected="from -100 to 100", is_valid=lambda value: abs(value) <= 100),
}
_CLASSIC = ("temperature", "top_k", "top_p", "min_p", "seed", "step")
_FILTERS = tuple(name for name in SETTINGS if name not in _CLASSIC)


class SamplerTable(SettingTable):
    """Settings of `sample` for `rows` rows, checked and moved to the device once: steady decoding then uploads nothing.

    SamplerTable(rows, xp, **settings): xp is `numpy` or `cupy`; settings are those of `sample` but step, each one number
    or an array [rows]. CuPy arrays are taken over as they stand now. Lives on CuPy's current device.

    >>> table = SamplerTable(2, np, top_k=[1, 40], seed=[5, 6])
    >>> sample(np.float32([[1, 2, 3], [3, 2, 1]]), table=table, step=9).tolist()
    [2, 0]
    """

    specification = {name: setting for name, setting in SETTINGS.items() if name != "step"}
    tabled = _FILTERS
    is_frozen = True  # see _replay

    def __init__(self, rows, xp=np, **settings):
        super().__init__(rows, xp, **settings)
        self.needs = _needs(self.values)


class _Needs(NamedTuple):
    """What may be on in some row."""

    filters: bool
    """A setting that only the larger kernel knows."""
    tail_free: bool
    mirostat: bool


def _needs(values):
    # These three do nothing alone.
    names = [name for name in _FILTERS if name not in ("mirostat_eta", "temp_exponent", "xtc_threshold")]
    return _Needs(
        any(may_be(values, name, lambda value, off=SETTINGS[name].default: value != off) for name in names),
        may_be(values, "tfs", lambda value: (value > 0) & (value < 1)),
        may_be(values, "mirostat_tau", lambda value: value > 0),
    )


@accepts_dlpack(writes=("out", "workspace", "mirostat_mu", "probabilities", "top_ids", "top_probabilities"), replays=True)
def sample(
    logits,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    step=0,
    smoothing=0.0,
    top_a=0.0,
    tfs=0.0,
    typical=0.0,
    mirostat_tau=0.0,
    mirostat_eta=0.1,
    mirostat_mu=None,
    post_temperature=1.0,
    min_temp=0.0,
    max_temp=0.0,
    temp_exponent=1.0,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    xtc_mask=None,
    skew=0.0,
    table=None,
    probabilities=None,
    top_ids=None,
    top_probabilities=None,
    out=None,
    workspace=None,
):
    """One token id per row, drawn from softmax(logits / temperature) after the filters.

    logits [rows, vocab] float16, bfloat16 or float32 -> int32 [rows]. Every setting is one number for all rows, or an
    array [rows]. Where logits is a CuPy array, NumPy arrays of settings are uploaded in one copy, and CuPy arrays are
    used as they are, their values unchecked; they must be float32, int32 (top_k), int64 or uint64 (seed, step). Arrays
    among the settings from smoothing on are packed on the device first. `table`, a SamplerTable, stands for all
    settings but step and leaves nothing to upload.

    Tokens are ordered by logit, descending, ties by lowest id. In this order, p being relative to what is left:
    temperature  0 takes the first token of the order. Must be finite; rounded to float32, as all real settings are.
    smoothing    s > 0: p ~ exp(-s * (max - logit)**2 / temperature) instead of exp((logit - max) / temperature).
    top_k        keeps the first top_k tokens; 0 keeps all.
    top_p        keeps the shortest beginning whose share of the probability reaches top_p; 1 keeps all.
    top_a        keeps tokens with p >= top_a * max(p)**2 and the first; 0 keeps all.
    min_p        keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
    tfs          tail-free: of the n tokens' n - 2 second differences of p, as absolute values, the beginning that holds at
                 most the share tfs, and one token more; 0 or 1 keeps all, as fewer than 3 tokens do.
    typical      keeps the tokens whose -log p is nearest the entropy until their share reaches typical; 0 or 1 keeps all.
    mirostat_tau, mirostat_eta, mirostat_mu
                 tau > 0: keeps tokens of -log2 p <= mu and the likeliest, and after the draw adds
                 eta * (tau + log2 p of the drawn token) to mu. mu: float32 [rows], updated in place; start with 2 * tau.
    post_temperature
                 p ~ p**(1 / post_temperature).
    min_temp, max_temp, temp_exponent
                 where max_temp > min_temp, post_temperature is instead min_temp + (max_temp - min_temp) * h**temp_exponent,
                 h the entropy over its largest value, log n.
    xtc_probability, xtc_threshold, xtc_mask
                 with that probability, tokens with p >= xtc_threshold go, but for the last of them. Tokens whose xtc_mask,
                 bool or uint8 [vocab], is false do not count and stay.
    skew         the draw takes u**exp(-skew) for the random number u, over the tokens in their order: above 0 favours
                 unlikely tokens. At 0, u counts along the ids.
    seed, step   64-bit integers, step >= 0. The random numbers are Philox4x32-10 of counter step under key seed: a row's
                 result depends on its own logits and settings alone, and rows of one batch want different seeds.

    At least one token is always left. Written where given, of the final distribution: probabilities, float32 [rows], of
    the drawn tokens; top_ids, int32 [rows, n], and top_probabilities, float32 [rows, n], of the first n tokens, n up to
    1024, missing ones being id -1 of probability 0. Nothing is written to other arguments. `workspace`, uint8
    [sample_workspace_size(rows, vocab)] or more, saves an allocation where tfs is on, and where nothing beyond temperature,
    top_k, top_p and min_p is asked for it lets many blocks work on each of few rows: several times as fast, the same ids.

    NaN counts as -inf, and -inf is never drawn: a row without any other value gives -1 with probability 0. A row with
    +inf gives the lowest id that has it. Probabilities are integers of 40 fractional bits relative to the likeliest
    token; less likely ones count as 0 (relative error 4e-6 elsewhere). So sums are exact; NumPy and CUDA take the same
    single roundings elsewhere, and draw the same ids.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides or settings, and for more than 2**23 tokens.
    Sources: top-p Holtzman et al., arXiv 1904.09751; min-p Nguyen et al., arXiv 2407.01082; typical Meister et al., arXiv
    2202.00666; mirostat v2 Basu et al., arXiv 2007.14966; tail-free sampling: Trenton Bricken, 2019; top-a: BlinkDL,
    RWKV-LM; XTC: P. E. Weidmann, text-generation-webui 6335; order of the filters as in exllamav2; Philox: Salmon et al.,
    SC 2011.

    >>> sample(np.log(np.array([[0.1, 0.6, 0.3]] * 8, np.float32)), top_p=0.8, seed=np.arange(8))
    array([2, 2, 1, 1, 2, 1, 1, 2], dtype=int32)
    """
    given = given_settings(SETTINGS, locals())
    xp = namespace(
        logits=logits,
        mirostat_mu=mirostat_mu,
        xtc_mask=xtc_mask,
        table=table,
        probabilities=probabilities,
        top_ids=top_ids,
        top_probabilities=top_probabilities,
        workspace=workspace,
    )
    check(logits, "logits", dtype=FLOATS, ndim=2)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"logits must have at most {MAX_VOCAB} columns, got {vocab}")
    if table is None:
        values = normalise(SETTINGS, given, xp, rows)
        needs = _needs(values)
    else:
        values, needs = _values_of_table(table, given, xp, rows), table.needs
    if needs.mirostat and mirostat_mu is None:
        raise ValueError(
            "mirostat_tau is given without mirostat_mu: pass float32 [rows], at first filled with 2 * mirostat_tau"
        )
    states = {"mirostat_mu": mirostat_mu, "probabilities": probabilities}
    for name, array in states.items():
        if array is not None:
            check(array, name, dtype=float32, shape=(rows,), writes=True)
    if xtc_mask is not None:
        check(xtc_mask, "xtc_mask", dtype=(np.dtype(bool), np.dtype(np.uint8)), shape=(vocab,))
    _check_top(top_ids, top_probabilities, rows)
    out = output(xp, out, (rows,), int32)
    refuse_overlap(out, "out", logits=logits, xtc_mask=xtc_mask)
    written = states | {"top_ids": top_ids, "top_probabilities": top_probabilities}
    others = written | {"logits": logits, "xtc_mask": xtc_mask, "out": out}
    for name, array in written.items():
        del others[name]
        if array is not None:
            refuse_overlap(array, name, **others)
    if rows == 0:
        return out
    if xp is np:
        sample_reference(logits, values, xtc_mask, out, **written)
    else:
        on_device, packed = _prepared(values, table, logits)
        if needs.filters or any(array is not None for array in (probabilities, top_ids, top_probabilities)):
            needs_workspace = needs.tail_free and vocab > _LIST_SIZE
            workspace = _checked_workspace(workspace, logits) if needs_workspace else None
            _launch_filtered(logits, on_device, packed, xtc_mask, out, workspace, **written)
        elif workspace is not None and (parts := pick_parts(rows, vocab, _device.info(logits.device.id).sm_count)) > 1:
            _launch_split(logits, on_device, out, _checked_workspace(workspace, logits), parts)
        else:
            _launch_sample(logits, on_device, out)
    return out


def sample_workspace_size(rows, vocab):
    """How many bytes of workspace sample() may use: where tfs is on and more than 2048 tokens are left to it, and for few rows.

    >>> sample_workspace_size(32, 128256)
    32833536
    """
    return rows * max(vocab * 8, _ROW_BYTES) if vocab > _LIST_SIZE else 0


def _checked_workspace(workspace, logits):
    return byte_workspace(workspace, sample_workspace_size(*logits.shape), logits, "sample_workspace_size")


def _values_of_table(table, given, xp, rows):
    if not isinstance(table, SamplerTable):
        raise TypeError(f"table must be a SamplerTable, got {type(table).__name__}")
    step = normalise({"step": SETTINGS["step"]}, given, xp, rows)
    return table.values_for(rows, [name for name in given if name != "step"]) | step


def _check_top(top_ids, top_probabilities, rows):
    pairs = [("top_ids", top_ids, int32), ("top_probabilities", top_probabilities, float32)]
    count = None
    for name, array, dtype in pairs:
        if array is None:
            continue
        check(array, name, dtype=dtype, shape=(rows, count), writes=True)
        count = array.shape[1]
        if count > MAX_TOP:
            raise ValueError(f"{name} must have at most {MAX_TOP} columns, got {count}")


def sample_reference(logits, values, xtc_mask, out, mirostat_mu, probabilities, top_ids, top_probabilities):
    rows = len(logits)
    random, coin = (np.broadcast_to(philox_bits(values["seed"], values["step"], word), rows) for word in (0, 2))
    values = {name: np.broadcast_to(value, rows) for name, value in values.items()}
    for r in range(rows):
        row = logits[r].astype(np.float32)
        row[np.isnan(row)] = -np.inf
        chosen = {name: value[r] for name, value in values.items()}
        mu = None if mirostat_mu is None else mirostat_mu[r]
        has_top = top_ids is not None or top_probabilities is not None
        ids, weights, place = _draw(row, chosen, mu, xtc_mask, int(random[r]), int(coin[r]), has_top)
        out[r] = ids[place] if ids.size else -1
        total = int(weights.sum())
        if probabilities is not None:
            probabilities[r] = probability_of(weights[place], total) if ids.size else 0
        if top_ids is not None:
            top_ids[r] = -1
            top_ids[r, : ids.size] = ids[: top_ids.shape[1]]
        if top_probabilities is not None:
            top_probabilities[r] = 0
            first = weights[: top_probabilities.shape[1]]
            top_probabilities[r, : first.size] = [probability_of(weight, total) for weight in first]
        if ids.size and chosen["mirostat_tau"] > 0:
            mirostat_mu[r] = surprised(mu, chosen["mirostat_tau"], chosen["mirostat_eta"], weights[place], total)


def _draw(row, chosen, mu, xtc_mask, random, coin, in_order):
    """What is left of a row: ids, weights, and the drawn one's place among them."""
    best = int(np.argmax(row)) if row.size else -1
    if best < 0 or row[best] == -np.inf:
        return np.empty(0, np.int32), np.empty(0, np.uint64), 0
    if chosen["temperature"] == 0 or row[best] == np.inf:
        return np.int32([best]), np.uint64([1]), 0
    candidates = Candidates(row, chosen["temperature"], chosen["smoothing"])
    candidates.top_k(chosen["top_k"])
    candidates.top_p(chosen["top_p"])
    candidates.top_a(chosen["top_a"])
    candidates.min_p(chosen["min_p"])
    candidates.tail_free(chosen["tfs"])
    candidates.typical(chosen["typical"])
    candidates.mirostat(chosen["mirostat_tau"], mu)
    candidates.retemper(chosen["post_temperature"], chosen["min_temp"], chosen["max_temp"], chosen["temp_exponent"])
    candidates.exclude_top(chosen["xtc_probability"], chosen["xtc_threshold"], xtc_mask, coin)
    if in_order:
        candidates.put_in_order()
    place = candidates.draw(random, chosen["skew"])
    return candidates.ids, candidates.weights, place


# --- launching --------------------------------------------------------------------------------------------------------


def _prepared(values, table, logits):
    """The settings on the device, and those of the larger kernel as one table if an array is among them."""
    with logits.device:
        if table is None:
            return upload(values, _FILTERS, SETTINGS, len(logits))
        step, _ = upload({"step": values["step"]}, (), SETTINGS, len(logits))
    return table.packed[0] | step, table.packed[1]


def _pairs(values, names):
    """(array or null, number) of each setting."""
    arguments = []
    for name in names:
        value = values[name]
        arguments += (None, value) if is_scalar(value) else (value, SETTINGS[name].dtype(0))
    return arguments


def _launch_sample(logits, values, out):
    arguments = (logits, *_pairs(values, _CLASSIC), out, np.int32(logits.shape[1]))
    launch(_sample_instance(logits.dtype, _vector(logits)), (len(logits),), (1024,), arguments)


def pick_parts(rows, vocab, sm_count):
    """Over how many blocks each row is spread: no more than there are multiprocessors, each with tokens enough."""
    return min(sm_count // rows, vocab // _PART_SIZE, _MOST_PARTS)


def _launch_split(logits, values, out, workspace, parts):
    rows, vocab = logits.shape
    vector, grid = _vector(logits), (parts, rows)
    arguments = (logits, *_pairs(values, _CLASSIC), out, workspace, np.int32(vocab))
    launch(_split_instance("sample_maxima", logits.dtype, vector), grid, (1024,), (logits, workspace, np.int32(vocab)))
    launch(_split_instance("sample_shares", logits.dtype, vector), grid, (1024,), arguments)
    if may_be(values, "top_k", lambda value: value > 1) or may_be(values, "top_p", lambda value: value < 1):
        launch(_split_instance("sample_listed", logits.dtype, vector), grid, (1024,), arguments)


def _launch_filtered(logits, values, table, xtc_mask, out, workspace, mirostat_mu, probabilities, top_ids, top_probabilities):
    rows, vocab = logits.shape
    numbers = [value if is_scalar(value) else np.float32(0) for value in (values[name] for name in _FILTERS)]
    top = next((array.shape[1] for array in (top_ids, top_probabilities) if array is not None), 0)
    outputs = (out, mirostat_mu, probabilities, top_ids if top else None, top_probabilities if top else None)
    sizes = (np.int32(vocab), np.int32(top))
    arguments = (logits, *_pairs(values, _CLASSIC), table, *numbers, xtc_mask, *outputs, workspace, *sizes)
    launch(_filtered_instance(logits.dtype, _vector(logits)), (rows,), (1024,), arguments)


def _vector(logits):
    return 4 if vector_width(logits.shape[1], logits) == 4 else 1


def _sample_instance(x, vector):
    return instance("sample", x, vector)


def _filtered_instance(x, vector):
    return instance("sample_filtered", x, vector, file="sample")


def _split_instance(name, x, vector):
    return instance(name, x, vector, file="sample_split")


INSTANCES = [_sample_instance(x, vector) for x in FLOATS for vector in (1, 4)]
INSTANCES += [_filtered_instance(x, 4) for x in FLOATS] + [_filtered_instance(float32, 1)]
INSTANCES += [_split_instance(name, float32, 4) for name in ("sample_maxima", "sample_shares", "sample_listed")]
"""All instances of `sample`; of `sample_filtered`, float16 and bfloat16 of odd vocabularies are left to their first use, of the
kernels for few rows all but those of whole float32 vectors."""
