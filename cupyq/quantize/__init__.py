"""Making quantized models: the folder of an unquantized one in, a new folder of EXL2 or GPTQ out.

    from cupyq.quantize import quantize_model        # `cupyq quantize` on the command line

    job           the work from end to end: plan, choose, quantize, write, report
    request       what is asked for, checked; `arguments` and `command` are the same on the command line
    plan          what a run works with, and all that can be refused before any work; `memory`: how much the work will take
    calibration   a text -> rows of tokens
    choice        every linear layer under every layout of a menu; `quantization`: each with its own, into a file
    walk          the model a layer at a time, other weights in its place; `recording`: what its linear layers read
    hessian       what they read -> the factors that rounding works with; `gather`: of the inputs of a layer
    layouts       how the rows of a layer may be shared out between code widths
    linear        a weight, a Hessian, a layout -> codes and scales
    sensitivity   what an error of each layer does to the predictions
    measurement   errors of every layer under every layout; `allocate` picks the best within a number of bits
    work          what is done so far, on the disk; `writer`: files that appear whole; `report`: tables and a picture

`anneal` is exllamav2's way to allocate, for its users and for comparison. Why things are as they are: docs/design/0006.
"""

__all__ = ["quantize_model"]


def __getattr__(name):
    # Imported when first used: the command line looks at this package before anything heavy may be loaded.
    if name != "quantize_model":
        raise AttributeError(f"module 'cupyq.quantize' has no attribute {name!r}")
    from cupyq.quantize.job import quantize_model as value

    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
