"""The command line: `cupyq doctor | inspect | generate | perplexity | quantize | compile | bench`, or `python -m cupyq`.

With --json the last line of stdout is one JSON object and everything else goes to stderr. Errors are one line on stderr and
exit code 2. Heavy modules are imported inside the commands: `cupyq --help` loads neither NumPy nor CuPy.
"""

import argparse
import contextlib
import io
import json
import os
import sys

from cupyq._arguments import adapter, add_backend, number_list, token_list, whole
from cupyq._version import VERSION
from cupyq.bench import arguments as bench_arguments
from cupyq.quantize import arguments as quantize_arguments

EXAMPLES = """\
examples:
  cupyq doctor                                             what is missing, and what mends it
  cupyq inspect MODEL                                      sizes and bits of every layer
  cupyq generate MODEL --prompt "Once upon a time"         text, as it is made
  cupyq generate MODEL --tokens 1,15043 --greedy --json    token ids in and out, for scripts
  cupyq generate MODEL --prompt "Dear" --lora STYLE=0.8    with a LoRA adapter, a PEFT folder
  cupyq generate MODEL --prompt "Once" --tp 2              on two GPUs
  mpirun -n 4 cupyq generate MODEL --prompt "Once" --tp    on four, a process for each
  cupyq perplexity MODEL --text val.txt --reference FP16   what quantizing cost
  cupyq perplexity MODEL --text val.txt --cache q4         what a cache of 4 bits costs
  cupyq quantize FP16 OUT --bits 3 --calibration wiki.txt  an EXL2 model of 3 bits per weight
  cupyq compile --arch sm_80 sm_90a                        fill the kernel cache, GPU or not
  cupyq bench qmatmul --bits 4 --rows 1,16                 products, against the limit
  cupyq bench attention --quick                            attention over plain and q4 caches
  cupyq bench quantize --quick                             the steps of the quantizer

MODEL is a folder with config.json and *.safetensors: EXL2, GPTQ, float16 or bfloat16.
"""


CACHES = ("fp16", "fp8", "e4m3", "q4", "q6", "q8")  # cupyq.layers.CACHE_KINDS, which is not loaded for --help


class _Parser(argparse.ArgumentParser):
    """Errors on one line, as every other error of this program."""

    def error(self, message):
        raise _UsageError(f"{message} (see {self.prog} --help)")


class _UsageError(Exception):
    pass


def build_parser():
    parser = _Parser(
        prog="cupyq",
        description="Run and examine quantized language models: CUDA kernels compiled on your GPU, NumPy without one.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=120),
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        return sub

    sub = command("doctor", _doctor, "show GPU, driver, CuPy, compiler and cache, and what mends the missing ones")
    sub.add_argument("--tp", action="store_true", help="look at several GPUs too: links, NCCL, launcher, speed of exchange")

    sub = command("inspect", _inspect, "show a model's architecture, sizes and bits per layer")
    sub.add_argument("model", metavar="MODEL", help="folder with config.json and *.safetensors")

    sub = command("generate", _generate, "continue a prompt; the text goes to stdout as it is made, speeds go to stderr")
    _add_generate(sub)

    sub = command(
        "perplexity", _perplexity, "measure how well a model predicts a text, and how far it is from a reference model"
    )
    _add_perplexity(sub)

    sub = command("quantize", _quantize, "quantize a model: EXL2 of any number of bits, or GPTQ")
    quantize_arguments.add_arguments(sub)

    sub = command("compile", _compile, "compile the kernels ahead of their first use")
    sub.add_argument("--arch", nargs="+", metavar="ARCH", help="such as sm_80 sm_90a; default: this machine's GPU")

    sub = command("bench", _bench, "measure products, attention or a model, against what this machine can do at most")
    bench_arguments.add_arguments(sub)
    return parser


def _add_model(sub):
    """Which model, and where it runs."""
    sub.add_argument("model", metavar="MODEL", help="folder with config.json and *.safetensors")
    add_backend(sub)
    sub.add_argument("--max-seq-len", type=whole(1), metavar="N", help="the longest context to serve; default: the model's")
    sub.add_argument(
        "--tp",
        type=whole(1),
        nargs="?",
        const=0,
        metavar="N",
        help="spread the model over N GPUs (NumPy: threads), or over the processes that mpirun, torchrun or srun started; "
        "N may be left out there, and stands for all GPUs elsewhere",
    )
    sub.add_argument(
        "--tp-weights",
        type=number_list,
        metavar="W,W,...",
        help="how much of the model each of them is to hold, such as its free memory; default: equal parts",
    )


def _add_cache(sub, help, **options):
    kinds = " ".join(CACHES)
    sub.add_argument("--cache", choices=CACHES, metavar="KIND", help=f"{help}; one of {kinds}", **options)


def _add_generate(sub):
    _add_model(sub)
    prompt = sub.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; needs the model's tokenizer.json")
    prompt.add_argument("--tokens", type=token_list, metavar="1,2,3", help="the prompt as token ids")
    sub.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="default: 128, or what the context leaves room for")
    sub.add_argument("--greedy", action="store_true", help="the most likely token at every step")
    sub.add_argument("--temperature", type=float, metavar="T", help="divides the logits; 0 is greedy; default 0.8")
    sub.add_argument("--top-k", type=whole(0), metavar="K", help="keep the K most likely tokens, 0 keeps all; default 50")
    sub.add_argument(
        "--top-p", type=float, metavar="P", help="keep the most likely tokens that reach probability P; default 0.8"
    )
    sub.add_argument("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the first; default 0")
    # These are off by default; what each does in full: cupyq.ops.penalties.penalize, cupyq.ops.sampling.sample.
    for option, value, help in (
        ("--repetition-penalty", "R", "divide the logits of tokens said before by R, multiply negative ones; 1 is off"),
        ("--frequency-penalty", "F", "subtract F for each time a token was said"),
        ("--presence-penalty", "F", "subtract F from tokens said before"),
        ("--dry-multiplier", "M", "DRY: subtract M * 1.75^(n - 2) from what would repeat n or more tokens once more"),
        ("--smoothing-factor", "S", "quadratic smoothing of the logits by S"),
        ("--tfs", "Z", "tail-free sampling: cut where the curve of probabilities has bent by the share Z"),
        ("--typical", "P", "keep the tokens of most typical surprise that reach probability P"),
        ("--mirostat-tau", "T", "mirostat: keep to a surprise of T bits"),
        ("--xtc-probability", "P", "XTC: with probability P, leave out the likely tokens but for the last of them"),
        ("--xtc-threshold", "P", "XTC: tokens of probability P are likely; default 0.1"),
        ("--skew", "S", "above 0 favours unlikely tokens, below 0 likely ones"),
    ):
        sub.add_argument(option, type=float, metavar=value, help=help)
    sub.add_argument(
        "--dynamic-temperature",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="a second temperature, after the filters, between MIN and MAX by the entropy",
    )
    sub.add_argument(
        "--lora",
        action="append",
        type=adapter,
        default=[],
        metavar="FOLDER[=W]",
        help="a LoRA adapter, a PEFT folder, its delta multiplied by W; may be given again",
    )
    _add_cache(sub, "what keys and values are kept in; default: fp16, the model's own dtype", default="fp16")
    sub.add_argument(
        "--seed", type=whole(0), metavar="S", help="the same seed gives the same text; default: a new one each time"
    )


def _add_perplexity(sub):
    _add_model(sub)
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--window", type=whole(2), default=256, metavar="N", help="tokens per window; default 256")
    sub.add_argument("--max-windows", type=whole(1), metavar="N", help="stop after N windows; default: the whole text")
    sub.add_argument("--reference", metavar="MODEL2", help="model to compare with, for KL divergence and top-1 agreement")
    _add_cache(sub, "go token by token through a cache of this kind; default: whole windows, without one")


def main(argv=None):
    """Run the command line; returns the exit code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a generation
        arguments = build_parser().parse_args(argv)
        if arguments.version:
            print(f"cupyq {VERSION}")
            return 0
        if arguments.command is None:
            build_parser().print_help()
            return 0
        # What people read: stdout, unless that is for the JSON object.
        arguments.out = sys.stderr if arguments.json else sys.stdout
        result, code = arguments.run(arguments)
        if arguments.json and result is not None:  # None: another rank prints it
            print(json.dumps(result, allow_nan=False))
        sys.stdout.flush()
        return code
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left, as `head` does. Python flushes stdout once more when it ends: to nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except Exception as error:
        return _fail(error)


def _fail(error):
    """One line on stderr. Errors that cupyq does not raise on purpose also name their type and the way to a traceback."""
    message = " ".join(str(error).split())
    if len(message) > 1000:  # a compiler log, say
        message = f"{message[:1000]} ..."
    expected = isinstance(error, (_UsageError, ValueError, TypeError, OSError)) or _is_own(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.filename}: {error.strerror}"
    if not expected:
        message = f"{type(error).__name__}: {message} (unexpected; set CUPYQ_TRACEBACK=1 to see where)"
    if os.environ.get("CUPYQ_TRACEBACK"):
        import traceback

        traceback.print_exc()
    print(f"cupyq: error: {message or type(error).__name__}", file=sys.stderr)
    return 2


def _is_own(error):
    from cupyq.errors import CupyqError

    return isinstance(error, CupyqError)


# --- commands: arguments -> (JSON object, exit code) ------------------------------------------------------------------


def _doctor(arguments):
    from cupyq import doctor

    diagnosis = doctor.diagnose(tp=True) if arguments.tp else doctor.diagnose()
    print(doctor.report(diagnosis), file=arguments.out)
    return diagnosis, 0 if diagnosis["ok"] else 2


def _load(path, arguments, comm=None):
    if comm is None:
        from cupyq.models.loader import load_model

        return load_model(path, backend=arguments.backend, max_seq_len=arguments.max_seq_len)
    from cupyq import tp

    return tp.load_model(path, comm, weights=arguments.tp_weights, max_seq_len=arguments.max_seq_len)


def _on_ranks(work, arguments):
    """work(arguments, comm): for one GPU, where comm is None, or with --tp on each rank, of which rank 0's result counts."""
    if arguments.tp is None:
        if arguments.tp_weights is not None:
            raise ValueError("--tp-weights is for --tp N: give that too")
        return work(arguments, None)
    from cupyq.tp.running import as_launched

    return as_launched(lambda comm: work(arguments, comm), arguments.tp or None, arguments.backend) or (None, 0)


def _generate(arguments):
    return _on_ranks(_generate_on, arguments)


def _generate_on(arguments, comm):
    is_first = comm is None or comm.rank == 0
    from cupyq.generate import StreamDecoder, encode, generate, load_tokenizer
    from cupyq.generate.arguments import sampler_settings
    from cupyq.generate.generator import check_ids
    from cupyq.generate.text import with_special_tokens

    settings = sampler_settings(arguments)
    tokenizer = None
    # Before the weights: a missing tokenizer should not take a minute to be noticed.
    if arguments.prompt is not None or os.path.isfile(os.path.join(arguments.model, "tokenizer.json")):
        tokenizer = load_tokenizer(arguments.model)
        settings = with_special_tokens(settings, tokenizer)
    prompt = arguments.tokens if arguments.prompt is None else encode(tokenizer, arguments.prompt)
    if not prompt:
        raise ValueError("--prompt: no tokens, expected some text")
    model = _load(arguments.model, arguments, comm)
    # Folders of adapters are often called the same: their paths are not.
    adapters = {model.load_adapter(folder, name=folder): weight for folder, weight in arguments.lora}

    prompt = check_ids(prompt, model.config.vocab_size, "--tokens" if arguments.prompt is None else "--prompt")
    limit = model.config.max_seq_len
    wanted = arguments.max_new_tokens or max(1, min(128, limit - len(prompt) + 1))
    decoder = None if tokenizer is None else StreamDecoder(tokenizer, prompt)
    pieces = []

    def show(piece):
        pieces.append(piece)
        if piece and is_first:
            print(piece, end="", file=arguments.out, flush=True)

    def on_token(token):
        show(f"{'' if not pieces else ','}{token}" if decoder is None else decoder.add(token))

    result = generate(
        model,
        prompt,
        max_new_tokens=wanted,
        settings=settings,
        stop_ids=model.config.eos_token_ids,
        adapters=adapters or None,
        cache=arguments.cache,
        on_token=on_token,
    )
    if decoder is not None:
        show(decoder.finish())
    if is_first:
        print(file=arguments.out, flush=True)
    speeds = [
        f"{model.backend}{'' if comm is None else f' on {comm.ranks} ranks'}: {len(prompt)} prompt tokens",
        _speed(result.prefill_tokens_per_s),
        f"{len(result.tokens)} new tokens",
        _speed(result.decode_tokens_per_s),
    ]
    if not settings.is_greedy:
        speeds.append(f"seed {result.seed}")
    if is_first:
        print(", ".join(part for part in speeds if part), file=sys.stderr)
    return {
        "backend": model.backend,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "text": None if decoder is None else "".join(pieces),
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
    }, 0


def _speed(tokens_per_s):
    return "" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _perplexity(arguments):
    return _on_ranks(_perplexity_on, arguments)


def _perplexity_on(arguments, comm):
    from tqdm import tqdm

    from cupyq.generate import encode, load_tokenizer, perplexity

    tokenizer = load_tokenizer(arguments.model)
    try:
        with open(arguments.text, encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.text}: not UTF-8 at byte {error.start}, expected plain text") from None
    # Windows start in the middle of the text: no start token belongs there.
    ids = encode(tokenizer, text, special=False)
    model = _load(arguments.model, arguments, comm)
    reference = None if arguments.reference is None else _load(arguments.reference, arguments, comm)

    is_first = comm is None or comm.rank == 0
    is_hidden = None if is_first else True  # None: shown on a terminal
    total = min(len(ids) // arguments.window, arguments.max_windows or len(ids))
    with tqdm(total=total, desc="perplexity", unit="window", delay=1, leave=False, disable=is_hidden, file=sys.stderr) as bar:
        measured = perplexity(
            model,
            ids,
            window=arguments.window,
            reference=reference,
            max_windows=arguments.max_windows,
            cache=arguments.cache,
            on_windows=bar.update,
        )
    lines = [f"perplexity  {measured.perplexity:.4f}   ({measured.windows} windows, {measured.tokens} predicted tokens)"]
    if measured.kl is not None and measured.top1 is not None:
        lines.append(f"KL          {measured.kl:.5f}   nats per token, from the reference")
        lines.append(f"top-1       {100 * measured.top1:.2f} %  of the tokens have the same most likely one")
    if is_first:
        print("\n".join(lines), file=arguments.out)
    return {
        "perplexity": measured.perplexity,
        "tokens": measured.tokens,
        "kl": measured.kl,
        "top1": measured.top1,
    }, 0


def _quantize(arguments):
    from cupyq.quantize.command import run

    return run(arguments)


def _inspect(arguments):
    from cupyq.models.loader import load_model

    model = load_model(arguments.model, "numpy")  # weights stay in the files: only tables are read
    config = model.config
    layers = list(model.linear_layers())
    width = max(len(layer.name) for layer in layers)
    print(
        f"{config.architecture.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} for keys and values) of {config.head_dim}, "
        f"vocabulary {config.vocab_size}, context {config.max_seq_len}\n\n"
        f"{'layer':<{width}}  {'K':>7} {'N':>7}  {'kind':<9}{'bits':>7}",
        file=arguments.out,
    )
    for layer in layers:
        k, n = layer.shape
        print(f"{layer.name:<{width}}  {k:>7} {n:>7}  {layer.kind:<9}{layer.bits_per_weight:>7.3f}", file=arguments.out)
    print(
        f"\n{model.format}, {model.bits_per_weight:.3f} bits per weight of the decoder (scales and permutations included), "
        f"{model.parameters:,} parameters",
        file=arguments.out,
    )
    return {
        "architecture": config.architecture.name,
        "format": model.format,
        "bits_per_weight": model.bits_per_weight,
        "parameters": model.parameters,
        "layers": [
            {"name": layer.name, "shape": list(layer.shape), "kind": layer.kind, "bits": layer.bits_per_weight}
            for layer in layers
        ],
    }, 0


def all_instances():
    """The kernels worth compiling ahead: INSTANCES of every module of cupyq.ops."""
    import importlib
    import pkgutil

    import cupyq.ops

    instances: list = []
    for module in pkgutil.iter_modules(cupyq.ops.__path__, "cupyq.ops."):
        instances += getattr(importlib.import_module(module.name), "INSTANCES", [])
    return list(dict.fromkeys(instances))


def _compile(arguments):
    import time
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from cupyq import _device, _kernels, doctor
    from cupyq.errors import BackendError

    cache = doctor.cache_check()
    if not cache.ok:
        raise BackendError(f"{cache.found}: {cache.mend}")
    if arguments.arch is None and _device.count() == 0:
        raise BackendError("no GPU here to compile for: name architectures, as in --arch sm_80 sm_90a")
    archs = [_device.current().arch] if arguments.arch is None else [_checked_arch(arch) for arch in arguments.arch]
    jobs = [(instance, arch) for arch in dict.fromkeys(archs) for instance in all_instances()]
    label = f"compiling for {', '.join(dict.fromkeys(archs))}"
    start = time.perf_counter()
    with (
        _kernels.announced(label),
        tqdm(total=len(jobs), desc=label, unit="kernel", delay=1, leave=False, disable=None, file=sys.stderr) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for _ in pool.map(lambda job: _kernels.compiled(*job), jobs):
            bar.update()
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} kernels in {_kernels.cache_folder()}, {seconds:.1f} s", file=arguments.out)
    return {"kernels": len(jobs), "seconds": seconds}, 0


def _checked_arch(text):
    """`text` as one of the architectures kernels are compiled for: sm_90 becomes sm_90a."""
    from cupyq import _device, _kernels

    number = _device.arch_number(text)
    known = [known for known in _kernels.load_nvrtc().getSupportedArchs() if known >= 75]
    if number not in known:
        raise ValueError(f"--arch {text}: this NVRTC and cupyq know {', '.join(f'sm_{known}' for known in known)}")
    return _device.arch_of(*divmod(number, 10))


def _bench(arguments):
    from cupyq.bench import run

    return run(arguments)
