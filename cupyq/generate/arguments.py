"""The sampler's arguments of `cupyq generate`, from the command line to settings."""

import dataclasses

from cupyq.models.sampler import SamplerSettings

_FILTERS = ("temperature", "top_k", "top_p", "min_p", "smoothing_factor", "tfs", "typical", "mirostat_tau", "xtc_probability",
            "xtc_threshold", "skew", "dynamic_temperature")  # fmt: skip
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "dry_multiplier")


def sampler_settings(arguments):
    """The SamplerSettings that the arguments of `cupyq generate` ask for."""
    named = {name: getattr(arguments, name) for name in (*_FILTERS, *_PENALTIES, "seed")}
    given = {name: value for name, value in named.items() if value is not None}
    filters = [name for name in given if name in _FILTERS]
    if arguments.greedy and filters:
        raise ValueError(f"--greedy and --{filters[0].replace('_', '-')} exclude each other: leave one out")
    if "dynamic_temperature" in given:
        given["min_temp"], given["max_temp"] = given.pop("dynamic_temperature")
        if not given["min_temp"] < given["max_temp"]:
            raise ValueError(
                f"--dynamic-temperature: MIN {given['min_temp']:g} must be below MAX {given['max_temp']:g}: exchange them"
            )
    if not arguments.greedy:
        return SamplerSettings(**given)
    given.pop("seed", None)  # harmless: greedy draws nothing
    return dataclasses.replace(SamplerSettings.greedy(), **given)
