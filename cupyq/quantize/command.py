"""`cupyq quantize`: the arguments of `arguments.add_arguments` to a quantized model."""

from cupyq.quantize.job import quantize_model

_SAME_NAME = (
    "bits",
    "head_bits",
    "calibration",
    "rows",
    "length",
    "seed",
    "backend",
    "dtype",
    "format",
    "group_size",
    "act_order",
    "measurement",
    "measured_layouts",
    "sensitivity_tokens",
    "resume",
    "evaluate",
    "windows",
)
_OF_FORMAT = {
    "exl2": ("head_bits", "measurement", "measured_layouts", "sensitivity_tokens"),
    "gptq": ("group_size", "asym", "act_order"),
}


def run(arguments):
    """(JSON object, exit code)."""
    for format, names in _OF_FORMAT.items():
        given = [f"--{name.replace('_', '-')}" for name in names if _is_given(getattr(arguments, name))]
        if given and format != arguments.format:
            raise ValueError(
                f"{given[0]} has no meaning for --format {arguments.format}: leave it out, or take --format {format}"
            )
    result = quantize_model(
        arguments.source,
        arguments.out_folder,
        is_symmetric=not arguments.asym,
        say=lambda line: print(line, file=arguments.out, flush=True),
        **{name: value for name in _SAME_NAME if _is_given(value := getattr(arguments, name))},
    )
    print(f"{result.folder}: {result.seconds:.1f} s", file=arguments.out)
    layers = [
        {
            "name": layer.name,
            "shape": [layer.k, layer.n],
            "bits": layer.bits_per_weight,
            "layout": layer.layout,
            "relative_error": layer.relative_error,
            "nats": layer.nats,
        }
        for layer in result.layers
    ]
    comparison = None if result.comparison is None else vars(result.comparison)
    found = {"bits_per_weight": result.bits_per_weight, "seconds": result.seconds, "comparison": comparison, "layers": layers}
    return found, 0


def _is_given(value):
    return value is not None and value is not False
