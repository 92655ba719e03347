"""Changing logits by what was already said, and by what the caller wants or forbids."""

import numpy as np

from cupyq._arrays import FLOATS, check, float32, int32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import byte_workspace, refuse_overlap, store
from cupyq.ops._settings import Setting, SettingTable, given_settings, is_scalar, normalise, upload

MAX_HISTORY = 1 << 24
_SLOT_BYTES = 32  # of the kernel's hash table

_FINITE = "finite in float32"
# In the order of the kernel's table (struct Penalties of penalize.cu).
SETTINGS = {
    "repetition": Setting(1.0, expected="finite in float32, > 0", is_valid=lambda value: value.astype(np.float32) > 0),
    "frequency": Setting(0.0, expected=_FINITE, is_valid=np.isfinite),
    "presence": Setting(0.0, expected=_FINITE, is_valid=np.isfinite),
    "sustain": Setting(-1, np.int32, least=-1),
    "decay": Setting(0, np.int32),
    "dry_multiplier": Setting(0.0, expected="finite in float32, >= 0", is_valid=lambda value: value >= 0),
    "dry_base": Setting(1.75, expected="finite in float32, >= 1", is_valid=lambda value: value >= 1),
    "dry_allowed_length": Setting(2, np.int32, least=1),
    "dry_max_ngram": Setting(20, np.int32, least=1),
    "dry_range": Setting(0, np.int32),
}


class PenaltyTable(SettingTable):
    """Settings of `penalize` for `rows` rows, checked and moved to the device once: steady decoding then uploads nothing.

    PenaltyTable(rows, xp, **settings): xp is `numpy` or `cupy`; each setting is one number or an array [rows].

    >>> PenaltyTable(2, np, repetition=[1.0, 1.1], presence=0.5)
    PenaltyTable(2 rows, numpy, repetition, presence)
    """

    specification = SETTINGS
    tabled = tuple(SETTINGS)
    is_frozen = True  # see _replay


@accepts_dlpack(replays=True)
def penalize(
    logits,
    history,
    lengths=None,
    *,
    repetition=1.0,
    frequency=0.0,
    presence=0.0,
    sustain=-1,
    decay=0,
    dry_multiplier=0.0,
    dry_base=1.75,
    dry_allowed_length=2,
    dry_max_ngram=20,
    dry_range=0,
    dry_breakers=None,
    bias=None,
    bias_ids=None,
    allowed=None,
    table=None,
    out=None,
    workspace=None,
):
    """Logits after the penalties for tokens of the history, then a bias, then DRY, then a mask of allowed tokens.

    logits [rows, vocab] float16, bfloat16 or float32; history int32 or int64 [rows, length], oldest first, of which
    lengths, int32 [rows], count (all where it is None; clamped to 0 to length). Ids outside the vocabulary are passed over.
    Settings are one number for all rows or an array [rows], or stand in `table`, a PenaltyTable.

    repetition, frequency, presence, sustain, decay
                  From the newest token back, for i = 0, 1, ... up to sustain + decay tokens, with s = 0 up to i = sustain
                  and then s = (i - sustain) / decay: the first time an id is met, x = x / r if x > 0 else x * r, with
                  r = repetition + s * (1 - repetition), and x -= (1 - s) * presence; each time, x -= (1 - s) * frequency.
                  sustain -1 is the whole history; with decay 0 all penalties are full.
    bias          float32 [vocab] or [rows, vocab], added; with bias_ids, int32 [n] or [rows, n], that shape: bias[..., i]
                  is added to token bias_ids[..., i], once per id, the last that names it.
    dry_multiplier, dry_base, dry_allowed_length, dry_max_ngram, dry_range, dry_breakers
                  Where the last m tokens of the history, m as large as possible but at most dry_max_ngram, stood in it
                  before and m >= dry_allowed_length: each token that followed there, c times, loses
                  dry_multiplier * dry_base**(m - dry_allowed_length) * c. Only the last dry_range tokens count (0: all).
                  Ids whose dry_breakers, bool or uint8 [vocab], is true are in no such repetition, nor penalised.
    allowed       bool or uint8 [vocab] or [rows, vocab]: all other tokens become -inf.

    -> out, logits' dtype or float32, may be logits itself. Computed in float64, then rounded to float32, then to out's
    dtype, the same on NumPy and CUDA. `workspace`, uint8 [penalize_workspace_size(...)], saves an allocation.
    Raises TypeError / ValueError for wrong dtypes, shapes and settings.
    Source: exllamav2's sampler (its DRY counts continuations of the longest match; P. E. Weidmann's original, in
    text-generation-webui 5677, penalises those of shorter matches too).

    >>> logits = np.float32([[2, 2, -1, 3]])
    >>> penalize(logits, np.array([[0, 2, 2]]), repetition=2.0, frequency=0.5)
    array([[ 0.5,  2. , -3. ,  3. ]], dtype=float32)
    """
    given = given_settings(SETTINGS, locals())
    xp = namespace(
        logits=logits,
        history=history,
        lengths=lengths,
        dry_breakers=dry_breakers,
        bias=bias,
        bias_ids=bias_ids,
        allowed=allowed,
        table=table,
        workspace=workspace,
    )
    check(logits, "logits", dtype=FLOATS, ndim=2)
    rows, vocab = logits.shape
    check(history, "history", dtype=(int32, np.dtype(np.int64)), shape=(rows, None))
    if history.shape[1] > MAX_HISTORY:
        raise ValueError(f"history must have at most {MAX_HISTORY} columns, got {history.shape[1]}")
    if lengths is not None:
        check(lengths, "lengths", dtype=int32, shape=(rows,))
    if table is None:
        values = normalise(SETTINGS, given, xp, rows)
    elif isinstance(table, PenaltyTable):
        values = table.values_for(rows, list(given))
    else:
        raise TypeError(f"table must be a PenaltyTable, got {type(table).__name__}")
    _check_masks(rows, vocab, dry_breakers, bias, bias_ids, allowed)
    dtype = float32 if getattr(out, "dtype", logits.dtype) != logits.dtype else logits.dtype
    out = output(xp, out, logits.shape, dtype)
    refuse_partial_overlap(out, logits=logits)
    inputs = {"history": history, "lengths": lengths, "dry_breakers": dry_breakers, "bias": bias, "bias_ids": bias_ids}
    refuse_overlap(out, "out", **inputs, allowed=allowed)
    if logits.size == 0:
        return out
    if xp is np:
        store(out, penalize_reference(logits, history, lengths, values, dry_breakers, bias, bias_ids, allowed))
    else:
        with logits.device:
            packed = upload(values, tuple(SETTINGS), SETTINGS, rows) if table is None else table.packed
        size = penalize_workspace_size(rows, vocab, history.shape[1], 0 if bias_ids is None else bias_ids.shape[-1])
        workspace = byte_workspace(workspace, size, logits, "penalize_workspace_size")
        _launch_penalize(logits, history, lengths, *packed, dry_breakers, bias, bias_ids, allowed, out, workspace)
    return out


def penalize_workspace_size(rows, vocab, length, bias_ids=0):
    """How many bytes of workspace penalize() may need for a history [rows, length] and that many bias_ids per row.

    >>> penalize_workspace_size(32, 128256, 2048)
    4194304
    """
    return rows * _slots(vocab, length, bias_ids) * _SLOT_BYTES


def _slots(vocab, length, bias_ids):
    """Places of a hash table at most half full."""
    return max(32, 1 << (2 * min(vocab, length + bias_ids) - 1).bit_length())


def _check_masks(rows, vocab, dry_breakers, bias, bias_ids, allowed):
    masks = (np.dtype(bool), np.dtype(np.uint8))
    if dry_breakers is not None:
        check(dry_breakers, "dry_breakers", dtype=masks, shape=(vocab,))
    if bias_ids is not None:
        if bias is None:
            raise ValueError("bias_ids is given without bias: pass what to add to them, float32 of the same shape")
        check(bias_ids, "bias_ids", dtype=int32, shape=(rows, None) if bias_ids.ndim > 1 else (None,))
        check(bias, "bias", dtype=float32, shape=bias_ids.shape)
    elif bias is not None:
        check(bias, "bias", dtype=float32, shape=(rows, vocab) if bias.ndim > 1 else (vocab,))
    if allowed is not None:
        by_row = allowed.ndim > 1 and allowed.shape[0] != 1
        check(allowed, "allowed", dtype=masks, shape=((rows if by_row else 1, vocab) if allowed.ndim > 1 else (vocab,)))


def penalize_reference(logits, history, lengths, values, dry_breakers, bias, bias_ids, allowed):
    rows, vocab = logits.shape
    result = logits.astype(np.float64)
    values = {name: np.broadcast_to(value, rows) for name, value in values.items()}
    with np.errstate(invalid="ignore", over="ignore"):
        for r, x in enumerate(result):
            length = history.shape[1] if lengths is None else min(max(int(lengths[r]), 0), history.shape[1])
            said = history[r, :length].astype(np.int64)
            said[(said < 0) | (said >= vocab)] = -1
            setting = {name: value[r].item() for name, value in values.items()}
            _penalize_said(x, said[::-1], setting)
            if bias_ids is not None:
                ids, added = (
                    np.broadcast_to(bias_ids, (rows, bias_ids.shape[-1]))[r],
                    np.broadcast_to(bias, (rows, bias.shape[-1]))[r],
                )
                last = {int(id): value for id, value in zip(ids, added, strict=True) if 0 <= id < vocab}
                for id, value in last.items():
                    x[id] += value
            elif bias is not None:
                x += np.broadcast_to(bias, (rows, vocab))[r]
            _penalize_repetitions(x, said, setting, dry_breakers)
            if allowed is not None:
                x[np.broadcast_to(allowed, (rows, vocab))[r] == 0] = -np.inf
        return result.astype(np.float32)


def _penalize_said(x, newest_first, setting):
    """Repetition, presence and frequency penalties, in place."""
    sustain, decay = setting["sustain"], setting["decay"]
    sustain = newest_first.size if sustain < 0 else sustain
    said = newest_first[: sustain + decay]
    steps = np.maximum(np.arange(said.size) - sustain, 0) if decay else np.zeros(said.size, np.int64)
    ids, first, which, counts = np.unique(said, return_index=True, return_inverse=True, return_counts=True)
    all_steps = np.zeros(ids.size, np.int64)
    np.add.at(all_steps, which, steps)
    known = ids >= 0
    ids, first_steps, counts, all_steps = ids[known], steps[first[known]], counts[known], all_steps[known]
    full = max(decay, 1)  # penalties are shares of it; with decay 0 nothing is taken off
    r = setting["repetition"] + (1 - setting["repetition"]) * first_steps / full
    old = x[ids]
    new = np.where(old > 0, old / r, old * r) - setting["presence"] * (full - first_steps) / full
    x[ids] = new - setting["frequency"] * (counts * full - all_steps) / full


def _penalize_repetitions(x, said, setting, breakers):
    """DRY, in place."""
    if setting["dry_range"] > 0:
        said = said[max(said.size - setting["dry_range"], 0) :]
    size = said.size
    if not setting["dry_multiplier"] > 0 or size < 2:
        return
    usable = said >= 0
    if breakers is not None:
        usable &= np.asarray(breakers)[said] == 0
    lengths = np.zeros(size, np.int64)  # of the match that ends before each place
    alive = usable.copy()
    for n in range(min(setting["dry_max_ngram"], size - 1)):
        alive[: n + 1] = False
        alive[n + 1 :] &= (said[: size - n - 1] == said[size - 1 - n]) & usable[size - 1 - n]
        if not alive.any():
            break
        lengths += alive
    longest = int(lengths.max())
    if longest >= setting["dry_allowed_length"]:
        power = 1.0
        for _ in range(longest - setting["dry_allowed_length"]):
            power *= setting["dry_base"]
        ids, counts = np.unique(said[lengths == longest], return_counts=True)
        x[ids] -= setting["dry_multiplier"] * power * counts


def _launch_penalize(logits, history, lengths, values, table, dry_breakers, bias, bias_ids, allowed, out, workspace):
    rows, vocab = logits.shape
    length = history.shape[1]
    width = 0 if bias_ids is None else bias_ids.shape[-1]
    numbers = [value if is_scalar(value) else SETTINGS[name].dtype(0) for name, value in values.items()]
    launch(
        _penalize_instance(logits.dtype, out.dtype),
        (rows,),
        (1024,),
        (
            *(logits, history, lengths, table, *numbers, dry_breakers, bias, bias_ids, allowed, out, workspace),
            np.int32(history.itemsize == 8),
            np.int32(length),
            np.int32(width),
            np.int32(bias is not None and bias.ndim > 1),
            np.int32(allowed is not None and allowed.ndim > 1 and allowed.shape[0] > 1),
            np.int32(_slots(vocab, length, width)),
            np.int32(vocab),
        ),
    )


def _penalize_instance(x, y):
    return instance("penalize", x, y)


INSTANCES = [_penalize_instance(x, y) for x in FLOATS for y in FLOATS if y in (x, float32)]
"""All instances of the kernel."""
