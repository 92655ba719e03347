"""Options of `cupyq bench`: the command line is built of them before anything heavy is loaded."""

import argparse

from cupyq._arguments import add_backend, whole

FAMILIES = """\
families:
  qmatmul    products with quantized weights, every width and number of rows, beside cuBLAS,
             PyTorch's int4 and exllamav2
  attention  decoding and prompts over contiguous, paged and quantized caches, beside
             PyTorch's FlashAttention and cuDNN
  model      a model of random weights: tokens per second, loading, the first token
  quantize   the steps of making quantized weights: scales, rows, Hessians, matrices, a layer
  serve      many texts at a time: tokens per second, in all and for each, and what the host
             adds; guesses ahead
  tp         over several GPUs: sums of 4 KB to 64 MB, by NCCL and by cupyq's kernels; tokens
             per second of a split model

Without a family: a short qmatmul table. Everything is verified before it is timed, and
compared with what this machine can do at most, measured in the same run.
"""


def _format(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=120)


def add_arguments(parser):
    families = parser.add_subparsers(dest="family", metavar="FAMILY")
    parser.epilog = FAMILIES
    parser.formatter_class = _format
    _add_qmatmul(_family(families, "qmatmul"))
    _add_attention(_family(families, "attention"))
    _add_model(_family(families, "model"))
    _add_quantize(_family(families, "quantize"))
    _add_serve(_family(families, "serve"))
    _add_tp(_family(families, "tp"))


def _family(families, name):
    sub = families.add_parser(name, formatter_class=_format)
    # Not given here, it keeps what `cupyq bench --json` may have set.
    sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object at the end")
    sub.add_argument("--out", dest="out_file", metavar="FILE", help="also append each row to FILE, one JSON object a line")
    return sub


def _add_random_model(sub):
    sub.add_argument("--bits", default="4", help="EXL2 width or mixture of the decoder's layers; default 4")
    sub.add_argument("--head-bits", type=whole(1), default=6, metavar="B", help="default 6")
    sub.add_argument("--layers", type=whole(1), metavar="N", help="fewer layers, for a quick run")


def _add_qmatmul(sub):
    sub.add_argument("--shapes", metavar="KxN,...", help="default: the matrices of 7, 8 and 70 B models, and a head")
    sub.add_argument("--bits", metavar="KIND,...", help="such as 4, 4-g32, 2.5, 4.65, gptq-g32, gptq8-g128, gptq-act")
    sub.add_argument("--rows", metavar="M,...", help="rows of x; default 1 to 4096")
    sub.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of x; default float16")
    sub.add_argument("--peers", metavar="NAME,...", help="of cublas, int4, exllamav2, or none; default: those present")
    sub.add_argument("--exllamav2", metavar="DIR", help="folder of a built exllamav2_ext*.so, where Python does not find it")
    sub.add_argument("--quick", action="store_true", help="three shapes and widths, and few rows: under a minute")
    sub.add_argument("--sweep", action="store_true", help="time every sensible configuration against the one in use")


def _add_attention(sub):
    sub.add_argument("--heads", type=whole(1), default=32, metavar="N", help="query heads; default 32")
    sub.add_argument("--kv-heads", type=whole(1), default=8, metavar="N", help="heads of keys and values; default 8")
    sub.add_argument("--head-dim", type=whole(8), default=128, metavar="N", help="size of a head; default 128")
    sub.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the queries; default float16")
    sub.add_argument("--cache", metavar="KIND,...", help="of fp16 (arrays of --dtype), fp8, e4m3, q4, q6, q8; default: all")
    sub.add_argument("--peers", metavar="NAME,...", help="of flash, cudnn, or none; default: those present")
    sub.add_argument("--quick", action="store_true", help="decoding and prompts of a few lengths, fp16 and q4")


def _add_model(sub):
    sub.add_argument(
        "--shape", default="llama-3.1-8b", help="llama-3.1-8b (default), llama-3.1-70b, mistral-7b, qwen2.5-7b, tiny"
    )
    _add_random_model(sub)
    sub.add_argument(
        "--context",
        type=lengths,
        default=(128, 2048, 4096),
        metavar="N,...",
        help="decode after so many tokens; default 128,2048,4096; 0 for none",
    )
    sub.add_argument("--steps", type=whole(1), default=128, metavar="N", help="tokens decoded for each; default 128")
    sub.add_argument("--sampled", action="store_true", help="draw tokens with the default sampler settings, not greedily")
    sub.add_argument(
        "--prefill",
        type=lengths,
        default=(2048, 4096),
        metavar="N,...",
        help="tokens of prompts; default 2048,4096; 0 for none",
    )
    sub.add_argument("--kernels", action="store_true", help="the time of each kernel of a step, by PyTorch's profiler")
    sub.add_argument("--load", action="store_true", help="write the model, load it in new processes, time the first token")
    sub.add_argument("--folder", metavar="DIR", help="where --load writes; default: in memory if there is room")
    add_backend(sub)


def _add_quantize(sub):
    sub.add_argument("--shape", metavar="MODEL", help="llama-3.1-8b (default), llama-3.1-70b, mistral-7b, qwen2.5-7b, tiny")
    sub.add_argument("--shapes", metavar="KxN,...", help="matrices in place of a model's")
    sub.add_argument("--layouts", metavar="NAME,...", help="such as 4g64 or 3x.5g64+2x.5g64; default: four of the menu")
    sub.add_argument("--tokens", type=whole(1), metavar="N", help="of calibration, for a layer; default 204800")
    sub.add_argument("--quick", action="store_true", help="one matrix and one layout")
    add_backend(sub)


def _add_serve(sub):
    sub.add_argument("--shape", default="llama-3.1-8b", metavar="MODEL", help="of random weights; default llama-3.1-8b")
    _add_random_model(sub)
    sub.add_argument("--model", metavar="DIR", help="a checkpoint in place of random weights")
    sub.add_argument("--text", metavar="FILE", help="prompts are pieces of it; default: random tokens")
    sub.add_argument("--concurrent", type=lengths, default=(1, 8, 32, 128), metavar="N,...", help="jobs; default 1,8,32,128")
    sub.add_argument("--prompt", type=whole(2), default=512, metavar="N", help="tokens of a prompt; default 512")
    sub.add_argument("--new", type=whole(16), default=128, metavar="N", help="tokens after it; default 128")
    sub.add_argument("--cache", default="fp16", metavar="KIND", help="fp16 (default), fp8, e4m3, q4, q6 or q8")
    sub.add_argument("--draft", metavar="NAME", help="guess ahead: ngram, or the folder of a smaller model")
    sub.add_argument("--guesses", type=whole(1), default=4, metavar="N", help="tokens guessed at a time; default 4")
    sub.add_argument("--sampled", action="store_true", help="draw tokens with the default sampler settings, not greedily")
    add_backend(sub)


def _add_tp(sub):
    sub.add_argument("--what", choices=("all-reduce", "decode", "all"), default="all", help="default: all")
    sub.add_argument("--gpus", metavar="N,...", help="numbers of GPUs; default: 1, 2, 4 and 8, as far as there are so many")
    sub.add_argument("--shape", default="llama-3.1-70b", metavar="MODEL", help="to decode; default llama-3.1-70b")
    sub.add_argument("--bits", default="4", help="EXL2 width or mixture of the decoder's layers; default 4")
    sub.add_argument("--layers", type=whole(1), metavar="N", help="fewer layers, for less memory")
    sub.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto", help="to decode; numpy: in threads")
    sub.add_argument("--quick", action="store_true", help="six sizes; eight layers, fewer steps")


def lengths(text):
    """Positive numbers separated by commas; 0 alone is none of them."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
    if values == (0,):
        return ()
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of 1 or more, got {text!r}")
    return values
