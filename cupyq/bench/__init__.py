"""Benchmarks: verify, then time, against the limits of this machine and the peers that are present.

`cupyq bench` on the command line. Nothing of the package but `cli` imports this folder.
"""

import contextlib


def run(arguments):
    """(JSON object, exit code) of `cupyq bench` with the arguments of `arguments.add_arguments`."""
    work = _work(arguments)
    path = getattr(arguments, "out_file", None)  # without a family there is no such option
    rows, is_right = [], True
    with contextlib.nullcontext() if path is None else open(path, "a", encoding="utf-8") as lines:
        for measure, options in work:
            found, is_part_right = measure(options, arguments.out, lines)
            rows, is_right = rows + found, is_right and is_part_right
    return {"rows": rows}, 0 if is_right else 1


def _work(arguments):
    """[(measure, options)]: measure(options, out, lines) gives (rows, whether all results were right)."""
    # Imported here: the command line looks at this package before anything heavy may be loaded.
    if arguments.family == "model":
        from cupyq.bench import model

        return [(_unverified(model.run), arguments)]
    if arguments.family == "attention":
        from cupyq.bench import attention

        asked = (arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.dtype, arguments.cache, arguments.peers)
        return [(attention.run, attention.Options.parse(*asked, arguments.quick))]
    if arguments.family == "quantize":
        from cupyq.bench import quantize

        asked = (arguments.shape, arguments.shapes, arguments.layouts, arguments.tokens, arguments.backend, arguments.quick)
        return [(quantize.run, quantize.Options.parse(*asked))]
    if arguments.family == "serve":
        from cupyq.bench import serve

        return [(_unverified(serve.run), arguments)]
    if arguments.family == "tp":
        return _tp_work(arguments)
    from cupyq.bench import qmatmul, sweep

    if arguments.family is None:
        return [(qmatmul.run, qmatmul.Options.parse(is_quick=True))]
    asked = (arguments.shapes, arguments.bits, arguments.rows, arguments.dtype, arguments.peers, arguments.exllamav2)
    return [((sweep if arguments.sweep else qmatmul).run, qmatmul.Options.parse(*asked, arguments.quick))]


def _tp_work(arguments):
    from cupyq.bench import tp, tp_decode

    counts = None if arguments.gpus is None else tp.gpu_counts(arguments.gpus)
    several = None if counts is None else tuple(count for count in counts if count > 1 or arguments.what == "all-reduce")
    work = []
    if arguments.what == "all-reduce" or (arguments.what == "all" and several != ()):
        work.append((tp.run, tp.Options.parse(several, arguments.quick)))
    if arguments.what != "all-reduce":
        asked = (arguments.shape, arguments.bits, arguments.layers, counts, arguments.backend, arguments.quick)
        work.append((tp_decode.run, tp_decode.Options.parse(*asked)))
    return work


def _unverified(measure):
    """Of a family that only times: its rows, all of them right."""
    return lambda *given: (measure(*given), True)
