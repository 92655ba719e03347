"""Options of `cupyq quantize`: the command line is built of them before anything heavy is loaded.

What is not given is None, or False: the defaults are those of `quantize_model`.
"""

import argparse

from cupyq._arguments import add_backend, whole

HEAD_BITS = (2, 3, 4, 5, 6, 8)  # cupyq.quantize.layouts.HEAD_LAYOUTS, which is not loaded for --help

NOTES = """\
What is done lies in OUT.partial: a run that was killed goes on with --resume, to the same
bytes. OUT holds, besides the model, quantization.md and quantization.svg (bits and errors of
every layer) and measurement.json, which saves the larger part of the work when the same model
is wanted with other bits: --measurement OUT/measurement.json.
"""


def add_arguments(parser):
    parser.epilog = NOTES
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=120)
    parser.add_argument("source", metavar="IN", help="folder of the unquantized model, with its tokenizer.json")
    parser.add_argument("out_folder", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--bits", type=float, required=True, metavar="B", help="per weight of the decoder, all included; 2, 3, 4 or 8 for GPTQ"
    )
    parser.add_argument(
        "--calibration", required=True, metavar="FILE", help="text of the kind the model is for: .txt or .jsonl"
    )
    parser.add_argument(
        "--head-bits", type=int, choices=HEAD_BITS, metavar="B", help="of the head, EXL2: 2, 3, 4, 5, 6 or 8; default 6"
    )
    parser.add_argument("--rows", type=whole(1), metavar="N", help="calibration rows; default 100")
    parser.add_argument(
        "--length", type=whole(2), metavar="N", help="tokens of a row; default: 2048, or the context if shorter"
    )
    parser.add_argument("--seed", type=whole(0), metavar="S", help="which rows of the text; default 0")
    parser.add_argument("--format", choices=("exl2", "gptq"), default="exl2", help="default exl2")
    gptq = parser.add_argument_group("for --format gptq")
    gptq.add_argument("--group-size", type=int, metavar="N", help="rows that share scales, -1: all; default 128")
    gptq.add_argument("--asym", action="store_true", help="groups have zero points of their own")
    gptq.add_argument("--act-order", action="store_true", help="rows by falling activations, noted in g_idx")
    parser.add_argument("--measurement", metavar="FILE", help="measurement.json of an earlier run with this model")
    parser.add_argument(
        "--measured-layouts",
        type=whole(2),
        metavar="N",
        help="measure N layouts of the menu, interpolate the others; default: all",
    )
    parser.add_argument(
        "--sensitivity-tokens",
        type=whole(0),
        metavar="N",
        help="calibration tokens that tell what an error of each layer does to the predictions; default 4096",
    )
    parser.add_argument("--evaluate", metavar="FILE", help="text to compare OUT with IN on; default: the calibration text")
    parser.add_argument("--windows", type=whole(0), metavar="N", help="of that text, 0: no comparison; default 16")
    parser.add_argument("--resume", action="store_true", help="go on with what a run that did not end left in OUT.partial")
    add_backend(parser)
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="of activations; default: float16, on NumPy float32"
    )
