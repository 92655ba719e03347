"""tp/loading.py: ranks read their own bytes, agree on what they load, and say who does not."""

import numpy as np
import pytest
from architecture_cases import CASES, EXPERTS, IDS, LENGTHS, SEQ, write
from kernel_checks import host
from random_layers import random_gptq
from safetensors.numpy import load_file
from test_architectures import goldens, is_exact, relative, rewritten
from test_models import ARCH, EXAMPLES, folder_of, loaded, variant
from tp_checks import in_threads, several_gpus  # noqa: F401

from cupyq import tp
from cupyq.errors import BackendError, FormatError
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile
from cupyq.models import load_model
from cupyq.tp.layers import SummedLinear
from cupyq.tp.local import LocalComm, SoloComm

LLAMA = ARCH / "llama3-rope"
FLOAT32 = 2e-6  # as tests/test_tp_model.py has it


def on_ranks(ranks, load, **options):
    """What load(comm) returned or raised, by rank."""
    return in_threads([lambda comm=comm: load(comm) for comm in LocalComm.group(ranks, **options)])


@pytest.mark.parametrize("name", ["llama3-rope", "mixtral", "shakespeare-exl2-4.0", "shakespeare-gptq-g32"])
def test_parts_are_those_of_the_whole(name):
    """Columns and rows of each rank together are every weight of the model, once."""
    models = tp.run(lambda comm: tp.load_model(folder_of(name), comm), 2, backend="numpy")
    parts = [model._linears_by_projection() for model in models]
    for key, whole in loaded(name)._linears_by_projection().items():
        dense = dense_of(whole)
        total = np.zeros_like(dense)
        for model, linears in zip(models, parts, strict=True):
            share = model._shares[f"model.{key}" if key != "lm_head" else key]
            rows = np.arange(share.k) if share.rows is None else np.asarray(share.rows)
            columns = np.arange(share.n) if share.columns is None else np.asarray(share.columns)
            held = dense_of(linears[key])
            assert np.array_equal(held, dense[np.ix_(rows, columns)])
            total[np.ix_(rows, columns)] += held != 0
        is_whole = key.endswith(".gate")
        assert np.array_equal(total, (1 + is_whole) * (dense != 0))


def dense_of(linear):
    """[k, n] as float32."""
    return (linear.weight.dense if linear.is_quantized else linear.weight.T).astype(np.float32)


def test_what_is_summed_is_split_by_rows():
    model = tp.load_model(LLAMA, LocalComm.group(1)[0])
    summed = {linear.name.rpartition(".")[2] for linear in model._decoder_linears() if isinstance(linear, SummedLinear)}
    assert summed == {"o_proj", "down_proj"}


@pytest.mark.parametrize("name", ["llama3-rope", "shakespeare-gptq-g32"])
def test_a_rank_reads_its_own_bytes(monkeypatch, name):
    """Of what is split, each of 4 ranks reads about a quarter. Layers in the model's own order: their columns are ranges."""
    counted = {}
    read_piece = Checkpoint.read_piece

    def count(self, tensor, begin, target):
        counted[tensor] = counted.get(tensor, 0) + target.nbytes
        return read_piece(self, tensor, begin, target)

    monkeypatch.setattr(Checkpoint, "read_piece", count)
    tp.run(lambda comm: tp.load_model(folder_of(name), comm), 4, backend="numpy")
    file = SafetensorsFile(folder_of(name) / "model.safetensors")
    big = [key for key in counted if key.endswith((".weight", ".qweight")) and "norm" not in key and "embed" not in key]
    assert len(big) >= 7 * 2
    total = sum(file.array(key).nbytes for key in big)
    # All ranks together: each byte once, but for keys and values, whose 2 heads are held by two ranks each.
    assert total <= sum(counted[key] for key in big) <= 1.3 * total


def test_options_are_those_of_load_model():
    model = tp.load_model(LLAMA, SoloComm(), dtype="float16", max_seq_len=33)
    assert model.dtype == np.float16 and model.config.max_seq_len == 33
    with pytest.raises(ValueError, match="max_seq_len must be from 1 to"):
        tp.load_model(LLAMA, SoloComm(), max_seq_len=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        tp.load_model(LLAMA, SoloComm(), dtype="int8")


# --- every architecture -----------------------------------------------------------------------------------------------


def written(folder, name, monkeypatch):
    """The model's folder; of experts wide enough for three ranks."""
    keys, shapes = CASES[name]
    if name.startswith(("qwen3-moe", "dbrx")):
        keys = keys | ({"ffn_config": keys["ffn_config"] | {"ffn_hidden_size": 96}} if name == "dbrx" else {})
        keys = keys | ({"moe_intermediate_size": 64} if name != "dbrx" else {})
        wide = {32: 64, 32 * EXPERTS: 96 * EXPERTS}
        shapes = {
            key: tuple(wide.get(size, size) for size in shape) if ".experts." in key else shape for key, shape in shapes.items()
        }
        monkeypatch.setitem(CASES, name, (keys, shapes))
    return write(folder, name)


def in_steps(model):
    """Logits of all tokens at once, and of a prompt and single tokens through a cache."""
    cache = model.new_cache(capacity=SEQ)
    parts = [model.forward(IDS[:, :7], cache)] + [model.forward(IDS[:, i : i + 1], cache) for i in range(7, SEQ)]
    return host(model.forward(IDS)), np.concatenate([host(part) for part in parts], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(tmp_path, monkeypatch, name):
    """Norms of other kinds, biases, parallel parts, fused and transposed tensors, other names, several windows, ..."""
    folder, ranks = written(tmp_path, name, monkeypatch), 2 if name.startswith("qwen3-moe") else 3
    options = {"max_seq_len": LENGTHS.get(name)}
    one = load_model(folder, "numpy", **options)
    expected = in_steps(one)

    def work(comm):
        model = tp.load_model(folder, comm, **options)
        return in_steps(model), model.parameters

    for found, parameters in tp.run(work, ranks, backend="numpy"):
        assert all(relative(*pair) <= FLOAT32 for pair in zip(found, expected, strict=True)) and parameters == one.parameters
        assert name.startswith(("qwen3-moe", "dbrx")) or is_exact(found[0][0], goldens()[name])


@pytest.mark.parametrize("is_act_order", [False, True])
def test_fused_gptq(tmp_path, is_act_order):
    """Columns of a matrix in one with others; those of gate and up in the order that the down projection stores."""
    rng = np.random.default_rng(6)
    folder = write(tmp_path / "plain", "phi3")
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if "_proj." not in key}
    widths = {"self_attn.qkv_proj": (64, 128), "self_attn.o_proj": (64, 64), "mlp.gate_up_proj": (64, 192)}
    for layer in range(2):
        for name, (k, n) in (widths | {"mlp.down_proj": (96, 64)}).items():
            parts = random_gptq(rng, 4, k=k, n=n, groups=k // 32)
            if is_act_order:
                parts["g_idx"] = rng.permutation(parts["g_idx"])
            tensors |= {f"model.layers.{layer}.{name}.{short}": array for short, array in parts.items()}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": is_act_order}}
    folder = rewritten(tmp_path, "phi3", tensors, **config)
    expected = load_model(folder, "numpy").forward(IDS)
    for found in tp.run(lambda comm: tp.load_model(folder, comm).forward(IDS), 2, backend="numpy"):
        assert relative(found, expected) <= FLOAT32


# --- ranks that differ ------------------------------------------------------------------------------------------------


def test_another_model_on_one_rank_is_named():
    folders = [EXAMPLES / "shakespeare", EXAMPLES / "shakespeare", LLAMA]
    errors = on_ranks(3, lambda comm: tp.load_model(folders[comm.rank], comm))
    assert all(isinstance(error, BackendError) for error in errors), errors
    assert all("rank 2 of 3 differ in model" in str(error) for error in errors), errors


def test_a_changed_configuration_is_another_model(tmp_path):
    other = variant(tmp_path, "llama3-rope", lambda data: {"rms_norm_eps": 0.5})
    errors = on_ranks(2, lambda comm: tp.load_model(other if comm.rank else LLAMA, comm))
    assert all(isinstance(error, BackendError) and "rank 1 of 2 differ in model" in str(error) for error in errors), errors


@pytest.mark.parametrize(
    ("name", "options"),
    [("dtype", {"dtype": "float16"}), ("max_seq_len", {"max_seq_len": 40}), ("weights", {"weights": [3, 1]})],
)
def test_other_arguments_on_one_rank_are_named(name, options):
    errors = on_ranks(2, lambda comm: tp.load_model(LLAMA, comm, **(options if comm.rank else {})))
    assert all(isinstance(error, BackendError) and f"rank 1 of 2 differ in {name}" in str(error) for error in errors), errors


def test_a_missing_folder_ends_all(tmp_path):
    """The rank whose folder it is says so by itself; the others hear of it, and do not wait."""
    errors = on_ranks(3, lambda comm: tp.load_model(tmp_path if comm.rank == 1 else LLAMA, comm), stall_s=20)
    assert isinstance(errors[1], FormatError)
    for rank in (0, 2):
        assert isinstance(errors[rank], BackendError) and "rank 1 failed: FormatError" in str(errors[rank]), errors


def test_a_damaged_file_on_one_rank_ends_all(tmp_path, monkeypatch):
    """What the digest does not see: an error while weights are read."""
    read = tp.loading.RankPlan._tensors_of

    def fail(plan, part):
        if plan.comm.rank == 1 and part.key.endswith("1.mlp.up_proj"):
            raise FormatError("model.safetensors: cut short")
        return read(plan, part)

    monkeypatch.setattr(tp.loading.RankPlan, "_tensors_of", fail)
    errors = on_ranks(2, lambda comm: tp.load_model(LLAMA, comm), stall_s=20)
    assert isinstance(errors[1], FormatError) and "rank 1 failed: FormatError: model.safetensors: cut short" in str(errors[0])


# --- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "gpt-bigcode", "dbrx", "phi3", "cohere-head-norms", "gemma3", "granite", "index"])
def test_architectures_on_gpus(several_gpus, tmp_path, monkeypatch, name):  # noqa: F811
    folder = written(tmp_path, name, monkeypatch)
    exact = load_model(folder, "numpy").forward(IDS)
    most = 2 * relative(load_model(folder, "numpy", dtype="float16").forward(IDS), exact) + 2**-11
    ranks = tp.run(lambda comm: in_steps(tp.load_model(folder, comm)), 2, backend="cupy")
    assert all(relative(logits, exact) <= most for found in ranks for logits in found)
    assert all(np.array_equal(*pair) for pair in zip(*ranks, strict=True))
