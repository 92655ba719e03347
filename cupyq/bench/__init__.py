"""Benchmarks: verify, then time, against the limits of this machine and the peers that are present.

`cupyq bench` on the command line. Nothing of the package but `cli` imports this folder.
"""

import contextlib


def run(arguments):
    """(JSON object, exit code) of `cupyq bench` with the arguments of `arguments.add_arguments`."""
    # Imported here: the command line looks at this package before anything heavy may be loaded.
    if arguments.family == "model":
        from cupyq.bench import model

        with _lines(arguments.out_file) as lines:
            return {"rows": model.run(arguments, arguments.out, lines)}, 0
    if arguments.family == "attention":
        from cupyq.bench import attention

        given = (arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.dtype, arguments.cache, arguments.peers)
        chosen = attention.Options.parse(*given, arguments.quick)
        with _lines(arguments.out_file) as lines:
            rows, is_right = attention.run(chosen, arguments.out, lines)
        return {"rows": rows}, 0 if is_right else 1
    if arguments.family == "quantize":
        from cupyq.bench import quantize

        asked = (arguments.shape, arguments.shapes, arguments.layouts, arguments.tokens, arguments.backend, arguments.quick)
        wanted = quantize.Options.parse(*asked)
        with _lines(arguments.out_file) as lines:
            rows, is_right = quantize.run(wanted, arguments.out, lines)
        return {"rows": rows}, 0 if is_right else 1
    if arguments.family == "serve":
        from cupyq.bench import serve

        with _lines(arguments.out_file) as lines:
            return {"rows": serve.run(arguments, arguments.out, lines)}, 0
    if arguments.family == "tp":
        return _run_tp(arguments)
    from cupyq.bench import qmatmul, sweep

    if arguments.family is None:
        options = qmatmul.Options.parse(is_quick=True)
        rows, is_right = qmatmul.run(options, arguments.out)
        return {"rows": rows}, 0 if is_right else 1
    options = qmatmul.Options.parse(
        arguments.shapes,
        arguments.bits,
        arguments.rows,
        arguments.dtype,
        arguments.peers,
        arguments.exllamav2,
        arguments.quick,
    )
    with _lines(arguments.out_file) as lines:
        rows, is_right = (sweep if arguments.sweep else qmatmul).run(options, arguments.out, lines)
    return {"rows": rows}, 0 if is_right else 1


def _run_tp(arguments):
    from cupyq.bench import tp, tp_decode

    counts = None if arguments.gpus is None else tp.gpu_counts(arguments.gpus)
    several = None if counts is None else tuple(count for count in counts if count > 1 or arguments.what == "all-reduce")
    work = []
    if arguments.what == "all-reduce" or (arguments.what == "all" and several != ()):
        work.append((tp.run, tp.Options.parse(several, arguments.quick)))
    if arguments.what != "all-reduce":
        asked = (arguments.shape, arguments.bits, arguments.layers, counts, arguments.backend, arguments.quick)
        work.append((tp_decode.run, tp_decode.Options.parse(*asked)))
    rows, is_right = [], True
    with _lines(arguments.out_file) as lines:
        for measure, options in work:
            found, is_part_right = measure(options, arguments.out, lines)
            rows, is_right = rows + found, is_right and is_part_right
    return {"rows": rows}, 0 if is_right else 1


def _lines(path):
    return contextlib.nullcontext() if path is None else open(path, "a", encoding="utf-8")
